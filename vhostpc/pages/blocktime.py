"""Block time: how long the vCPUs stood still because pages were missing, each of them and all together.

Counted in C, where a fault is read and where its thread is woken. A fault lasts until its thread is woken, also where
the link is lost meanwhile.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vhostpc._native import check, ffi, lib
from vhostpc._native.numbers import numbers_of
from vhostpc.pages.waits import Waits, waits_of


@dataclass(frozen=True, slots=True)
class ThreadWaits:
    """The waits of a vCPU, or of all other threads together. Nanoseconds."""

    waits: Waits
    """Those that have ended, from reading a fault to waking its thread."""
    blocked_ns: int
    """The time in which it waited until now, waits that have not ended included. Of several threads: at least one of
    them."""
    waiting_now: int
    remote: int
    """Of the waits, those for a page that had to come."""
    remote_ns: int
    """Sum of those."""


@dataclass(frozen=True, slots=True)
class Blocktime:
    """For how long whom missing pages have blocked until now. Nanoseconds."""

    vcpus: tuple[ThreadWaits, ...]
    others: ThreadWaits
    """Of the other threads that touch our own mapping, such as drivers."""
    all_vcpus_ns: int
    """The time in which all vCPUs waited at once."""
    all_ns: int
    """The time in which all vCPUs and all back-ends waited at once. A back-end waits while one of its threads does."""
    latency: tuple[int, ...]
    """How many remote waits took at least 2^N and less than 2^(N+1) microseconds; shorter ones are in the first, longer
    ones in the last."""


NOBODY = ThreadWaits(Waits(0, 0, 0, 0), 0, 0, 0, 0)


class Blocktimes:
    """The block time of the fault service with C handle ``handle``. None of its methods waits."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle
        self._threads: Sequence[int] | None = None
        self._client: int | None = None
        self._told_apart = True
        self._kept: Blocktime | None = None

    def set_vcpus(self, threads: Sequence[int]) -> None:
        """See ``FaultService.set_vcpus``."""
        if self._threads is not None and len(threads) != len(self._threads):
            raise ValueError(f"there are {len(self._threads)} vCPUs, not {len(threads)}")
        self._threads = tuple(threads)
        self._tell()

    def armed(self, client: int, told_apart: bool) -> None:
        """Our own mapping is this client from now on; ``told_apart``: its faults name their threads."""
        self._client = client
        self._told_apart = told_apart
        self._tell()

    def _tell(self) -> None:
        if self._client is None or self._threads is None or self._handle is None:
            return
        raw = ffi.new("uint32_t[]", [*self._threads, 0])
        check(lib.vpc_fault_set_vcpus(self._handle, self._client, raw, len(self._threads)), "vCPUs")

    def read(self) -> Blocktime | None:
        """None where it is not known which threads are vCPUs."""
        if self._handle is None:
            return self._kept
        if self._threads is None or not self._told_apart:
            return None
        # What all have in common first: each of them has waited at least as long.
        raw = ffi.new("struct vpc_blocked *")
        lib.vpc_fault_blocked(self._handle, raw)
        one = ffi.new("struct vpc_vcpu_waits *")
        vcpus = []
        for index in range(len(self._threads)):
            known = lib.vpc_fault_vcpu_waits(self._handle, index, one) == 0
            vcpus.append(_waits(one) if known else NOBODY)
        return numbers_of(
            Blocktime, raw, vcpus=tuple(vcpus), others=_waits(raw.others), latency=tuple(raw.latency)
        )

    def keep(self) -> None:
        """The service is about to close: what is counted now can still be read. Waits that have not ended end here."""
        if self._handle is not None:
            self._kept = self.read()
            self._handle = None


def _waits(raw: Any) -> ThreadWaits:
    return numbers_of(ThreadWaits, raw, waits=waits_of(raw.histogram, raw.longest_ns))
