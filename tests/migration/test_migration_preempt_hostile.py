"""Sources whose connection of requested pages lies, comes at the wrong time, or ends too early: one sentence each."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress

import pytest
import trio
import trio.testing

from tests.kit.hostile import open_fds
from tests.kit.migration_ends import Received, pair
from tests.kit.scripted_source import RAM, ScriptedSource
from tests.kit.thread_names import thread_names
from tests.kit.until import until
from tests.migration.test_migration_incoming_postcopy import BLOCKS, Setup, receiving
from vhostpc.errors import ChannelLost, MemoryLost
from vhostpc.migration.channel import Channel
from vhostpc.migration.phase import Event, Phase
from vhostpc.wire.migration.elements import (
    BitmapRequest,
    EndOfStream,
    Footer,
    Header,
    PostcopyResume,
    SectionEnd,
    SectionPart,
)
from vhostpc.wire.migration.ramrec import RamEncoder
from vhostpc.wire.migration.return_path import PageRequest, Pong, ResumeAck, Shut

pytestmark = pytest.mark.ufd
PAGE = 4096
A, B = (bytes([byte]) * PAGE for byte in (0xAA, 0xBB))
WORD_OF_THE_END = bytes(7) + b"\x10"
NO_PAGES = WORD_OF_THE_END + Footer(RAM).encode()
LAST = SectionEnd(RAM).encode() + NO_PAGES + EndOfStream().encode()


def record(page: int, data: bytes = A, block: str = "ram") -> bytes:
    return RamEncoder().page(block, page * PAGE, data)


class Urgent:
    """The second connection, from its source's side."""

    def __init__(self, setup: Setup, stream: trio.SocketStream, received: Received) -> None:
        self.setup = setup
        self.source = setup.source
        self.received = received
        self.stream = stream
        self.read: dict[int, bytes] = {}

    def touch(self, page: int) -> None:
        async def read() -> None:
            with suppress(MemoryLost):  # where all is given up
                self.read[page] = await self.setup.machine.ram["ram"].read(page * PAGE, PAGE)

        self.setup.nursery.start_soon(read)

    async def lost(self, words: str) -> None:
        """It is a pause, with this sentence."""
        await until(lambda: Event.LOSE in self.received.events, what=words)
        assert words in str(self.received.error), str(self.received.error)
        assert "\n" not in str(self.received.error)

    async def recovered(self) -> None:
        """An honest source goes on: all that is missing comes, and it is over."""
        incoming, machine = self.setup.incoming, self.setup.machine
        (ours, theirs), (near, far) = pair(), pair()
        async with Channel(ours) as channel, theirs, Channel(near) as urgent, far:

            async def second() -> Channel:
                return urgent

            source = ScriptedSource(theirs, self.source.blocks)
            self.setup.nursery.start_soon(source.listen)
            incoming.attach(channel, second)
            names = list(self.source.blocks)
            await source.send(b"".join(BitmapRequest(name).encode() for name in names))
            await source.send(PostcopyResume().encode())
            await source.heard(ResumeAck())
            for name, (pages, size) in self.source.blocks.items():
                there = machine.ram[name].received_bitmap()
                missing = [n for n in range(pages) if not there[n // 8] >> n % 8 & 1]
                each = size // PAGE
                await source.pages(
                    name, *((page * each + part, B) for page in missing for part in range(each))
                )
            await source.send(LAST)
            await source.heard(Shut(0))
            await self.setup.ended.wait()
            assert self.setup.raised is None
            incoming.close()


@asynccontextmanager
async def preempted(
    blocks: dict[str, tuple[int, int]] = BLOCKS, *, switched: bool = True
) -> AsyncIterator[Urgent]:
    """In postcopy, over two connections, with all pages missing."""
    received = Received()
    ours, theirs = pair()
    async with Channel(ours) as channel, theirs:

        async def second() -> Channel:
            return channel

        async with receiving(received, blocks, second=second) as setup:
            if switched:
                await setup.source.switch()
                await setup.source.heard(Pong(3), Pong(4))
            yield Urgent(setup, theirs, received)


LIES: dict[str, tuple[bytes, str]] = {
    "garbage": (b"\xff" * 64, "the channel of requested pages: flags that are neither"),
    "a stream of its own": (Header().encode() + bytes(8), "the channel of requested pages: flags that are"),
    "another protocol": (b"GET / HTTP/1.0\r\n\r\n", "the channel of requested pages: flags that are neither"),
    "a section": (SectionPart(RAM).encode() + record(1), "the channel of requested pages: flags that are"),
    "an unknown block": (record(1, block="other"), "a block name that is empty or unknown, at byte 0"),
    "behind the block": (record(8), "an offset behind the end of its block, at byte 0"),
    "behind a good one": (record(1) + record(8), f"the end of its block, at byte {len(record(1))}"),
    "no block": (
        record(1)[:7] + b"\x28" + record(1)[12:],
        "a page that continues a block, but none was named",
    ),
    "compressed": (bytes(6) + b"\x01\x00" + b"\x03ram" + bytes(8), "flags that are neither"),
    "a difference": (bytes(7) + b"\x40" + b"\x03ram\x01\x00\x01\x00", "flags that are neither"),
}


@pytest.mark.parametrize("what", LIES)
async def test_it_says_anything_but_pages(what: str) -> None:
    said, words = LIES[what]
    async with preempted() as urgent:
        urgent.touch(5)
        await urgent.source.asked("ram", 5)
        await urgent.stream.send_all(said)
        await urgent.lost(words)
        await urgent.recovered()
        assert urgent.read[5] == B


@pytest.mark.parametrize("size", [0, 5, 100, len(record(1)) + 9])
async def test_it_ends_early(size: int) -> None:
    """Also in the middle of a record, and with pages that were asked for."""
    async with preempted() as urgent:
        urgent.touch(5)
        await urgent.source.asked("ram", 5)
        await urgent.stream.send_all((record(1) * 2)[:size])
        await urgent.stream.send_eof()
        await urgent.lost("the source of pages closed the channel")
        assert ("inside a record" in str(urgent.received.error)) == (size > 0)
        await urgent.recovered()


PARTS: dict[str, tuple[Callable[[], bytes], str]] = {
    "and an end": (lambda: b"".join(record(n, block="big") for n in range(100)), "inside a record"),
    "and another": (
        lambda: b"".join(record(n, block="big") for n in range(100)) + record(1),
        "a host page whose parts are not consecutive",
    ),
    "from its middle": (lambda: record(7, block="big"), "a host page whose parts are not consecutive"),
}


@pytest.mark.parametrize("what", PARTS)
async def test_half_a_huge_page(what: str, huge_pages: int) -> None:
    said, words = PARTS[what]
    async with preempted({"ram": (8, PAGE), "big": (2, huge_pages)}) as urgent:
        await urgent.stream.send_all(said())
        if what == "and an end":
            await urgent.stream.send_eof()
        await urgent.lost(words)
        await urgent.recovered()
        assert await urgent.setup.machine.ram["big"].read(0, huge_pages) == B * (huge_pages // PAGE)


async def test_a_page_on_both_connections() -> None:
    """The first one stays: the thread that waited for it may have written to it since."""
    async with preempted() as urgent:
        for page in range(0, 8, 2):
            urgent.touch(page)
            await urgent.source.asked("ram", page)
            await urgent.stream.send_all(record(page, A))
            await until(lambda p=page: p in urgent.read)  # type: ignore[misc]
        await urgent.source.pages("ram", *((page, B) for page in range(8)))
        await until(lambda: urgent.setup.incoming.missing() == 0)
        await urgent.stream.send_all(record(1, A))
        await until(lambda: urgent.setup.incoming.loads()[-1].already == 5)
        await urgent.source.send(LAST)
        await urgent.source.heard(Shut(0))
        assert await urgent.setup.machine.ram["ram"].read(0, 8 * PAGE) == (A + B) * 4


async def test_pages_on_both_connections_at_once() -> None:
    """Neither is overwritten, and neither thread takes the other's page for one that nobody sent."""
    count = 3000
    async with preempted({"ram": (count, PAGE)}) as urgent:

        async def send_urgent() -> None:
            await urgent.stream.send_all(b"".join(record(page, A) for page in range(count)))

        async def send_main() -> None:
            await urgent.source.pages("ram", *((page, B) for page in range(count)))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send_urgent)
            nursery.start_soon(send_main)
        await until(lambda: urgent.setup.incoming.loads()[-1].already == count)
        await urgent.source.send(LAST)
        await urgent.source.heard(Shut(0))
        ram = await urgent.setup.machine.ram["ram"].read(0, count * PAGE)
        assert {ram[at : at + PAGE] for at in range(0, len(ram), PAGE)} <= {A, B}


async def test_the_closing_word_before_a_page_that_was_asked_for() -> None:
    async with preempted() as urgent:
        await urgent.stream.send_all(WORD_OF_THE_END)
        urgent.touch(5)
        await urgent.source.asked("ram", 5)
        await urgent.source.pages("ram", *((page, B) for page in range(8) if page != 5))
        await urgent.source.send(LAST)
        await urgent.lost("the source closed the channel of requested pages, 1 of which have not come")
        await urgent.recovered()
        assert urgent.read[5] == B


@pytest.mark.parametrize("words", [0, 1, 2, 1000])
@pytest.mark.parametrize("early", [False, True])
async def test_the_closing_word(words: int, early: bool) -> None:
    """Missing, once, again and again; before all pages or behind them: nothing was asked for that has not come."""
    async with preempted() as urgent:
        urgent.touch(5)
        await urgent.source.asked("ram", 5)
        await urgent.stream.send_all(record(5))
        await until(lambda: urgent.read)
        if early:
            await urgent.stream.send_all(WORD_OF_THE_END * words)
        await urgent.source.pages("ram", *((page, B) for page in range(8) if page != 5))
        await urgent.source.send(LAST)
        if not early:
            with suppress(trio.BrokenResourceError):  # all is here already
                await urgent.stream.send_all(WORD_OF_THE_END * words)
        await urgent.source.heard(Shut(0))
        await urgent.setup.ended.wait()
        assert urgent.setup.raised is None


async def test_the_end_overtakes_a_page() -> None:
    async with preempted() as urgent:
        urgent.touch(5)
        await urgent.source.asked("ram", 5)
        await urgent.source.pages("ram", *((page, B) for page in range(8) if page != 5))
        await urgent.stream.send_all(record(5)[:-1])
        await urgent.source.send(LAST)
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert not urgent.setup.ended.is_set()
        await urgent.stream.send_all(record(5)[-1:])
        await urgent.source.heard(Shut(0))
        assert urgent.read[5] == A


async def test_a_page_that_no_source_sends() -> None:
    """Not discarded and not sent, so nobody owes it: who asked for it gets zeros, and nobody waits for the source."""
    async with preempted(switched=False) as urgent:
        await urgent.source.begin()
        await urgent.source.discard("ram", 0, 6)
        await urgent.source.package()
        await urgent.source.heard(Pong(3), Pong(4))
        urgent.touch(7)
        await urgent.source.asked("ram", 7)
        await urgent.source.pages("ram", *((page, B) for page in range(6)))
        await urgent.source.send(LAST)
        await urgent.source.heard(Shut(0))
        await until(lambda: urgent.read)
        assert urgent.read[7] == bytes(PAGE)


async def test_silence_behind_the_end_of_the_other_one() -> None:
    """A page was asked for that never comes: the link is lost, in both its channels."""
    async with preempted() as urgent:
        urgent.setup.nursery.start_soon(urgent.setup.incoming.watch, 0.2)
        urgent.touch(5)
        await urgent.source.asked("ram", 5)
        await urgent.source.pages("ram", *((page, B) for page in range(8) if page != 5))
        await urgent.source.send(LAST)
        await urgent.lost("the source closed the channel of requested pages, 1 of which have not come")
        await urgent.recovered()


async def test_the_end_overtakes_the_second_connection() -> None:
    """Of a recovery: what is left is all on it, and it has just been made."""
    async with preempted() as urgent:
        urgent.touch(5)
        await urgent.source.asked("ram", 5)
        await urgent.stream.send_eof()
        await urgent.lost("closed the channel")
        urgent.received.events.clear()
        (ours, theirs), (near, far) = pair(), pair()
        made = trio.Event()
        async with Channel(ours) as channel, theirs, Channel(near) as second, far:

            async def take() -> Channel:
                await made.wait()
                return second

            source = ScriptedSource(theirs, urgent.source.blocks)
            urgent.setup.nursery.start_soon(source.listen)
            urgent.setup.incoming.attach(channel, take)
            await source.send(BitmapRequest("ram").encode() + PostcopyResume().encode())
            await source.heard(ResumeAck(), PageRequest("ram", 5 * PAGE, PAGE))
            await source.pages("ram", *((page, B) for page in range(8) if page != 5))
            await source.send(LAST)
            await far.send_all(record(5))
            await until(lambda: urgent.setup.incoming.missing() == 1)
            await trio.testing.wait_all_tasks_blocked(0.01)
            made.set()
            await source.heard(Shut(0))
            await urgent.setup.ended.wait()
            assert urgent.received.events == [Event.FINISH]
            assert urgent.read[5] == A


async def test_nothing_is_placed_in_a_pause() -> None:
    """What is asked for in a recovery is right only if the threads of the link before have ended."""
    async with preempted({"ram": (4096, PAGE)}) as urgent:
        await urgent.stream.send_all(b"".join(record(page) for page in range(0, 40)))
        link = urgent.setup.incoming._link
        await urgent.source.stream.aclose()
        await until(lambda: urgent.setup.incoming.course.phase is Phase.PAUSED)
        assert link._urgent_ended.is_set()
        await urgent.recovered()


@pytest.mark.parametrize("how", ["never", "lost", "one-way"])
async def test_it_does_not_come(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine has not run, and the source is told so."""
    monkeypatch.setattr("vhostpc.migration.incoming.SECOND_LIMIT", 0.1)
    received = Received()
    file = Channel.__new__(Channel)

    async def second() -> Channel:
        if how == "never":
            await trio.sleep_forever()
        if how == "lost":
            raise ChannelLost("No other connection comes from there, or the listener was closed")
        return file

    monkeypatch.setattr(Channel, "two_way", property(lambda self: self is not file))
    words = {
        "never": "postcopy-preempt is on here, but the source has made no second connection: is it on there?",
        "lost": "No other connection comes from there",
        "one-way": "the channel of requested pages has to go both ways",
    }
    async with receiving(received, second=second) as setup:
        await setup.source.switch()
        await setup.source.heard(Shut(1))
        await setup.source.stream.send_eof()
        await setup.ended.wait()
        assert words[how] in str(setup.raised)


async def test_nothing_is_left() -> None:
    """However often, and in whatever state a link ends: no descriptor and no thread stays."""

    async def all_ways() -> None:
        for what in ("garbage", "behind a good one"):
            await test_it_says_anything_but_pages(what)
        await test_it_ends_early(100)
        await test_the_end_overtakes_the_second_connection()
        await test_silence_behind_the_end_of_the_other_one()
        async with preempted() as urgent:  # and one that is given up with everything open
            urgent.touch(5)
            await urgent.source.asked("ram", 5)
            urgent.setup.incoming.close()
            await urgent.setup.ended.wait()

    await all_ways()
    fds = len(open_fds())
    await until(lambda: "vpc-urgent" not in thread_names().values())
    threads = sum(name.startswith("vpc-load") for name in thread_names().values())
    await all_ways()
    await until(lambda: "vpc-urgent" not in thread_names().values())
    await until(lambda: len(open_fds()) <= fds, what="descriptors")
    assert sum(name.startswith("vpc-load") for name in thread_names().values()) <= threads
