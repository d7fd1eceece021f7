"""The unsent output to one client of the monitor, bounded in bytes."""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any

import trio

from vhostpc.wire import qmp

ROOM = 64 << 10
"""Bytes that may be unsent when one more reply is added, so a longer reply waits alone."""
EVENTS = 1024
"""Most unsent events. They are short, and cannot be made to wait."""


class Unsent:
    """Messages in order, encoded as bytes. Only one task drains it."""

    def __init__(self) -> None:
        self._lines: deque[tuple[bytes, bool]] = deque()
        self._size = 0
        self._events = 0
        self._closed = False
        self._changed = trio.Event()

    async def reply(self, message: dict[str, Any]) -> None:
        """Add a reply, as soon as there is room for it. Waits for the client to read."""
        while self._size > ROOM and not self._closed:
            await self._changed.wait()
        self._add(message, event=False)

    def event(self, message: dict[str, Any]) -> bool:
        """Add an event. False if too many are unsent: the client does not read."""
        if self._events >= EVENTS:
            return False
        self._add(message, event=True)
        return True

    def close(self) -> None:
        """No more messages follow; unsent ones still go out."""
        self._closed = True
        self._wake()

    def _add(self, message: dict[str, Any], *, event: bool) -> None:
        if self._closed:
            return
        data = qmp.encode(message)
        self._lines.append((data, event))
        self._size += len(data)
        self._events += event
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    async def drain(self, send: Callable[[bytes], Awaitable[None]]) -> None:
        """Send each message; returns when :meth:`close` was called and all is sent. Raises what ``send`` raises."""
        while self._lines or not self._closed:
            if not self._lines:
                await self._changed.wait()
                continue
            data, event = self._lines[0]
            await send(data)
            self._lines.popleft()
            self._size -= len(data)
            self._events -= event
            self._wake()
