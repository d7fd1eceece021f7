"""The phases of a migration: for each end a table of what follows what, and what each phase means.

All that is asked of a migration is a function of its phase and of the dialect: QEMU's status, whether the machine may
run at this end, whether it can be cancelled, what a failure makes of it. An event that the table does not have is an
error of this program and raises.

Two rules hold in whatever order things happen: the machine never runs at both ends, and a source is always running or
has a phase that says why not. They rest on one border, which one transition crosses: the byte without which the
destination cannot run the machine. It is the last one of the package in postcopy (``PACKAGE``), and the one that ends
the stream in precopy (``SENT``). Before it is written any failure lets the machine run on at its source (``FAIL``).
From there on a lost link is a pause, or leaves it to a person where the machine runs (``LOSE``), and only the
destination's word that the machine never ran there (``NEVER_RAN``) gives it back.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from vhostpc.dialect import DEFAULT, DIALECTS, Dialect
from vhostpc.migration.status import Status

Side = Literal["source", "destination"]


class Phase(StrEnum):
    NONE = "none"
    """No migration yet."""
    CONNECTING = "connecting"
    LISTENING = "listening"
    PRECOPY = "precopy"
    """Pages; the machine runs at its source."""
    SWITCHING = "switching"
    """Postcopy has begun, the package has not gone, or has not come."""
    STOPPED = "stopped"
    """The machine stands for the last pass of a precopy."""
    SWITCHED = "switched"
    """It stands for a postcopy; discards and its devices follow."""
    SENT = "sent"
    """All of a precopy is sent, the destination's word is not here."""
    SWITCHED_SENT = "switched-sent"
    """The same where a postcopy had begun, and no page was left for it."""
    ARRIVED = "arrived"
    """All of a precopy has come, and the machine is about to run here."""
    PACKAGED = "packaged"
    """The whole package has gone, or has come."""
    STARTING = "starting"
    """The destination lets the machine run, whose pages are still coming: it may have run when this is left."""
    NOT_STARTED = "not-started"
    """It could not be started."""
    POSTCOPY = "postcopy"
    """It runs at the destination, as far as is known here."""
    PAUSED_PACKAGED = "paused-packaged"
    """The link is lost, and the machine has not run yet: the destination goes on to load it."""
    PAUSED_STARTING = "paused-starting"
    PAUSED = "paused"
    """The link is lost, and the machine may be running at the destination."""
    RECONNECTING = "reconnecting"
    RECOVERING_PACKAGED = "recovering-packaged"
    """There is another link, and it is being agreed on what is missing; the machine has not run yet."""
    RECOVERING_STARTING = "recovering-starting"
    RECOVERING = "recovering"
    COMPLETED = "completed"
    """By precopy."""
    MOVED = "moved"
    """By postcopy."""
    CANCELLING = "cancelling"
    BREAKING_OFF = "breaking-off"
    """As cancelling, of a postcopy that its source told before the border."""
    CANCELLED = "cancelled"
    FAILED = "failed"
    """The machine has not run at the destination."""
    UNKNOWN = "unknown"
    """All was sent and the destination did not say what became of it: only a person can find out."""


class Event(StrEnum):
    """What moves a phase."""

    START = "start"  # migrate; migrate-incoming
    CONNECT = "connect"  # the channel stands, the stream begins
    SWITCH = "switch"  # postcopy begins (source); the first discard has come (destination)
    STOP = "stop"  # the machine has stopped to be sent
    SENT = "sent"  # about to write the byte that ends a precopy
    UNSENT = "unsent"  # it was not written
    PACKAGE = "package"  # the package's last byte was written (source), it has come (destination)
    LOADED = "loaded"  # source: the destination says that it loaded the package
    RUN = "run"  # destination: the machine is about to run
    RAN = "ran"  # destination: it runs, or was left standing for a person
    NOT_RUN = "not-run"  # destination: it could not be started
    FINISH = "finish"
    FAIL = "fail"  # whatever went wrong before the border
    LOSE = "lose"  # whatever went wrong behind it
    NEVER_RAN = "never-ran"  # the destination's word
    CANCEL = "cancel"
    RECOVER = "recover"  # source: a recovery begins; destination: another link is there
    RECONNECT = "reconnect"  # source: another link is there
    RESUME = "resume"  # both ends know what is missing, and pages come again


class WrongMove(Exception):
    """An event that the phase does not allow: an error of this program."""


Table = dict[tuple[Phase, Event], Phase]
P, E, S = Phase, Event, Status

