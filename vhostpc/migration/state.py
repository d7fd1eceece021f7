"""Statuses of a migration: tables of what follows what, for each end and each QEMU version.

A pair that is not in the table raises. Two rules hold in whatever order things happen: the machine never runs
on both sides, and a source is always running or has a status that says why not. They rest on one border: the
first byte of the package, which lets the destination run. Before it the source runs on by itself after any
failure (``FAIL``); from there on a lost link only pauses (``LOSE``), and only the destination's word that it
never ran (``NEVER_RAN``) lets the source run again.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Literal

from vhostpc.migration.options import Compat


class Status(StrEnum):
    """QEMU's MigrationStatus."""

    NONE = "none"
    SETUP = "setup"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"
    ACTIVE = "active"
    POSTCOPY_ACTIVE = "postcopy-active"
    POSTCOPY_PAUSED = "postcopy-paused"
    POSTCOPY_RECOVER_SETUP = "postcopy-recover-setup"
    POSTCOPY_RECOVER = "postcopy-recover"
    COMPLETED = "completed"
    FAILED = "failed"
    PRE_SWITCHOVER = "pre-switchover"
    DEVICE = "device"


class Event(StrEnum):
    """What moves a status."""

    START = "start"  # migrate; migrate-incoming
    CONNECT = "connect"  # the channel stands, the stream begins
    SWITCH = "switch"  # source: the machine has stopped, device state follows
    PACKAGE = "package"  # the package's first byte (source), RUN's package is taken (destination)
    FINISH = "finish"
    FAIL = "fail"  # before the package
    LOSE = "lose"  # the link, from the package on
    NEVER_RAN = "never-ran"  # the destination's word
    CANCEL = "cancel"
    CANCELLED = "cancelled"
    RECOVER = "recover"
    RECONNECT = "reconnect"
    RESUME = "resume"


class WrongMove(Exception):
    """An event that the status does not allow: an error of this program."""


Table = dict[tuple[Status, Event], Status]
S, E = Status, Event

_FINAL = (S.NONE, S.COMPLETED, S.FAILED, S.CANCELLED)

_SOURCE: Table = {
    **{(status, E.START): S.SETUP for status in _FINAL},
    (S.SETUP, E.CONNECT): S.ACTIVE,
    (S.SETUP, E.FAIL): S.FAILED,
    (S.ACTIVE, E.FAIL): S.FAILED,
    (S.DEVICE, E.FAIL): S.FAILED,
    (S.DEVICE, E.FINISH): S.COMPLETED,
    (S.SETUP, E.CANCEL): S.CANCELLING,
    (S.ACTIVE, E.CANCEL): S.CANCELLING,
    (S.DEVICE, E.CANCEL): S.CANCELLING,
    (S.CANCELLING, E.CANCELLED): S.CANCELLED,
    # What was under way when cancel came ends as cancelled, however it ends.
    (S.CANCELLING, E.FAIL): S.CANCELLED,
    (S.CANCELLING, E.CANCEL): S.CANCELLING,
    (S.POSTCOPY_ACTIVE, E.FINISH): S.COMPLETED,
    (S.POSTCOPY_ACTIVE, E.LOSE): S.POSTCOPY_PAUSED,
    (S.POSTCOPY_ACTIVE, E.NEVER_RAN): S.FAILED,
    (S.POSTCOPY_PAUSED, E.NEVER_RAN): S.FAILED,
    (S.POSTCOPY_RECOVER, E.RESUME): S.POSTCOPY_ACTIVE,
    (S.POSTCOPY_RECOVER, E.LOSE): S.POSTCOPY_PAUSED,
}
SOURCE: dict[Compat, Table] = {
    "7.2": {
        **_SOURCE,
        # The status does not tell when the machine stops; it does when the package goes.
        (S.ACTIVE, E.SWITCH): S.ACTIVE,
        (S.ACTIVE, E.FINISH): S.COMPLETED,
        (S.ACTIVE, E.PACKAGE): S.POSTCOPY_ACTIVE,
        (S.POSTCOPY_PAUSED, E.RECOVER): S.POSTCOPY_RECOVER,
    },
    "10.0": {
        **_SOURCE,
        (S.ACTIVE, E.SWITCH): S.DEVICE,
        (S.DEVICE, E.PACKAGE): S.POSTCOPY_ACTIVE,
        (S.POSTCOPY_PAUSED, E.RECOVER): S.POSTCOPY_RECOVER_SETUP,
        (S.POSTCOPY_RECOVER_SETUP, E.RECONNECT): S.POSTCOPY_RECOVER,
        (S.POSTCOPY_RECOVER_SETUP, E.LOSE): S.POSTCOPY_PAUSED,
    },
}

