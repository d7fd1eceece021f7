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
    """One measurement: a value in the row's unit, what was lost on the way (a share of what was sent), the
    sender's own rate in the same unit, and the part of the loss that the receiver's full socket was."""

    value: float
    loss: float | None = None
    sent: float | None = None
    full: float | None = None


@dataclass(frozen=True)
class Goal:
    """What the ratio should be; with none, a row is only stated. ``below`` limits our own figure instead, in
    the row's unit; ``loss`` is the largest share of our frames that may be lost, ``on_the_way`` the largest that
    may be lost before the receiver's socket."""

    least: float | None = None
    most: float | None = None
    below: float | None = None
    loss: float | None = None
    on_the_way: float | None = None

    def reached(self, row: Row) -> bool:
        return (
            (self.least is None or row.ratio >= self.least)
            and (self.most is None or row.ratio <= self.most)
            and (self.below is None or median(row.ours) < self.below)
            and (self.loss is None or (median_loss(row.ours) or 0.0) <= self.loss)
            and (self.on_the_way is None or median_on_the_way(row.ours) <= self.on_the_way)
        )

    def text(self, unit: str) -> str:
        """As the table says it."""
        parts = [f">= {self.least:g}x"] if self.least is not None else []
        parts += [f"<= {self.most:g}x"] if self.most is not None else []
        parts += [f"< {self.below:g} {unit}"] if self.below is not None else []
        parts += [f"loss <= {100 * self.loss:g} %"] if self.loss is not None else []
        parts += (
            [f"loss before the receiver <= {100 * self.on_the_way:g} %"]
            if self.on_the_way is not None
            else []
        )
        return ", ".join(parts) or "stated"


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
            verdict = f"{self.ratio:.2f}x" + ("" if self.goal.reached(self) else " (missed)")
        return [
            self.id,
            self.what,
            show(self.ours, self.unit),
            self.peer,
            show(self.theirs, self.unit),
            verdict,
            self.goal.text(self.unit),
        ]


HEAD = ["row", "what", "vhostpc", "peer", "peer's figure", "ratio", "goal"]


def at_least(ratio: float, *, loss: float | None = None, on_the_way: float | None = None) -> Goal:
    return Goal(least=ratio, loss=loss, on_the_way=on_the_way)


def at_most(ratio: float) -> Goal:
    return Goal(most=ratio)


def below(value: float) -> Goal:
    return Goal(below=value)


def stated() -> Goal:
    return Goal()


def median(samples: list[Sample]) -> float:
    return statistics.median(s.value for s in samples)


def median_loss(samples: list[Sample]) -> float | None:
    losses = [s.loss for s in samples if s.loss is not None]
    return statistics.median(losses) if losses else None


def median_on_the_way(samples: list[Sample]) -> float:
    return statistics.median((s.loss or 0.0) - (s.full or 0.0) for s in samples)


def show(samples: list[Sample], unit: str) -> str:
    """The median with its spread, and the medians of loss and of the sender's rate where they were measured."""
    if not samples:
        return "-"
    values = [s.value for s in samples]
    digits = 0 if median(samples) >= 100 else 1
    text = f"{median(samples):,.{digits}f} {unit} ({min(values):,.{digits}f} to {max(values):,.{digits}f})"
    loss = median_loss(samples)
    if loss is not None:
        text += f", loss {100 * loss:.2g} %"
        full = statistics.median(s.full or 0.0 for s in samples)
        text += f" ({100 * full:.2g} % at the receiver's full socket)" if full else ""
    if sent := [s.sent for s in samples if s.sent is not None]:
        text += f", sender {statistics.median(sent):,.0f}"
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
        print(f"  ratio {row.ratio:.2f} (goal {row.goal.text(row.unit)})")
