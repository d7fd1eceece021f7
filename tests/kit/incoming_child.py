"""``python -m tests.kit.incoming_child SOCKET``: a destination that listens there, holds one machine, says how it went.

One JSON line when it listens, one at the end: what was reported and the error. For ``tests.kit.confine``.
"""

from __future__ import annotations

import json
import socket
import sys

import trio

from tests.kit.confine import die_with_parent
from tests.kit.migration_ends import incoming_of
from vhostpc.errors import VhostpcError
from vhostpc.migration.channel import Channel
from vhostpc.migration.held import HeldMachine
from vhostpc.migration.phase import Event


async def run(path: str) -> None:
    events: list[str] = []
    error = ""

    def report(event: Event, why: BaseException | None) -> None:
        events.append(event.value)

    listener = trio.socket.socket(socket.AF_UNIX)
    with listener, HeldMachine() as machine:
        await listener.bind(path)
        listener.listen(1)
        print("{}", flush=True)
        sock, _ = await listener.accept()
        async with Channel(trio.SocketStream(sock)) as channel:
            incoming = incoming_of(channel, machine, postcopy=True, report=report)
            try:
                await incoming.receive()
            except VhostpcError as why:
                error = str(why)
            incoming.close()
    print(json.dumps({"events": events, "error": error}), flush=True)


if __name__ == "__main__":
    die_with_parent()
    trio.run(run, sys.argv[1])
