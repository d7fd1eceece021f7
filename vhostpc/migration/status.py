"""Statuses of a migration as QEMU names them."""

from __future__ import annotations

from enum import StrEnum


class Status(StrEnum):
    """QEMU's MigrationStatus."""

    NONE = "none"
    SETUP = "setup"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"
    ACTIVE = "active"
    POSTCOPY_DEVICE = "postcopy-device"
    POSTCOPY_ACTIVE = "postcopy-active"
    POSTCOPY_PAUSED = "postcopy-paused"
    POSTCOPY_RECOVER_SETUP = "postcopy-recover-setup"
    POSTCOPY_RECOVER = "postcopy-recover"
    COMPLETED = "completed"
    FAILING = "failing"
    FAILED = "failed"
    PRE_SWITCHOVER = "pre-switchover"
    DEVICE = "device"


FINAL = frozenset({Status.NONE, Status.COMPLETED, Status.FAILED, Status.CANCELLED})
"""No migration is in progress."""

BUSY = frozenset(Status) - FINAL
"""Statuses of a migration in progress."""

IN_POSTCOPY = frozenset(
    {
        Status.POSTCOPY_DEVICE,
        Status.POSTCOPY_ACTIVE,
        Status.POSTCOPY_PAUSED,
        Status.POSTCOPY_RECOVER_SETUP,
        Status.POSTCOPY_RECOVER,
    }
)
"""Statuses of a migration whose pages may arrive after the machine runs."""