_FINAL = (P.NONE, P.COMPLETED, P.MOVED, P.CANCELLED, P.FAILED, P.UNKNOWN)
_BEFORE = (P.CONNECTING, P.PRECOPY, P.SWITCHING, P.STOPPED, P.SWITCHED)
_BROKEN_OFF = (P.CANCELLING, P.BREAKING_OFF)

SOURCE: Table = {
    **{(phase, E.START): P.CONNECTING for phase in _FINAL},
    (P.CONNECTING, E.CONNECT): P.PRECOPY,
    (P.PRECOPY, E.SWITCH): P.SWITCHING,
    (P.PRECOPY, E.STOP): P.STOPPED,
    (P.SWITCHING, E.STOP): P.SWITCHED,
    # Before the border.
    **{(phase, event): P.FAILED for phase in _BEFORE for event in (E.FAIL, E.NEVER_RAN)},
    **{(phase, E.CANCEL): P.CANCELLING for phase in _BEFORE},
    # What is under way when cancel comes is broken off, and ends as cancelled however it ends.
    **{(phase, event): phase for phase in _BROKEN_OFF for event in (E.CANCEL, E.CONNECT, E.SWITCH, E.STOP)},
    **{(P.CANCELLING, event): P.CANCELLED for event in (E.FAIL, E.NEVER_RAN)},
    **{(P.BREAKING_OFF, event): P.FAILED for event in (E.FAIL, E.NEVER_RAN)},
    # The border of a precopy. The destination may run the machine: there is nothing left to cancel, and the wait for
    # its word can be broken off.
    (P.STOPPED, E.SENT): P.SENT,
    (P.SENT, E.UNSENT): P.STOPPED,
    (P.SENT, E.FINISH): P.COMPLETED,
    (P.SWITCHED, E.SENT): P.SWITCHED_SENT,
    (P.SWITCHED_SENT, E.UNSENT): P.SWITCHED,
    (P.SWITCHED_SENT, E.FINISH): P.COMPLETED,
    **{(phase, E.CANCEL): phase for phase in (P.SENT, P.SWITCHED_SENT)},
    **{(phase, E.LOSE): P.UNKNOWN for phase in (P.SENT, P.SWITCHED_SENT)},
    **{(phase, E.NEVER_RAN): P.FAILED for phase in (P.SENT, P.SWITCHED_SENT)},
    # The border of a postcopy. A cancel comes too late if the last byte had gone by then.
    (P.SWITCHED, E.PACKAGE): P.PACKAGED,
    **{(phase, E.PACKAGE): P.PACKAGED for phase in _BROKEN_OFF},
    (P.PACKAGED, E.LOADED): P.POSTCOPY,
    **{(phase, E.FINISH): P.MOVED for phase in (P.PACKAGED, P.POSTCOPY)},
    **{(phase, E.LOSE): P.PAUSED for phase in (P.PACKAGED, P.POSTCOPY)},
    **{(phase, E.NEVER_RAN): P.FAILED for phase in (P.PACKAGED, P.POSTCOPY, P.PAUSED, P.RECOVERING)},
    (P.PAUSED, E.RECOVER): P.RECONNECTING,
    (P.RECONNECTING, E.LOSE): P.PAUSED,
    (P.RECONNECTING, E.RECONNECT): P.RECOVERING,
    (P.RECOVERING, E.LOSE): P.PAUSED,
    (P.RECOVERING, E.RESUME): P.POSTCOPY,
}


def _recovery(paused: Phase, recovering: Phase, resumed: Phase) -> Table:
    """Over another link, which may be lost again."""
    return {(paused, E.RECOVER): recovering, (recovering, E.LOSE): paused, (recovering, E.RESUME): resumed}


