"""A source that tells most of its discards while its machine runs: each page once, none forgotten, none in vain."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.kit.scripted_destination import PAGE, LivelyMachine, Sent, channels, content, options, send
from tests.kit.until import until
from vhostpc.migration import outgoing as outgoing_file
from vhostpc.migration.outgoing import READY, NeverRan
from vhostpc.pages.pagesource import PageSource
from vhostpc.pages.ramblock import Bits, RamBlock
from vhostpc.wire.migration.elements import Package, Ping, RamDiscard, SectionPart, StreamEvent
from vhostpc.wire.migration.return_path import Pong, Shut

PAGES = 300
READY_NOW = Pong(READY)
SLOWLY = 4 << 20  # bytes a second, so that precopy does not end by itself


class RunningMachine(LivelyMachine):
    """It runs until it is stopped, and writes ``last`` as it is stopped."""

    def __init__(self, **blocks: int) -> None:
        super().__init__(**blocks)
        self.last: Sequence[int] = ()
        self.running = True

    async def stop(self) -> None:
        for page in self.last:
            await self.write("ram0", page, f"{page} at the last".encode())
        self.running = False
        await super().stop()


def told(events: Sequence[StreamEvent]) -> list[int]:
    """Pages of discards, in order, as often as they are told."""
    return [
        start // PAGE + i
        for event in events
        if isinstance(event, RamDiscard)
        for start, length in event.ranges
        for i in range(length // PAGE)
    ]


def at(sent: Sent, wanted: int | type) -> int:
    """Where the element is among those that came: the PING of this value, or the first of this type."""
    return next(
        i
        for i, event in enumerate(sent.destination.events)
        if (isinstance(event, Ping) and event.value == wanted)
        or (isinstance(wanted, type) and isinstance(event, wanted))
    )


def statuses(sent: Sent) -> list[str]:
    return [told for told in sent.watched.told if not told.startswith("pass")]


async def switch(
    machine: RunningMachine,
    first: Sequence[int] = (),
    meanwhile: Sequence[int] = (),
    answer: Pong | Shut | None = READY_NOW,
) -> Sent:
    """A postcopy behind some pages. Written: ``first`` before it, ``meanwhile`` between the early discards and the
    answer to them."""
    parts = 0

    async def act(event: StreamEvent, sent: Sent) -> None:
        nonlocal parts
        if isinstance(event, SectionPart):
            parts += 1
            if parts == 2:
                for page in first:
                    await machine.write("ram0", page, f"{page} first".encode())
                sent.outgoing.start_postcopy()
        elif isinstance(event, Ping) and event.value == READY:
            assert not machine.stopped
            for page in meanwhile:
                await machine.write("ram0", page, f"{page} meanwhile".encode())
            if answer is not None:
                await sent.destination.channel.send_all(answer.encode())

    for page in range(PAGES):
        await machine.ram["ram0"].write(page * PAGE, page.to_bytes(PAGE, "big"))
    return await send(machine, options("postcopy-ram", max_bandwidth=SLOWLY, downtime_limit=0), on_event=act)


async def test_only_what_was_written_since_follows_the_stop() -> None:
    with RunningMachine(ram0=PAGES) as machine:
        machine.last = (0, PAGES - 1)
        sent = await switch(machine, first=(1, 2), meanwhile=(2, 3))
        assert sent.error is None, repr(sent.error)
        assert sent.destination.content == await content(machine.ram)
    ready, package = at(sent, READY), at(sent, Package)
    early, late = told(sent.destination.events[:ready]), told(sent.destination.events[ready:package])
    assert {1, 2, PAGES - 1} <= set(early)
    assert sorted(late) == [0, 3]
    assert not told(sent.destination.events[package:])
    assert statuses(sent)[:3] == ["active", "stop", "device"]
    pages = [page for _, page in sent.destination.pages]
    assert all(pages.count(page) == 2 for page in (0, 1, 2, 3))


pages = st.lists(st.integers(0, PAGES - 1), max_size=20)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(first=pages, meanwhile=pages, last=pages)
def test_whatever_is_written_when(first: list[int], meanwhile: list[int], last: list[int]) -> None:
    """The model: a page is told once if it is sent behind the package, and otherwise not at all."""

    async def play() -> None:
        with RunningMachine(ram0=PAGES) as machine:
            machine.last = last
            sent = await switch(machine, first, meanwhile)
            assert sent.error is None, repr(sent.error)
            assert sent.destination.content == await content(machine.ram)
        package = at(sent, Package)
        discarded = told(sent.destination.events[:package])
        assert len(discarded) == len(set(discarded))
        behind = sent.destination.pages[len(sent.destination.pages) - len(discarded) :]
        assert sorted(page for _, page in behind) == sorted(discarded)
        assert set(first) | set(meanwhile) | set(last) <= set(discarded)

    trio.run(play)


async def test_a_destination_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is waited for no longer than a moment."""
    monkeypatch.setattr(outgoing_file, "READY_LIMIT", 0.01)
    with RunningMachine(ram0=PAGES) as machine:
        sent = await switch(machine, first=(1,), answer=None)
        assert sent.error is None, repr(sent.error)
        assert sent.destination.content == await content(machine.ram)


