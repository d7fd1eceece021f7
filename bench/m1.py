"""M1: RAM in, what a destination needs to take a machine's memory. ``python -m bench.m1``.

Each side is a process of its own that waits for ``migrate-incoming`` and is driven by QMP; both get the same bytes
(:mod:`bench.streams`: a stopped QEMU's stream, with a record for each page) from the same native sender over a unix
socket: 512 MiB of pages full of data, then as many marks of zero pages. What is measured is the time from the
sender's first byte to the event that says ``completed``. Behind it some pages of either side's memory are looked at.
"""

from __future__ import annotations

import os
import tempfile
from functools import partial
from pathlib import Path

import trio

from .ends import OURS, PEER, destination, memory_file, play
from .rows import REPETITIONS, Row, Sample, at_most, in_turn, print_rows
from .streams import PAGE, pool_page, streams

MIB = 512
CONTENTS = {"full": "pages full of data", "zero": "zero pages"}


def look(pid: int, mib: int, content: str) -> None:
    """Whether a hundred pages are what was sent."""
    fd = memory_file(pid, mib << 20)
    pages = (mib << 20) // PAGE
    for page in range(0, pages, pages // 100):
        wanted = pool_page(page) if content == "full" else bytes(PAGE)
        if os.pread(fd, PAGE, page * PAGE) != wanted:
            raise RuntimeError(f"page {page:#x} is not what was sent")
    os.close(fd)


async def measure(name: str, stream: Path, content: str) -> Sample:
    with tempfile.TemporaryDirectory(prefix="vpc-bench-") as folder:
        async with destination(name, Path(folder), MIB) as it:
            played = await play(it, Path(folder), stream, (MIB << 20) // PAGE, content)
            look(it.pid, MIB, content)
    return Sample(played.seconds * 1000)


async def rows(repetitions: int = REPETITIONS) -> list[Row]:
    table = []
    async with streams(MIB) as made:
        for content, what in CONTENTS.items():
            sides = {n: partial(measure, n, made[MIB], content) for n in (OURS, PEER)}
            got = await in_turn(sides, repetitions, f"M1 {what}")
            row = Row("M1", f"RAM in, {MIB} MiB, {what}", "ms", PEER, at_most(1.0), got[OURS], got[PEER])
            table.append(row)
    return table


if __name__ == "__main__":
    print_rows(trio.run(rows))
