"""RAM blocks: named pieces of shared memory on memfd, with a bit per host page.

The process that owns a :class:`RamSet` maps each block once. Nothing here hands out that memory: bytes go
in and out by bounded copies in C, on a borrowed thread, since any of them may wait for a missing page.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from collections.abc import Iterator, Sequence
from typing import Any

import trio

from vhostpc._native import check, ffi, lib
from vhostpc._native.entries import Thread
from vhostpc._native.handles import Handle, Owner, made
from vhostpc._native.threads import borrow
from vhostpc.enums import WordEnum
from vhostpc.errors import BadAddress, MemoryLost, PageBorn, StreamError, naming
from vhostpc.pages.ramfiles import RamFiles
from vhostpc.units import TARGET_PAGE

MEMFD_NAME = 200
"""Bytes of a memfd's name that are kept; the kernel takes 249."""
_HUGE_SHIFT = 26
_MFD_HUGETLB = 0x4


class Bits(WordEnum):
    """The bitmaps of a block, one bit a host page."""

    RECEIVED = 0
    REQUESTED = 1
    DIRTY = 2
    WITHHELD = 3
    ASKED = 4
    DISCARDED = 5
    """The stream's RAM_DISCARD cleared it, or a part of it has arrived: its source will send it."""


def make_memfd(name: str, length: int, page_size: int = TARGET_PAGE) -> int:
    """A new memfd of ``length`` bytes; ``page_size`` above 4096 takes huge pages of that size.

    Its length is sealed: back-ends have the descriptor, and one that shrank the file would end a process that touches
    the missing part (SIGBUS). Raises OSError (ENOMEM when mapped later, if there are not enough huge pages).
    """
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    if page_size > mmap.PAGESIZE:
        flags |= _MFD_HUGETLB | (page_size.bit_length() - 1) << _HUGE_SHIFT
    # The name is for people who look into /proc: a peer's may be too long for the kernel, or not be text.
    label = name.encode("utf-8", "surrogateescape").replace(b"\0", b"?")[:MEMFD_NAME]
    with naming(f"memory file {name}"):
        fd = os.memfd_create(os.fsdecode(label), flags)
    try:
        os.ftruncate(fd, length)
        # The last seal, so that nobody seals it against our own writes.
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    except BaseException:
        os.close(fd)
        raise
    return fd


def shared_copy(fd: int) -> int:
    """A descriptor of the same file for a peer: an open file of its own.

    So flags that a peer sets on it (with O_APPEND each write goes to the file's end) do not affect ours. Where the file
    cannot be opened again, it is a copy of ``fd``. Raises OSError without descriptors.
    """
    flags = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE
    try:
        return os.open(f"/proc/self/fd/{fd}", flags | os.O_CLOEXEC)
    except OSError:
        return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 0)


def refusal(error: OSError, length: int, page_size: int) -> str:
    """Why such a block cannot be created; if huge pages are short, also the remedy."""
    why = (error.strerror or str(error)).rpartition(": ")[2]
    if error.errno != errno.ENOMEM or page_size <= mmap.PAGESIZE:
        return why
    pool = f"/sys/kernel/mm/hugepages/hugepages-{page_size >> 10}kB/nr_hugepages"
    return f"{why}; reserve {length // page_size} in {pool}"


def touched(rc: int, what: str) -> int:
    """Result of a call that touches a RAM set. Raises MemoryLost when the set was given up, otherwise OSError."""
    if rc == -errno.EOWNERDEAD:
        raise MemoryLost(f"{what}: the source of its pages is gone and will send no more")
    return check(rc, what)


