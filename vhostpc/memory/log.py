"""The dirty log: one bit per 4096 bytes of guest memory, shared with the front-end."""

from __future__ import annotations

import errno

from vhostpc._native import lib
from vhostpc._native.handles import Handle, Owner, made
from vhostpc.errors import GuestMemoryError
from vhostpc.memory.mapping import Supply
from vhostpc.units import TARGET_PAGE, in_units


class DirtyLog(Owner):
    """Maps ``size`` bytes at ``offset`` of ``fd``; the descriptor may be closed afterwards.

    If a page of it goes, because the front-end shrinks the file, ``supply`` is lost. Raises GuestMemoryError
    when the area is empty or longer than its file.
    """

    def __init__(self, supply: Supply, fd: int, offset: int, size: int) -> None:
        try:
            raw = made("log", "dirty log", lib.vpc_log_new, supply.handle, fd, offset, size)
        except OSError as e:
            outside = f"dirty log: {in_units(size)} at {offset:#x} are not within the file"
            raise GuestMemoryError(
                outside if e.errno in (errno.EFBIG, errno.EINVAL) else e.strerror
            ) from None
        self._native = Handle(raw, lib.vpc_log_unref, "this dirty log is closed")
        self.size = size

    def covers(self, guest_end: int) -> bool:
        """Whether every page below guest address ``guest_end`` has a bit."""
        return self.size * 8 * TARGET_PAGE >= guest_end
