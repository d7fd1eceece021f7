"""The bridge of ``vhostpc demo``, a process of its own: ``python -m vhostpc.cli.demo.bridge_process PATH HOST PORT``.

Serves on the unix socket PATH, sends the guest's frames to HOST:PORT, says "ready" on stdout and ends when its
stdin is closed. A parent that has not said ``IN_ORDER`` on stdin before has ended without clearing up: then this
removes the folder of PATH when the other processes have left it.
"""

from __future__ import annotations

import logging
import shutil
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

import trio

from vhostpc.backend import serve
from vhostpc.backend.net import Bridge
from vhostpc.errors import is_foreseen, sentence

RECEIVE_BUFFER = 4 << 20
IN_ORDER = b"."
LEAVING = 10.0
"""Seconds that the other processes may take to end when the parent has gone."""


async def run(path: str, far: tuple[str, int]) -> bytes:
    """Serve until stdin is closed; what was said on it."""
    said = b""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as link:
        link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER)
        link.bind(("127.0.0.1", 0))
        link.connect(far)
        link.setblocking(False)
        async with trio.open_nursery() as nursery:
            await nursery.start(serve, Bridge([link.fileno()]), path)
            print("ready", flush=True)
            async with trio.lowlevel.FdStream(0) as stdin:
                while more := await stdin.receive_some():
                    said += more
            nursery.cancel_scope.cancel()
    return said


def clear_up(folder: Path) -> None:
    """Remove it when no socket is left in it, or when that takes too long."""
    until = time.monotonic() + LEAVING
    while time.monotonic() < until and any(path.is_socket() for path in folder.iterdir()):
        time.sleep(0.05)
    shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    """See the module's docstring."""
    logging.basicConfig(level="WARNING", format="bridge: %(message)s")
    # It is told to end with its parent, and does so by the end of its stdin, in order.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        said = trio.run(run, sys.argv[1], (sys.argv[2], int(sys.argv[3])))
    except Exception as error:
        if not is_foreseen(error):
            traceback.print_exc()
        # The demonstration reports the last line.
        print(sentence(error), file=sys.stderr)
        sys.exit(1)
    if said != IN_ORDER:
        clear_up(Path(sys.argv[1]).parent)


if __name__ == "__main__":
    main()
