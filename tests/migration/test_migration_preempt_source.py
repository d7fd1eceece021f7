"""A source with two connections, and destinations that lie, leave one of them too early, or stop in the middle."""

from __future__ import annotations

import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
import trio
import trio.testing

from tests.kit.hostile import open_fds
from tests.kit.scripted_destination import Destination, LivelyMachine, Watched, channels, options
from tests.kit.until import until
from vhostpc._native.handles import _address, _needed
from vhostpc.dialect import Compat
from vhostpc.errors import ChannelLost, StreamError
from vhostpc.migration.channel import Channel
from vhostpc.migration.outgoing import Outgoing
from vhostpc.migration.phase import Event, Phase
from vhostpc.pages import pagesource
from vhostpc.pages.pagesource import UNLIMITED, Ended, PageSource
from vhostpc.pages.ramblock import Bits, RamSet
from vhostpc.wire.migration.elements import Ping, PostcopyRun, StreamEvent
from vhostpc.wire.migration.return_path import PageRequest, Pong, ReceivedBitmap, Shut

pytestmark = pytest.mark.ufd
PAGE, PAGES = 4096, 300
MANY = 12000
"""More pages than a source notes as asked for."""


class Sending:
    """A machine in flight to a destination that a test plays, in postcopy with nothing but requested pages."""

    def __init__(self, outgoing: Outgoing, main: Channel, urgent: Channel, destination: Destination) -> None:
        self.outgoing = outgoing
        self.main = main
        self.urgent = urgent
        self.destination = destination
        self.error: BaseException | None = None
        self.ended = trio.Event()
        self.go = trio.Event()
        """Read on behind the package."""
        self._turn = trio.Lock()

    async def say(self, message: bytes) -> None:
        async with self._turn:
            await self.main.send_all(message)

    async def ask(self, block: str, start: int, length: int) -> None:
        await self.say(PageRequest(block, start, length).encode())

    def let_go(self) -> None:
        self.outgoing.source.set_rate(UNLIMITED)

    async def failed(self, words: str) -> None:
        await self.ended.wait()
        assert self.error is not None
        assert words in str(self.error), str(self.error)
        assert "\n" not in str(self.error)


@asynccontextmanager
async def sending(
    machine: LivelyMachine, compat: Compat = "10.0", *, answer: int | None = 0, reads_on: bool = True
) -> AsyncIterator[Sending]:
    (there, here), (far, near) = channels(), channels()
    with socket.socket(fileno=os.dup(there.out_fd)) as small:
        small.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, PAGE)
    watched = Watched(compat, on_stop=machine.stop)
    chosen = options("postcopy-ram", "postcopy-preempt", compat=compat, max_postcopy_bandwidth=1)

    async def second() -> Channel:
        return far

    async with there, here, far, near, trio.open_nursery() as nursery:
        with trio.fail_after(30):
            outgoing = Outgoing(there, machine, watched.course, watched, options=chosen, second=second)
            made = Sending(outgoing, here, near, Destination(here))

            async def hear(event: StreamEvent) -> None:
                if isinstance(event, Ping):
                    await made.say(Pong(event.value).encode())
                if isinstance(event, Ping) and event.value == 4:
                    await made.go.wait()

            async def send() -> None:
                try:
                    await outgoing.send()
                except Exception as error:
                    made.error = error
                made.ended.set()

            if reads_on:
                made.go.set()
            made.destination.on_event = hear
            outgoing.start_postcopy()
            nursery.start_soon(lambda: made.destination.read(answer=answer))
            nursery.start_soon(send)
            await until(lambda: any(isinstance(e, PostcopyRun) for e in made.destination.events))
            await until(lambda: outgoing.source._divided)
            yield made
        nursery.cancel_scope.cancel()
    outgoing.close()


REQUESTS = {
    "behind the block": (("ram0", PAGES * PAGE, PAGE), "an offset behind the end of its block"),
    "over its end": (("ram0", (PAGES - 1) * PAGE, 2 * PAGE), "an offset behind the end of its block"),
    "an unknown block": (("other", 0, PAGE), "a block name that is empty or unknown"),
    "half a page": (("ram0", 0, 100), "an offset behind the end of its block"),
}


@pytest.mark.parametrize("what", REQUESTS)
async def test_requests_that_are_refused(what: str) -> None:
    asked, words = REQUESTS[what]
    with LivelyMachine(ram0=PAGES, rom0=1) as machine:
        async with sending(machine) as made:
            await made.ask(*asked)
            await made.failed(f"return path: a message with {words}")
            assert made.outgoing.course.phase is Phase.PAUSED


async def test_a_part_of_a_huge_page_is_refused(huge_pages: int) -> None:
    """QEMU 10.0 ends with an assertion there. Of a source without this capability it is no mistake."""
    with LivelyMachine(ram0=PAGES) as machine:
        machine.ram.create("big", 2 * huge_pages, page_size=huge_pages)
        async with sending(machine) as made:
            await made.ask("big", huge_pages, huge_pages)
            await until(lambda: made.outgoing.numbers().requested_pages == 1)
            await made.ask("big", 0, PAGE)
            await made.failed("a length that is not a multiple of the block's page size")
            assert made.outgoing.course.phase is Phase.PAUSED


