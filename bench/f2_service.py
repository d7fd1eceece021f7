"""Our side of F2: ``python -m bench.f2_service SOCKET`` moves memory to the back-end that listens there.

A front-end with its fault service in this process, the source of pages in a second one, each page in its memory.
``--rate``: bytes a second that the source sends unasked. Runs until it is ended.
"""

from __future__ import annotations

import argparse
import os

import trio

from vhostpc.frontend import BackendPostcopy, GuestRegion, MemoryShare, Mode, connect
from vhostpc.frontend.source import start_source
from vhostpc.pages.ramblock import RamSet, make_memfd
from vhostpc.pages.service import FaultService

from .f1_service import PAGE, write_pages

MIB = 512
FIRST, COUNT = 4096, (MIB << 20) // PAGE - 8192
"""The pages that hold what the toucher expects: beside 16 MiB at each end, where a QEMU may have something."""


async def serve(path: str, rate: int) -> None:
    with RamSet() as there, RamSet() as ram:
        memfd = make_memfd("mem", MIB << 20)
        write_pages(memfd, FIRST, COUNT)
        there.add("mem", memfd, MIB << 20)
        os.close(memfd)
        block = ram.create("mem", MIB << 20)
        async with start_source(there.blocks, background_rate=rate) as source, connect(path) as front:
            await front.negotiate()
            memory = MemoryShare(front, [GuestRegion(0, block.length, block)], Mode.TABLE)
            with FaultService(ram) as service:
                postcopy = BackendPostcopy(front, service)
                service.set_return_path(source.sock.fileno())
                service.arm()
                async with trio.open_nursery() as nursery:
                    with service.open_channel(source.sock.fileno()) as channel:
                        nursery.start_soon(service.run)
                        nursery.start_soon(channel.load)
                        await postcopy.advise()
                        await postcopy.listen()
                        await postcopy.share(memory)
                        await trio.sleep_forever()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("path")
    parser.add_argument("--rate", type=int, default=0)
    args = parser.parse_args()
    trio.run(serve, args.path, args.rate)
