"""M0: what an idle bridge keeps resident. ``python -m bench.m0``.

A guest has connected and started both rings; then nothing moves. The pages of the guest's memory that the bridge has
touched count too.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import trio

from .net import OURS, THEIRS, Bridge, setup
from .peers import build_bridges
from .rows import REPETITIONS, Row, Sample, below, in_turn, print_rows


def resident_mib(pid: int) -> float:
    """Rss of a process, from its smaps_rollup."""
    found = re.search(r"^Rss:\s*(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE)
    assert found
    return int(found[1]) / 1024


async def measure(bridge: Bridge) -> Sample:
    async with setup(bridge, "io") as run:
        await run.guest.start()
        await trio.sleep(0.3)
        return Sample(resident_mib(run.bridge.pid))


async def rows(repetitions: int = REPETITIONS) -> list[Row]:
    build_bridges()
    what = "resident memory of an idle bridge, rings started"
    got = await in_turn({b.name: partial(measure, b) for b in (OURS, THEIRS)}, repetitions, f"M0 {what}")
    return [Row("M0", what, "MiB", THEIRS.name, below(40), got[OURS.name], got[THEIRS.name])]


if __name__ == "__main__":
    print_rows(trio.run(rows))
