"""Run states of a machine as QEMU names them, and the one rule whether it may be migrated now."""

from __future__ import annotations

from enum import StrEnum

from vhostpc.errors import MigrationRefused
from vhostpc.migration.options import IN_PROGRESS
from vhostpc.migration.status import BUSY, Status


class RunState(StrEnum):
    """Those of QEMU's RunState that a machine has here."""

    PRELAUNCH = "prelaunch"
    INMIGRATE = "inmigrate"
    RUNNING = "running"
    PAUSED = "paused"
    FINISH_MIGRATE = "finish-migrate"
    POSTMIGRATE = "postmigrate"


def check_migrate(run_state: RunState, status: Status, *, resume: bool) -> None:
    """Whether ``migrate`` can begin now. Raises MigrationRefused, in QEMU's words."""
    if resume:
        if status is not Status.POSTCOPY_PAUSED:
            raise MigrationRefused("Cannot resume if there is no paused migration")
    elif run_state is RunState.INMIGRATE:
        raise MigrationRefused("Guest is waiting for an incoming migration")
    elif status in BUSY:
        raise MigrationRefused(IN_PROGRESS)
    elif run_state is RunState.POSTMIGRATE:
        raise MigrationRefused("Can't migrate the vm that was paused due to previous migration")