class RamBlock:
    """One block of a :class:`RamSet`: its name, index in the set, length and host page size in bytes.

    ``fd`` is for peers, such as back-ends that map it; our own writes go another way.
    """

    def __init__(
        self, ram: RamSet, index: int, name: str, fd: int, fd_offset: int, length: int, page_size: int
    ) -> None:
        self._ram = ram
        self.index = index
        self.name = name
        self.fd = fd
        self.fd_offset = fd_offset
        self.length = length
        self.page_size = page_size

    @property
    def pages(self) -> int:
        """Number of host pages."""
        return self.length // self.page_size

    @property
    def base(self) -> int:
        """Address of our own mapping: for registering and for the memory table, never for touching."""
        return lib.vpc_ram_base(self._ram.handle, self.index)

    def set_bits(self, which: Bits, first: int = 0, count: int | None = None, value: bool = True) -> None:
        """Set or clear the bits of ``count`` host pages (default: to the end)."""
        count = self.pages - first if count is None else count
        check(lib.vpc_ram_set_bits(self._ram.handle, self.index, which, first, count, value), "RAM bits")

    def test_bit(self, which: Bits, page: int) -> bool:
        return bool(check(lib.vpc_ram_test_bit(self._ram.handle, self.index, which, page), "RAM bits"))

    def count_bits(self, which: Bits) -> int:
        return check(lib.vpc_ram_count_bits(self._ram.handle, self.index, which), "RAM bits")

    def count_awaited(self) -> int:
        """Host pages that were requested, and that the source owes."""
        return check(lib.vpc_ram_count_awaited(self._ram.handle, self.index), "RAM bits")

    def count_owed(self) -> int:
        """Host pages that are DISCARDED and not RECEIVED."""
        return check(lib.vpc_ram_count_owed(self._ram.handle, self.index), "RAM bits")

    def count_cells(self, which: Bits, cells: int) -> list[int]:
        """The same in each of ``cells`` equal parts, at most the block's pages: part i begins at i * pages // cells."""
        out = ffi.new("uint32_t[]", max(cells, 1))
        check(lib.vpc_ram_count_cells(self._ram.handle, self.index, which, out, cells), "RAM bits")
        return list(out[0:cells])

    @property
    def bitmap_size(self) -> int:
        """Bytes of :meth:`received_bitmap`: whole words of 8."""
        return lib.vpc_ram_bitmap_size(self._ram.handle, self.index)

    def received_bitmap(self) -> bytes:
        """The RECEIVED pages as a recovery sends them: a bit for each target page, the lowest of a byte first."""
        size = self.bitmap_size
        out = ffi.new("unsigned char[]", size)
        check(lib.vpc_ram_bitmap(self._ram.handle, self.index, out, size), f"bitmap of {self.name}")
        return bytes(ffi.buffer(out, size))

    def take_bitmap(self, bitmap: bytes) -> None:
        """Set DIRTY for the pages that are missing according to a :meth:`received_bitmap`, and clear it for all others.

        A host page of which a part is missing is DIRTY. Raises StreamError, with nothing changed, for a bitmap of
        another size or with bits behind the last page.
        """
        rc = lib.vpc_ram_take_bitmap(self._ram.handle, self.index, bitmap, len(bitmap))
        if rc == -errno.EINVAL:
            raise StreamError(
                f"the bitmap of RAM block {self.name!r} has {len(bitmap)} bytes, not {self.bitmap_size}"
            )
        if rc == -errno.ERANGE:
            raise StreamError(f"the bitmap of RAM block {self.name!r} has bits behind its last page")
        check(rc, f"bitmap of {self.name}")

    def discard(self, offset: int = 0, length: int | None = None) -> None:
        """Punch a hole (whole host pages) and forget that these pages were received, requested or discarded.

        Raises OSError, and PageBorn where the kernel leaves a page all the same: a part of a huge page that somebody
        holds is only cleared, and would be read as zeros instead of being missed.
        """
        length = self.length - offset if length is None else length
        left = ffi.new("uint64_t *")
        self._discarded(lib.vpc_ram_discard(self._ram.handle, self.index, offset, length, left), left)

    def discard_for(self, ranges: Sequence[tuple[int, int]]) -> None:
        """As :meth:`discard` for ranges (offset, length), in order, whose pages the source will send: DISCARDED."""
        flat = ffi.new("uint64_t[]", [number for pair in ranges for number in pair])
        left = ffi.new("uint64_t *")
        rc = lib.vpc_ram_discard_ranges(self._ram.handle, self.index, flat, len(ranges), left)
        self._discarded(rc, left)

    def _discarded(self, rc: int, left: Any) -> None:
        if rc == -errno.EEXIST:
            raise PageBorn(
                f"host page {left[0]} of {self.name!r} is still there after its discard: it belongs to a huge "
                "page that is still held (by I/O in flight), or a process that maps it has touched it again",
                self.name,
                left[0],
            )
        check(rc, f"discard in {self.name}")

    def born(self, first: int = 0, count: int | None = None) -> int | None:
        """The first of these host pages (default: all to the end) that exists and was not received. Touches nothing.

        None also where the kernel cannot tell: huge pages, before Linux 5.13.
        """
        count = self.pages - first if count is None else count
        page = ffi.new("uint64_t *")
        rc = lib.vpc_ram_born(self._ram.handle, self.index, first, count, page)
        if rc == -errno.EOPNOTSUPP:
            return None
        return int(page[0]) if check(rc, f"pages of {self.name}") else None

    def discards(self, room: int = 64 << 10) -> Iterator[bytes]:
        """RAM_DISCARD commands for the pages that are DIRTY and not DISCARDED, in pieces of at most ``room`` bytes.

        They are DISCARDED then: each is told once. None if there is nothing to tell.
        """
        at = ffi.new("uint64_t *")
        buffer = ffi.new("unsigned char[]", room)
        while at[0] < self.pages:
            rc = lib.vpc_ram_discards(self._ram.handle, self.index, at, buffer, room)
            if count := check(rc, f"discards of {self.name}"):
                yield bytes(ffi.buffer(buffer, count))

    def merge_log(self, fd: int, size: int, guest_addr: int) -> int:
        """Set DIRTY for this block's pages that a dirty log of ``size`` bytes marks, and clear the marks, atomically.

        The block's guest address is a multiple of 256 KiB, and nobody can shrink the log. Returns how many bits were
        not set before.
        """
        rc = lib.vpc_ram_merge_log(self._ram.handle, self.index, fd, size, guest_addr)
        return check(rc, f"dirty log of {self.name}")

    def holes(self) -> list[tuple[int, int]]:
        """(offset, length) of the file's holes: pages that nobody created. Touches nothing."""
        found = []
        at, end = self.fd_offset, self.fd_offset + self.length
        while at < end:
            hole = os.lseek(self.fd, at, os.SEEK_HOLE)
            if hole >= end:
                break
            try:
                data = min(os.lseek(self.fd, hole, os.SEEK_DATA), end)
            except OSError:  # ENXIO: no data up to the end
                data = end
            found.append((hole - self.fd_offset, data - hole))
            at = data
        return found

    async def read(self, offset: int, length: int) -> bytes:
        """A copy of ``length`` bytes. May wait for a page (on a borrowed thread). Raises MemoryLost."""
        buffer = ffi.new("unsigned char[]", max(length, 1))
        await self._hop(lib.vpc_ram_read, offset, buffer, length)
        return bytes(ffi.buffer(buffer, length))

    async def write(self, offset: int, data: bytes) -> None:
        """Copy ``data`` in. May wait for a page (on a borrowed thread)."""
        await self._hop(lib.vpc_ram_write, offset, ffi.from_buffer(data), len(data))

    async def fill(self, seed: int, first: int = 0, count: int | None = None) -> None:
        """Write target pages that identify themselves (a function of block, page and ``seed``)."""
        count = self.length // TARGET_PAGE - first if count is None else count
        await self._hop(lib.vpc_ram_fill, first, count, seed)

    async def verify(self, seed: int, first: int = 0, count: int | None = None) -> tuple[int, int | None]:
        """(number of target pages that differ from those of :meth:`fill`, the first of them or None)."""
        count = self.length // TARGET_PAGE - first if count is None else count
        where = ffi.new("uint64_t *")
        bad = await self._hop(lib.vpc_ram_verify, first, count, seed, where)
        return bad, (where[0] if bad else None)

    async def _hop(self, call: Any, *args: Any) -> int:
        handle = self._ram.handle
        what = f"RAM block {self.name}"
        rc = await borrow(lambda: call(handle, self.index, *args), self._ram.limiter, Thread.BLOCKS, what)
        return touched(rc, what)


