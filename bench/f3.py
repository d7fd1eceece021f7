"""F3: faults while a Python thread of the serving process spins. ``python -m bench.f3``.

F2's pair of endpoints, against itself: the destination's process has a thread that computes in plain Python and gives
the GIL away only when it is asked to. The same for a fault served locally is among the rows of F1.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import trio

from .f2 import FLOWING, IDLE, PAIR, WAYS, compare, pair
from .rows import REPETITIONS, Row, at_most, in_turn, print_rows, stated


async def rows(repetitions: int = REPETITIONS) -> list[Row]:
    table = []
    for how in (IDLE, FLOWING):
        rate, _ = WAYS[how]
        sides = {"busy": partial(pair, rate, module="bench.f3_endpoint"), "idle": partial(pair, rate)}
        got = await in_turn(sides, repetitions, f"F3 {how}")
        what = f"{how}, a busy Python thread at the destination"
        p50, p99 = compare(what, got["busy"], got["idle"], f"{PAIR}, no busy thread", lambda _: stated())
        table += [replace(p50, id="F3"), replace(p99, id="F3", goal=at_most(2))]
    return table


if __name__ == "__main__":
    print_rows(trio.run(rows))
