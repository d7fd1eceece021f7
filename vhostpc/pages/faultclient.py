"""A client of the fault service: a process's ufd, and the place of its addresses in our RAM blocks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from vhostpc._native import check, ffi, lib
from vhostpc._native.numbers import numbers_of
from vhostpc.pages.ramblock import RamBlock
from vhostpc.pages.waits import Waits, waits_of


@dataclass(frozen=True, slots=True)
class ClientRange:
    """``length`` bytes from ``base``, an address of the client's process, are ``block`` from ``offset``.

    All in bytes and whole host pages of the block.
    """

    base: int
    length: int
    block: RamBlock
    offset: int


@dataclass(frozen=True, slots=True)
class ClientNumbers:
    """Counts of a client so far."""

    faults: int
    """Fault events read."""
    distinct: int
    """Host pages that faulted at least once since the ranges were set."""
    wakes: int
    found_nothing: int
    """Faults at addresses of no range: the thread there stays blocked until ranges are set."""
    received_already: int
    """Woken at once: the page had arrived in the meantime."""
    requested_already: int
    """Faults on pages that were already requested."""
    repeated: int
    """Faults of a thread that waited for that page already, and returned to it after a signal: they do not count as
    waits. A ufd without THREAD_ID does not distinguish threads: there this includes faults of other threads."""
    other_events: int
    waiting_now: int
    waiting_for_page: int
    """Of those, the faults at addresses of a range: only their pages are sure to arrive."""
    last_unknown: int
    """Address of the last fault that found nothing, 0 if there was none."""
    error: int
    """errno that ended reading this client, 0 if it is read."""
    blocked_ns: int
    """The time in which at least one of its threads waited until now, waits that have not ended included."""
    waits: Waits
    """From reading a fault to waking it."""


class Served(Protocol):
    """The part of the fault service that its clients need."""

    @property
    def handle(self) -> Any: ...

    @property
    def closed(self) -> bool: ...


class Client:
    """Made by ``FaultService.add_client``. None of its methods waits."""

    def __init__(self, service: Served, number: int, name: str) -> None:
        self._service = service
        self.number = number
        self.name = name
        self.removed = False

    def set_ranges(self, ranges: Iterable[ClientRange]) -> None:
        """Set where the client's addresses lie, replacing earlier ranges.

        Earlier faults that found nothing are examined again. Raises OSError EINVAL for ranges that overlap, are
        not whole host pages or exceed their block.
        """
        rows = list(ranges)
        raw = ffi.new("struct vpc_client_range[]", max(len(rows), 1))
        for i, r in enumerate(rows):
            raw[i].base, raw[i].length = r.base, r.length
            raw[i].block, raw[i].offset = r.block.index, r.offset
        rc = lib.vpc_fault_set_ranges(self._service.handle, self.number, raw, len(rows))
        check(rc, f"ranges of {self.name}")

    def remove(self) -> None:
        """Stop reading it and close our copy of its ufd. Its numbers stay readable.

        Harmless after the service was closed, which does the same.
        """
        if not self.removed and not self._service.closed:
            lib.vpc_fault_remove_client(self._service.handle, self.number)
        self.removed = True

    def numbers(self) -> ClientNumbers:
        raw = ffi.new("struct vpc_client_stats *")
        check(lib.vpc_fault_client_stats(self._service.handle, self.number, raw), "client numbers")
        return numbers_of(ClientNumbers, raw, waits=waits_of(raw.histogram, raw.longest_ns))