DESTINATION: Table = {
    (P.NONE, E.START): P.LISTENING,
    (P.FAILED, E.START): P.LISTENING,
    (P.LISTENING, E.CONNECT): P.PRECOPY,
    (P.PRECOPY, E.SWITCH): P.SWITCHING,
    (P.SWITCHING, E.SWITCH): P.SWITCHING,
    **{(phase, E.FAIL): P.FAILED for phase in (P.LISTENING, P.PRECOPY, P.SWITCHING)},
    # Precopy.
    **{(phase, E.RUN): P.ARRIVED for phase in (P.PRECOPY, P.SWITCHING)},
    (P.ARRIVED, E.RAN): P.ARRIVED,
    (P.ARRIVED, E.NOT_RUN): P.PRECOPY,
    (P.ARRIVED, E.FINISH): P.COMPLETED,
    # Postcopy. The whole package is here, and nobody but this end can run the machine.
    **{(phase, E.PACKAGE): P.PACKAGED for phase in (P.PRECOPY, P.SWITCHING)},
    (P.PACKAGED, E.FINISH): P.MOVED,  # a package need not say that it is to run
    (P.PACKAGED, E.RUN): P.STARTING,
    (P.STARTING, E.RAN): P.POSTCOPY,
    (P.STARTING, E.NOT_RUN): P.NOT_STARTED,
    (P.POSTCOPY, E.FINISH): P.MOVED,
    (P.POSTCOPY, E.LOSE): P.PAUSED,
    # A link that is lost before the machine runs keeps nobody from loading it.
    **{(phase, E.LOSE): P.PAUSED_PACKAGED for phase in (P.PACKAGED, P.NOT_STARTED)},
    (P.STARTING, E.LOSE): P.PAUSED_STARTING,
    (P.PAUSED_PACKAGED, E.RUN): P.PAUSED_STARTING,
    (P.PAUSED_STARTING, E.RAN): P.PAUSED,
    (P.PAUSED_STARTING, E.NOT_RUN): P.PAUSED_PACKAGED,
    **{(phase, E.NEVER_RAN): P.FAILED for phase in (P.PACKAGED, P.NOT_STARTED, P.PAUSED_PACKAGED)},
    # Another link. What the load waits for comes over that, so it does not wait for the load.
    **_recovery(P.PAUSED_PACKAGED, P.RECOVERING_PACKAGED, P.PACKAGED),
    **_recovery(P.PAUSED_STARTING, P.RECOVERING_STARTING, P.STARTING),
    **_recovery(P.PAUSED, P.RECOVERING, P.POSTCOPY),
    (P.RECOVERING_PACKAGED, E.RUN): P.RECOVERING_STARTING,
    (P.RECOVERING_STARTING, E.RAN): P.RECOVERING,
    (P.RECOVERING_STARTING, E.NOT_RUN): P.RECOVERING_PACKAGED,
    (P.RECOVERING_PACKAGED, E.NEVER_RAN): P.FAILED,
}

TABLES: dict[Side, Table] = {"source": SOURCE, "destination": DESTINATION}

_STATUS = {
    P.NONE: S.NONE,
    P.CONNECTING: S.SETUP,
    P.LISTENING: S.SETUP,
    P.PRECOPY: S.ACTIVE,
    P.SWITCHING: S.ACTIVE,
    P.STOPPED: S.DEVICE,
    P.SWITCHED: S.DEVICE,
    P.SENT: S.DEVICE,
    P.SWITCHED_SENT: S.DEVICE,
    P.ARRIVED: S.ACTIVE,
    P.PACKAGED: S.POSTCOPY_ACTIVE,
    P.STARTING: S.POSTCOPY_ACTIVE,
    P.POSTCOPY: S.POSTCOPY_ACTIVE,
    P.NOT_STARTED: S.POSTCOPY_ACTIVE,
    P.PAUSED_PACKAGED: S.POSTCOPY_PAUSED,
    P.PAUSED_STARTING: S.POSTCOPY_PAUSED,
    P.PAUSED: S.POSTCOPY_PAUSED,
    P.RECONNECTING: S.POSTCOPY_RECOVER_SETUP,
    P.RECOVERING_PACKAGED: S.POSTCOPY_RECOVER,
    P.RECOVERING_STARTING: S.POSTCOPY_RECOVER,
    P.RECOVERING: S.POSTCOPY_RECOVER,
    P.COMPLETED: S.COMPLETED,
    P.MOVED: S.COMPLETED,
    P.CANCELLING: S.CANCELLING,
    P.BREAKING_OFF: S.CANCELLING,
    P.CANCELLED: S.CANCELLED,
    P.FAILED: S.FAILED,
    P.UNKNOWN: S.FAILED,
}
_STANDS = (P.STOPPED, P.SWITCHED, P.SENT, P.SWITCHED_SENT)
_TOLD_EARLY = (P.SWITCHING, P.SWITCHED, P.SWITCHED_SENT, P.BREAKING_OFF)

AWAY = frozenset(
    {P.PACKAGED, P.POSTCOPY, P.PAUSED, P.RECONNECTING, P.RECOVERING, P.MOVED, P.COMPLETED, P.SENT}
    | {P.SWITCHED_SENT, P.UNKNOWN}
)
"""Phases of a source whose machine may be running at the destination."""

CAME = frozenset(
    {P.ARRIVED, P.STARTING, P.POSTCOPY, P.PAUSED_STARTING, P.PAUSED, P.RECOVERING_STARTING, P.RECOVERING}
    | {P.COMPLETED, P.MOVED}
)
"""Phases of a destination whose machine may be running here."""

