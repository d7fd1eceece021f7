"""Calls that wait for different things, side by side."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from typing import TypeVar

import trio

T = TypeVar("T")


async def side_by_side(calls: Iterable[Callable[[], Awaitable[T]]]) -> list[T]:
    """The results of all, in their order. Raises the first error once all have ended: no call is broken off by it."""
    results: dict[int, T] = {}
    errors: list[Exception] = []

    async def make(number: int, call: Callable[[], Awaitable[T]]) -> None:
        try:
            results[number] = await call()
        except Exception as error:
            errors.append(error)

    async with trio.open_nursery() as nursery:
        for number, call in enumerate(calls):
            nursery.start_soon(make, number, call)
    if errors:
        raise errors[0]
    return [results[number] for number in sorted(results)]
