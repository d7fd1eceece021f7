"""P1: a page that a back-end waits for, with a fault and without one (``--no-fault``). ``python -m bench.p1``.

A device in plain Python has chains whose data is on pages of their own. Each page is held back for so long, then placed
and, where there was a fault, its waiter is woken, as QEMU does it. Measured are the time from just before the page is
placed until the device has read it, and the processor time of the whole process while pages are held back. Nobody is
asked for a page here: without a fault a page comes when the migration's background brings it, and that wait is not in
the figures.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from functools import partial

import trio

from tests.kit.absent_guest import PAGE, AbsentGuest
from tests.kit.raw_front_end import connected
from vhostpc.backend import Device, Options, Queue

from .rows import REPETITIONS, Row, Sample, in_turn, print_rows, stated

HOLDS = {0.001: 100, 0.02: 40, 0.5: 4}  # s, and how many pages
NEVER, FAULT = "waiting without a fault", "waiting by a fault"
DATA = 0x40  # page of the first chain's data


@dataclass(frozen=True)
class Waited:
    """Microseconds from placing to reading; microseconds of processor for each millisecond of holding back."""

    late: Sample
    processor: Sample


class Reader(Device):
    def __init__(self) -> None:
        self.count = 0
        self.read_ns = 0
        self.came = trio.Event()

    async def handle_queue(self, queue: Queue) -> None:
        async for chain in queue:
            chain.read()
            self.read_ns = time.monotonic_ns()
            self.count += 1
            self.came.set()
            self.came = trio.Event()


async def measure(hold: float, no_fault: bool) -> Waited:
    count = HOLDS[hold]
    guest, device = AbsentGuest((DATA + count) * PAGE), Reader()
    ring = guest.ring(0, 128)
    for i in range(count):
        ring.set_desc(i, guest.put((DATA + i) * PAGE, b"data"), 4)
    ring.offer(*range(count))
    late, processor = [], 0.0
    try:
        async with connected(device, Options(no_fault=no_fault)) as front:
            await front.negotiate()
            await guest.advise(front)
            await guest.listen(front)
            await guest.share_table(front)
            for page in range(DATA):
                guest.place(page)
            await ring.send_setup(front)
            await front.barrier()
            for i in range(count):
                used = time.process_time()
                await trio.sleep(hold)
                processor += time.process_time() - used
                came, begin = device.came, time.monotonic_ns()
                guest.place(DATA + i)
                await came.wait()
                late.append(device.read_ns - begin)
                assert device.count == i + 1
            await guest.end(front)
    finally:
        guest.close()
    return Waited(Sample(statistics.median(late) / 1e3), Sample(processor * 1e6 / (hold * 1e3 * count)))


async def rows(repetitions: int = REPETITIONS) -> list[Row]:
    found = []
    for hold in HOLDS:
        sides = {NEVER: partial(measure, hold, True), FAULT: partial(measure, hold, False)}
        got = await in_turn(sides, repetitions, f"P1, {hold * 1e3:g} ms")
        for what, unit, name in (
            ("from its placing to its reading", "us", "late"),
            ("processor while it is waited for", "us/ms", "processor"),
        ):
            ours, theirs = ([getattr(w, name) for w in got[side]] for side in (NEVER, FAULT))
            what = f"page held back for {hold * 1e3:g} ms, {NEVER}, {what}"
            found.append(Row("P1", what, unit, FAULT, stated(), ours, theirs))
    return found


if __name__ == "__main__":
    print_rows(trio.run(rows))
