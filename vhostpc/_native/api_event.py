"""Types of what ``vpc_event.h`` declares; the header says what each call does."""

from __future__ import annotations

from typing import Protocol


class EventLib(Protocol):
    def vpc_event_signal(self, fd: int) -> int: ...
    def vpc_event_clear(self, fd: int) -> int: ...
