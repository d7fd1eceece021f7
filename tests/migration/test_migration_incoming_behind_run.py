"""The machine runs here, and something goes wrong in this process: a pause, or nothing where all has come.

Never an end: raised out of :meth:`Incoming.receive` it would end the program, and with it the guest that only it has.
"""

from __future__ import annotations

import logging

import pytest
import trio

from tests.kit.migration_ends import Received
from tests.kit.scripted_source import CLOCK
from tests.kit.until import until
from tests.migration.test_migration_border import WRONG
from tests.migration.test_migration_incoming_postcopy import PAGE, A, B, Toucher, receiving
from vhostpc.migration.answers import Answers
from vhostpc.migration.incoming import Incoming
from vhostpc.migration.phase import Event, Phase
from vhostpc.wire.migration.elements import Ping
from vhostpc.wire.migration.return_path import Shut

pytestmark = pytest.mark.ufd
any_error = pytest.mark.parametrize("error", WRONG, ids=lambda e: type(e).__name__)


@any_error
async def test_the_rest_of_the_package_fails_and_pages_miss(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pause: a thread that waits for a page goes on waiting, and the source is not told that it never ran."""

    def fail(self: Incoming, event: Ping) -> None:
        raise error

    monkeypatch.setattr(Incoming, "_pong_in_package", fail)
    received = Received()
    async with receiving(received) as setup:
        await setup.source.switch()
        await until(lambda: received.events[-1:] == [Event.LOSE])
        assert received.error is error
        toucher = Toucher(setup, 3)
        await until(lambda: setup.incoming.service.waiting())
        assert toucher.waits
        assert not setup.machine.ram.lost
        assert setup.incoming.course.phase is Phase.PAUSED
        assert not setup.ended.is_set()
        assert not [said for said in setup.source.said if isinstance(said, Shut)]
    assert received.events == [Event.PACKAGE, Event.LOSE]


@any_error
async def test_the_rest_of_the_package_fails_and_all_pages_are_here(
    error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The machine is whole: it completes, and the source is told so."""
    go = trio.Event()

    async def run(postcopy: bool) -> None:
        await go.wait()

    def fail(self: Incoming, event: Ping) -> None:
        raise error

    received = Received()
    async with receiving(received, run=run) as setup:
        await setup.source.switch()
        await setup.incoming.running()
        await setup.source.pages("ram", *((page, B) for page in range(8)), last=True)
        await setup.source.end()
        await until(lambda: setup.incoming.missing() == 0)
        monkeypatch.setattr(Incoming, "_pong_in_package", fail)
        go.set()
        await setup.source.heard(Shut(0))
        await setup.ended.wait()
        assert setup.raised is None
        assert await setup.machine.ram["ram"].read(0, PAGE) == B
    assert received.events == [Event.PACKAGE, Event.FINISH]
    assert any("the machine runs, but" in r.getMessage() for r in caplog.records)


@any_error
@pytest.mark.parametrize("postcopy", [False, True], ids=["precopy", "postcopy"])
async def test_the_final_report_fails(
    postcopy: bool, error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Everything is here and runs; that its source is not told changes nothing about that."""
    caplog.set_level(logging.INFO)
    send = Answers.send

    def fail(self: Answers, message: bytes) -> None:
        if message == Shut(0).encode():
            raise error
        send(self, message)

    monkeypatch.setattr(Answers, "send", fail)
    received = Received()
    async with receiving(received) as setup:
        if postcopy:
            await setup.source.switch()
        else:
            await setup.source.begin()
        await setup.source.pages("ram", *((page, A) for page in range(8)), last=True)
        await setup.source.end([] if postcopy else [CLOCK])
        await setup.ended.wait()
        assert setup.raised is None
        assert not setup.machine.ram.lost
    assert received.events[-1] is Event.FINISH
    assert any("the source does not know that everything has arrived" in m for m in caplog.messages)
