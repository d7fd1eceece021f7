"""The destination in postcopy, from a source that does what it is told: order, waiting, pauses, pages twice."""

from __future__ import annotations

import itertools
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

from tests.kit.migration_ends import LIMIT, Received, incoming_of, pair
from tests.kit.scripted_source import CLOCK, ScriptedSource
from tests.kit.streams import Encoded
from tests.kit.until import until
from vhostpc.errors import ChannelLost, MemoryLost, StreamError
from vhostpc.migration import long_waits
from vhostpc.migration.channel import Channel, Connect
from vhostpc.migration.held import HeldMachine
from vhostpc.migration.incoming import Incoming
from vhostpc.migration.phase import Event, Phase
from vhostpc.pages.ramblock import Bits
from vhostpc.pages.service import FaultService
from vhostpc.wire.migration.elements import (
    BitmapRequest,
    DeviceSection,
    Package,
    Ping,
    PostcopyListen,
    PostcopyResume,
    PostcopyRun,
    RamBlocks,
)
from vhostpc.wire.migration.return_path import PageRequest, Pong, ResumeAck, Shut

pytestmark = pytest.mark.ufd
PAGE = 4096
A, B, C = (bytes([byte]) * PAGE for byte in (0xAA, 0xBB, 0xCC))
BLOCKS = {"ram": (8, PAGE)}