async def test_a_destination_that_cannot() -> None:
    """It says so in place of an answer: the machine was not stopped."""
    with RunningMachine(ram0=PAGES) as machine:
        sent = await switch(machine, answer=Shut(1))
        assert isinstance(sent.error, NeverRan)
        assert not machine.stopped
    assert statuses(sent) == ["active", "failed"]


async def test_a_cancel_while_the_answer_is_waited_for() -> None:
    with RunningMachine(ram0=PAGES) as machine:
        for page in range(PAGES):
            await machine.ram["ram0"].write(page * PAGE, page.to_bytes(PAGE, "big"))

        async def act(event: StreamEvent, sent: Sent) -> None:
            if isinstance(event, Ping) and event.value == READY:
                sent.outgoing.cancel()

        sent = await send(machine, options("postcopy-ram"), on_event=act, postcopy=True)
        assert sent.error is not None
        assert not machine.stopped
    assert statuses(sent) == ["active", "cancelling", "cancelled"]


async def test_a_machine_that_stands_is_told_of_at_once() -> None:
    with LivelyMachine(ram0=PAGES) as machine:
        sent = await send(machine, options("postcopy-ram"), postcopy=True)
        assert sent.error is None, repr(sent.error)
    assert f"Ping {READY}" not in sent.destination.order()


async def test_the_next_migration_tells_everything_again() -> None:
    """What was told to a destination that failed is nothing to another one."""
    with RunningMachine(ram0=PAGES) as machine:
        failed = await switch(machine, answer=Shut(1))
        assert failed.error is not None
        assert machine.ram["ram0"].count_bits(Bits.DISCARDED)
        sent = await switch(machine)
        assert sent.error is None, repr(sent.error)
        assert sent.destination.content == await content(machine.ram)
    dirty = set(told(sent.destination.events))
    assert len(dirty) + len({page for _, page in sent.destination.pages} - dirty) == PAGES


async def test_numbers_of_what_is_left_come_from_the_last_look() -> None:
    with RunningMachine(ram0=PAGES) as machine:
        sent = await switch(machine, meanwhile=(0,))
        assert sent.error is None, repr(sent.error)
        await until(lambda: sent.outgoing.ram_info().remaining == 0)
        assert sent.outgoing.ram_info().dirty_sync_count == 2  # the early look is no pass


class Eager(RunningMachine):
    """It names two pages that it touches first, and one that has been sent."""

    wanted: Sequence[int] = ()

    def first(self) -> Sequence[tuple[RamBlock, int]]:
        assert self.stopped
        return [(self.ram["ram0"], page * PAGE + 7) for page in self.wanted]


async def test_pages_that_are_touched_first_come_first() -> None:
    with Eager(ram0=PAGES) as machine:
        machine.wanted = (222, 1, 0, PAGES - 1)
        sent = await switch(machine, first=(1,))
        assert sent.error is None, repr(sent.error)
        assert sent.destination.content == await content(machine.ram)
    discarded = told(sent.destination.events)
    behind = [page for _, page in sent.destination.pages][-len(discarded) :]
    assert behind[:3] == [222, 1, PAGES - 1]  # page 0 was sent before
    assert len(behind) == len(set(behind))


async def test_a_page_that_is_none_cannot_be_first() -> None:
    there, here = channels()
    async with there, here:
        with RunningMachine(ram0=4) as machine, PageSource(machine.ram, there.out_fd) as source:
            source.send_first(machine.ram["ram0"], 3 * PAGE)
            with pytest.raises(OSError, match="page source"):
                source.send_first(machine.ram["ram0"], 4 * PAGE)
