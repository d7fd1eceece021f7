"""Events: sent to every monitor that has negotiated capabilities."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import trio

from vhostpc.migration.options import Options
from vhostpc.migration.status import Status
from vhostpc.wire import qmp

Listener = Callable[[dict[str, Any]], None]


class Events:
    """The place where the endpoint emits and the monitors listen. On the trio thread only; emitting never waits."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._listeners: list[Listener] = []
        self._moved = trio.Event()

    def listen(self, listener: Listener) -> None:
        self._listeners.append(listener)

    def forget(self, listener: Listener) -> None:
        self._listeners.remove(listener)

    def emit(self, name: str, data: dict[str, Any] | None = None) -> None:
        message = qmp.event(name, data, time.time_ns() // 1000)
        for listener in tuple(self._listeners):
            listener(message)

    def migration(self, status: Status) -> None:
        """Set the status. MIGRATION, if the capability ``events`` is on. (7.2 reports an incoming
        ``setup`` in any case: there the endpoint calls ``emit`` itself.)"""
        self._moved.set()
        self._moved = trio.Event()
        if "events" in self._options:
            self.emit("MIGRATION", {"status": str(status)})

    async def moved(self) -> None:
        """Wait for the next change of the migration's status, even if no event reports it."""
        await self._moved.wait()

    def migration_pass(self, number: int) -> None:
        """MIGRATION_PASS, if the capability ``events`` is on."""
        if "events" in self._options:
            self.emit("MIGRATION_PASS", {"pass": number})

    def stop(self) -> None:
        self.emit("STOP")

    def resume(self) -> None:
        self.emit("RESUME")

    def shutdown(self, reason: str = "host-qmp-quit") -> None:
        self.emit("SHUTDOWN", {"guest": False, "reason": reason})
