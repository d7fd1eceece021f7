"""Long work on the trio loop, cut into pieces that let everybody else have a turn."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

import trio

from vhostpc.wire.migration.elements import Slices

T = TypeVar("T")


async def in_turns(work: Slices[T]) -> T:
    """The result of ``work``, with a checkpoint behind each of its slices."""
    while True:
        try:
            next(work)
        except StopIteration as end:
            found: T = end.value
            return found
        await trio.lowlevel.checkpoint()


def batches(ranges: Iterable[tuple[int, int]], most: int, count: int) -> Iterator[list[tuple[int, int]]]:
    """Ranges (start, length) in lists of at most ``count`` with a length of at most ``most`` together, or of one."""
    batch: list[tuple[int, int]] = []
    together = 0
    for start, length in ranges:
        if batch and (len(batch) == count or together + length > most):
            yield batch
            batch, together = [], 0
        batch.append((start, length))
        together += length
    if batch:
        yield batch


def pieces(ranges: Iterable[tuple[int, int]], most: int) -> Iterator[tuple[int, int]]:
    """Ranges (start, length) as disjoint ones in order, none longer than ``most``; parts covered twice occur once."""
    done = 0
    for start, length in sorted(ranges):
        at, end = max(start, done), start + length
        while at < end:
            piece = min(most, end - at)
            yield at, piece
            at += piece
        done = max(done, end)
