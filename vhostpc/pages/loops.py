"""Long C loops that work on one handle: its end is theirs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Loops:
    """C loops that work on one handle; each keeps the handle's object until it has ended."""

    def __init__(self) -> None:
        self._stops: list[Callable[[], None]] = []

    @contextmanager
    def running(self, stop: Callable[[], None]) -> Iterator[None]:
        self._stops.append(stop)
        try:
            yield
        finally:
            self._stops.remove(stop)

    @property
    def idle(self) -> bool:
        """None runs."""
        return not self._stops

    def close(self) -> None:
        """Stop what runs."""
        for stop in list(self._stops):
            stop()
