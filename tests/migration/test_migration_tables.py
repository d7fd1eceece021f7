"""Options, statuses and addresses of a migration, without any I/O."""

from __future__ import annotations

import itertools
from typing import Any, cast

import pytest

from vhostpc.dialect import DIALECTS, Compat
from vhostpc.errors import MigrationRefused
from vhostpc.migration.options import SUPPORTED, Options, parameters
from vhostpc.migration.phase import Course, Event, Phase, Side, WrongMove, statuses, table
from vhostpc.migration.status import Status
from vhostpc.migration.uri import Exec, Fd, File, Tcp, Unix, parse_address

ALL = tuple(DIALECTS)
E = Event


@pytest.mark.parametrize("compat", ALL)
def test_no_capability_that_we_do_not_do_can_be_switched_on(compat: Compat) -> None:
    for name in DIALECTS[compat].capabilities:
        options = Options(compat)
        if name in SUPPORTED:
            needed = [("postcopy-ram", True)] if name == "postcopy-preempt" else []
            options.set_capabilities([*needed, (name, True)], busy=False)
            assert name in options
        else:
            with pytest.raises(MigrationRefused):
                options.set_capabilities([("events", True), (name, True)], busy=False)
            assert not options.on
        options.set_capabilities([(name, False)], busy=False)


def test_no_capability_changes_while_a_migration_runs() -> None:
    options = Options()
    with pytest.raises(MigrationRefused, match="^There's a migration process in progress$"):
        options.set_capabilities([("events", True)], busy=True)


def test_parameters_are_set_all_or_none() -> None:
    options = Options()
    with pytest.raises(MigrationRefused, match=r"downtime_limit.*2000 \* 1000"):
        options.set_parameters({"max-bandwidth": 7, "downtime-limit": 9999999})
    assert options["max-bandwidth"] == 128 << 20
    options.set_parameters({"max-bandwidth": 7})
    assert options["max-bandwidth"] == 7
    for changes in ({"mode": "cpr-reboot"}, {"direct-io": True}):
        with pytest.raises(MigrationRefused):
            options.set_parameters(cast(dict[str, Any], changes))
    options.set_parameters({"tls-creds": "x"})
    with pytest.raises(MigrationRefused, match="^No TLS credentials with id 'x'$"):
        options.check_start()


@pytest.mark.parametrize("compat", ALL)
def test_no_value_that_we_do_not_do_can_be_set(compat: Compat) -> None:
    limited = [row for row in parameters(DIALECTS[compat]).values() if row.accepted is not None]
    assert [row.name for row in limited] == (
        ["block-incremental"] if compat == "7.2" else ["mode", "direct-io"]
    )
    for row in limited:
        assert row.accepted is not None
        for value in row.values or (False, True):
            options = Options(compat)
            if value in row.accepted:
                options.set_parameters({row.name: value})
                continue
            spelt = str(value).lower()
            words = rf"^(Parameter '{row.name}' does not accept value '{spelt}'|No build-time support for {row.name})$"
            with pytest.raises(MigrationRefused, match=words):
                options.set_parameters({"max-bandwidth": 7, row.name: value})
            assert options[row.name] == row.default
            assert options["max-bandwidth"] != 7


