"""``python -m tests.kit.frontend_child FD SPEC``: a front-end in a process of its own, made to be killed.

Over the unix socket FD come the memfds of the two destination blocks and the page source's socket. It takes
the back-end through ADVISE, LISTEN and the exchange of addresses, starts the rings that SPEC lays out, serves
faults, says "ready" and goes on; on "stop N" it asks for GET_VRING_BASE of ring N.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from typing import Any

import trio

from tests.kit.confine import die_with_parent
from vhostpc.frontend import (
    BackendPostcopy,
    Driver,
    GuestRegion,
    MemoryShare,
    Mode,
    RingLayout,
    connect,
    start_ring,
)
from vhostpc.pages.ramblock import RamSet
from vhostpc.pages.service import FaultService


async def run(control: trio.SocketStream, spec: dict[str, Any], fds: list[int]) -> None:
    *memfds, pages = fds
    with RamSet() as ram:
        regions = []
        for row, fd in zip(spec["blocks"], memfds, strict=True):
            block = ram.add(row["name"], fd, row["length"], row["page_size"])
            regions.append(GuestRegion(row["guest_addr"], block.length, block))
        with FaultService(ram) as service:
            service.arm()
            service.set_return_path(pages)
            async with trio.open_nursery() as nursery, connect(spec["path"]) as front:
                nursery.start_soon(service.run)
                nursery.start_soon(service.load, pages)
                await front.negotiate()
                memory = MemoryShare(front, regions, Mode(spec["mode"]))
                postcopy = BackendPostcopy(front, service)
                await postcopy.advise()
                await postcopy.listen()
                await postcopy.share(memory)
                for index, row in spec["rings"].items():
                    driver = Driver(ram, regions, RingLayout(**row["layout"]), receive=row["receive"])
                    await start_ring(front, memory, int(index), driver)
                await control.send_all(b"ready\n")
                while data := await control.receive_some(64):
                    if data.startswith(b"stop"):
                        nursery.start_soon(front.get_vring_base, int(data.split()[1]))
                        await control.send_all(b"asked\n")
                    elif data.startswith(b"close"):
                        front.close()  # only the socket: the process lives, and still serves faults
                        await control.send_all(b"closed\n")
                nursery.cancel_scope.cancel()


def main() -> None:
    die_with_parent()
    with socket.socket(fileno=int(sys.argv[1])) as sock:
        _, fds, _, _ = socket.recv_fds(sock, 1, 16)
        sock.setblocking(False)
        trio.run(run, trio.SocketStream(trio.socket.from_stdlib_socket(sock)), json.loads(sys.argv[2]), fds)


if __name__ == "__main__":
    os.environ.setdefault("PYTHONFAULTHANDLER", "1")
    main()