class RamSet(Owner):
    """All RAM blocks of a machine. Close it after everything that uses it."""

    def __init__(self, threads: int = 16, *, files: RamFiles | None = None) -> None:
        """``files``: where new blocks lie, in place of memfds."""
        raw = made("ram", "RAM set", lib.vpc_ram_new)
        self._native = Handle(raw, lib.vpc_ram_free, "this RAM set is closed")
        self.limiter = trio.CapacityLimiter(threads)
        """For copies that may wait for a page: never trio's default."""
        self.blocks: list[RamBlock] = []
        self._files = files

    @property
    def lost(self) -> bool:
        """Whether it was given up: touching raises MemoryLost from then on."""
        return bool(lib.vpc_ram_is_lost(self.handle))

    def __getitem__(self, name: str) -> RamBlock:
        for block in self.blocks:
            if block.name == name:
                return block
        raise KeyError(name)

    def create(self, name: str, length: int, page_size: int = TARGET_PAGE) -> RamBlock:
        """A new block on a new memfd, or in a new file, all holes. Raises OSError."""
        make = self._files.create if self._files is not None else make_memfd
        fd = make(name, length, page_size)
        try:
            return self.add(name, fd, length, page_size)
        finally:
            os.close(fd)

    def add(
        self, name: str, fd: int, length: int, page_size: int = TARGET_PAGE, fd_offset: int = 0
    ) -> RamBlock:
        """A block on ``length`` bytes of ``fd`` from ``fd_offset``; we keep a copy of ``fd``, and one for peers.

        A process that can shrink the file can so end this one; nobody can shrink one from :func:`make_memfd`.
        Raises OSError: EINVAL (not whole pages), ERANGE (longer than the file), EEXIST (name taken).
        """
        raw = name.encode("utf-8", "surrogateescape")
        if b"\0" in raw:
            raise OSError(errno.EINVAL, "a block's name cannot contain NUL")
        with naming(f"RAM block {name}"):
            own = shared_copy(fd)
        try:
            rc = lib.vpc_ram_add(self.handle, raw, fd, fd_offset, length, page_size)
            index = check(rc, f"RAM block {name}")
        except BaseException:
            os.close(own)
            raise
        block = RamBlock(self, index, name, own, fd_offset, length, page_size)
        self.blocks.append(block)
        return block

    def locate(self, address: int) -> tuple[RamBlock, int]:
        """Block and offset of an address of our own mapping. Raises BadAddress."""
        for block in self.blocks:
            if 0 <= address - block.base < block.length:
                return block, address - block.base
        raise BadAddress(f"{address:#x} is in no RAM block")

    def close(self) -> None:
        """Unmap everything, as soon as no call and no C object uses it: close those first."""
        self._native.close(idle=not self.limiter.borrowed_tokens)
        for block in self.blocks:
            if block.fd >= 0:
                os.close(block.fd)
                block.fd = -1


def total_pages(blocks: Sequence[RamBlock], which: Bits) -> int:
    """Bits set in all ``blocks``."""
    return sum(block.count_bits(which) for block in blocks)
