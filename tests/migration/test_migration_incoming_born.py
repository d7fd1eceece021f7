"""A destination whose memory holds a page that the source did not send: what it says, and what stays as it was."""

from __future__ import annotations

import os

import pytest
import trio

from tests.kit.migration_ends import Received
from tests.kit.until import until
from tests.migration.test_migration_incoming_huge import HUGE, advised, huge_page  # noqa: F401  a fixture
from tests.migration.test_migration_incoming_postcopy import (
    BLOCKS,
    PAGE,
    TOUCH,
    A,
    B,
    Machine,
    Setup,
    Toucher,
    receiving,
)
from tests.ufd.test_ufd_born import held_for_io
from vhostpc.errors import PageBorn
from vhostpc.migration.phase import Event
from vhostpc.pages.ramblock import Bits, RamSet
from vhostpc.pages.service import FaultService
from vhostpc.ufd import Userfaultfd
from vhostpc.wire.migration.elements import Ping
from vhostpc.wire.migration.return_path import Pong, Shut

pytestmark = pytest.mark.ufd


class Backed(Machine):
    """A machine with two back-ends, as far as the fault service knows of them."""

    async def advise(self, service: FaultService) -> None:
        await super().advise(service)
        for name in ("net0", "disk0"):
            with Userfaultfd.open() as ufd:
                service.add_client(ufd, name)


async def touch_all(setup: Setup) -> None:
    """What mlockall(MCL_FUTURE) does in a back-end that maps the memory before its userfaultfd watches it."""
    block = setup.machine.ram["ram"]
    with RamSet() as theirs:
        await theirs.add("ram", block.fd, block.length).read(0, block.length)


async def test_a_back_end_that_fills_memory_pauses_the_migration() -> None:
    """Behind RUN. Nothing is taken for a page that came; earlier pages and waiting threads stay."""
    received = Received()

    async def run(postcopy: bool) -> None:
        assert await setup.machine.ram["ram"].read(0, PAGE) == A
        await touch_all(setup)

    async with receiving(received, run=run, wanted=Backed()) as setup:
        await setup.source.switch()
        await setup.source.pages("ram", (0, A))
        await setup.source.heard(Pong(3), Pong(4))
        await setup.incoming.running()
        block = setup.machine.ram["ram"]
        await until(lambda: block.holes() == [])
        assert setup.incoming.missing() == 7
        await setup.source.pages("ram", *((page, B) for page in range(8)), last=True)
        await setup.source.end()
        await until(lambda: received.events[-1:] == [Event.LOSE])
        assert isinstance(received.error, PageBorn)
        assert (received.error.block, received.error.page) == ("ram", 1)
        for words in ("host page 1 of 'ram'", "in this process or by net0 or disk0", "cannot be recovered"):
            assert words in str(received.error)
        assert setup.incoming.missing() == 7
        assert block.count_bits(Bits.RECEIVED) == 1
        assert await block.read(0, 2 * PAGE) == A + bytes(PAGE)
        assert not setup.ended.is_set()
        assert not [said for said in setup.source.said if isinstance(said, Shut)]
    assert received.events == [Event.PACKAGE, Event.LOSE]
    assert "end" not in setup.machine.told


async def test_who_waits_for_a_page_that_was_born_waits_on() -> None:
    """It was asleep before the page was born: it is not woken for something else."""
    received = Received()
    async with receiving(received) as setup:
        await setup.source.switch()
        await setup.source.heard(Pong(3), Pong(4))
        await setup.incoming.running()
        toucher = Toucher(setup, 3)
        await setup.source.asked("ram", 3)
        os.pwrite(setup.machine.ram["ram"].fd, b"born", 3 * PAGE)
        await setup.source.pages("ram", (3, A))
        await until(lambda: received.events[-1:] == [Event.LOSE])
        assert [(w.block, w.page) for w in setup.incoming.service.waiting()] == [("ram", 3)]
        assert toucher.waits
    assert isinstance(received.error, PageBorn)


