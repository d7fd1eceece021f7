"""What the benchmarks' table says of a row: the ratio, the goal, whether it was missed."""

from __future__ import annotations

import pytest

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
