"""The front-end of F4: ``python -m bench.f4_service SOCKET`` starts a ring of 64 chains whose pages all miss.

The chains are made where the guest came from, each with a frame on a page of its own, and that memory goes to a source
of pages in another process, which sends only what it is asked for. Says on stdout when the ring was started, in
nanoseconds of CLOCK_MONOTONIC, and runs until it is ended.
"""

from __future__ import annotations

import argparse
import json
import os
import time

import trio

from vhostpc.frontend import (
    BackendPostcopy,
    Driver,
    GuestRegion,
    MemoryShare,
    RingLayout,
    connect,
    start_ring,
)
from vhostpc.frontend.source import start_source
from vhostpc.pages.ramblock import RamSet, make_memfd
from vhostpc.pages.service import FaultService

PAGE = 4096
MIB = 4
CHAINS = 64


async def serve(path: str) -> None:
    layout = RingLayout.contiguous_at(0, num=CHAINS, buffer_stride=PAGE)
    with RamSet() as there, RamSet() as ram:
        memfd = make_memfd("mem", MIB << 20)
        full = there.add("mem", memfd, MIB << 20)
        os.close(memfd)
        block = ram.create("mem", MIB << 20)
        regions = [GuestRegion(0, block.length, block)]
        with Driver(there, [GuestRegion(0, full.length, full)], layout, header=0) as driver:
            await driver.reset()
            if (made := await driver.post(CHAINS, 64)) != CHAINS:
                raise RuntimeError(f"{made} chains were made, not {CHAINS}")
            driver.move(ram)
            async with start_source(there.blocks) as source, connect(path) as front:
                await front.negotiate()
                memory = MemoryShare(front, regions)
                with FaultService(ram) as service:
                    postcopy = BackendPostcopy(front, service)
                    service.set_return_path(source.sock.fileno())
                    service.arm()
                    async with trio.open_nursery() as nursery:
                        with service.open_channel(source.sock.fileno()) as channel:
                            nursery.start_soon(service.run)
                            nursery.start_soon(channel.load)
                            await source.numbers()  # it takes its time to start
                            await postcopy.advise()
                            await postcopy.listen()
                            await postcopy.share(memory)
                            begin = time.monotonic_ns()
                            await start_ring(front, memory, 0, driver)
                            print(json.dumps({"begin_ns": begin}), flush=True)
                            await trio.sleep_forever()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("path")
    trio.run(serve, parser.parse_args().path)
