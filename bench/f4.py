"""F4: a back-end meets 64 chains whose pages are all missing: time until all are done. ``python -m bench.f4``.

A ring that is started just after the switch of a postcopy, with 64 requests in it, the data of each on a page of its
own; the ring's pages miss as well. Both sides are the same device in plain Python (``f4_device.py``) by the same
framework, in a process of its own; front-end, fault service and driver are in a second one, the source of the pages in
a third, which sends nothing unasked. Measured is the time from the messages that start the ring until the device has
done the last chain.

*Together*: ``queue.unordered()`` and a plain ``async for chain in queue``, with 64 pages asked for ahead, as usual.
*One after the other*: the plain iteration with none asked for ahead (``Options(pages_ahead=0)``).
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
from .f4_service import CHAINS
from .rows import REPETITIONS, Row, Sample, at_most, in_turn, print_rows

UNORDERED, IN_ORDER = "together (queue.unordered)", "together (a plain iteration)"
IN_TURN = "the same, one fault after the other"


async def measure(unordered: bool, ahead: int) -> Sample:
    """Milliseconds."""
    with tempfile.TemporaryDirectory(prefix="vpc-bench-") as folder:
        path = Path(folder) / "sock"
        device: list[str | Path] = [
            sys.executable,
            "-m",
            "bench.f4_device",
            path,
            *("--ahead", str(ahead)),
            *(["--unordered"] if unordered else []),
        ]
        front: list[str | Path] = [sys.executable, "-m", "bench.f4_service", path]
        async with open_child(device, name="device", cwd=ROOT) as back:
            with trio.fail_after(20):
                while not path.is_socket():
                    if back.ended.is_set():
                        raise RuntimeError(f"the device ended: {back.last_words()}")
                    await trio.sleep(0.01)
            async with open_child(front, name="front-end", cwd=ROOT) as it:
                begin = json.loads((await it.until(r"\{.*?\}", 0, 60))[0])["begin_ns"]
                said = json.loads((await back.until(r"\{.*?\}", 0, 60))[0])
    if said["different"] != CHAINS:
        raise RuntimeError(f"{said['different']} different requests were read, not {CHAINS}")
    return Sample((said["last_ns"] - begin) / 1e6)


async def rows(repetitions: int = REPETITIONS) -> list[Row]:
    sides = {
        UNORDERED: partial(measure, True, CHAINS),
        IN_ORDER: partial(measure, False, CHAINS),
        IN_TURN: partial(measure, False, 0),
    }
    got = await in_turn(sides, repetitions, "F4")
    what = f"{CHAINS} chains whose pages are all missing, "
    return [
        Row("F4", what + way, "ms", IN_TURN, at_most(0.3), got[way], got[IN_TURN])
        for way in (UNORDERED, IN_ORDER)
    ]


if __name__ == "__main__":
    print_rows(trio.run(rows))
