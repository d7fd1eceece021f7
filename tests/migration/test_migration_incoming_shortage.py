"""A destination that has no memory for pages which have come: the migration waits and says so; it does not pause."""

from __future__ import annotations

import logging

import pytest

from tests.kit.migration_ends import Received
from tests.kit.small_tmpfs import SmallTmpfs, small_tmpfs
from tests.kit.until import until
from tests.migration.test_migration_incoming_postcopy import PAGE, TOUCH, A, Machine, Toucher, receiving
from vhostpc.migration import long_waits
from vhostpc.migration.phase import Event
from vhostpc.wire.migration.elements import RamBlocks
from vhostpc.wire.migration.return_path import Pong, Shut

pytestmark = pytest.mark.ufd
PAGES = 8


class OnDisk(Machine):
    """Its block lies in a file that it was given."""

    def __init__(self, disk: SmallTmpfs) -> None:
        super().__init__()
        self.disk = disk

    def accept_blocks(self, listed: RamBlocks, *, postcopy: bool) -> None:
        (block,) = listed.blocks
        self.ram.add(block.name, self.disk.fd, block.length)


@pytest.mark.parametrize("running", [True, False], ids=["behind RUN", "before RUN"])
async def test_a_shortage_is_waited_out(
    running: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The log says so; a thread that waits for a page gets it when there is memory, and the migration completes."""
    monkeypatch.setattr(long_waits, "FIRST", 0.02)
    received = Received()
    told: list[str] = []

    def lines() -> list[str]:
        told[:] = [r.getMessage() for r in caplog.records if "memory" in r.getMessage()]
        return told

    with small_tmpfs(3, PAGES * PAGE) as disk, caplog.at_level(logging.WARNING, "vhostpc.migration"):
        async with receiving(received, wanted=OnDisk(disk)) as setup:
            await setup.source.switch([] if running else [TOUCH])
            await until(lambda: received.events == [Event.PACKAGE])  # before that a touch would make the page
            toucher = Toucher(setup, 5)
            await setup.source.asked("ram", 5)
            await setup.source.pages("ram", *((page, A) for page in range(PAGES)), last=True)
            await setup.source.end()
            await until(lines)
            assert setup.incoming.missing() == PAGES - 3
            assert (Pong(3) in setup.source.said) is running
            assert toucher.got is None
            assert received.events == [Event.PACKAGE]
            disk.resize(100)
            await setup.source.heard(Shut(0))
            await setup.ended.wait()
            await until(lambda: toucher.got)
            assert toucher.got == A
            assert setup.raised is None
            assert setup.incoming.loads()[-1].shortages == 1
    assert received.events == [Event.PACKAGE, Event.FINISH]
    assert "no memory for a page that has arrived" in told[0]


async def test_a_shortage_that_is_over_is_told(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line when it begins, one when it is over."""
    monkeypatch.setattr(long_waits, "FIRST", 0.02)
    with (
        small_tmpfs(3, PAGES * PAGE) as disk,
        caplog.at_level(logging.WARNING, "vhostpc.migration.long_waits"),
    ):
        async with receiving(wanted=OnDisk(disk)) as setup:
            await setup.source.switch()
            await setup.source.pages("ram", *((page, A) for page in range(5)))
            for count, room in ((1, 5), (3, 7)):
                await until(lambda count=count: len(caplog.records) == count)  # type: ignore[misc]
                assert "no memory for a page" in caplog.records[-1].getMessage()
                disk.resize(room)
                await until(lambda count=count: len(caplog.records) == count + 1)  # type: ignore[misc]
                assert "there is memory for pages again, after" in caplog.records[-1].getMessage()
                await setup.source.pages("ram", (5, A), (6, A))