class Machine(HeldMachine):
    """Writes down what it is told; the section ``touch`` reads the page that its body names while it is loaded."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[str] = []
        self.read: list[bytes] = []
        self.broken = False

    async def advise(self, service: FaultService) -> None:
        assert not service.armed
        self.told.append("advise")

    def accept_blocks(self, listed: RamBlocks, *, postcopy: bool) -> None:
        super().accept_blocks(listed, postcopy=postcopy)
        self.told.append(f"blocks, postcopy={postcopy}")

    async def listen(self) -> None:
        self.told.append("listen")

    async def load(self, section: DeviceSection) -> None:
        if self.broken:
            raise StreamError(f"the state of {section.idstr!r} is not of this version")
        if section.idstr == "touch":
            self.read.append(await self.ram["ram"].read(section.body[0] * PAGE, PAGE))
        await super().load(section)
        self.told.append(f"load {section.idstr}")

    async def loaded(self, description: bytes) -> None:
        self.told.append("loaded")

    async def end(self) -> None:
        self.told.append("end")


TOUCH = DeviceSection(11, "touch", 0, 1, b"\x05")


class Setup:
    """A destination and its source; ``received`` is what it reported."""

    def __init__(
        self, incoming: Incoming, machine: Machine, source: ScriptedSource, nursery: trio.Nursery
    ) -> None:
        self.incoming = incoming
        self.machine = machine
        self.source = source
        self.nursery = nursery
        self.ended = trio.Event()
        self.raised: BaseException | None = None


@asynccontextmanager
async def receiving(
    received: Received | None = None,
    blocks: dict[str, tuple[int, int]] = BLOCKS,
    run: Callable[[bool], Awaitable[None]] | None = None,
    wanted: Machine | None = None,
    second: Connect | None = None,
) -> AsyncIterator[Setup]:
    """A destination that receives from a scripted source; both end with the context."""
    ours, theirs = pair()
    received = received or Received()
    with trio.fail_after(LIMIT), wanted or Machine() as machine:
        async with Channel(ours) as channel, theirs, trio.open_nursery() as nursery:
            incoming = incoming_of(
                channel, machine, postcopy=True, report=received.report, run=run, second=second
            )
            source = ScriptedSource(theirs, blocks)
            setup = Setup(incoming, machine, source, nursery)

            async def receive() -> None:
                try:
                    await incoming.receive()
                except Exception as error:
                    setup.raised = error
                setup.ended.set()

            nursery.start_soon(source.listen)
            nursery.start_soon(receive)
            try:
                yield setup
            finally:
                incoming.close()
                nursery.cancel_scope.cancel()


async def test_the_order_of_things() -> None:
    """ADVISE before the blocks, LISTEN before a load, PONG 3 behind the last of them, END before SHUT."""
    received = Received()
    told_at: dict[str, list[str]] = {}

    async def run(postcopy: bool) -> None:
        told_at["run"] = list(setup.machine.told)
        assert postcopy

    async with receiving(received, run=run) as setup:
        await setup.source.switch()
        await setup.source.heard(Pong(3), Pong(4))
        assert received.events == [Event.PACKAGE]
        assert "end" not in setup.machine.told
        await setup.source.pages("ram", *((page, A) for page in range(8)), last=True)
        await setup.source.end()
        await setup.source.heard(Shut(0))
        await setup.ended.wait()
        assert setup.raised is None
        expected = ["advise", "blocks, postcopy=True", "listen", "load clk", "loaded"]
        assert told_at["run"] == expected
        assert setup.machine.told == [*expected, "end"]
        assert received.events == [Event.PACKAGE, Event.FINISH]
        assert not setup.incoming.service.armed
        assert setup.incoming.missing() == 0


@pytest.mark.parametrize("advised", [False, True])
async def test_the_order_of_things_in_precopy(advised: bool) -> None:
    """Who was told ADVISE is told END too; nobody is told LISTEN."""
    received = Received()
    async with receiving(received) as setup:
        await setup.source.begin(postcopy=advised)
        await setup.source.pages("ram", *((page, A) for page in range(8)), last=True)
        await setup.source.end([CLOCK])
        await setup.ended.wait()
        assert setup.raised is None
        told = [f"blocks, postcopy={advised}", "load clk", "loaded"]
        assert setup.machine.told == (["advise", *told, "end"] if advised else told)
        assert setup.source.said == [Pong(1), Shut(0)]
    assert received.events == [Event.FINISH]


async def test_each_phase_is_told_by_one_line(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "vhostpc.migration"):
        async with receiving() as setup:
            await setup.source.switch()
            await setup.source.heard(Pong(3))
            await setup.source.pages("ram", *((page, A) for page in range(8)), last=True)
            await setup.source.end()
            await setup.ended.wait()
    lines = [record.getMessage() for record in caplog.records]
    # Two tasks tell that it runs and that all is loaded.
    assert [*lines[:2], *sorted(lines[2:4]), *lines[4:]] == [
        "migration: the source may switch to postcopy",
        "migration: 'toyvm': 32 KiB of RAM in 1 blocks",
        "migration: postcopy: 4 elements loaded, 8 host pages missing before",
        "migration: the machine may run here, 8 host pages are missing",
        "migration: all pages have arrived",
    ]


async def test_pages_are_served_while_a_device_is_loaded() -> None:
    """A load that waits for a page has it asked for, and others come meanwhile; PONG 4 may come before PONG 3."""
    received = Received()
    async with receiving(received) as setup:
        await setup.source.switch([TOUCH, CLOCK])
        await setup.source.asked("ram", 5)
        await setup.source.heard(Pong(4))
        await setup.source.pages("ram", (0, A), (1, B))
        await until(lambda: setup.incoming.missing() == 6)
        assert setup.machine.read == []
        assert Pong(3) not in setup.source.said
        assert setup.incoming.course.phase is Phase.PACKAGED
        await setup.source.pages("ram", (5, C))
        await setup.source.heard(Pong(3))
        await setup.incoming.running()
        assert setup.machine.read == [C]
        assert [s.idstr for s in setup.machine.devices] == ["touch", "clk"]
        await setup.source.pages("ram", *((page, A) for page in (2, 3, 4, 6, 7)))
        await setup.source.end()
        await setup.ended.wait()
        assert setup.source.said[-1] == Shut(0)
    assert received.events == [Event.PACKAGE, Event.FINISH]


async def test_the_end_waits_for_the_load() -> None:
    """The last byte has come, the machine is not yet started: no SHUT before it is."""
    go = trio.Event()

    async def run(postcopy: bool) -> None:
        await go.wait()

    async with receiving(run=run) as setup:
        await setup.source.switch()
        await setup.source.pages("ram", *((page, A) for page in range(8)), last=True)
        await setup.source.end()
        await setup.source.heard(Pong(4))
        await until(lambda: setup.incoming.missing() == 0)
        await trio.testing.wait_all_tasks_blocked()
        assert Pong(3) not in setup.source.said, "behind it no word that it never ran is believed"
        assert Shut(0) not in setup.source.said
        assert "end" not in setup.machine.told
        go.set()
        await setup.source.heard(Pong(3), Shut(0))


async def test_a_device_that_cannot_be_loaded() -> None:
    """The machine has not run: the source is told, so that it may."""
    received = Received()
    machine = Machine()
    machine.broken = True
    async with receiving(received, wanted=machine) as setup:
        await setup.source.switch()
        await setup.source.heard(Shut(1))
        await setup.source.stream.send_eof()
        await setup.ended.wait()
        assert str(setup.raised) == "the state of 'clk' is not of this version"
        await until(lambda: setup.source.closed)
    assert Shut(1) in setup.source.said
    assert Pong(3) not in setup.source.said
    assert received.events == [Event.PACKAGE, Event.NEVER_RAN]


async def test_a_link_lost_while_a_device_waits() -> None:
    """The whole package is here, so nobody but this machine can run: a pause, in which the load goes on waiting."""
    received = Received()
    async with receiving(received) as setup:
        await setup.source.switch([TOUCH])
        await setup.source.asked("ram", 5)
        await setup.source.stream.send_eof()
        await until(lambda: received.events[-1:] == [Event.LOSE])
        assert [w.page for w in setup.incoming.service.waiting()] == [5]
        assert not setup.ended.is_set()
        setup.incoming.close()
        await setup.ended.wait()
        assert "the stream ends where its next element belongs" in str(setup.raised)
    assert received.events == [Event.PACKAGE, Event.LOSE]
    assert received.error is setup.raised


async def test_a_link_lost_before_it_runs() -> None:
    """The load goes on, and the machine runs, although the source cannot be answered any more."""
    received = Received()
    go, ran = trio.Event(), trio.Event()

    class Slow(Machine):
        async def load(self, section: DeviceSection) -> None:
            await go.wait()
            await super().load(section)

    async def run(postcopy: bool) -> None:
        ran.set()

    async with receiving(received, run=run, wanted=Slow()) as setup:
        await setup.source.switch()
        await setup.source.heard(Pong(4))
        await setup.source.stream.aclose()
        await until(lambda: received.events[-1:] == [Event.LOSE])
        assert not ran.is_set()
        go.set()
        await ran.wait()
        await setup.incoming.running()
        assert not setup.ended.is_set()
    assert received.events == [Event.PACKAGE, Event.LOSE]


async def test_a_link_lost_before_it_runs_and_a_device_that_cannot_be_loaded() -> None:
    """The source is told over the next link, also if a stranger comes first: then it runs its machine again."""
    received = Received()
    go = trio.Event()

    class Slow(Machine):
        async def load(self, section: DeviceSection) -> None:
            await go.wait()
            raise StreamError("no such device")

    async with receiving(received, wanted=Slow()) as setup:
        await setup.source.switch()
        await setup.source.heard(Pong(4))
        await setup.source.stream.aclose()
        await until(lambda: received.events[-1:] == [Event.LOSE])
        go.set()
        await trio.testing.wait_all_tasks_blocked()
        assert not setup.ended.is_set()
        for recovers in (False, True):
            ours, theirs = pair()
            async with Channel(ours) as channel, theirs:
                source = ScriptedSource(theirs, BLOCKS)
                setup.nursery.start_soon(source.listen)
                setup.nursery.start_soon(setup.incoming.resume, channel)
                if not recovers:
                    await source.stream.send_all(b"GET / HTTP/1.0")
                    await until(lambda: received.events[-2:] == [Event.LOSE, Event.LOSE])
                    continue
                await source.stream.send_all(b"".join(BitmapRequest(name).encode() for name in BLOCKS))
                await source.stream.send_all(PostcopyResume().encode())
                await source.heard(ResumeAck(), Shut(1))
                await theirs.send_eof()
                await setup.ended.wait()
    assert received.events == [Event.PACKAGE, Event.LOSE, Event.LOSE, Event.NEVER_RAN]
    assert "no such device" in str(setup.raised)


async def test_a_link_lost_before_the_source_has_heard_what_it_must() -> None:
    """A source that takes its machine back without a PONG of the package: it never runs here."""
    received = Received()
    go = trio.Event()

    class Slow(Machine):
        async def load(self, section: DeviceSection) -> None:
            await go.wait()
            await super().load(section)

    async with receiving(received, wanted=Slow()) as setup:
        await setup.source.begin()
        await setup.source.discard("ram")
        inside: list[Encoded] = [PostcopyListen(), CLOCK, Ping(3), Ping(0x42), PostcopyRun()]
        await setup.source.send(Package(b"".join(element.encode() for element in inside)).encode())
        await until(lambda: received.events == [Event.PACKAGE])
        await setup.source.stream.aclose()
        await setup.ended.wait()
    assert received.events == [Event.PACKAGE, Event.NEVER_RAN]


async def test_all_is_said_to_be_sent_while_a_device_waits() -> None:
    """It would wait for ever for a page that never comes."""
    received = Received()
    async with receiving(received) as setup:
        await setup.source.switch([TOUCH])
        await setup.source.asked("ram", 5)
        await setup.source.pages("ram", (0, A), last=True)
        await setup.source.end()
        await setup.ended.wait()
        assert str(setup.raised) == "the source says that everything is sent, but 7 host pages never came"
    assert received.events == [Event.PACKAGE, Event.NEVER_RAN]


class Toucher:
    """Reads one page of a block; may wait for it."""

    def __init__(self, setup: Setup, page: int) -> None:
        self.got: bytes | None = None
        self.error: BaseException | None = None
        self._setup, self._page = setup, page
        setup.nursery.start_soon(self._touch)

    @property
    def waits(self) -> bool:
        return self.got is None and self.error is None

    async def _touch(self) -> None:
        try:
            self.got = await self._setup.machine.ram["ram"].read(self._page * PAGE, PAGE)
        except MemoryLost as error:
            self.error = error


@pytest.mark.parametrize("how", ["close", "cancel"])
async def test_a_lost_link_is_a_pause(how: str) -> None:
    """Waiters go on waiting, also later ones; received pages stay. Only the end of it all gives them up."""
    received = Received()
    async with receiving(received) as setup:
        await setup.source.switch()
        await setup.source.pages("ram", (0, A))
        await setup.incoming.running()
        first = Toucher(setup, 3)
        await setup.source.asked("ram", 3)
        await setup.source.stream.send_eof()
        await until(lambda: received.events[-1:] == [Event.LOSE])
        assert isinstance(received.error, StreamError | ChannelLost)
        late = Toucher(setup, 4)
        service = setup.incoming.service
        await until(lambda: service.numbers().waiting_now == 2)
        assert service.numbers().outbox_bytes == 0  # nobody to ask: it is noted, for a recovery
        assert [w.page for w in service.waiting()] == [3, 4]
        assert await setup.machine.ram["ram"].read(0, PAGE) == A
        assert not setup.ended.is_set()
        assert first.waits
        assert late.waits
        block = setup.machine.ram["ram"]
        assert block.test_bit(Bits.RECEIVED, 0)
        assert block.test_bit(Bits.REQUESTED, 3)
        assert block.test_bit(Bits.REQUESTED, 4)
        assert block.holes() == [(PAGE, 7 * PAGE)]
        if how == "close":
            setup.incoming.close()
            await setup.ended.wait()
            assert setup.raised is received.error
            await until(lambda: first.error and late.error)
    if how == "close":
        assert isinstance(first.error, MemoryLost)
        assert isinstance(late.error, MemoryLost)
    assert received.events == [Event.PACKAGE, Event.LOSE]
    assert setup.machine.told[-1] == "loaded"  # no END


async def test_cancelled_in_a_pause() -> None:
    """Waiters are let go: none keeps a thread."""
    received = Received()
    ours, theirs = pair()
    with trio.fail_after(LIMIT), Machine() as machine:
        async with Channel(ours) as channel, theirs, trio.open_nursery() as waiters:
            incoming = incoming_of(channel, machine, postcopy=True, report=received.report)
            source = ScriptedSource(theirs, BLOCKS)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(incoming.receive)
                nursery.start_soon(source.listen)
                await source.switch()
                await incoming.running()
                setup = Setup(incoming, machine, source, waiters)
                toucher = Toucher(setup, 3)
                await source.asked("ram", 3)
                await theirs.send_eof()
                await until(lambda: received.events[-1:] == [Event.LOSE])
                nursery.cancel_scope.cancel()
            await until(lambda: toucher.error)
            assert isinstance(toucher.error, MemoryLost)
            assert machine.ram["ram"].holes() == [(0, 8 * PAGE)]
            incoming.close()


async def test_a_return_path_that_breaks_alone() -> None:
    """The source still sends and can no longer be asked: as good as lost."""
    received = Received()
    async with receiving(received) as setup:
        await setup.source.switch()
        await setup.source.heard(Pong(3), Pong(4))
        setup.source.stream.socket.shutdown(0)  # SHUT_RD: what we send gets EPIPE
        toucher = Toucher(setup, 3)
        await until(lambda: received.events[-1:] == [Event.LOSE])
        assert toucher.error is None


async def test_a_page_that_comes_twice_or_late_changes_nothing() -> None:
    """What is newer here is never overwritten, by whatever the source sends."""
    received = Received()
    async with receiving(received) as setup:
        await setup.source.switch()
        await setup.source.pages("ram", (0, A), (1, A), (0, B))
        await setup.source.heard(Pong(3), Pong(4))
        await until(lambda: setup.incoming.missing() == 6)
        block = setup.machine.ram["ram"]
        assert await block.read(0, PAGE) == A
        await block.write(0, C)  # the machine runs here, and writes
        await block.write(PAGE + 100, b"new")
        await setup.source.pages("ram", (0, A), (1, B), (2, B), (1, bytes(PAGE)), (0, bytes(PAGE)))
        await until(lambda: setup.incoming.missing() == 5)
        assert await block.read(0, PAGE) == C
        assert await block.read(PAGE, PAGE) == A[:100] + b"new" + A[103:]
        await setup.source.pages("ram", *((page, B) for page in range(8)), last=True)
        await setup.source.end()
        await setup.ended.wait()
        assert await block.read(0, PAGE) == C
        assert await block.read(2 * PAGE, 6 * PAGE) == B * 6
    assert received.events == [Event.PACKAGE, Event.FINISH]


async def test_a_page_of_precopy_that_was_not_discarded_stays() -> None:
    """It comes once more in postcopy, though nobody said that it is old."""
    async with receiving() as setup:
        await setup.source.begin()
        await setup.source.pages("ram", (0, A), (1, A))
        await setup.source.pages("ram", (1, B))  # precopy: the last one wins
        await setup.source.discard("ram", 2)
        await setup.source.package(forget=False)  # and the block that was named last still is
        await setup.source.heard(Pong(3))
        await setup.source.pages("ram", (0, C), *((page, C) for page in range(2, 8)), (1, C), last=True)
        await setup.source.end()
        await setup.source.heard(Shut(0))
        assert await setup.machine.ram["ram"].read(0, 8 * PAGE) == A + B + C * 6


async def test_each_page_is_asked_for_once() -> None:
    async with receiving() as setup:
        await setup.source.switch()
        await setup.incoming.running()
        touchers = [Toucher(setup, page) for page in (6, 6, 6, 2)]
        await setup.source.asked("ram", 6)
        await setup.source.asked("ram", 2)
        await until(lambda: setup.incoming.service.numbers().waiting_now == 4)
        await setup.source.pages("ram", (6, A), (2, B))
        await until(lambda: all(t.got for t in touchers))
        assert [t.got for t in touchers] == [A, A, A, B]
        requests = [m for m in setup.source.said if isinstance(m, PageRequest)]
        assert len(requests) == 2


async def test_who_waits_for_long_is_named(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Client, page, how long; at growing intervals, also in a pause."""
    monkeypatch.setattr(long_waits, "FIRST", 0.02)
    received = Received()
    with caplog.at_level(logging.WARNING, "vhostpc.migration.long_waits"):
        async with receiving(received) as setup:
            await setup.source.switch()
            await setup.incoming.running()
            Toucher(setup, 3)
            await until(lambda: len(caplog.records) >= 3)
            await setup.source.stream.send_eof()
            await until(lambda: received.events[-1:] == [Event.LOSE])
            count = len(caplog.records)
            await until(lambda: len(caplog.records) > count)
            setup.incoming.close()
            await setup.ended.wait()
    told = [record for record in caplog.records if record.name == long_waits.__name__]
    for record in told:
        assert "own mapping has waited" in record.getMessage()
        assert "for page 3 of 'ram'" in record.getMessage()
    ages = [float(str(record.args[1])) for record in told if isinstance(record.args, tuple)]
    assert len(ages) >= 4
    assert all(later >= 2 * earlier for earlier, later in itertools.pairwise(ages))
