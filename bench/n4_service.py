"""Our side of N4: ``python -m bench.n4_service SOCKET`` is the bridge with the null device at its far end.

Frames from the guest are copied, read whole and are gone. Each line on stdin is answered by one of JSON: the
counters of the frames from the guest.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys

import trio

from vhostpc.backend import Queue, serve
from vhostpc.backend.net import Bridge


class Sink(Bridge):
    """Takes frames and has none to give: the null device reads as the end of a file."""

    async def handle_queue(self, queue: Queue) -> None:
        if queue.index % 2:
            await super().handle_queue(queue)
        else:
            await trio.sleep_forever()


async def main(path: str) -> None:
    null = os.open(os.devnull, os.O_RDWR)
    device = Sink([null])
    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve, device, path)
        async with trio.lowlevel.FdStream(os.dup(0)) as lines:
            async for _ in lines:
                print(json.dumps(dataclasses.asdict(device.counters()["out"])), flush=True)
        nursery.cancel_scope.cancel()


if __name__ == "__main__":
    trio.run(main, sys.argv[1])
