"""``python -m tests.kit.give_up_child HOW``: memory is given up while somebody waits in it and no mapping can be made.

HOW: ``maps`` (the process has as many as it may), ``data`` (RLIMIT_DATA), ``space`` (RLIMIT_AS, lifted later),
``never`` (RLIMIT_AS, never lifted). One JSON line says the outcome.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import resource
import sys

import trio

from tests.kit.confine import LIBC, die_with_parent
from tests.kit.until import until
from vhostpc.errors import MemoryLost
from vhostpc.pages.ramblock import Bits, RamSet
from vhostpc.pages.service import FaultService
from vhostpc.units import TARGET_PAGE


def use_all_mappings() -> None:
    """Pages of a range protected by turns, each a mapping; then whole mappings, which may be one more."""
    pages, failed = 1 << 17, (1 << 64) - 1
    at = LIBC.mmap(0, pages * TARGET_PAGE, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000, failed, 0)
    for page in range(0, pages, 2):
        if LIBC.mprotect(at + page * TARGET_PAGE, TARGET_PAGE, mmap.PROT_READ):
            break
    else:
        raise SystemExit("there seems to be no end of mappings")
    while LIBC.mmap(0, TARGET_PAGE, 0, mmap.MAP_SHARED | mmap.MAP_ANONYMOUS, failed, 0) != failed:
        pass


def limit(how: str) -> None:
    if how == "maps":
        use_all_mappings()
    else:
        kind = resource.RLIMIT_DATA if how == "data" else resource.RLIMIT_AS
        resource.setrlimit(kind, (TARGET_PAGE, resource.RLIM_INFINITY))


async def run(how: str) -> None:
    with RamSet() as ram, FaultService(ram) as service:
        block, other = ram.create("ram0", 16 * TARGET_PAGE), ram.create("rom", 8 * TARGET_PAGE)
        os.pwrite(block.fd, b"came", 0)
        block.set_bits(Bits.RECEIVED, 0, 1)
        holes = block.holes(), other.holes()
        service.arm()
        lost: list[int] = []
        said: dict[str, object] = {}

        async def touch(page: int) -> None:
            try:
                await block.read(page * TARGET_PAGE, 4)
            except MemoryLost:
                lost.append(page)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(service.run)
            nursery.start_soon(touch, 3)
            await until(service.waiting)
            await touch(0)  # a thread for what follows: later none could be made
            assert not lost
            limit(how)
            service.give_up()
            said["lost"] = ram.lost
            if how in ("space", "never"):
                # A touch that comes now is refused, and the one that waits is left alone.
                await touch(5)
                said["waits on"] = lost == [5]
            if how == "space":
                resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
                service.give_up()
            if how == "never":
                service.close()
                await touch(6)
                said["waits on"] = lost == [5, 6]
            else:
                await until(lambda: 3 in lost)
            said["no page was made"] = holes == (block.holes(), other.holes())
            print(json.dumps(said), flush=True)
            if how == "never":
                os._exit(0)  # its thread cannot end
            nursery.cancel_scope.cancel()


if __name__ == "__main__":
    die_with_parent()
    LIBC.mmap.restype = ctypes.c_uint64
    LIBC.mmap.argtypes = [ctypes.c_uint64] * 6
    LIBC.mprotect.argtypes = [ctypes.c_uint64] * 3
    trio.run(run, sys.argv[1])
