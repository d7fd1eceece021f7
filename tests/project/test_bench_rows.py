"""The benchmarks' rows: what the table says of one, and that each can be run."""

from __future__ import annotations

import importlib
import inspect

import pytest

from bench.__main__ import ROWS
from bench.r3 import BIOS, WALK, bios
from bench.rows import Goal, Row, Sample, at_least, at_most, below, stated


def row(goal: Goal, ours: list[Sample], theirs: list[Sample]) -> Row:
    return Row("X", "something", "frames/s", "peer", goal, ours, theirs)


def samples(*values: float, loss: float | None = None, sent: float | None = None) -> list[Sample]:
    return [Sample(v, loss, sent) for v in values]


@pytest.mark.parametrize(
    ("goal", "ours", "loss", "reached"),
    [
        (at_least(8), 80, None, True),
        (at_least(8), 79, None, False),
        (at_least(8, loss=0.01), 90, 0.01, True),
        (at_least(8, loss=0.01), 90, 0.02, False),
        (at_most(1.2), 12, None, True),
        (at_most(1.2), 13, None, False),
        (below(40), 39.9, None, True),
        (below(40), 40, None, False),
        (stated(), 1, 0.9, True),
    ],
)
def test_goal(goal: Goal, ours: float, loss: float | None, reached: bool) -> None:
    """Judged by medians: one odd run decides nothing."""
    mine = samples(ours, ours, ours * 100, loss=loss) + samples(ours, 0, loss=loss)
    verdict = row(goal, mine, samples(10, 10, 1000)).cells()[5]
    assert verdict.endswith("(missed)") is not reached


def test_loss_at_the_receiver() -> None:
    """What the receiver's socket had no room for is not held against the bridge where the goal says so."""
    for full, said, reached in ((0.05, "5", True), (0.02, "2", False)):
        mine = [Sample(90, 0.06, 95, full)] * 3
        cells = row(at_least(8, on_the_way=0.01), mine, samples(10)).cells()
        assert cells[5].endswith("(missed)") is not reached
        assert f"loss 6 % ({said} % at the receiver's full socket)" in cells[2]


def test_cells() -> None:
    mine = samples(800, 900, 1000, loss=0.005, sent=950)
    cells = row(at_least(8, loss=0.01), mine, samples(90, 100, 110)).cells()
    assert cells[2:] == [
        "900 frames/s (800 to 1,000), loss 0.5 %, sender 950",
        "peer",
        "100 frames/s (90 to 110)",
        "9.00x",
        ">= 8x, loss <= 1 %",
    ]
    assert row(below(40), mine, mine).cells()[6] == "< 40 frames/s"
    assert row(stated(), mine, []).cells()[5:] == ["-", "stated"]


@pytest.mark.parametrize("name", ROWS)
def test_each_row_has_a_module(name: str) -> None:
    module = importlib.import_module(f"bench.{name}")
    assert inspect.iscoroutinefunction(module.rows)
    assert name.upper() in (module.__doc__ or "").splitlines()[0]


@pytest.mark.parametrize(("mib", "top"), [(1024, 1008), (4096, 3056)])
def test_firmware_that_walks_through_memory(mib: int, top: int) -> None:
    """The processor begins 16 bytes before the end and jumps to the walk, whose first page depends on the size."""
    image = bios(mib)
    assert len(image) == BIOS
    start = len(image) - 16
    assert image[start] == 0xE9
    jump = int.from_bytes(image[start + 1 : start + 3], "little", signed=True)
    walk = start + 3 + jump
    assert image[walk : walk + len(WALK)].startswith(WALK[:8])
    at = image.index(b"\xbe", walk)  # mov esi, what follows
    assert int.from_bytes(image[at + 1 : at + 5], "little") == top << 20
    # The far jump goes to the instruction behind it, the descriptor table is where its register says.
    far = image.index(b"\x66\xea", walk)
    assert int.from_bytes(image[far + 2 : far + 6], "little") & 0xFFFF == far + 8
    table = int.from_bytes(image[walk + 5 : walk + 7], "little")
    place = int.from_bytes(image[table + 2 : table + 6], "little") & 0xFFFF
    limit = int.from_bytes(image[table : table + 2], "little")
    assert image[place : place + 8] == bytes(8)
    assert place + limit + 1 == walk + len(WALK)
