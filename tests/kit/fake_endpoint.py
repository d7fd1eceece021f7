"""An endpoint without a migration behind it: statuses move when the test says so."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import trio

from vhostpc.dialect import Compat
from vhostpc.errors import MigrationRefused
from vhostpc.migration.options import Options
from vhostpc.migration.phase import Course, Event, Side
from vhostpc.migration.runstate import RunState
from vhostpc.migration.status import Status
from vhostpc.migration.uri import Address
from vhostpc.qmp import Events, MigrationInfo


class FakeEndpoint:
    """``calls`` is what the monitor asked for; ``ended`` is set by quit."""

    def __init__(self, compat: Compat = "10.0", *, incoming: bool = False) -> None:
        self.options = Options(compat)
        self.events = Events(self.options)
        self.run_state = RunState.INMIGRATE if incoming else RunState.PRELAUNCH
        self.forget()
        self.has_listened = False
        self.calls: list[Any] = []
        self.ended = trio.Event()
        self.extra = MigrationInfo()

    def forget(self) -> None:
        """There has been no migration."""
        side: Side = "destination" if self.run_state is RunState.INMIGRATE else "source"
        self.course = Course(side, self.options.dialect, lambda told: self.events.migration(told.status))

    def info(self) -> MigrationInfo:
        return replace(self.extra, status=self.course.status)

    def report(self) -> dict[str, Any]:
        return {"running": self.run_state is RunState.RUNNING}

    def trace(self, start: int) -> dict[str, Any]:
        return {"next": start, "clients": {}, "faults": []}

    def map(self, cells: int) -> dict[str, Any]:
        return {"time-ns": 0, "blocks": [{"name": "pc.ram", "pages": cells, "received": [1] * cells}]}

    async def verify(self) -> dict[str, Any]:
        return {"pages": 1, "bad": 0, "first-bad": None}

    def postcopy_refusal(self) -> str | None:
        return None

    def move(self, event: Event) -> None:
        self.course.move(event)

    async def stop(self) -> None:
        if self.run_state is RunState.RUNNING:
            self.run_state = RunState.PAUSED
            self.events.stop()

    async def cont(self) -> None:
        if self.run_state is not RunState.RUNNING:
            self.run_state = RunState.RUNNING
            self.events.resume()

    async def migrate(self, address: Address, *, resume: bool) -> None:
        self.calls.append(("migrate", address, resume))
        self.move(Event.START)

    async def incoming(self, address: Address, *, exit_on_error: bool) -> None:
        self.calls.append(("incoming", address, exit_on_error))
        self.has_listened = True
        self.move(Event.START)

    async def cancel(self) -> None:
        if self.course.in_postcopy:
            raise MigrationRefused("Postcopy migration in progress, cannot cancel.")
        if self.course.status in (Status.SETUP, Status.ACTIVE):
            self.move(Event.CANCEL)
            self.move(Event.FAIL)

    async def pause(self) -> None:
        if not self.course.in_postcopy:
            raise MigrationRefused(self.options.dialect.pause_refusal)
        self.calls.append("pause")

    def check_recover(self) -> None:
        if not self.course.allows(Event.RECOVER) or self.course.side == "source":
            raise MigrationRefused("Migrate recover can only be run when postcopy is paused.")

    async def recover(self, address: Address) -> None:
        self.calls.append(("recover", address))

    async def start_postcopy(self) -> None:
        self.calls.append("start-postcopy")

    def parameters_changed(self) -> None:
        self.calls.append("parameters-changed")

    def quit(self, why: str = "quit") -> None:
        self.ended.set()
