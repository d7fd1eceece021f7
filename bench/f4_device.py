"""The back-end of F4: ``python -m bench.f4_device SOCKET [--ahead N] [--unordered]`` reads what 64 chains hold.

A device in plain Python, by the framework; the order of its requests does not matter to it. Once all of them are done
it says on stdout when the last was, in nanoseconds of CLOCK_MONOTONIC.
"""

from __future__ import annotations

import argparse
import json
import time

import trio

from vhostpc.backend import Device, Options, Queue, serve

from .f4_service import CHAINS


class Reader(Device):
    queue_size = CHAINS

    def __init__(self, unordered: bool) -> None:
        self.unordered = unordered
        self.count = 0
        self.seen: set[bytes] = set()

    async def handle_queue(self, queue: Queue) -> None:
        async for chain in queue.unordered() if self.unordered else queue:
            self.seen.add(chain.read())
            self.count += 1
            if self.count == CHAINS:
                said = {"last_ns": time.monotonic_ns(), "different": len(self.seen)}
                print(json.dumps(said), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("path")
    parser.add_argument("--unordered", action="store_true")
    parser.add_argument("--ahead", type=int, default=64)
    args = parser.parse_args()
    trio.run(serve, Reader(args.unordered), args.path, Options(pages_ahead=args.ahead))