# The statuses that QEMU goes through, as its events told them.
PATHS: list[tuple[Side, Compat, str, str]] = [
    ("source", "10.0", "start connect stop sent finish", "setup active device completed"),
    ("source", "7.2", "start connect stop sent finish", "setup active completed"),
    (
        "source",
        "10.0",
        "start connect switch stop package finish",
        "setup active device postcopy-active completed",
    ),
    ("source", "7.2", "start connect switch stop package finish", "setup active postcopy-active completed"),
    # Nothing was left for the postcopy.
    ("source", "10.0", "start connect switch stop sent finish", "setup active device completed"),
    ("source", "7.2", "start connect switch stop sent finish", "setup active postcopy-active completed"),
    ("source", "10.0", "start connect cancel fail", "setup active cancelling cancelled"),
    ("source", "10.0", "start connect cancel switch stop fail", "setup active cancelling cancelled"),
    ("source", "10.0", "start connect switch cancel fail", "setup active cancelling cancelled"),
    # It has said postcopy by then, and fails.
    ("source", "7.2", "start connect switch cancel fail", "setup active postcopy-active failed"),
    (
        "source",
        "10.0",
        "start connect switch stop cancel package finish",
        "setup active device cancelling postcopy-active completed",
    ),
    (
        "source",
        "7.2",
        "start connect switch stop cancel package finish",
        "setup active postcopy-active completed",
    ),
    ("source", "10.0", "start connect stop sent cancel lose", "setup active device failed"),
    ("destination", "10.0", "start connect run ran finish", "setup active completed"),
    ("destination", "10.0", "start connect run not-run fail", "setup active failed"),
    (
        "destination",
        "10.0",
        "start connect switch package run ran finish",
        "setup active postcopy-active completed",
    ),
    ("destination", "7.2", "start connect package run ran finish", "active postcopy-active completed"),
    (
        "source",
        "10.0",
        "start connect switch stop package lose recover reconnect resume finish",
        "setup active device postcopy-active postcopy-paused postcopy-recover-setup postcopy-recover "
        "postcopy-active completed",
    ),
    (
        "source",
        "7.2",
        "start connect switch stop package lose recover reconnect resume finish",
        "setup active postcopy-active postcopy-paused postcopy-recover postcopy-active completed",
    ),
]


PATHS += [
    (side, "11.1", events, statuses)
    for side, events, statuses in cast(
        list[tuple[Side, str, str]],
        (
            (
                "source",
                "start connect switch stop package loaded finish",
                "setup active device postcopy-device postcopy-active completed",
            ),
            # The word that it has loaded, and the last one, at once.
            (
                "source",
                "start connect switch stop package finish",
                "setup active device postcopy-device completed",
            ),
            (
                "source",
                "start connect switch stop package lose never-ran",
                "setup active device postcopy-device postcopy-paused failing failed",
            ),
            ("source", "start fail start", "setup failing failed setup"),
            (
                "destination",
                "start connect package run ran finish",
                "setup active postcopy-device postcopy-active completed",
            ),
            ("destination", "start connect package never-ran", "setup active postcopy-device failed"),
            (
                "destination",
                "start connect package run not-run never-ran",
                "setup active postcopy-device postcopy-active failed",
            ),
            # The link is lost before RUN, which then comes of what is here.
            (
                "destination",
                "start connect package lose run ran",
                "setup active postcopy-device postcopy-paused",
            ),
            ("destination", "start connect fail", "setup active failed"),
        ),
    )
]


@pytest.mark.parametrize("events", ["package loaded finish", "package finish"])
def test_nobody_starts_a_machine_that_went_by_postcopy(events: str) -> None:
    course = Course("source", DIALECTS["11.1"])
    for event in ("start", "connect", "switch", "stop", *events.split()):
        course.move(Event(event))
    assert course.status is Status.COMPLETED
    assert not course.person_may_run


@pytest.mark.parametrize(("side", "compat", "events", "expected"), PATHS)
def test_paths_are_qemus(side: Side, compat: Compat, events: str, expected: str) -> None:
    course = Course(side, DIALECTS[compat])
    for event in events.split():
        course.move(Event(event))
    assert course.history[1:] == [Status(word) for word in expected.split()]


