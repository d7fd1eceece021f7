"""A trace of the fault service: the last answered faults, one by one."""

from __future__ import annotations

from typing import Any, NamedTuple

from vhostpc._native import check, ffi, lib
from vhostpc.enums import WordEnum


class Way(WordEnum):
    """The ways in which a fault was answered."""

    ASKED = 0
    """Its page was requested because of it."""
    JOINED = 1
    """Its page had been requested before."""
    THERE = 2
    """Its page had arrived meanwhile."""
    LOCAL = 3
    """From a file of our own."""


class Traced(NamedTuple):
    """One answered fault. Times: CLOCK_MONOTONIC in nanoseconds, when it was read and when its thread was woken.

    ``client``: its number in the fault service; ``thread``: kernel thread id, 0 where the ufd does not report it;
    ``block``: index; ``page``: host page in it.
    """

    client: int
    thread: int
    block: int
    page: int
    way: Way
    read_ns: int
    woken_ns: int

    def row(self) -> list[int | str]:
        """Its fields in this order, for JSON; ``way`` as a word."""
        return [self.client, self.thread, self.block, self.page, str(self.way), self.read_ns, self.woken_ns]


class Trace:
    """A trace of the fault service with C handle ``handle``, of ``entries`` faults. None of its methods waits."""

    def __init__(self, handle: Any, entries: int) -> None:
        check(lib.vpc_fault_trace(handle, entries), "trace of faults")
        self._handle = handle
        self._entries = entries
        self._kept: tuple[int, list[Traced]] = (0, [])

    def read(self, start: int, most: int) -> tuple[int, list[Traced]]:
        """Entries from number ``start`` on that are still kept, oldest first, and the number of the next one."""
        if self._handle is None:
            end, rows = self._kept
            first = end - len(rows)
            at = start if first <= start <= end else first
            found = rows[at - first : at - first + most]
            return at + len(found), found
        following = ffi.new("uint64_t *", start)
        raw = ffi.new("struct vpc_traced[]", max(most, 1))
        count = lib.vpc_fault_traced(self._handle, following, raw, most)
        # Thousands at once: without numbers_of, which is slow.
        return following[0], [
            Traced(t.client, t.thread, t.block, t.page, Way(t.way), t.read_ns, t.woken_ns)
            for t in raw[0:count]
        ]

    def keep(self) -> None:
        """The service is about to close: recorded entries can still be read."""
        if self._handle is not None:
            kept = self.read(0, self._entries)
            self._handle = None
            self._kept = kept