PACKAGE_GONE = frozenset(
    {P.PACKAGED, P.STARTING, P.NOT_STARTED, P.POSTCOPY}
    | {P.PAUSED_PACKAGED, P.PAUSED_STARTING, P.PAUSED, P.RECONNECTING}
    | {P.RECOVERING_PACKAGED, P.RECOVERING_STARTING, P.RECOVERING}
)
"""Phases of a postcopy behind its border: it cannot be cancelled."""

ALL_SENT = frozenset({P.SENT, P.SWITCHED_SENT, P.COMPLETED, P.MOVED, P.UNKNOWN})
"""Phases of a source that has nothing left to send."""


def statuses(phase: Phase, side: Side, dialect: Dialect) -> tuple[Status, ...]:
    """QEMU's status of a phase: the last of those which it shows one after the other."""
    status = _STATUS[phase]
    if side == "source":
        if phase in _STANDS and not dialect.device_status:
            status = S.ACTIVE
        if phase in _TOLD_EARLY and dialect.postcopy_before_stop:
            status = S.POSTCOPY_ACTIVE
        if phase is P.RECONNECTING and S.POSTCOPY_RECOVER_SETUP not in dialect.statuses:
            status = S.POSTCOPY_PAUSED  # it changes with the connection
        if status is S.FAILED and S.FAILING in dialect.statuses:
            return (S.FAILING, S.FAILED)
    elif phase is P.LISTENING and not dialect.setup_while_listening:
        status = S.NONE
    if phase is P.PACKAGED and dialect.loaded_ping:
        status = S.POSTCOPY_DEVICE
    return (status,)


def table(side: Side, dialect: Dialect) -> Table:
    """What follows what at one end. The versions differ in what a cancel makes of a postcopy that was told early."""
    if side == "source" and dialect.postcopy_before_stop:
        return SOURCE | {(phase, E.CANCEL): P.BREAKING_OFF for phase in (P.SWITCHING, P.SWITCHED)}
    return TABLES[side]


@dataclass(frozen=True)
class Told:
    """A status that an event has brought, and why. ``before``: the one before it."""

    before: Status
    status: Status
    error: BaseException | None = None


def _nobody(told: Told) -> None:
    pass


class Course:
    """The phase of one migration at one end. On the trio thread only.

    ``tell`` is called with each new status, behind the change; it must not raise. ``history``: the statuses until now,
    the first being ``none``.
    """

    def __init__(self, side: Side, dialect: Dialect, tell: Callable[[Told], None] = _nobody) -> None:
        self.side = side
        self.dialect = dialect
        self.phase = Phase.NONE
        self.status = Status.NONE
        self.history = [Status.NONE]
        self._tell = tell
        self._table = table(side, dialect)

    def allows(self, event: Event) -> bool:
        return (self.phase, event) in self._table

    def move(self, event: Event, error: BaseException | None = None) -> None:
        """Apply an event. Raises WrongMove, and nothing has changed then."""
        after = self._table.get((self.phase, event))
        if after is None:
            raise WrongMove(f"{self.side}: {event} in phase {self.phase}")
        self.phase = after
        for status in statuses(after, self.side, self.dialect):
            if status is not self.status:
                told = Told(self.status, status, error)
                self.status = status
                self.history.append(status)
                self._tell(told)

    def trouble(self) -> Event:
        """What any failure is at this point, but for the destination's word: before the border, or behind it."""
        return Event.LOSE if self.allows(Event.LOSE) else Event.FAIL

    @property
    def may_run(self) -> bool:
        """Whether the machine may run at this end."""
        return self.phase not in AWAY if self.side == "source" else self.phase in CAME

    @property
    def person_may_run(self) -> bool:
        """Whether somebody may let it run at the source: also when a precopy has sent all of it, as with QEMU."""
        return self.may_run or self.phase in ALL_SENT - {Phase.MOVED}

    @property
    def in_postcopy(self) -> bool:
        """The border of a postcopy has been passed, and not all is done."""
        return self.phase in PACKAGE_GONE


def begun(
    side: Side,
    *events: Event,
    dialect: Dialect = DIALECTS[DEFAULT],
    tell: Callable[[Told], None] = _nobody,
) -> Course:
    """The course of a migration behind these events, of which nobody was told. ``tell``: of those that follow."""
    course = Course(side, dialect)
    for event in events:
        course.move(event)
    course._tell = tell
    return course


LEFT = (Event.START, Event.CONNECT, Event.SWITCH, Event.STOP, Event.PACKAGE, Event.LOSE)
"""The events behind which a source stands that was killed in postcopy."""
