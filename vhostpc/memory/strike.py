"""A page of a front-end's file that vanished under our mapping, as the SIGBUS of a touch showed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import trio

from vhostpc._native import ffi, lib
from vhostpc._native.numbers import numbers_of
from vhostpc.enums import WordEnum
from vhostpc.memory.mapping import Backing, Supply
from vhostpc.memory.table import Region


class Use(WordEnum):
    """The use of a mapped file of a front-end (``VPC_USE_*``)."""

    MEMORY = 0
    DIRTY_LOG = 1
    INFLIGHT_REGION = 2


@dataclass(frozen=True)
class Strike:
    """The first such page of a session, whose supply has been lost since then.

    ``address``: of the touch, in our process. ``offset``: the same in the file, whose size was ``size`` just then;
    bytes. ``use``: the purpose of the mapping. ``poisoned``: the page is present, and must not be read.
    """

    address: int
    offset: int
    size: int
    backing: Backing
    use: Use
    poisoned: bool

    def sentence(self, regions: Iterable[Region]) -> str:
        """The message, in one sentence; ``regions``: all that the session knows."""
        what = self.use.name.lower().replace("_", " ")
        whose = f"the front-end's {what}"
        where = f"offset {self.offset:#x} of its file"
        for r in regions:
            if self.use is Use.MEMORY and 0 <= self.address - r.mapping.address < r.size:
                where = f"region at guest address {r.guest_addr:#x}, {where}"
        if self.poisoned:
            return f"a page of {whose} is poisoned, by UFFDIO_POISON or because the machine's memory fails ({where})"
        if self.offset >= self.size:
            return f"the front-end shrank the file of its {what} ({where}, which now ends at {self.size:#x})"
        # The two cannot be told apart: kernels without memory failure report poison in the same way.
        also = {
            Backing.TMPFS: "its file system is full",
            Backing.HUGETLB: "no huge page is free",
            Backing.OTHER: "its disk fails",
        }[self.backing]
        return (
            f"a page of {whose} is not available ({where}): {also}, its file was shrunk, or it was poisoned"
        )


async def struck(supply: Supply) -> Strike:
    """Wait until a touch of ``supply``'s memory, dirty log or inflight region, has met a page that had gone."""
    await trio.lowlevel.wait_readable(lib.vpc_supply_strike_fd(supply.handle))
    out = ffi.new("struct vpc_strike *")
    assert lib.vpc_supply_struck(supply.handle, out)
    return numbers_of(Strike, out, backing=Backing(out.kind), use=Use(out.use), poisoned=bool(out.poisoned))
