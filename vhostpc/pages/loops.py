"""Long C loops that work on one handle, and end with it."""

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
        """Whether none runs."""
        return not self._stops

    def close(self) -> None:
        """Stop running loops."""
        for stop in list(self._stops):
            stop()
