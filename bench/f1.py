"""F1: a fault served locally, touch to return. ``python -m bench.f1``.

The toucher is the same program for both sides, in a process of its own. Spinning is off in both, or the same bounded
one in both: so many microseconds after each event (on one core that would only keep the toucher waiting). The last rows
compare our service with itself: a thread of its process computes in Python meanwhile. Where the cores are not chosen
that shows what the thread costs as such; with two cores the whole process is held to one of them, so the handler
contends for a processor too, and the row shows the scheduler's part.
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import trio

from tests.peers.child import open_child

from . import ROOT
from .native import tool
from .rows import REPETITIONS, Row, Sample, at_most, in_turn, print_rows, stated

PAGES, NO_GAP = 8192, "0"
SPIN_US = 50
OURS = "vhostpc fault service"
PEER = "minimal C handler"


@dataclass(frozen=True)
class Way:
    """How both sides run: on which cores, spinning so long after an event, with a busy Python thread or not."""

    toucher: int
    handler: int | None
    spin_us: int = 0
    busy: bool = False


ONE_CORE, TWO_CORES, FREE = Way(0, 0), Way(1, 0), Way(-1, None)


async def measure(name: str, way: Way) -> tuple[Sample, Sample]:
    """p50 and p99 of one run, in microseconds."""
    with tempfile.TemporaryDirectory(prefix="vpc-bench-") as folder:
        path = Path(folder) / "sock"
        argv: list[str | Path] = [tool("fault_serve"), path, str(way.handler), str(way.spin_us)]
        if name == OURS:
            argv = [sys.executable, "-m", "bench.f1_service", path, "--spin-us", str(way.spin_us)]
            argv = [*argv, *(["--busy"] if way.busy else [])]
            argv = argv if way.handler is None else ["taskset", "-c", str(way.handler), *argv]
        async with open_child(argv, name=name, cwd=ROOT) as server:
            await server.until("ready\n")
            async with open_child([tool("fault_touch"), path, str(PAGES), NO_GAP, str(way.toucher)]) as touch:
                if await touch.wait(120):
                    raise RuntimeError(f"{touch.last_words()}\n{server.last_words()}")
                got = json.loads(touch.said)
    if got["bad"]:
        raise RuntimeError(f"{name} served {got['bad']} wrong pages")
    return Sample(got["p50_ns"] / 1000), Sample(got["p99_ns"] / 1000)


async def against_peer(what: str, way: Way, repetitions: int) -> list[Row]:
    got = await in_turn({n: partial(measure, n, way) for n in (OURS, PEER)}, repetitions, f"F1 {what}")
    table = []
    for which, part in enumerate(("p50", "p99")):
        ours, theirs = ([both[which] for both in got[n]] for n in (OURS, PEER))
        goal = at_most(1.2) if which == 0 else stated()
        table.append(Row("F1", f"fault served locally, {what}, {part}", "us", PEER, goal, ours, theirs))
    return table


async def beside_python(what: str, way: Way, repetitions: int) -> Row:
    """Our own p99 with a thread of the process that computes in Python, against the one without."""
    idle, busy = "without it", "busy thread"
    ways = {busy: replace(way, busy=True), idle: way}
    got = await in_turn({n: partial(measure, OURS, w) for n, w in ways.items()}, repetitions, f"F1 {what}")
    ours, theirs = ([p99 for _, p99 in got[n]] for n in (busy, idle))
    row = f"fault served locally, {what}, a busy Python thread in the process, p99"
    return Row("F1", row, "us", f"{OURS}, no busy thread", at_most(2), ours, theirs)


async def rows(repetitions: int = REPETITIONS) -> list[Row]:
    spinning = replace(TWO_CORES, spin_us=SPIN_US)
    return [
        *await against_peer("one core", ONE_CORE, repetitions),
        *await against_peer("two cores", TWO_CORES, repetitions),
        *await against_peer(f"two cores, both spin {SPIN_US} us", spinning, repetitions),
        await beside_python("one core", ONE_CORE, repetitions),
        await beside_python("cores not chosen", FREE, repetitions),
        await beside_python("two cores", TWO_CORES, repetitions),
    ]


if __name__ == "__main__":
    print_rows(trio.run(rows))
