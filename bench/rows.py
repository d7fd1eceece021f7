"""A row of the table: two things measured in turn, medians compared."""

from __future__ import annotations

import statistics
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from rich.console import Console

T = TypeVar("T")
REPETITIONS = 5
# The lead of a measurement's progress line; the table itself goes to stdout.
console = Console(stderr=True, highlight=False)


@dataclass(frozen=True)
class Sample:
    """One measurement: a value in the row's unit, and what was lost on the way (a share of what was sent)."""

    value: float
    loss: float | None = None


@dataclass(frozen=True)
class Goal:
    """What the ratio should be; None is a row that is only stated."""

    least: float | None = None
    most: float | None = None

    def reached(self, ratio: float) -> bool:
        return (self.least is None or ratio >= self.least) and (self.most is None or ratio <= self.most)

    def __str__(self) -> str:
        if self.least is not None:
            return f">= {self.least:g}x"
        return f"<= {self.most:g}x" if self.most is not None else "stated"


@dataclass
class Row:
    """One line of the table. ``ratio`` is ours over the peer's, so below one is better where less is."""

    id: str
    what: str
    unit: str
    peer: str
    goal: Goal
    ours: list[Sample] = field(default_factory=list)
    theirs: list[Sample] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        return median(self.ours) / median(self.theirs) if self.ours and self.theirs else float("nan")

    def cells(self) -> list[str]:
        verdict = "-"
        if self.ours and self.theirs:
            verdict = f"{self.ratio:.2f}x" + ("" if self.goal.reached(self.ratio) else " (missed)")
        return [
            self.id,
            self.what,
            show(self.ours, self.unit),
            self.peer,
            show(self.theirs, self.unit),
            verdict,
            str(self.goal),
        ]


HEAD = ["row", "what", "vhostpc", "peer", "peer's figure", "ratio", "goal"]


def at_least(ratio: float) -> Goal:
    return Goal(least=ratio)


def at_most(ratio: float) -> Goal:
    return Goal(most=ratio)


def stated() -> Goal:
    return Goal()


def median(samples: list[Sample]) -> float:
    return statistics.median(s.value for s in samples)


def show(samples: list[Sample], unit: str) -> str:
    """The median with its spread, and the median loss where one was measured."""
    if not samples:
        return "-"
    values = [s.value for s in samples]
    digits = 0 if median(samples) >= 100 else 1
    text = f"{median(samples):,.{digits}f} {unit} ({min(values):,.{digits}f} to {max(values):,.{digits}f})"
    losses = [s.loss for s in samples if s.loss is not None]
    if losses:
        text += f", loss {100 * statistics.median(losses):.2g} %"
    return text


async def in_turn(
    subjects: Mapping[str, Callable[[], Awaitable[T]]], repetitions: int, label: str
) -> dict[str, list[T]]:
    """Measure each subject once, then each again, ``repetitions`` times; a drift of the machine hits all."""
    results: dict[str, list[T]] = {name: [] for name in subjects}
    for turn in range(repetitions):
        for name, measure in subjects.items():
            console.print(f"{label}: {name}, {turn + 1} of {repetitions}")
            results[name].append(await measure())
    return results


def print_rows(rows: list[Row]) -> None:
    """Print each row in words, the ratio last."""
    for row in rows:
        print(f"{row.id} {row.what}")
        print(f"  vhostpc: {show(row.ours, row.unit)}")
        print(f"  {row.peer}: {show(row.theirs, row.unit)}")
        print(f"  ratio {row.ratio:.2f} (goal {row.goal})")