async def test_it_has_all_before_the_closing_word() -> None:
    """A destination may have closed that connection by then; what became of it, it says on the other one."""
    with LivelyMachine(ram0=4) as machine:
        await machine.ram["ram0"].fill(1)
        async with sending(machine, "7.2", reads_on=False) as made:
            made.let_go()
            await until(lambda: made.outgoing.source.numbers().eos_sent)
            await made.urgent.aclose()
            made.go.set()
            await made.ended.wait()
            assert made.error is None
            assert made.outgoing.course.phase is Phase.MOVED


@pytest.mark.parametrize("asked", [False, True])
async def test_it_is_closed_with_pages_left(asked: bool) -> None:
    """Seen at once, not with the next page that is asked for."""
    with LivelyMachine(ram0=PAGES) as machine:
        async with sending(machine) as made:
            if asked:
                await made.ask("ram0", 5 * PAGE, PAGE)
            await made.urgent.aclose()
            await made.failed("closed the connection")
            assert made.outgoing.course.phase is Phase.PAUSED


async def test_the_other_one_is_cut_while_it_is_full() -> None:
    """More is asked for than is noted, nobody reads the pages, and the end of the return path shows all the same."""
    with LivelyMachine(ram0=MANY) as machine:
        await machine.ram["ram0"].fill(1)
        async with sending(machine) as made:
            await made.ask("ram0", 0, MANY * PAGE)
            await until(lambda: made.outgoing.numbers().requested_pages > 20)
            made.main.shut_down()
            await made.failed("closed the connection")


async def test_more_is_asked_for_than_is_noted_before_anything_is_sent() -> None:
    """That the destination has gone is seen although no more of it is read, and not by asking for ever."""
    there, here = channels()
    async with there, here:
        with RamSet() as ram:
            ram.create("ram0", MANY * PAGE).set_bits(Bits.DIRTY)
            with PageSource(ram, there.out_fd) as source:
                await here.send_all(PageRequest("ram0", 0, MANY * PAGE).encode())
                here.shut_down()
                assert await source.hear(6, 5) is Ended.PEER_CLOSED


@pytest.mark.parametrize("which", ["pause", "silence"])
async def test_the_second_one_of_a_recovery_is_never_made(which: str) -> None:
    """The link that it belongs to is broken, and nobody waits for it any longer."""
    with LivelyMachine(ram0=PAGES) as machine:
        async with sending(machine) as made:
            await made.urgent.aclose()
            made.main.shut_down()
            await made.ended.wait()
            there, here = channels()
            connecting = trio.Event()

            async def second() -> Channel:
                connecting.set()
                await trio.sleep_forever()
                raise AssertionError

            async with there, here, trio.open_nursery() as nursery:
                raised: list[BaseException] = []

                async def resume() -> None:
                    try:
                        await made.outgoing.resume(there, second)
                    except Exception as error:
                        raised.append(error)

                made.outgoing.course.move(Event.RECOVER)
                nursery.start_soon(resume)
                await here.receive_some(4096)
                await here.send_all(ReceivedBitmap("ram0", bytes((PAGES + 63) // 64 * 8)).encode())
                await connecting.wait()
                if which == "pause":
                    made.outgoing.pause()
                else:
                    nursery.start_soon(made.outgoing.watch, 0.1)
                await until(lambda: raised)
                assert isinstance(raised[0], ChannelLost)
                assert made.outgoing.course.phase is Phase.PAUSED
                nursery.cancel_scope.cancel()


async def test_it_is_closed_while_both_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever loop ends last, the other one's memory is still there: it wakes that one."""
    serve = pagesource._serve
    over = trio.Event()
    left: list[int] = []
    (there, here), (far, near) = channels(), channels()
    async with there, here, far, near:
        with RamSet() as ram:
            ram.create("ram0", 4096 * PAGE).set_bits(Bits.DIRTY)
            source = PageSource(ram, there.out_fd, background_rate=UNLIMITED)
            source.add_urgent(far.out_fd, closing_word=True)
            source.switch()
            address = _address(source.handle)

            async def watched(handle: Any, thread: Any, heard: Any) -> int:
                bulk = _address(handle) == address
                try:
                    return await serve(handle, thread, heard)
                finally:
                    if bulk:
                        with trio.CancelScope(shield=True):
                            await over.wait()
                            await trio.testing.wait_all_tasks_blocked()
                        left.append(_needed[address])
                    del handle
                    over.set()

            monkeypatch.setattr(pagesource, "_serve", watched)
            with trio.fail_after(10):
                async with trio.open_nursery() as nursery:

                    async def run() -> None:
                        with suppress(StreamError, OSError, ValueError):
                            await source.serve()

                    nursery.start_soon(run)
                    await until(lambda: source.numbers().bytes)
                    source.close()
    assert left == [1]


async def test_nothing_is_left() -> None:
    async def all_ways() -> None:
        await test_requests_that_are_refused("over its end")
        await test_it_is_closed_with_pages_left(True)
        await test_it_has_all_before_the_closing_word()
        await test_the_second_one_of_a_recovery_is_never_made("pause")

    await all_ways()
    fds = len(open_fds())
    await all_ways()
    await until(lambda: len(open_fds()) <= fds, what="descriptors")


async def test_the_last_word_twice() -> None:
    """It is over with the first one."""
    with LivelyMachine(ram0=PAGES) as machine:
        async with sending(machine, answer=None) as made:
            made.let_go()
            await until(lambda: made.destination.reader.ended)
            await made.say(Shut(0).encode() * 2)
            await made.ended.wait()
            assert made.error is None
