"""Where the time of a page goes: a fault served remotely, stage by stage. ``python -m bench.stages``.

The idle case of F2 with our machine at both ends, each process with ``native/stamps.c`` preloaded, which notes when the
system calls of its threads begin and end (by CLOCK_MONOTONIC; it costs some 0.1 us a call). One page is in flight at a
time, so the calls of one fault are those between its touch and its return. Prints the medians as a table for the
reader; it is no row, there is nothing to compare it with.
"""

from __future__ import annotations

import bisect
import itertools
import os
import statistics
import struct
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import trio

from .f2 import WITHOUT, pair
from .native import tool

READ, SEND, POLL, EPOLL, IOCTL, SEEK, SLEEP = range(1, 8)
COPY, WAKE = 0xC028AA03, 0x8010AA02
STAGES = (
    "fault: the kernel tells it, the fault loop wakes up",
    "fault read, page looked up",
    "request out: send, the source wakes up",
    "source's turn: request read, page looked at, record made",
    "page back: send, the load wakes up",
    "page read from the socket",
    "place: UFFDIO_COPY",
    "wake: UFFDIO_WAKE of the back-end's mapping",
    "the toucher wakes up",
)


class Stamp(NamedTuple):
    begin: int
    end: int
    result: int
    thread: int
    call: int
    what: int


_STAMP = struct.Struct("=QQqIIQ")


class Calls:
    """The calls of one thread, by time."""

    def __init__(self, stamps: list[Stamp]) -> None:
        self.stamps = sorted(stamps)
        self._begins = [s.begin for s in self.stamps]

    def after(self, when: int, call: int, what: int = 0) -> tuple[int, Stamp]:
        """The first call of the kind that ended well after ``when``, and its index. Raises LookupError."""
        for i in range(max(bisect.bisect_left(self._begins, when) - 1, 0), len(self.stamps)):
            found = self.stamps[i]
            if found.call == call and found.what == what and found.end > when and found.result >= 0:
                return i, found
        raise LookupError(call)

    def has(self, *calls: int) -> bool:
        return set(calls) <= {s.call for s in self.stamps}


def threads(folder: Path) -> Iterator[Calls]:
    for file in folder.iterdir():
        data = file.read_bytes()
        count = min(int.from_bytes(data[:8], "little"), (len(data) - 8) // _STAMP.size)
        mine = defaultdict(list)
        for fields in _STAMP.iter_unpack(data[8 : 8 + count * _STAMP.size]):
            mine[fields[3]].append(Stamp(*fields))
        yield from map(Calls, mine.values())


def stages(folder: Path) -> list[list[int]]:
    """For each fault the time in each stage, in nanoseconds."""
    every = list(threads(folder))
    toucher = max((c for c in every if c.has(SEEK, SLEEP)), key=lambda c: len(c.stamps))
    load = max((c for c in every if c.has(POLL, IOCTL)), key=lambda c: sum(s.what == COPY for s in c.stamps))
    faults = max((c for c in every if c.has(EPOLL, READ, SEND)), key=lambda c: len(c.stamps))
    source = max((c for c in every if c.has(POLL, READ, SEND) and c is not load), key=lambda c: len(c.stamps))
    found = []
    for seek, sleep in itertools.pairwise(toucher.stamps):
        if (seek.call, sleep.call) != (SEEK, SLEEP):
            continue
        try:
            at, read = faults.after(seek.end, READ)
            woken = faults.stamps[at - 1].end
            _, request = faults.after(read.end, SEND)
            at, asked = source.after(request.begin, READ)
            turn = source.stamps[at - 1].end
            _, page = source.after(asked.end, SEND)
            at, came = load.after(page.begin, READ)
            there = load.stamps[at - 1].end
            _, place = load.after(came.begin, IOCTL, COPY)
            _, wake = load.after(place.end, IOCTL, WAKE)
        except LookupError:
            break
        ends = [
            seek.end,
            woken,
            request.begin,
            turn,
            page.begin,
            there,
            place.begin,
            place.end,
            wake.end,
            sleep.begin,
        ]
        ends = [min(end, sleep.begin) for end in ends]  # the toucher may run before the wake has returned
        if ends == sorted(ends):  # otherwise something else was in flight, too
            found.append([b - a for a, b in itertools.pairwise(ends)])
    return found


async def measure() -> list[list[int]]:
    library = tool("stamps", "-shared", "-fPIC", "-ldl")
    with tempfile.TemporaryDirectory(prefix="vpc-bench-") as folder:
        os.environ.update(LD_PRELOAD=str(library), STAMPS=folder)
        try:
            await pair(0, names=WITHOUT)
        finally:
            del os.environ["LD_PRELOAD"], os.environ["STAMPS"]
        return stages(Path(folder))


def main() -> None:
    found = trio.run(measure)
    if not found:
        raise SystemExit("no fault could be followed from its touch to its return")
    medians = [statistics.median(one[i] for one in found) / 1000 for i in range(len(STAGES))]
    whole = statistics.median(sum(one) for one in found) / 1000
    print(f"{len(found)} faults, median {whole:.1f} us from touch to return; medians of the stages:\n")
    print("| stage | us | share |\n| --- | --- | --- |")
    for stage, median in zip(STAGES, medians, strict=True):
        print(f"| {stage} | {median:.1f} | {100 * median / sum(medians):.0f} % |")


if __name__ == "__main__":
    main()
