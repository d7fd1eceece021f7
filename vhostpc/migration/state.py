"""Statuses of a migration: tables of what follows what, for each end and each QEMU version.

A pair that is not in the table raises. Two rules hold in whatever order things happen: the machine never runs
on both sides, and a source is always running or has a status that says why not. They rest on one border: the
package's last byte, without which the destination cannot run. Before it is written the source runs on by itself
after any failure (``FAIL``); from there on a lost link only pauses (``LOSE``), and only the destination's word that
it never ran (``NEVER_RAN``) lets the source run again.
"""

from __future__ import annotations

from enum import StrEnum
from functools import cache
from typing import Literal

from vhostpc.dialect import Dialect


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


class Event(StrEnum):
    """What moves a status."""

    START = "start"  # migrate; migrate-incoming
    CONNECT = "connect"  # the channel stands, the stream begins
    SWITCH = "switch"  # source: the machine has stopped, device state follows
    PACKAGE = "package"  # the package's last byte was written (source), it is taken (destination)
    LOADED = "loaded"  # device state is, at the destination: RUN is reached there, the source hears of it
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
    # But a package whose last byte had gone by then.
    (S.CANCELLING, E.PACKAGE): S.POSTCOPY_ACTIVE,
    (S.POSTCOPY_ACTIVE, E.FINISH): S.COMPLETED,
    (S.POSTCOPY_ACTIVE, E.LOSE): S.POSTCOPY_PAUSED,
    (S.POSTCOPY_ACTIVE, E.NEVER_RAN): S.FAILED,
    (S.POSTCOPY_PAUSED, E.NEVER_RAN): S.FAILED,
    (S.POSTCOPY_RECOVER, E.RESUME): S.POSTCOPY_ACTIVE,
    (S.POSTCOPY_RECOVER, E.LOSE): S.POSTCOPY_PAUSED,
}


@cache
def source_table(dialect: Dialect) -> Table:
    table = dict(_SOURCE)
    if dialect.device_status:
        table |= {(S.ACTIVE, E.SWITCH): S.DEVICE, (S.DEVICE, E.PACKAGE): S.POSTCOPY_ACTIVE}
    else:
        # The status does not tell when the machine stops; it does when the package goes.
        table |= {
            (S.ACTIVE, E.SWITCH): S.ACTIVE,
            (S.ACTIVE, E.FINISH): S.COMPLETED,
            (S.ACTIVE, E.PACKAGE): S.POSTCOPY_ACTIVE,
        }
    if S.POSTCOPY_RECOVER_SETUP in dialect.statuses:
        table |= {
            (S.POSTCOPY_PAUSED, E.RECOVER): S.POSTCOPY_RECOVER_SETUP,
            (S.POSTCOPY_RECOVER_SETUP, E.RECONNECT): S.POSTCOPY_RECOVER,
            (S.POSTCOPY_RECOVER_SETUP, E.LOSE): S.POSTCOPY_PAUSED,
        }
    else:
        table[S.POSTCOPY_PAUSED, E.RECOVER] = S.POSTCOPY_RECOVER
    if dialect.loaded_ping:
        table |= {
            (S.DEVICE, E.PACKAGE): S.POSTCOPY_DEVICE,
            (S.CANCELLING, E.PACKAGE): S.POSTCOPY_DEVICE,
            (S.POSTCOPY_DEVICE, E.LOADED): S.POSTCOPY_ACTIVE,
            (S.POSTCOPY_DEVICE, E.FINISH): S.COMPLETED,
            (S.POSTCOPY_DEVICE, E.LOSE): S.POSTCOPY_PAUSED,
            (S.POSTCOPY_DEVICE, E.NEVER_RAN): S.FAILED,
        }
    if S.FAILING in dialect.statuses:
        table = {pair: S.FAILING if after is S.FAILED else after for pair, after in table.items()}
        table[S.FAILING, E.FAIL] = S.FAILED
    return table