_DESTINATION: Table = {
    (S.SETUP, E.FAIL): S.FAILED,
    (S.ACTIVE, E.FAIL): S.FAILED,
    (S.ACTIVE, E.FINISH): S.COMPLETED,
    (S.ACTIVE, E.PACKAGE): S.POSTCOPY_ACTIVE,
    (S.POSTCOPY_ACTIVE, E.FINISH): S.COMPLETED,
    (S.POSTCOPY_ACTIVE, E.LOSE): S.POSTCOPY_PAUSED,
    # The package could not be loaded: the machine has not run here.
    (S.POSTCOPY_ACTIVE, E.NEVER_RAN): S.FAILED,
    (S.POSTCOPY_PAUSED, E.RECOVER): S.POSTCOPY_RECOVER,
    (S.POSTCOPY_RECOVER, E.RESUME): S.POSTCOPY_ACTIVE,
    (S.POSTCOPY_RECOVER, E.LOSE): S.POSTCOPY_PAUSED,
}
DESTINATION: dict[Compat, Table] = {
    "7.2": {
        **_DESTINATION,
        (S.NONE, E.START): S.NONE,
        (S.NONE, E.CONNECT): S.ACTIVE,
        (S.NONE, E.FAIL): S.FAILED,
    },
    "10.0": {
        **_DESTINATION,
        (S.NONE, E.START): S.SETUP,
        (S.FAILED, E.START): S.SETUP,
        (S.SETUP, E.CONNECT): S.ACTIVE,
    },
}

SOURCE_HOLDS = frozenset(
    {S.POSTCOPY_ACTIVE, S.POSTCOPY_PAUSED, S.POSTCOPY_RECOVER_SETUP, S.POSTCOPY_RECOVER, S.COMPLETED}
)
"""Statuses in which the machine may be running at the destination, so never at the source."""

BUSY = frozenset(Status) - set(_FINAL)
"""Statuses of a migration that is under way."""

IN_POSTCOPY = frozenset({S.POSTCOPY_ACTIVE, S.POSTCOPY_PAUSED, S.POSTCOPY_RECOVER_SETUP, S.POSTCOPY_RECOVER})
"""Statuses of a migration whose pages come after the machine runs."""

RUNS_HERE = frozenset({S.POSTCOPY_ACTIVE, S.POSTCOPY_PAUSED, S.POSTCOPY_RECOVER, S.COMPLETED})
"""Statuses in which the machine may be running at the destination, seen from there."""


class Machine:
    """The status of one end. ``history`` is all it has been, the first being ``none``."""

    def __init__(self, side: Literal["source", "destination"], compat: Compat) -> None:
        self.side = side
        self.status = Status.NONE
        self.history = [Status.NONE]
        self._table = (SOURCE if side == "source" else DESTINATION)[compat]

    def allows(self, event: Event) -> bool:
        return (self.status, event) in self._table

    def move(self, event: Event) -> Status:
        """Apply an event; the new status. Raises WrongMove. Whoever calls this also tells of the change."""
        try:
            after = self._table[self.status, event]
        except KeyError:
            raise WrongMove(f"{self.side}: {event} in status {self.status}") from None
        if after is not self.status:
            self.history.append(after)
        self.status = after
        return after

    @property
    def may_run(self) -> bool:
        """Whether the machine may run at this end."""
        if self.side == "source":
            return self.status not in SOURCE_HOLDS
        return self.status in RUNS_HERE
