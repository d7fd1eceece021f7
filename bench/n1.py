"""N1: frames out of the guest, counted where they arrive. ``python -m bench.n1``.

The guest sends as fast as its ring takes frames, so its own rate, printed beside, is what the bridge consumed: a
bridge that drops would consume fastest.
"""

from __future__ import annotations

from functools import partial

import trio

from .net import NODUMP, OURS, THEIRS, Bridge, Setup, counts, open_sink, ours_is_there, settled, setup
from .peers import build_bridges
from .rows import REPETITIONS, Row, Sample, at_least, in_turn, print_rows, stated

WARM, LENGTH = 0.3, 1.5  # seconds
MOST_LOSS = 0.01
# Segments of a packet; with "split rand" a packet has the first one, or the first two, and so on.
MIXED = "64,400,1000"


async def sent_now(run: Setup) -> tuple[int, float]:
    """Frames that the guest has handed over, and when it said so, in seconds."""
    return (await run.guest.stats())["tx_packets"], trio.current_time()


async def measure(bridge: Bridge, segments: str) -> Sample:
    """Frames a second that arrive; lost is what the guest handed over and never came."""
    async with setup(bridge, "txonly", args=[f"--txpkts={segments}"]) as run:
        if "," in segments:
            await run.guest.set("txsplit rand")
        async with open_sink(run.here) as sink:
            await sink.line("zero")
            await run.guest.start()
            await trio.sleep(WARM)
            first, sent_first = await counts(sink), await sent_now(run)
            await trio.sleep(LENGTH)
            last, sent_last = await counts(sink), await sent_now(run)
            await run.guest.stop()
            sent = (await run.guest.stats())["tx_packets"]
            total = await settled(sink)
    seconds = (last["now_ns"] - first["now_ns"]) * 1e-9
    arrived = (last["frames"] - first["frames"]) / seconds
    rate = (sent_last[0] - sent_first[0]) / (sent_last[1] - sent_first[1])
    return Sample(arrived, max(0.0, 1 - total["frames"] / sent), rate, total["dropped"] / sent)


async def rows(repetitions: int = REPETITIONS) -> list[Row]:
    build_bridges()
    table = []
    for segments, what, goal in (
        ("64", "64-byte frames out", at_least(8, loss=MOST_LOSS)),
        ("1500", "1500-byte frames out", at_least(8, on_the_way=MOST_LOSS)),
        (MIXED, "mixed sizes out, 64 to 1464", at_least(2.5)),
    ):
        subjects = {b.name: partial(measure, b, segments) for b in (THEIRS, NODUMP)}
        if ours_is_there():
            subjects = {OURS.name: partial(measure, OURS, segments), **subjects}
        got = await in_turn(subjects, repetitions, f"N1 {what}")
        for peer, aim in ((THEIRS, goal), (NODUMP, stated())):
            table.append(Row("N1", what, "frames/s", peer.name, aim, got.get(OURS.name, []), got[peer.name]))
    return table


if __name__ == "__main__":
    print_rows(trio.run(rows))
