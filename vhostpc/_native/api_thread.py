"""Types of what ``vpc_thread.h`` declares; the header says what each call does."""

from __future__ import annotations

from typing import Protocol


class ThreadLib(Protocol):
    def vpc_thread_name(self, name: bytes) -> int: ...
