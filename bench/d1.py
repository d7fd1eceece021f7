"""D1: an entropy device in plain Python (``examples/rng``) against one in C. ``python -m bench.d1``.

The guest is our own front-end's driver in C, the same for both: requests of 64 bytes, so many in flight. The
peer is written for the bench on QEMU's libvhost-user.
"""

from __future__ import annotations

import os
import sys
import tempfile
from functools import partial
from pathlib import Path

import trio

from tests.peers.child import Child, open_child
from vhostpc.frontend import Driver, GuestRegion, MemoryShare, RingLayout, connect, start_ring
from vhostpc.pages.ramblock import RamSet
from vhostpc.wire.vhost_user import Feature

from . import ROOT
from .native import tool
from .net import REST
from .peers import LIBRARY, build_bridges
from .rows import REPETITIONS, Row, Sample, in_turn, print_rows, stated

OURS, PEER = "vhostpc rng", "rng on libvhost-user"
SIZE, WARM, COUNT = 64, 2_000, 150_000
DEPTHS = {"64 in flight": 64, "one at a time": 1}


def cpu_seconds(pid: int) -> float:
    """User and system time of a process until now."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def command(name: str, path: Path) -> list[str | Path]:
    if name == PEER:
        built = tool(
            "rng_libvhost", f"-I{LIBRARY}", "-isystem", str(LIBRARY), str(LIBRARY / "libvhost-user.o")
        )
        return [built, path, str(REST)]
    rng = f"{ROOT / 'examples' / 'rng' / 'rng.py'}:Rng"
    program = [sys.executable, "-m", "vhostpc", "backend", rng]
    return ["taskset", "-c", str(REST), *program, "--socket-path", path]


async def drive(path: Path, child: Child, depth: int) -> tuple[Sample, Sample]:
    """Requests a second, and the back-end's microseconds of processor a request."""
    count = COUNT if depth > 1 else COUNT // 10
    with RamSet() as ram:
        block = ram.create("ram", 4 << 20)
        regions = [GuestRegion(0, block.length, block)]
        async with connect(path) as front:
            await front.negotiate()
            memory = MemoryShare(front, regions)
            await memory.share()
            layout = RingLayout.contiguous_at(0, slots=depth, buffer_len=SIZE)
            event = bool(front.features & Feature.EVENT_IDX)
            with Driver(ram, regions, layout, receive=True, header=0, event_idx=event) as driver:
                await driver.reset()
                await start_ring(front, memory, 0, driver)
                await driver.run(WARM, SIZE)
                before, begin = cpu_seconds(child.pid), trio.current_time()
                await driver.run(count, SIZE)
                seconds = trio.current_time() - begin
                used = cpu_seconds(child.pid) - before
                assert driver.numbers().bad_used == 0
    return Sample(count / seconds), Sample(used / count * 1e6)


async def measure(name: str, depth: int) -> tuple[Sample, Sample]:
    with tempfile.TemporaryDirectory(prefix="vpc-bench-") as folder:
        path = Path(folder) / "rng.sock"
        async with open_child(command(name, path), name=name, cwd=ROOT) as child:
            with trio.fail_after(20):
                while not path.is_socket():
                    if child.ended.is_set():
                        raise RuntimeError(f"{name} ended: {child.last_words()}")
                    await trio.sleep(0.01)
            return await drive(path, child, depth)


async def rows(repetitions: int = REPETITIONS) -> list[Row]:
    build_bridges()
    table = []
    for how, depth in DEPTHS.items():
        got = await in_turn({n: partial(measure, n, depth) for n in (OURS, PEER)}, repetitions, f"D1 {how}")
        for which, (what, unit) in enumerate((("requests", "requests/s"), ("processor", "us/request"))):
            ours, theirs = ([both[which] for both in got[n]] for n in (OURS, PEER))
            table.append(
                Row("D1", f"entropy, {SIZE} bytes, {how}, {what}", unit, PEER, stated(), ours, theirs)
            )
    return table


if __name__ == "__main__":
    print_rows(trio.run(rows))
