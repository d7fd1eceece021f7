"""The dirty log: one bit per 4096 bytes of guest memory, shared with the front-end."""

from __future__ import annotations

import errno
import os
from typing import Any

from vhostpc._native import ffi, lib
from vhostpc._native.handles import Handle
from vhostpc.errors import GuestMemoryError
from vhostpc.memory.mapping import Supply
from vhostpc.units import in_units


class DirtyLog:
    """Maps ``size`` bytes at ``offset`` of ``fd``; the descriptor may be closed afterwards.

    A page of it that goes, because the front-end shrinks the file, makes ``supply`` lost. Raises GuestMemoryError
    when the area is empty or longer than its file.
    """

    def __init__(self, supply: Supply, fd: int, offset: int, size: int) -> None:
        out = ffi.new("struct vpc_log **")
        rc = lib.vpc_log_new(supply.handle, fd, offset, size, out)
        if rc in (-errno.EFBIG, -errno.EINVAL):
            raise GuestMemoryError(f"dirty log: {in_units(size)} at {offset:#x} are not within the file")
        if rc < 0:
            raise GuestMemoryError(f"dirty log: {os.strerror(-rc)}")
        self._native = Handle(out[0], lib.vpc_log_unref, "this dirty log is closed")
        self.size = size

    @property
    def handle(self) -> Any:
        """The C handle; ValueError after :meth:`close`."""
        return self._native.raw

    def covers(self, guest_end: int) -> bool:
        """Whether every page below guest address ``guest_end`` has a bit."""
        return self.size * 8 * 4096 >= guest_end

    def close(self) -> None:
        """Release our reference; rings keep theirs until they get another log."""
        self._native.close()
