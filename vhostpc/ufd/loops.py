"""Handles that long C loops work on: freed when nobody does any more."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Loops:
    """C loops that work on one handle: it is freed when it is closed and the last of them has ended."""

    def __init__(self, free: Callable[[], None]) -> None:
        self._free = free
        self._stops: list[Callable[[], None]] = []
        self._closing = False

    @contextmanager
    def running(self, stop: Callable[[], None]) -> Iterator[None]:
        self._stops.append(stop)
        try:
            yield
        finally:
            self._stops.remove(stop)
            if self._closing and not self._stops:
                self._free()

    def close(self) -> None:
        """Stop what runs; free now, or when that has ended."""
        if self._closing:
            return
        self._closing = True
        if not self._stops:
            self._free()
        for stop in list(self._stops):
            stop()