async def test_a_page_born_before_run_fails_the_migration() -> None:
    """While devices are loaded: the machine has not run, and the source is told so."""
    received = Received()
    async with receiving(received) as setup:
        await setup.source.switch([TOUCH])
        await setup.source.asked("ram", 5)
        os.pwrite(setup.machine.ram["ram"].fd, b"born", 2 * PAGE)
        await setup.source.pages("ram", (2, A))
        await setup.source.heard(Shut(1))
        await setup.source.stream.aclose()
        await setup.ended.wait()
        assert isinstance(setup.raised, PageBorn)
        assert "host page 2 of 'ram' arrived" in str(setup.raised)
        assert setup.machine.read == []
    assert received.events == [Event.PACKAGE, Event.NEVER_RAN]


async def test_a_page_born_before_listen_fails_the_migration() -> None:
    """After its discard, by a back-end that has the memory: found before anybody relies on it. The source, which sends
    pages by then, hears that it may go on."""
    received = Received()
    async with receiving(received, {"ram": (600, PAGE)}, wanted=Backed()) as setup:
        await setup.source.begin()
        await setup.source.pages("ram", *((page, A) for page in range(10)))
        await setup.source.discard("ram", 3)
        await until(
            lambda: setup.machine.ram.blocks and setup.machine.ram["ram"].count_bits(Bits.RECEIVED) == 3
        )
        os.pwrite(setup.machine.ram["ram"].fd, b"born", 77 * PAGE)
        await setup.source.package()
        async with trio.open_nursery() as nursery:

            async def send_pages() -> None:
                while True:
                    await setup.source.pages("ram", *((page, A) for page in range(100, 200)))

            nursery.start_soon(send_pages)
            await setup.source.heard(Shut(1))
            nursery.cancel_scope.cancel()
        await setup.source.stream.aclose()
        await setup.ended.wait()
        assert isinstance(setup.raised, PageBorn)
        assert "host page 77 of 'ram' has not arrived, but a page is there" in str(setup.raised)
        assert "net0 or disk0" in str(setup.raised)
        assert setup.machine.told[-2:] == ["listen", "end"]
    assert received.events == [Event.FAIL]


async def test_a_discard_that_leaves_a_page_fails_the_migration(advised: None) -> None:  # noqa: F811
    """The kernel says that it is gone, and has only cleared it: the source goes on by itself."""
    received = Received()
    async with receiving(received, {"ram": (HUGE // PAGE, PAGE)}, wanted=Backed()) as setup:
        await setup.source.begin()
        await until(lambda: setup.machine.ram.blocks)
        with huge_page(setup.machine.ram["ram"].fd) as at, held_for_io(at):
            await setup.source.pages("ram", *((page, A) for page in range(HUGE // PAGE)))
            await setup.source.discard("ram", 77, 1)
            await setup.source.heard(Shut(1))
            await setup.source.stream.aclose()
            await setup.ended.wait()
        assert isinstance(setup.raised, PageBorn)
        assert "host page 77 of 'ram' is still there after its discard" in str(setup.raised)
        assert "the back-ends are net0 or disk0" in str(setup.raised)
    assert received.events == [Event.FAIL]


@pytest.mark.parametrize("blocks", [BLOCKS])
async def test_huge_page_that_was_born(blocks: dict[str, tuple[int, int]], huge_pages: int) -> None:
    """hugetlbfs, where a hole cannot be told from data: a page made before LISTEN is found all the same."""
    received = Received()
    async with receiving(received, {**blocks, "big": (4, huge_pages)}) as setup:
        await setup.source.begin()
        await setup.source.discard("ram")
        await setup.source.discard("big")
        await setup.source.send(Ping(7).encode())
        await setup.source.heard(Pong(7))  # all that came before is done
        with RamSet() as theirs:
            block = setup.machine.ram["big"]
            await theirs.add("big", block.fd, block.length, huge_pages).write(2 * huge_pages, b"born")
        await setup.source.package()
        await setup.source.heard(Shut(1))
        await setup.source.stream.aclose()
        await setup.ended.wait()
        assert "host page 2 of 'big' has not arrived" in str(setup.raised)
    assert received.events == [Event.FAIL]
