"""One mapping of one descriptor, and the provider behind a session's mappings: the supply of pages."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass

from vhostpc._native import check, ffi, lib
from vhostpc._native.handles import Handle, Owner, made
from vhostpc._native.numbers import numbers_of
from vhostpc.enums import WordEnum
from vhostpc.errors import GuestMemoryError, PostcopyRefused
from vhostpc.memory.addr import OwnAddr
from vhostpc.units import in_units

#: Pages that a session asks for ahead at a time, at most.
PAGES_AHEAD: int = lib.VPC_AHEAD_MOST


class Backing(WordEnum):
    """The kind of file system of a mapping. Postcopy works on the first two."""

    TMPFS = 1
    HUGETLB = 2
    OTHER = 3


@dataclass(frozen=True)
class WaitStats:
    """Touches of guest memory that waited for a page: how many, in all (ns), the longest (ns)."""

    waits: int
    total_ns: int
    longest_ns: int


@dataclass(frozen=True)
class AheadStats:
    """Pages asked for ahead: threads that do so now, pages in flight now, pages so far, threads that did not start."""

    threads: int
    waiting: int
    asked: int
    failed: int


class Supply(Owner):
    """The provider of a session's missing pages: a userfaultfd lent to the front-end, or none (no page is missing).

    Armed memory is memory that may miss pages, from POSTCOPY_LISTEN to POSTCOPY_END.
    """

    def __init__(self, pages_ahead: int = PAGES_AHEAD) -> None:
        raw = made("supply", "guest memory", lib.vpc_supply_new)
        self._native = Handle(raw, lib.vpc_supply_unref, "this supply is closed")
        lib.vpc_supply_ahead_limit(raw, pages_ahead)

    def arm(self, ufd: int) -> None:
        """Register maps made from now on with this userfaultfd; a copy is kept until :meth:`disarm`."""
        check(lib.vpc_supply_arm(self.handle, ufd), "userfaultfd")

    def never_fault(self, ask_by: int | None) -> None:
        """Before the first armed mapping: from now on absent pages are not touched, but asked for until they are here.

        ``ask_by``: a userfaultfd with MINOR_HUGETLBFS (a copy is kept), by which huge pages are asked for; None: there
        is none, and armed mappings of huge pages are refused. A thread may then wait for a page that nobody requested.
        """
        check(lib.vpc_supply_never_fault(self.handle, -1 if ask_by is None else ask_by), "userfaultfd")

    def disarm(self) -> None:
        """Every page has arrived (POSTCOPY_END): unregister all mappings, close our copies of the ufd."""
        check(lib.vpc_supply_disarm(self.handle), "UFFDIO_UNREGISTER")

    def fail(self) -> str | None:
        """No more pages will come: release every waiter, so that nothing is read, sent or created.

        Each armed mapping is replaced by private memory and its waiters are woken; they raise :class:`MemoryLost`.
        The shared file stays as it was, also for a guest that lives on. Returns None, or the reason why not all
        mappings could be replaced: waiters in the others sleep on (:attr:`asleep`). May be called again.
        """
        rc = lib.vpc_supply_fail(self.handle)
        return os.strerror(-rc) if rc < 0 else None

    @property
    def asleep(self) -> int:
        """Threads that wait for a page; after :meth:`fail` only those that it could not release."""
        return lib.vpc_supply_asleep(self.handle)

    @property
    def lost(self) -> bool:
        return self.closed or bool(lib.vpc_supply_is_lost(self.handle))

    @property
    def ahead_fd(self) -> int | None:
        """An eventfd, readable when pages that were asked for ahead have come; None: it was never armed."""
        fd: int = lib.vpc_supply_ahead_fd(self.handle)
        return None if fd < 0 else fd

    def ahead(self) -> AheadStats:
        out = ffi.new("struct vpc_ahead_stats *")
        lib.vpc_supply_ahead_stats(self.handle, out)
        return numbers_of(AheadStats, out)

    def stats(self) -> WaitStats:
        out = ffi.new("struct vpc_wait_stats *")
        lib.vpc_supply_stats(self.handle, out)
        return numbers_of(WaitStats, out)


def mlock_future_in_force() -> bool:
    """True if ``mlockall(MCL_FUTURE)`` is in force: a new mapping would be populated, creating pages."""
    return bool(lib.vpc_mlock_future())


class Mapping(Owner):
    """``size`` bytes at ``offset`` of ``fd`` (duplicated), shared, kept from children and core dumps.

    ``armed``: mapped without access until :meth:`register`. Raises GuestMemoryError for an empty, wrapping
    or too long range, for an unaligned (4096) armed one, PostcopyRefused for armed memory that is neither tmpfs nor
    hugetlbfs, or huge pages of a supply that never faults and cannot ask for them.
    Never touches a page.
    """

    def __init__(self, supply: Supply, fd: int, offset: int, size: int, *, armed: bool = False) -> None:
        where = f"memory region: {in_units(size)} at {offset:#x} of the descriptor"
        try:
            raw = made("map", where, lib.vpc_map_new, supply.handle, fd, offset, size, armed)
        except OSError as e:
            if e.errno == errno.EOPNOTSUPP:
                raise PostcopyRefused(
                    "postcopy needs guest memory on tmpfs (memfd, /dev/shm) or hugetlbfs; this is another file system"
                ) from None
            if e.errno == errno.ENOSYS:
                raise PostcopyRefused(
                    "postcopy without faults refused: whether a huge page is here can be asked only by a userfaultfd"
                    " with MINOR_HUGETLBFS (Linux 5.13), which cannot be opened here; give the guest pages of 4 KiB"
                ) from None
            unaligned = ", unaligned" if armed else ""
            why = {
                errno.EFBIG: f"{where} end after the end of its file",
                errno.EINVAL: f"{where} are empty, wrapping{unaligned} or not a regular file's",
            }
            raise GuestMemoryError(why.get(e.errno or 0, e.strerror)) from None
        self._native = Handle(raw, lib.vpc_map_unref, "this mapping is closed")

    @property
    def address(self) -> OwnAddr:
        """The address of the region's first byte in our process: for the front-end, which translates faults."""
        return OwnAddr(lib.vpc_map_address(self.handle))

    @property
    def backing(self) -> Backing:
        return Backing(lib.vpc_map_kind(self.handle))

    def register(self) -> None:
        """Register with the supply's userfaultfd (missing pages), then allow access. Raises OSError."""
        check(lib.vpc_map_register(self.handle), "UFFDIO_REGISTER")