_DESTINATION: Table = {
    (S.SETUP, E.FAIL): S.FAILED,
    (S.ACTIVE, E.FAIL): S.FAILED,
    (S.ACTIVE, E.FINISH): S.COMPLETED,
    (S.ACTIVE, E.PACKAGE): S.POSTCOPY_ACTIVE,
    (S.POSTCOPY_ACTIVE, E.FINISH): S.COMPLETED,
    (S.POSTCOPY_ACTIVE, E.LOSE): S.POSTCOPY_PAUSED,
    # The package could not be loaded: the machine has not run here.
    (S.POSTCOPY_ACTIVE, E.NEVER_RAN): S.FAILED,
    # Nor after its link was lost meanwhile.
    (S.POSTCOPY_PAUSED, E.NEVER_RAN): S.FAILED,
    (S.POSTCOPY_PAUSED, E.RECOVER): S.POSTCOPY_RECOVER,
    (S.POSTCOPY_RECOVER, E.RESUME): S.POSTCOPY_ACTIVE,
    (S.POSTCOPY_RECOVER, E.LOSE): S.POSTCOPY_PAUSED,
}


@cache
def destination_table(dialect: Dialect) -> Table:
    table = dict(_DESTINATION)
    if dialect.setup_while_listening:
        table |= {(S.NONE, E.START): S.SETUP, (S.SETUP, E.CONNECT): S.ACTIVE}
    else:
        table |= {
            (S.NONE, E.START): S.NONE,
            (S.NONE, E.CONNECT): S.ACTIVE,
            (S.NONE, E.FAIL): S.FAILED,
        }
    if dialect.exit_on_error:
        table[S.FAILED, E.START] = S.SETUP
    if dialect.loaded_ping:
        table |= {
            (S.ACTIVE, E.PACKAGE): S.POSTCOPY_DEVICE,
            (S.POSTCOPY_DEVICE, E.LOADED): S.POSTCOPY_ACTIVE,
            (S.POSTCOPY_DEVICE, E.LOSE): S.POSTCOPY_PAUSED,
            (S.POSTCOPY_DEVICE, E.NEVER_RAN): S.FAILED,
        }
    return table


IN_POSTCOPY = frozenset(
    {
        S.POSTCOPY_DEVICE,
        S.POSTCOPY_ACTIVE,
        S.POSTCOPY_PAUSED,
        S.POSTCOPY_RECOVER_SETUP,
        S.POSTCOPY_RECOVER,
    }
)
"""Statuses of a migration whose package has gone, and whose pages may come after the machine runs."""

SOURCE_HOLDS = IN_POSTCOPY | {S.COMPLETED}
"""Statuses in which the machine may be running at the destination, so never at the source."""

BUSY = frozenset(Status) - set(_FINAL)
"""Statuses of a migration that is under way."""

RUNS_HERE = frozenset({S.POSTCOPY_ACTIVE, S.POSTCOPY_PAUSED, S.POSTCOPY_RECOVER, S.COMPLETED})
"""Statuses in which the machine may be running at the destination, seen from there."""


class Machine:
    """The status of one end. ``history`` is all it has been, the first being ``none``."""

    def __init__(self, side: Literal["source", "destination"], dialect: Dialect) -> None:
        self.side = side
        self.status = Status.NONE
        self.history = [Status.NONE]
        self._table = source_table(dialect) if side == "source" else destination_table(dialect)

    def allows(self, event: Event) -> bool:
        return (self.status, event) in self._table

    def move(self, event: Event) -> Status:
        """Apply an event; the new status. Raises WrongMove. The caller also reports the change."""
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

    @property
    def person_may_run(self) -> bool:
        """Whether somebody may let it run at the source: also when it has completed by precopy, as with QEMU."""
        return self.may_run or (self.status is Status.COMPLETED and IN_POSTCOPY.isdisjoint(self.history))
