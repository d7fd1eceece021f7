"""The events of a ufd, as values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vhostpc.ufd.flags import FaultFlags

UFFD_EVENT_PAGEFAULT = 0x12
UFFD_EVENT_FORK = 0x13
UFFD_EVENT_REMAP = 0x14
UFFD_EVENT_REMOVE = 0x15
UFFD_EVENT_UNMAP = 0x16


@dataclass(frozen=True, slots=True)
class PageFault:
    """A thread waits at ``address``, an address of the process that created the ufd.

    ``address`` is that of the page (4 KiB or huge) unless EXACT_ADDRESS is on. ``thread`` is the waiting
    thread's id as the reader's process-id namespace sees it, 0 unless THREAD_ID is on.
    """

    address: int
    flags: FaultFlags
    thread: int


@dataclass(frozen=True, slots=True)
class Fork:
    """The process forked; ``fd`` is a new ufd for the child's memory, owned by the receiver of this event."""

    fd: int


@dataclass(frozen=True, slots=True)
class Remap:
    """mremap(2) moved ``length`` bytes from ``source`` to ``target``."""

    source: int
    target: int
    length: int


@dataclass(frozen=True, slots=True)
class Remove:
    """``length`` bytes from ``address`` were given back (madvise DONTNEED or REMOVE): missing again."""

    address: int
    length: int


@dataclass(frozen=True, slots=True)
class Unmap:
    """``length`` bytes from ``address`` are no longer mapped."""

    address: int
    length: int


@dataclass(frozen=True, slots=True)
class UnknownEvent:
    """An event of a kernel newer than this package."""

    kind: int


Event = PageFault | Fork | Remap | Remove | Unmap | UnknownEvent


def decode(raw: Any) -> Event:
    """An event from a ``struct vpc_uffd_event``."""
    kind = raw.kind
    if kind == UFFD_EVENT_PAGEFAULT:
        return PageFault(raw.address, FaultFlags(raw.flags), raw.thread)
    if kind == UFFD_EVENT_FORK:
        return Fork(raw.address)
    if kind == UFFD_EVENT_REMAP:
        return Remap(raw.address, raw.to, raw.length)
    if kind == UFFD_EVENT_REMOVE:
        return Remove(raw.address, raw.length)
    if kind == UFFD_EVENT_UNMAP:
        return Unmap(raw.address, raw.length)
    return UnknownEvent(kind)
