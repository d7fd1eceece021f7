"""The order in which a source sends the pages that nobody has asked for, compared with the model."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from typing import NamedTuple

import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kit.scan_order import GROUPS, TOLD, ScanOrder
from vhostpc.pages.pagesource import UNLIMITED, Ended, PageScan, PageSource
from vhostpc.pages.ramblock import Bits, RamSet, make_memfd
from vhostpc.units import TARGET_PAGE
from vhostpc.wire.migration.ramrec import RamDecoder, RamPage
from vhostpc.wire.migration.return_path import PageRequest

Page = tuple[int, int]
"""Number of the block, of the host page."""


class Made(NamedTuple):
    name: str
    pages: int
    page_size: int = TARGET_PAGE


ONE = (Made("ram0", 1300),)
SEVERAL = (
    Made("ram0", 700),
    Made("rom", 3),
    Made("large", 40, 16 * TARGET_PAGE),  # a page is as large as the smallest group
    Made("ram1", 130),
)
HUGE = (Made("huge", 4, 2 << 20), Made("ram0", 40))


class Rig:
    """A source that stands still between two steps. ``wire``: host pages in the order in which they came."""

    def __init__(self, blocks: Sequence[Made]) -> None:
        self.blocks = blocks
        self.ram = RamSet()
        for made in blocks:
            length = made.pages * made.page_size
            file = make_memfd(made.name, length)  # large pages need not be of hugetlbfs to be sent
            try:
                self.ram.add(made.name, file, length, made.page_size).set_bits(Bits.DIRTY)
            finally:
                os.close(file)
        self.scan = PageScan(self.ram)
        self.wire: list[Page] = []
        self.batches: list[tuple[int, list[Page]]] = []
        """Which pages were asked for when so many had been taken."""
        self.connect()

    def connect(self) -> None:
        ours, self.theirs = trio.socket.socketpair()
        with ours:
            # A little, so that the background is held up soon; and each page is sent with its content.
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
            self.source = PageSource(self.ram, ours.fileno(), scan=self.scan)
        self.source.keep_zeros(True)
        self.decoder = RamDecoder({made.name: made.pages * made.page_size for made in self.blocks})

    def disconnect(self) -> None:
        self.source.close()
        self.theirs.close()

    def close(self) -> None:
        self.disconnect()
        self.scan.close()
        self.ram.close()

    @property
    def taken(self) -> int:
        numbers = self.source.numbers()
        return numbers.requested_pages + numbers.background_pages

    @property
    def total(self) -> int:
        return sum(made.pages for made in self.blocks)

    async def _read(self, until: int) -> None:
        names = [made.name for made in self.blocks]
        while len(self.wire) < until:
            data = await self.theirs.recv(4096)
            assert data
            for event in self.decoder.feed(data):
                if isinstance(event, RamPage):
                    number = names.index(event.block)
                    size = self.blocks[number].page_size
                    if event.offset % size == 0:
                        self.wire.append((number, event.offset // size))

    async def _step(self, rate: int, until: int) -> None:
        """Serve until so many pages have come."""

        async def serve() -> None:
            assert await self.source.serve() is Ended.STOPPED

        self.source.set_rate(rate)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve)
            await self._read(until)
            self.source.stop()

    async def flow(self, count: int) -> None:
        """At least so many more pages of the background, if there are so many."""
        await self._step(UNLIMITED, min(len(self.wire) + count, self.total))

    async def ask(self, pages: Sequence[Page]) -> None:
        """Ask for pages and wait for those that have not been taken; the background stands still."""
        before, numbers = self.taken, self.source.numbers()
        self.batches.append((before, list(pages)))
        dirty = [
            (block, page)
            for block, page in dict.fromkeys(pages)
            if self.ram[self.blocks[block].name].test_bit(Bits.DIRTY, page)
        ]
        for block, page in pages:
            size = self.blocks[block].page_size
            await self.theirs.send(PageRequest(self.blocks[block].name, page * size, size).encode())
        await self._step(0, before + len(dirty))
        assert self.source.numbers().background_pages == numbers.background_pages

    async def all(self) -> None:
        await self.flow(self.total)


def predicted(blocks: Sequence[Made], batches: Sequence[tuple[int, list[Page]]]) -> list[Page]:
    left = [bytearray(b"\1") * made.pages for made in blocks]
    model = ScanOrder(left, [made.page_size for made in blocks])
    wire: list[Page] = []

    def send(block: int, page: int) -> None:
        left[block][page] = 0
        wire.append((block, page))

    def background(until: int) -> None:
        while len(wire) < until and (following := model.next()) is not None:
            send(*following)

    for taken, pages in batches:
        background(taken)
        for block, page in pages:
            if left[block][page]:
                send(block, page)
                model.asked(block, page)
    background(sum(made.pages for made in blocks))
    return wire


async def play(blocks: Sequence[Made], steps: Sequence[tuple[int, Sequence[Page]]]) -> list[Page]:
    """So many pages of the background, then requests; and so on. All that came, which is as predicted."""
    rig = Rig(blocks)
    try:
        with trio.fail_after(60):
            for count, pages in steps:
                await rig.flow(count)
                await rig.ask(pages)
            await rig.all()
        assert len(set(rig.wire)) == len(rig.wire) == rig.total
        assert rig.wire == predicted(blocks, rig.batches)
        return rig.wire
    finally:
        rig.close()


def pages_of(blocks: Sequence[Made]) -> st.SearchStrategy[Page]:
    anywhere = st.integers(0, len(blocks) - 1).flatmap(
        lambda block: st.tuples(st.just(block), st.integers(0, blocks[block].pages - 1))
    )
    near = st.tuples(st.just(0), st.integers(0, min(blocks[0].pages, 80) - 1))
    return anywhere | near


def plays(blocks: Sequence[Made], most: int) -> st.SearchStrategy[list[tuple[int, list[Page]]]]:
    batch = st.lists(pages_of(blocks), min_size=1, max_size=most)
    return st.lists(st.tuples(st.integers(0, 60), batch), max_size=6)


@settings(deadline=None, max_examples=20)
@given(steps=plays(ONE, 4))
def test_the_order_is_the_model_s(steps: list[tuple[int, list[Page]]]) -> None:
    trio.run(play, ONE, steps)


@settings(deadline=None, max_examples=15)
@given(steps=plays(SEVERAL, 2 * TOLD))
def test_over_several_blocks_and_many_requests_at_once(steps: list[tuple[int, list[Page]]]) -> None:
    trio.run(play, SEVERAL, steps)


async def test_near_a_request_first() -> None:
    """The rest of its 64 KiB upwards and then downwards, of its 256 KiB, and so on; the newest request first."""
    came = await play(ONE, [(0, [(0, 40), (0, 1240)])])
    assert [page for _, page in came[:10]] == [40, 1240, *range(1241, 1248), 1239]
    near = [*range(1241, 1248), *range(1239, 1231, -1), *range(41, 48), *range(39, 31, -1)]
    assert [page for _, page in came[2:32]] == near
    assert [page for _, page in came[32:48]] == list(range(1248, 1264))
    assert {page for _, page in came[:128]} == {*range(64), *range(1216, 1280)}
    assert {page for _, page in came[:532]} == {*range(256), *range(1024, 1300)}


async def test_around_a_huge_page_only_what_is_larger() -> None:
    came = await play(HUGE, [(0, [(0, 2)])])
    assert came == [(0, 2), (0, 3), *((1, page) for page in range(40)), (0, 0), (0, 1)]
    came = await play(HUGE, [(0, [(0, 3)])])
    assert came[:3] == [(0, 3), (0, 2), (1, 0)]


async def test_the_oldest_neighbourhoods_give_way() -> None:
    """More requests, each with a group of its own, than are remembered."""
    asked = [(0, 16 * number + 5) for number in range(2 * GROUPS)]
    came = await play(ONE, [(0, asked[:GROUPS]), (1, asked[GROUPS:])])
    assert len(came) == 1300


async def test_requests_of_a_lost_connection_have_no_neighbourhood() -> None:
    rig = Rig(ONE)
    try:
        with trio.fail_after(60):
            await rig.ask([(0, 700)])
            rig.disconnect()
            rig.wire.clear()
            rig.ram["ram0"].set_bits(Bits.DIRTY)
            rig.connect()
            await rig.all()
        assert [page for _, page in rig.wire] == [*range(701, 1300), *range(701)]
    finally:
        rig.close()


async def test_pages_near_a_request_can_be_withheld() -> None:
    """They are passed over, and come when they are released."""
    rig = Rig(ONE)
    try:
        with trio.fail_after(60):
            rig.source.withhold("ram0", 42, 3)
            await rig.ask([(0, 40)])
            await rig.flow(3)
            assert [page for _, page in rig.wire[:4]] == [40, 41, 45, 46]
            rig.source.release("ram0")
            await rig.all()
        assert sorted(rig.wire) == [(0, page) for page in range(1300)]
    finally:
        rig.close()
