"""I1: what an inflight region costs: the same back-end with one and without. ``python -m bench.i1``.

The guest is our own front-end's driver in C. Frames go out to the bridge's pump with the null device behind it
(``bench.n4_service``), requests to the entropy device in Python (``examples/rng``).
"""

from __future__ import annotations

import os
import sys
import tempfile
from functools import partial
from pathlib import Path

import trio

from tests.peers.child import open_child
from vhostpc.frontend import Driver, FrontEnd, GuestRegion, MemoryShare, RingLayout, connect, start_ring
from vhostpc.frontend.client import KNOWN_PROTOCOL_FEATURES
from vhostpc.pages.ramblock import RamSet
from vhostpc.wire.vhost_user import Feature, ProtocolFeature

from . import ROOT
from .net import REST
from .rows import REPETITIONS, Row, Sample, in_turn, print_rows, stated

WITH, WITHOUT = "vhostpc, with an inflight region", "vhostpc, without"
SIZE, ENTRIES, WARM = 64, 256, 2_000
HEADER = 12

#: What it serves: the program, the ring, how many requests, and what the row calls them.
FRAMES = (["-m", "bench.n4_service"], 1, 3_000_000, f"{SIZE}-byte frames out", "frames/s")
REQUESTS = (
    ["-m", "vhostpc", "backend", f"{ROOT / 'examples' / 'rng' / 'rng.py'}:Rng", "--socket-path"],
    0,
    150_000,
    f"entropy, {SIZE} bytes, {ENTRIES} in flight",
    "requests/s",
)


async def share_region(front: FrontEnd, queues: int) -> None:
    """Have the back-end make one and keep it."""
    made = await front.get_inflight_fd(queues, ENTRIES)
    assert made is not None, "the back-end makes no inflight region"
    region, fd = made
    await front.set_inflight_fd(region, fd)
    os.close(fd)


async def drive(path: Path, index: int, count: int, region: bool) -> Sample:
    """Chains a second that come back."""
    receive = index == 0
    with RamSet() as ram:
        block = ram.create("ram", 4 << 20)
        regions = [GuestRegion(0, block.length, block)]
        async with connect(path) as front:
            await front.negotiate(protocol=KNOWN_PROTOCOL_FEATURES | ProtocolFeature.INFLIGHT_SHMFD)
            if region:
                await share_region(front, index + 1)
            memory = MemoryShare(front, regions)
            await memory.share()
            layout = RingLayout.contiguous_at(0, num=ENTRIES, buffer_len=SIZE if receive else 2048)
            event = bool(front.features & Feature.EVENT_IDX)
            header = 0 if receive else HEADER
            with Driver(ram, regions, layout, receive=receive, header=header, event_idx=event) as driver:
                await driver.reset()
                await start_ring(front, memory, index, driver)
                await driver.run(WARM, SIZE)
                begin = trio.current_time()
                await driver.run(count, SIZE)
                seconds = trio.current_time() - begin
                assert driver.numbers().bad_used == 0
    return Sample(count / seconds)


async def measure(program: list[str], index: int, count: int, region: bool) -> Sample:
    with tempfile.TemporaryDirectory(prefix="vpc-bench-") as folder:
        path = Path(folder) / "s"
        argv: list[str | Path] = ["taskset", "-c", str(REST), sys.executable, *program, path]
        async with open_child(argv, name="the back-end", cwd=ROOT) as child:
            with trio.fail_after(20):
                while not path.is_socket():
                    if child.ended.is_set():
                        raise RuntimeError(f"the back-end ended: {child.last_words()}")
                    await trio.sleep(0.01)
            return await drive(path, index, count, region)


async def rows(repetitions: int = REPETITIONS) -> list[Row]:
    table = []
    for program, index, count, what, unit in (FRAMES, REQUESTS):
        subjects = {name: partial(measure, program, index, count, name == WITH) for name in (WITH, WITHOUT)}
        got = await in_turn(subjects, repetitions, f"I1 {what}")
        table.append(
            Row("I1", f"{what}, with an inflight region", unit, WITHOUT, stated(), got[WITH], got[WITHOUT])
        )
    return table


if __name__ == "__main__":
    print_rows(trio.run(rows))
