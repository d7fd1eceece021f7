"""The bridge of ``vhostpc demo``, a process of its own: ``python -m vhostpc.cli.demo_bridge PATH HOST PORT``.

Serves on the unix socket PATH, sends the guest's frames to HOST:PORT, says "ready" on stdout and ends when its
stdin is closed.
"""

from __future__ import annotations

import logging
import socket
import sys

import trio

from vhostpc.backend import serve
from vhostpc.backend.net import Bridge

RECEIVE_BUFFER = 4 << 20


async def run(path: str, far: tuple[str, int]) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as link:
        link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER)
        link.bind(("127.0.0.1", 0))
        link.connect(far)
        link.setblocking(False)
        async with trio.open_nursery() as nursery:
            await nursery.start(serve, Bridge([link.fileno()]), path)
            print("ready", flush=True)
            async with trio.lowlevel.FdStream(0) as stdin:
                while await stdin.receive_some():
                    pass
            nursery.cancel_scope.cancel()


def main() -> None:
    """See the module's docstring."""
    logging.basicConfig(level="WARNING", format="bridge: %(message)s")
    trio.run(run, sys.argv[1], (sys.argv[2], int(sys.argv[3])))


if __name__ == "__main__":
    main()
