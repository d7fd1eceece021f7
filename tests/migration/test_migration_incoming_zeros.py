"""Pages that a source never sends: not sent and never discarded they are zero, discarded they are owed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import trio
import trio.testing

from tests.kit.hugepages import hugepages
from tests.kit.migration_ends import Received
from tests.kit.scripted_source import CLOCK
from tests.kit.until import until
from tests.migration.test_migration_incoming_postcopy import TOUCH, Machine, Toucher, receiving
from vhostpc.migration.phase import Event
from vhostpc.pages.faultclient import ClientRange
from vhostpc.pages.ramblock import Bits, RamSet
from vhostpc.ufd import Userfaultfd
from vhostpc.wire.migration.elements import RamBlocks
from vhostpc.wire.migration.return_path import Pong, Shut

pytestmark = pytest.mark.ufd
PAGE, HUGE = 4096, 2 << 20
A, B = (bytes([byte]) * PAGE for byte in (0xAA, 0xBB))
ZERO = bytes(PAGE)
TOLD = "migration: 2 host pages were not sent: they are zero"


async def test_never_discarded_is_zero(caplog: pytest.LogCaptureFixture) -> None:
    """As QEMU leaves out what of a virtio-mem is not plugged: counted, told, and no page of the file."""
    received = Received()
    async with receiving(received) as setup:
        await setup.source.begin()
        await setup.source.pages("ram", (0, A), (1, A))
        await setup.source.discard("ram", 1, 5)
        await setup.source.package()
        await setup.source.pages("ram", *((page, B) for page in range(1, 6)), last=True)
        await setup.source.end()
        await setup.source.heard(Shut(0))
        await setup.ended.wait()
        assert setup.raised is None
        block = setup.machine.ram["ram"]
        assert block.holes() == [(6 * PAGE, 2 * PAGE)]
        assert block.count_bits(Bits.RECEIVED) == 8
        assert await block.read(0, 8 * PAGE) == A + B * 5 + ZERO * 2
    assert received.events == [Event.PACKAGE, Event.FINISH]
    assert caplog.messages.count(TOLD) == 1


async def test_in_precopy_too(caplog: pytest.LogCaptureFixture) -> None:
    async with receiving() as setup:
        await setup.source.begin(postcopy=False)
        await setup.source.pages("ram", *((page, A) for page in range(6)), last=True)
        await setup.source.end([CLOCK])
        await setup.source.heard(Shut(0))
        assert await setup.machine.ram["ram"].read(0, 8 * PAGE) == A * 6 + ZERO * 2
        assert setup.machine.ram["ram"].count_bits(Bits.RECEIVED) == 8
    assert caplog.messages.count(TOLD) == 1


@pytest.mark.parametrize("how", ["postcopy", "precopy"])
async def test_discarded_is_owed(how: str) -> None:
    received = Received()
    async with receiving(received) as setup:
        await setup.source.begin()
        await setup.source.pages("ram", *((page, A) for page in range(4)))
        await setup.source.discard("ram", 0, 6)
        if how == "postcopy":
            await setup.source.package()
            await setup.source.heard(Pong(3))
        await setup.source.pages("ram", *((page, B) for page in range(5)), last=True)
        await setup.source.end([] if how == "postcopy" else [CLOCK])
        await until(lambda: received.error)
        assert str(received.error) == "the source says that everything is sent, but 1 host pages never came"
    assert received.events == ([Event.PACKAGE, Event.LOSE] if how == "postcopy" else [Event.FAIL])


async def test_who_waits_for_such_a_page_gets_it_when_all_has_come() -> None:
    """It is asked for as any other, because a source may send it all the same."""
    async with receiving() as setup:
        await setup.source.begin()
        await setup.source.discard("ram", 0, 5)
        await setup.source.package()
        await setup.incoming.running()
        sent, never = Toucher(setup, 6), [Toucher(setup, 7), Toucher(setup, 7)]
        await setup.source.asked("ram", 6)
        await setup.source.asked("ram", 7)
        await setup.source.pages("ram", (6, A))
        await until(lambda: sent.got)
        await setup.source.pages("ram", *((page, B) for page in range(5)), last=True)
        await trio.testing.wait_all_tasks_blocked()
        assert [t.got for t in never] == [None, None]
        await setup.source.end()
        await setup.source.heard(Shut(0))
        await until(lambda: all(t.got for t in never))
        assert (sent.got, [t.got for t in never]) == (A, [ZERO, ZERO])
        assert await setup.machine.ram["ram"].read(0, 8 * PAGE) == B * 5 + ZERO + A + ZERO


async def test_a_device_that_waits_for_such_a_page_is_loaded() -> None:
    """The end of the stream waits for the load, so the load must not wait for pages that never come."""
    async with receiving() as setup:
        await setup.source.begin()
        await setup.source.discard("ram", 0, 5)
        await setup.source.package([TOUCH, CLOCK])
        await setup.source.asked("ram", 5)
        await setup.source.pages("ram", *((page, B) for page in range(5)), last=True)
        await setup.source.end()
        await setup.source.heard(Pong(3), Shut(0))
        assert setup.machine.read == [ZERO]


async def test_who_touches_it_behind_the_end() -> None:
    """Everything has arrived and the machine is still being started: the first touch makes it."""
    go = trio.Event()

    async def run(postcopy: bool) -> None:
        await go.wait()

    async with receiving(run=run) as setup:
        await setup.source.begin()
        await setup.source.discard("ram", 0, 6)
        await setup.source.package()
        await setup.source.pages("ram", *((page, B) for page in range(6)), last=True)
        await setup.source.end()
        await until(lambda: setup.incoming.missing() == 0)
        block = setup.machine.ram["ram"]
        assert block.holes() == [(6 * PAGE, 2 * PAGE)]
        # Another process' mapping, as a back-end has one.
        with RamSet() as theirs, Userfaultfd.open() as ufd:
            mapped = theirs.add("theirs", block.fd, block.length)
            ufd.register(mapped.base, mapped.length)
            client = setup.incoming.service.add_client(ufd, "back-end")
            client.set_ranges([ClientRange(mapped.base, mapped.length, block, 0)])
            assert await mapped.read(7 * PAGE, PAGE) == ZERO
            client.remove()
        own = Toucher(setup, 6)
        await until(lambda: own.got)
        assert own.got == ZERO
        assert block.holes() == []
        go.set()
        await setup.source.heard(Shut(0))


@pytest.fixture
def huge_pages() -> Iterator[None]:
    with hugepages(8):
        yield


async def test_huge_pages(huge_pages: None) -> None:
    blocks = {"ram": (4, HUGE)}
    async with receiving(blocks=blocks) as setup:
        await setup.source.begin()
        await setup.source.discard("ram", 0, 2)
        await setup.source.package()
        await setup.incoming.running()
        toucher = Toucher(setup, 2 * HUGE // PAGE + 5)
        await setup.source.asked("ram", 2)
        await setup.source.pages("ram", *((page, B) for page in range(2 * HUGE // PAGE)), last=True)
        await setup.source.end()
        await setup.source.heard(Shut(0))
        await until(lambda: toucher.got)
        assert toucher.got == ZERO
        block = setup.machine.ram["ram"]
        for at in range(0, 4 * HUGE, HUGE):
            assert await block.read(at, HUGE) == (B if at < 2 * HUGE else ZERO) * (HUGE // PAGE)


async def test_a_part_of_a_huge_page_is_owed_the_rest(huge_pages: None) -> None:
    received = Received()
    async with receiving(received, blocks={"ram": (4, HUGE)}) as setup:
        await setup.source.begin()
        await setup.source.discard("ram", 0, 1)
        await setup.source.package()
        await setup.source.heard(Pong(3))
        await setup.source.pages("ram", *((page, B) for page in range(HUGE // PAGE + 1)), last=True)
        await setup.source.end()
        await until(lambda: received.error)
        assert str(received.error) == "the source says that everything is sent, but 1 host pages never came"
        assert setup.incoming.course.may_run


async def test_what_another_stream_discarded_is_nothing_to_this_one() -> None:
    """A machine whose memory is there already, as ours is, takes a second one after the first has failed."""

    class Again(Machine):
        def accept_blocks(self, listed: RamBlocks, *, postcopy: bool) -> None:
            if not self.ram.blocks:
                super().accept_blocks(listed, postcopy=postcopy)

        def close(self) -> None:
            pass

    machine = Again()
    async with receiving(wanted=machine) as setup:
        await setup.source.begin()
        await setup.source.discard("ram")
        await setup.source.stream.send_eof()
        await setup.ended.wait()
        assert setup.raised is not None
    assert machine.ram["ram"].count_bits(Bits.DISCARDED) == 8
    async with receiving(wanted=machine) as setup:
        await setup.source.begin()
        await setup.source.pages("ram", (0, A), last=True)
        await setup.source.end([CLOCK])
        await setup.source.heard(Shut(0))
        assert machine.ram["ram"].count_bits(Bits.DISCARDED) == 0
    machine.ram.close()
