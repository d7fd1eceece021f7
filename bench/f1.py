"""F1: a fault served locally, touch to return. ``python -m bench.f1``.

The toucher is the same program for both sides, in a process of its own. Spinning is off in both.
"""

from __future__ import annotations

import json
import sys
import tempfile
from functools import partial
from pathlib import Path

import trio

from tests.peers.child import open_child

from . import ROOT
from .native import tool
from .rows import REPETITIONS, Row, Sample, at_most, in_turn, print_rows, stated

PAGES, GAP_US = 8192, 0
PINNINGS = {"one core": (0, 0), "two cores": (1, 0)}  # toucher, handler
OURS = "vhostpc fault service"
PEER = "minimal C handler"


async def measure(name: str, pinning: tuple[int, int]) -> tuple[Sample, Sample]:
    """p50 and p99 of one run, in microseconds."""
    toucher, handler = pinning
    with tempfile.TemporaryDirectory(prefix="vpc-bench-") as folder:
        path = Path(folder) / "sock"
        argv = [tool("fault_serve"), path, str(handler)]
        if name == OURS:
            argv = ["taskset", "-c", str(handler), sys.executable, "-m", "bench.f1_service", path]
        async with open_child(argv, name=name, cwd=ROOT) as server:
            await server.until("ready\n")
            async with open_child(
                [tool("fault_touch"), path, str(PAGES), str(GAP_US), str(toucher)]
            ) as touch:
                if await touch.wait(120):
                    raise RuntimeError(f"{touch.last_words()}\n{server.last_words()}")
                got = json.loads(touch.said)
    if got["bad"]:
        raise RuntimeError(f"{name} served {got['bad']} wrong pages")
    return Sample(got["p50_ns"] / 1000), Sample(got["p99_ns"] / 1000)


async def rows(repetitions: int = REPETITIONS) -> list[Row]:
    table = []
    names = [OURS, PEER] if (ROOT / "bench" / "f1_service.py").exists() else [PEER]
    for where, pinning in PINNINGS.items():
        got = await in_turn({n: partial(measure, n, pinning) for n in names}, repetitions, f"F1 {where}")
        for which, what in enumerate(("p50", "p99")):
            ours, theirs = ([both[which] for both in got.get(n, [])] for n in (OURS, PEER))
            row = f"fault served locally, {where}, {what}"
            table.append(Row("F1", row, "us", PEER, at_most(1.2) if which == 0 else stated(), ours, theirs))
    return table


if __name__ == "__main__":
    print_rows(trio.run(rows))
