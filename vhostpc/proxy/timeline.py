"""The events of a proxied migration, in the order in which they were noticed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import trio


@dataclass(frozen=True, slots=True)
class Event:
    """Something that passed, or that was done.

    ``time``: seconds of the monotonic clock. ``connection``: its number, from 1; 0 for what belongs to none. ``way``:
    ``forward``, ``back`` or empty. ``offset``: the element's first byte in its direction, -1 for what is no element.
    """

    time: float
    name: str
    connection: int = 0
    way: str = ""
    offset: int = -1
    details: dict[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Fields that mean nothing are left out."""
        found: dict[str, Any] = {"time": round(self.time, 6), "event": self.name}
        if self.connection:
            found["connection"] = self.connection
        if self.way:
            found["way"] = self.way
        if self.offset >= 0:
            found["offset"] = self.offset
        return found | self.details


Tell = Callable[[Event], None]


class Timeline:
    """Events, kept if ``keep``, and given to ``tell``."""

    def __init__(self, tell: Tell | None = None, *, keep: bool = True) -> None:
        self.events: list[Event] = []
        self._tell = tell
        self._keep = keep
        self._changed = trio.Event()

    def add(self, event: Event) -> None:
        if self._keep:
            self.events.append(event)
        if self._tell is not None:
            self._tell(event)
        self._changed.set()
        self._changed = trio.Event()

    async def wait(self, name: str, since: int = 0, **details: Any) -> Event:
        """The first event of that name with these details, from number ``since`` on; waits for it.

        ``connection`` and ``way`` are compared, too.
        """
        at = since
        while True:
            for event in self.events[at:]:
                at += 1
                there = {"connection": event.connection, "way": event.way, **event.details}
                if event.name == name and details.items() <= there.items():
                    return event
            await self._changed.wait()
