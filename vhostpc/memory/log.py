"""The dirty log: one bit per 4096 bytes of guest memory, shared with the front-end."""

from __future__ import annotations

import errno
import os
from typing import Any

from vhostpc._native import ffi, lib
from vhostpc.errors import GuestMemoryError


class DirtyLog:
    """Maps ``size`` bytes at ``offset`` of ``fd``; the descriptor may be closed afterwards.

    Raises GuestMemoryError when the area is empty or longer than its file.
    """

    def __init__(self, fd: int, offset: int, size: int) -> None:
        out = ffi.new("struct vpc_log **")
        rc = lib.vpc_log_new(fd, offset, size, out)
        if rc in (-errno.EFBIG, -errno.EINVAL):
            raise GuestMemoryError(
                f"dirty log: {size:#x} bytes at {offset:#x} do not lie in a file of that size"
            )
        if rc < 0:
            raise GuestMemoryError(f"dirty log: {os.strerror(-rc)}")
        self.handle: Any = ffi.gc(out[0], lib.vpc_log_unref)
        self.size = size

    def covers(self, guest_end: int) -> bool:
        """Has every page below guest address ``guest_end`` a bit?"""
        return self.size * 8 * 4096 >= guest_end

    def close(self) -> None:
        """Let go of our hold; rings keep theirs until they are told of another log."""
        self.handle, handle = ffi.NULL, self.handle
        ffi.release(handle)
