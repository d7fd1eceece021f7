"""N3: round trip of a small frame, UDP to guest and back. ``python -m bench.n3``."""

from __future__ import annotations

from functools import partial

import trio

from .net import NODUMP, OURS, REST, THEIRS, Bridge, ours_is_there, run_tool, setup
from .peers import build_bridges
from .rows import REPETITIONS, Row, Sample, at_most, in_turn, print_rows, stated

SIZE, COUNT = 64, 4000


async def measure(bridge: Bridge) -> tuple[Sample, Sample]:
    """p50 and p99 of one run, in microseconds. The guest polls, so it adds next to nothing."""
    async with setup(bridge, "io") as run:
        await run.guest.start()
        got = await run_tool("udp_rtt", run.here, run.there, SIZE, COUNT, REST)
    loss = got["lost"] / (got["lost"] + got["count"])
    return Sample(got["p50_ns"] / 1000, loss), Sample(got["p99_ns"] / 1000, loss)


async def rows(repetitions: int = REPETITIONS) -> list[Row]:
    build_bridges()
    bridges = [OURS, THEIRS, NODUMP] if ours_is_there() else [THEIRS, NODUMP]
    got = await in_turn({b.name: partial(measure, b) for b in bridges}, repetitions, "N3 round trip")
    table = []
    for peer, goal in ((THEIRS, at_most(1.0)), (NODUMP, stated())):
        for which, what in enumerate(("round trip of 64 bytes, p50", "round trip of 64 bytes, p99")):
            ours = [both[which] for both in got.get(OURS.name, [])]
            theirs = [both[which] for both in got[peer.name]]
            table.append(Row("N3", what, "us", peer.name, goal, ours, theirs))
    return table


if __name__ == "__main__":
    print_rows(trio.run(rows))
