"""M4: what size costs. ``python -m bench.m4``.

Our endpoint takes a machine full of data as in M1 and sends it as in M2, at 256 MiB, 1 GiB, 4 GiB and so on up to a
third of the memory that is free (sizes left out are named). Judged is the time a GiB against that at 256 MiB, which
should not grow; and the process's own memory (RssAnon: what is neither shared blocks nor files; its largest of a look
every 10 ms) beyond that at 256 MiB, of which 1 MiB and 6 bits a page of 4 KiB are allowed. The kernel's page tables for
the shared blocks are not in it.
"""

from __future__ import annotations

import re
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import trio

from .ends import OURS, destination, drain, own_bytes, play
from .m1 import look
from .rows import REPETITIONS, Row, Sample, at_most, console, in_turn, print_rows
from .streams import PAGE, streams

SIZES = [256, 1024, 4096, 16384, 65536]  # MiB
LEAST = SIZES[0]


@dataclass(frozen=True)
class Cost:
    """Milliseconds a GiB in and out, and bytes of the process's own memory."""

    taken: float
    sent: float
    memory: int


def possible() -> list[int]:
    """The sizes that fit; says which do not."""
    found = re.search(r"^MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    assert found
    third = (int(found[1]) >> 10) // 3
    if left := [f"{mib >> 10} GiB" for mib in SIZES if mib > third]:
        console.print(f"M4: left out, beyond a third of the free memory ({third} MiB): {', '.join(left)}")
    return [mib for mib in SIZES if mib <= third]


async def measure(mib: int, stream: Path) -> Cost:
    memory = 0

    async def watch(pid: int) -> None:
        nonlocal memory
        while True:
            memory = max(memory, own_bytes(pid))
            await trio.sleep(0.01)

    with tempfile.TemporaryDirectory(prefix="vpc-bench-") as folder:
        async with destination(OURS, Path(folder), mib) as it, trio.open_nursery() as nursery:
            nursery.start_soon(watch, it.pid)
            taken = await play(it, Path(folder), stream, (mib << 20) // PAGE, "full")
            look(it.pid, mib, "full")
            sent = await drain(it, Path(folder))
            nursery.cancel_scope.cancel()
    return Cost(taken.seconds * 1000 / (mib / 1024), sent.seconds * 1000 / (mib / 1024), memory)


def name(mib: int) -> str:
    return f"{mib} MiB" if mib < 1024 else f"{mib >> 10} GiB"


async def rows(repetitions: int = REPETITIONS) -> list[Row]:
    sizes = possible()
    async with streams(*sizes) as made:
        sides = {name(mib): partial(measure, mib, made[mib]) for mib in sizes}
        got = await in_turn(sides, repetitions, "M4")
    least, table = got[name(LEAST)], []
    for mib in sizes[1:]:
        costs = got[name(mib)]
        for what, field in (("in", "taken"), ("out", "sent")):
            ours, theirs = ([Sample(getattr(c, field)) for c in side] for side in (costs, least))
            row = f"RAM {what}, {name(mib)} full of data, time a GiB"
            table.append(Row("M4", row, "ms", f"{OURS}, {name(LEAST)}", at_most(1.25), ours, theirs))
        grown = [Sample((c.memory - d.memory) / 1024) for c, d in zip(costs, least, strict=True)]
        allowed = 1024 + (mib << 20) / PAGE * 6 / 8 / 1024
        row = f"own memory, {name(mib)}, beyond that at {name(LEAST)}"
        limit = [Sample(allowed)] * len(grown)
        table.append(Row("M4", row, "KiB", "1 MiB and 6 bits a page", at_most(1.0), grown, limit))
    return table


if __name__ == "__main__":
    print_rows(trio.run(rows))
