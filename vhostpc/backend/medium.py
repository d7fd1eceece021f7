"""The storage of a disk: a file, a block device, or memory. Nothing here waits on the trio thread."""

from __future__ import annotations

import os
import stat

import trio

from vhostpc.errors import VhostpcError

SECTOR = 512
#: Reads and writes of one disk that may wait for its medium at the same time, each on a thread.
DEPTH = 16


class Medium:
    """``size`` bytes, a whole number of sectors. Errors of the medium are OSError."""

    def __init__(self, fd: int, *, read_only: bool, in_memory: bool) -> None:
        self.fd = fd
        self.read_only = read_only
        self.in_memory = in_memory
        self.size = 0
        self.look()
        self._limiter = trio.CapacityLimiter(DEPTH)

    @classmethod
    def from_file(cls, path: str, *, read_only: bool) -> Medium:
        """Raises VhostpcError with one sentence."""
        try:
            fd = os.open(path, (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC)
        except OSError as e:
            raise VhostpcError(f"cannot open {path}: {e.strerror}") from None
        mode = os.fstat(fd).st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISBLK(mode):
            os.close(fd)
            raise VhostpcError(f"{path} is neither a file nor a block device")
        medium = cls(fd, read_only=read_only, in_memory=False)
        if not medium.size:
            os.close(fd)
            raise VhostpcError(f"{path} is shorter than one sector of {SECTOR} bytes")
        return medium

    @classmethod
    def from_memory(cls, size: int, *, read_only: bool) -> Medium:
        """An empty disk that vanishes with the process."""
        fd = os.memfd_create("disk", os.MFD_CLOEXEC)
        os.ftruncate(fd, size // SECTOR * SECTOR)
        return cls(fd, read_only=read_only, in_memory=True)

    def look(self) -> int:
        """Adopt the medium's current size, in bytes, and return it."""
        # Right for a block device too, whose size fstat does not give.
        self.size = os.lseek(self.fd, 0, os.SEEK_END) // SECTOR * SECTOR
        return self.size

    def read_now(self, offset: int, length: int) -> bytes | None:
        """The bytes if they are available at once, otherwise None."""
        data = bytearray(length)
        try:
            if os.preadv(self.fd, [data], offset, 0 if self.in_memory else os.RWF_NOWAIT) == length:
                return bytes(data)
        except OSError:  # not in the page cache, or a file system that cannot tell
            pass
        return None

    async def read(self, offset: int, length: int) -> bytes:
        found = await trio.to_thread.run_sync(os.pread, self.fd, length, offset, limiter=self._limiter)
        return found.ljust(length, b"\0")  # the file has become shorter: beyond its end there are zeros

    def write_now(self, offset: int, data: memoryview) -> bool:
        """Write to memory; False if the write may wait."""
        return self.in_memory and os.pwrite(self.fd, data, offset) == len(data)

    async def write(self, offset: int, data: memoryview, *, through: bool) -> None:
        """``through``: return when the bytes are on the medium."""

        def work() -> None:
            done = 0
            while done < len(data):
                done += os.pwrite(self.fd, data[done:], offset + done)
            if through:
                os.fdatasync(self.fd)

        await trio.to_thread.run_sync(work, limiter=self._limiter)

    async def flush(self) -> None:
        """Return when all earlier writes are on the medium."""
        if not self.in_memory:
            await trio.to_thread.run_sync(os.fdatasync, self.fd, limiter=self._limiter)
