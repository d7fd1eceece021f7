"""The table of guest memory regions: immutable, counted, replaced whole."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable
from dataclasses import dataclass

from vhostpc._native import lib
from vhostpc._native.handles import Handle, Owner, made
from vhostpc.errors import GuestMemoryError
from vhostpc.memory.addr import FrontAddr, GuestAddr
from vhostpc.memory.mapping import Backing, Mapping, Supply
from vhostpc.units import in_units


@dataclass(frozen=True)
class Region:
    """A range of guest memory: where the guest and the front-end see it, and our mapping of it."""

    guest_addr: GuestAddr
    size: int
    user_addr: FrontAddr
    mapping: Mapping


class GuestMemory(Owner):
    """An immutable region table over ``struct vpc_gm``.

    Rings and chains in flight count as users; the memory is unmapped with the last of them. Raises
    GuestMemoryError for regions that wrap, or overlap in guest or front-end addresses, and for armed ones that are
    unaligned (4096).
    """

    def __init__(self, supply: Supply, regions: Iterable[Region]) -> None:
        self.regions = tuple(regions)
        self.mappings = frozenset(r.mapping for r in self.regions)
        raw = made("gm", "memory table", lib.vpc_gm_new, supply.handle)
        self._native = Handle(raw, lib.vpc_gm_unref, "this memory table is closed")
        try:
            for r in self.regions:
                self._add(r)
        except BaseException:
            self.close()
            raise

    def _add(self, r: Region) -> None:
        rc = lib.vpc_gm_add(self.handle, r.mapping.handle, r.guest_addr, r.size, r.user_addr)
        where = f"region at guest address {r.guest_addr:#x}, {in_units(r.size)}"
        if rc == -errno.EEXIST:
            raise GuestMemoryError(f"{where}, overlaps another one")
        if rc == -errno.EINVAL:
            raise GuestMemoryError(
                f"{where}, front-end address {r.user_addr:#x}: wrapping, or unaligned in postcopy"
            )
        if rc < 0:
            raise GuestMemoryError(f"{where}: {os.strerror(-rc)}")

    @property
    def users(self) -> int:
        """Rings and chains that still use this table."""
        return lib.vpc_gm_users(self.handle)

    @property
    def end(self) -> int:
        """Guest address behind the highest region; 0 for an empty table."""
        return lib.vpc_gm_end(self.handle)

    @property
    def slow(self) -> bool:
        """Whether a touch may have to read a disk."""
        return any(r.mapping.backing is Backing.OTHER for r in self.regions)
