"""M2: RAM out of a stopped machine. ``python -m bench.m2``.

Each side first takes the machine as in M1, so both have the same one; then it sends it, without a limit of bandwidth,
to the same native reader over a unix socket, which looks at nothing but the stream's end. What is measured is the
time from the command ``migrate`` to the event that says ``completed``. A QEMU whose machine is stopped sends each page
once, as ours does.
"""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path

import trio

from .ends import OURS, PEER, destination, drain, play
from .m1 import CONTENTS, MIB
from .rows import REPETITIONS, Row, Sample, at_most, in_turn, print_rows
from .streams import PAGE, streams

RECORD = {"full": PAGE + 8, "zero": 9}  # bytes a page


async def measure(name: str, stream: Path, content: str) -> Sample:
    pages = (MIB << 20) // PAGE
    with tempfile.TemporaryDirectory(prefix="vpc-bench-") as folder:
        async with destination(name, Path(folder), MIB) as it:
            await play(it, Path(folder), stream, pages, content)
            sent = await drain(it, Path(folder))
    least = pages * RECORD[content]
    if not least <= sent.bytes <= least + (8 << 20):
        raise RuntimeError(f"{name} sent {sent.bytes} bytes, where the memory alone is {least}")
    return Sample(sent.seconds * 1000)


async def rows(repetitions: int = REPETITIONS) -> list[Row]:
    table = []
    async with streams(MIB) as made:
        for content, what in CONTENTS.items():
            sides = {n: partial(measure, n, made[MIB], content) for n in (OURS, PEER)}
            got = await in_turn(sides, repetitions, f"M2 {what}")
            row = Row("M2", f"RAM out, {MIB} MiB, {what}", "ms", PEER, at_most(1.0), got[OURS], got[PEER])
            table.append(row)
    return table


if __name__ == "__main__":
    print_rows(trio.run(rows))
