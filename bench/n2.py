"""N2: frames into the guest, counted by the guest; and there and back. ``python -m bench.n2``.

UDP has no back-pressure, so one rate says little: a sender that is too fast takes the processor from the
very bridge it waits for. Each bridge is measured at its best: the highest offered rate, found by halving,
of which at most 1 % is lost. What it takes of a sender that never pauses is a row of its own. The sender
uses UDP_SEGMENT, as our own bridge does, except where it says "one by one": there sendmmsg.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

import trio

from tests.peers.child import Child

from .net import NODUMP, OURS, THEIRS, Bridge, Setup, open_sink, ours_is_there, settled, setup
from .peers import build_bridges
from .rows import REPETITIONS, Row, Sample, at_least, in_turn, print_rows, stated

LENGTH = 0.5  # seconds a probe
MOST_LOSS = 0.01
CEILING = 6_000_000.0  # frames a second: more than the sender can
PRECISION = 1.08


class Guest:
    """Counts by the guest's port: frames in."""

    forward = "rxonly"

    def __init__(self, run: Setup, sink: Child) -> None:
        self.run, self.sink = run, sink

    async def count(self) -> int:
        """What has arrived, once no more arrives."""
        last, now = -1, (await self.run.guest.stats())["rx_packets"]
        while now != last:
            await trio.sleep(0.05)
            last, now = now, (await self.run.guest.stats())["rx_packets"]
        return now

    async def offer(self, size: int, rate: float, joined: bool = True) -> Sample:
        """Send at ``rate`` (0: without a pause), joined by UDP_SEGMENT or not, and count what arrived."""
        before = await self.count()
        words = await self.sink.line(f"blast {self.run.there} {size} {LENGTH} {rate} {joined:d}")
        sent = json.loads(words)
        got = await self.count() - before
        # A sender that never had a turn has shown nothing.
        loss = 1 - got / sent["sent"] if sent["sent"] else 1.0
        return Sample(got / sent["seconds"], loss, sent["sent"] / sent["seconds"])


class Echo(Guest):
    """Counts by the native receiver: frames into the guest and out again."""

    forward = "io"

    async def count(self) -> int:
        return (await settled(self.sink))["frames"]


@asynccontextmanager
async def running(bridge: Bridge, way: type[Guest]) -> AsyncIterator[Guest]:
    async with setup(bridge, way.forward) as run:
        await run.guest.start()
        async with open_sink(run.here) as sink:
            yield way(run, sink)


async def flood(bridge: Bridge, way: type[Guest], size: int) -> Sample:
    """What arrives from a sender that never pauses."""
    async with running(bridge, way) as run:
        await run.offer(size, 1000)
        return await run.offer(size, 0)


async def best(bridge: Bridge, way: type[Guest], size: int, joined: bool = True) -> Sample:
    """The highest rate with at most 1 % loss."""
    async with running(bridge, way) as run:
        low, high = 2000.0, CEILING
        found = await run.offer(size, low, joined)
        while high / low > PRECISION:
            # Halve the ratio, not the difference: the bridges are far apart.
            rate = (low * high) ** 0.5
            # One hiccup of the machine must not decide: a rate is too high when it fails twice.
            for _ in range(2):
                sample = await run.offer(size, rate, joined)
                if passed := sample.loss is not None and sample.loss <= MOST_LOSS:
                    found = max(found, sample, key=lambda s: s.value)
                    break
            low, high = (rate, high) if passed else (low, rate)
        return found


async def rows(repetitions: int = REPETITIONS) -> list[Row]:
    build_bridges()
    table = []
    plans = [
        (
            "64-byte frames in, at most 1 % lost",
            partial(best, way=Guest, size=64),
            at_least(4, loss=MOST_LOSS),
        ),
        (
            "64-byte frames in, sent one by one, at most 1 % lost",
            partial(best, way=Guest, size=64, joined=False),
            stated(),  # the sender's own pace is below four times the peer's
        ),
        (
            "1500-byte frames in, at most 1 % lost",
            partial(best, way=Guest, size=1500),
            at_least(4, loss=MOST_LOSS),
        ),
        ("64-byte frames in, sender without a pause", partial(flood, way=Guest, size=64), stated()),
        (
            "64-byte frames in and out again, at most 1 % lost",
            partial(best, way=Echo, size=64),
            at_least(4, loss=MOST_LOSS),
        ),
    ]
    for what, measure, goal in plans:
        bridges = [OURS, THEIRS, NODUMP] if ours_is_there() else [THEIRS, NODUMP]
        got = await in_turn({b.name: partial(measure, b) for b in bridges}, repetitions, f"N2 {what}")
        for peer, aim in ((THEIRS, goal), (NODUMP, stated())):
            table.append(Row("N2", what, "frames/s", peer.name, aim, got.get(OURS.name, []), got[peer.name]))
    return table


if __name__ == "__main__":
    print_rows(trio.run(rows))
