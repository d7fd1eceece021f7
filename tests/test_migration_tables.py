"""Options, statuses and addresses of a migration, without any I/O."""

from __future__ import annotations

import itertools
from typing import Any, cast

import pytest

from vhostpc.dialect import DIALECTS, Compat
from vhostpc.errors import MigrationRefused
from vhostpc.migration.options import SUPPORTED, Options, parameters
from vhostpc.migration.state import Event, Machine, Status, WrongMove, destination_table, source_table
from vhostpc.migration.uri import Exec, Fd, File, Tcp, Unix, parse

ALL = tuple(DIALECTS)
E = Event


@pytest.mark.parametrize("compat", ALL)
def test_no_capability_that_we_do_not_do_can_be_switched_on(compat: Compat) -> None:
    for name in DIALECTS[compat].capabilities:
        options = Options(compat)
        if name in SUPPORTED:
            options.set_capabilities([(name, True)], busy=False)
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
PATHS = [
    ("source", "10.0", "start connect switch finish", "setup active device completed"),
    ("source", "7.2", "start connect switch finish", "setup active completed"),
    (
        "source",
        "10.0",
        "start connect switch package finish",
        "setup active device postcopy-active completed",
    ),
    ("source", "7.2", "start connect switch package finish", "setup active postcopy-active completed"),
    ("source", "10.0", "start connect cancel cancelled", "setup active cancelling cancelled"),
    ("destination", "10.0", "start connect package finish", "setup active postcopy-active completed"),
    ("destination", "7.2", "start connect package finish", "active postcopy-active completed"),
    (
        "source",
        "10.0",
        "start connect switch package lose recover reconnect resume finish",
        "setup active device postcopy-active postcopy-paused postcopy-recover-setup postcopy-recover "
        "postcopy-active completed",
    ),
    (
        "source",
        "7.2",
        "start connect switch package lose recover resume finish",
        "setup active postcopy-active postcopy-paused postcopy-recover postcopy-active completed",
    ),
]


PATHS += [
    (side, "11.1", events, statuses)
    for side, events, statuses in (
        (
            "source",
            "start connect switch package loaded finish",
            "setup active device postcopy-device postcopy-active completed",
        ),
        # The word that it has loaded, and the last one, at once.
        ("source", "start connect switch package finish", "setup active device postcopy-device completed"),
        (
            "source",
            "start connect switch package lose never-ran fail",
            "setup active device postcopy-device postcopy-paused failing failed",
        ),
        ("source", "start fail fail start", "setup failing failed setup"),
        (
            "destination",
            "start connect package loaded finish",
            "setup active postcopy-device postcopy-active completed",
        ),
        ("destination", "start connect package never-ran", "setup active postcopy-device failed"),
        # The link is lost before RUN, which then comes of what is here.
        (
            "destination",
            "start connect package lose",
            "setup active postcopy-device postcopy-paused",
        ),
        ("destination", "start connect fail", "setup active failed"),
    )
]


@pytest.mark.parametrize("events", ["package loaded finish", "package finish"])
def test_nobody_starts_a_machine_that_went_by_postcopy(events: str) -> None:
    machine = Machine("source", DIALECTS["11.1"])
    for event in ("start", "connect", "switch", *events.split()):
        machine.move(Event(event))
    assert machine.status is Status.COMPLETED
    assert not machine.person_may_run


@pytest.mark.parametrize(("side", "compat", "events", "statuses"), PATHS)
def test_paths_are_qemus(side: Any, compat: Compat, events: str, statuses: str) -> None:
    machine = Machine(side, DIALECTS[compat])
    for event in events.split():
        machine.move(Event(event))
    assert machine.history[1:] == statuses.split()


@pytest.mark.parametrize("compat", ALL)
def test_a_missing_pair_raises_and_changes_nothing(compat: Compat) -> None:
    for status, event in itertools.product(Status, Event):
        for side, table in (
            ("source", source_table(DIALECTS[compat])),
            ("destination", destination_table(DIALECTS[compat])),
        ):
            machine = Machine(cast(Any, side), DIALECTS[compat])
            machine.status = status
            if (status, event) not in table:
                with pytest.raises(WrongMove):
                    machine.move(event)
                assert machine.status is status


@pytest.mark.parametrize("compat", ALL)
def test_the_machine_never_runs_on_both_sides(compat: Compat) -> None:
    """Every pair of statuses that the two ends can reach together.

    What ties them: the destination takes the package (or the end of a precopy) only after the source sent it,
    the source hears that the destination never ran only when it did not.
    """
    seen = set()
    todo = [(Status.NONE, Status.NONE)]
    while todo:
        pair = todo.pop()
        if pair in seen:
            continue
        seen.add(pair)
        source, destination = (Machine("source", DIALECTS[compat]), Machine("destination", DIALECTS[compat]))
        source.status, destination.status = pair
        assert not (source.may_run and destination.may_run), pair
        for (status, event), after in source_table(DIALECTS[compat]).items():
            heard = event is not E.NEVER_RAN or destination.status is Status.FAILED
            again = event is E.START and source.status is not Status.NONE  # another destination
            if status is source.status and heard and not again:
                todo.append((after, destination.status))
        for (status, event), after in destination_table(DIALECTS[compat]).items():
            sent = not (event in (E.PACKAGE, E.FINISH) and source.may_run)
            if status is destination.status and sent:
                todo.append((source.status, after))
    assert (Status.POSTCOPY_PAUSED, Status.POSTCOPY_PAUSED) in seen
    assert (Status.COMPLETED, Status.COMPLETED) in seen


@pytest.mark.parametrize("compat", ALL)
def test_after_the_package_only_the_destinations_word_frees_the_source(compat: Compat) -> None:
    machine = Machine("source", DIALECTS[compat])
    for (before, event), after in source_table(DIALECTS[compat]).items():
        machine.status = before
        held = not machine.may_run
        machine.status = after
        if held and machine.may_run and before is not Status.COMPLETED:
            assert event is E.NEVER_RAN


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
    assert parse(uri, DIALECTS["10.0"]) == address
