"""An endpoint without a migration behind it: statuses move when the test says so."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import trio

from vhostpc.dialect import DIALECTS, Compat
from vhostpc.errors import MigrationRefused
from vhostpc.migration.options import Options
from vhostpc.migration.state import IN_POSTCOPY, Event, Machine, Status
from vhostpc.migration.uri import Address
from vhostpc.qmp import Events, MigrationInfo


class FakeEndpoint:
    """``calls`` is what the monitor asked for; ``ended`` is set by quit."""

    def __init__(self, compat: Compat = "10.0", *, incoming: bool = False) -> None:
        self.options = Options(compat)
        self.events = Events(self.options)
        self.machine = Machine("destination" if incoming else "source", DIALECTS[compat])
        self.run_state = "inmigrate" if incoming else "prelaunch"
        self.has_listened = False
        self.calls: list[Any] = []
        self.ended = trio.Event()
        self.extra = MigrationInfo()

    def info(self) -> MigrationInfo:
        return replace(self.extra, status=self.machine.status)

    def report(self) -> dict[str, Any]:
        return {"running": self.run_state == "running"}

    def trace(self, start: int) -> dict[str, Any]:
        return {"next": start, "clients": {}, "faults": []}

    def map(self, cells: int) -> dict[str, Any]:
        return {"time-ns": 0, "blocks": [{"name": "pc.ram", "pages": cells, "received": [1] * cells}]}

    async def verify(self) -> dict[str, Any]:
        return {"pages": 1, "bad": 0, "first-bad": None}

    def postcopy_refusal(self) -> str | None:
        return None

    def move(self, event: Event) -> None:
        before = self.machine.status
        if (after := self.machine.move(event)) is not before:
            self.events.migration(after)
        if after is Status.FAILING:
            self.move(Event.FAIL)

    async def stop(self) -> None:
        if self.run_state == "running":
            self.run_state = "paused"
            self.events.stop()

    async def cont(self) -> None:
        if self.run_state != "running":
            self.run_state = "running"
            self.events.resume()

    async def migrate(self, address: Address, *, resume: bool) -> None:
        self.calls.append(("migrate", address, resume))
        self.move(Event.START)

    async def incoming(self, address: Address, *, exit_on_error: bool) -> None:
        self.calls.append(("incoming", address, exit_on_error))
        self.has_listened = True
        self.move(Event.START)

    async def cancel(self) -> None:
        if self.machine.status in IN_POSTCOPY:
            raise MigrationRefused("Postcopy migration in progress, cannot cancel.")
        if self.machine.status in (Status.SETUP, Status.ACTIVE):
            self.move(Event.CANCEL)
            self.move(Event.CANCELLED)

    async def start_postcopy(self) -> None:
        self.calls.append("start-postcopy")

    def parameters_changed(self) -> None:
        self.calls.append("parameters-changed")

    def quit(self, why: str = "quit") -> None:
        self.ended.set()