@pytest.mark.parametrize("compat", ALL)
@pytest.mark.parametrize("side", ["source", "destination"])
def test_every_pair_of_a_phase_and_an_event(side: Side, compat: Compat) -> None:
    """It leads to a phase of this end, of which all is known, or it is raised and changes nothing."""
    dialect = DIALECTS[compat]
    pairs = table(side, dialect)
    phases = {Phase.NONE, *pairs.values()}
    assert phases == {phase for phase, _ in pairs} | {Phase.NONE} | (
        phases & set(ENDS)
    ), "a phase without an end"
    every: list[tuple[Phase, Event]] = list(itertools.product(Phase, Event))
    for phase, event in every:
        course = Course(side, dialect)
        course.phase, course.status = phase, statuses(phase, side, dialect)[-1]
        if (phase, event) in pairs:
            assert phase in phases, f"{phase} is never reached"
            course.move(event)
            assert course.phase is pairs[phase, event]
            assert course.status is statuses(course.phase, side, dialect)[-1]
            assert course.status in dialect.statuses
        else:
            with pytest.raises(WrongMove):
                course.move(event)
            assert course.phase is phase
        # Whatever is under way can fail.
        if phase in phases and phase not in ENDS and phase is not Phase.ARRIVED:
            course.phase = phase
            assert {Event.LOSE, Event.FAIL, Event.NEVER_RAN} & {e for p, e in pairs if p is phase}, phase


ENDS = (
    *(Phase.NONE, Phase.COMPLETED, Phase.MOVED, Phase.CANCELLED, Phase.FAILED, Phase.UNKNOWN),
    Phase.PAUSED,  # until somebody recovers it
    Phase.PAUSED_STARTING,
)


@pytest.mark.parametrize("compat", ALL)
def test_the_machine_never_runs_on_both_sides(compat: Compat) -> None:
    """Every pair of phases that the two ends can reach together.

    What ties them: the destination takes the package (or the end of a precopy) only after the source sent it,
    the source hears that the destination never ran only when it did not.
    """
    dialect = DIALECTS[compat]
    seen = set()
    todo = [(Phase.NONE, Phase.NONE)]
    while todo:
        pair = todo.pop()
        if pair in seen:
            continue
        seen.add(pair)
        source, destination = Course("source", dialect), Course("destination", dialect)
        source.phase, destination.phase = pair
        assert not (source.may_run and destination.may_run), pair
        for (phase, event), after in table("source", dialect).items():
            heard = event is not E.NEVER_RAN or destination.phase is Phase.FAILED
            again = event is E.START and source.phase is not Phase.NONE  # another destination
            unsent = event is not E.UNSENT or not destination.may_run
            if phase is source.phase and heard and unsent and not again:
                todo.append((after, destination.phase))
        for (phase, event), after in table("destination", dialect).items():
            sent = not (event in (E.PACKAGE, E.RUN, E.FINISH) and source.may_run)
            if phase is destination.phase and sent:
                todo.append((source.phase, after))
    assert (Phase.PAUSED, Phase.PAUSED) in seen
    assert (Phase.MOVED, Phase.MOVED) in seen
    assert (Phase.COMPLETED, Phase.COMPLETED) in seen
    assert (Phase.UNKNOWN, Phase.COMPLETED) in seen


@pytest.mark.parametrize("compat", ALL)
def test_behind_the_border_only_the_destinations_word_frees_the_source(compat: Compat) -> None:
    for (before, event), after in table("source", DIALECTS[compat]).items():
        course = Course("source", DIALECTS[compat])
        course.phase = before
        held = not course.may_run
        course.phase = after
        if held and course.may_run and event is not E.START:
            assert event is E.NEVER_RAN or (event is E.UNSENT and after in (Phase.STOPPED, Phase.SWITCHED))


@pytest.mark.parametrize(
    ("uri", "address"),
    [
        ("tcp:h:5", Tcp("h", "5")),
        ("tcp::0", Tcp("", "0")),
        ("tcp:[::1]:5,ipv4", Tcp("::1", "5", ipv4=True)),
        ("tcp:127.0.0.1:1,to=9,ipv6=off", Tcp("127.0.0.1", "1", ipv6=False, to=9)),
        ("unix:/a:b", Unix("/a:b")),
        ("fd:x", Fd("x")),
        ("exec:cat > x,y", Exec(("/bin/sh", "-c", "cat > x,y"))),
        ("file:/x,offset=0x10k", File("/x", 16 << 10)),
        ("file:/x", File("/x")),
    ],
)
def test_addresses(uri: str, address: Any) -> None:
    assert parse_address(uri, DIALECTS["10.0"]) == address
