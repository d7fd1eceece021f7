"""No memory for pages: received or ready pages are tried again until there is some; nothing is lost or spun on."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio

from tests.kit.hugepages import none_free
from tests.kit.small_tmpfs import SmallTmpfs, small_tmpfs
from tests.kit.until import until
from vhostpc.errors import ChannelLost, MemoryLost
from vhostpc.pages.pagesource import UNLIMITED, PageSource
from vhostpc.pages.ramblock import Bits, RamBlock, RamSet
from vhostpc.pages.ramchannel import RamChannel
from vhostpc.pages.service import FaultService
from vhostpc.units import TARGET_PAGE

pytestmark = pytest.mark.ufd
SEED = 4
PAGES = 16


class Short:
    """A destination whose block lies on a tmpfs too small for it, and its source."""

    def __init__(self, disk: SmallTmpfs, block: RamBlock, service: FaultService, channel: RamChannel) -> None:
        self.disk, self.block, self.service, self.channel = disk, block, service, channel

    async def wait(self) -> None:
        await until(lambda: self.channel.numbers().short)


@asynccontextmanager
async def short(pages: int, *, zeros: bool = False) -> AsyncIterator[Short]:
    """``pages`` of all fit. ``zeros``: the last half of the source is zero."""
    length = PAGES * TARGET_PAGE
    ours, theirs = socket.socketpair()
    with trio.fail_after(30), ours, theirs, small_tmpfs(pages, length) as disk:
        with RamSet() as original, RamSet() as ram, FaultService(ram) as service:
            source = original.create("ram0", length)
            await source.fill(SEED, 0, PAGES // 2 if zeros else PAGES)
            source.set_bits(Bits.DIRTY)
            block = ram.add("ram0", disk.fd, length)
            service.arm()
            service.set_return_path(ours.fileno())
            with (
                PageSource(original, theirs.fileno(), background_rate=UNLIMITED) as pages_of,
                service.open_channel(ours.fileno()) as channel,
            ):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(service.run)
                    nursery.start_soon(pages_of.serve)
                    yield Short(disk, block, service, channel)
                    for offset in range(0, length, TARGET_PAGE):
                        here, there = (os.pread(fd, TARGET_PAGE, offset) for fd in (block.fd, source.fd))
                        assert here == there
                    nursery.cancel_scope.cancel()


@pytest.mark.parametrize(("fit", "zeros"), [(0, False), (4, False), (10, True)])
async def test_pages_that_have_come_wait_for_memory(fit: int, zeros: bool) -> None:
    """Placed as far as they go, then as memory appears; a thread that waits for one is woken when it is there."""
    async with short(fit or 1, zeros=zeros) as s:
        if not fit:
            os.pwrite(s.disk.fd, b"x", 0)  # not one more
            s.block.set_bits(Bits.RECEIVED, 0, 1)
        got: list[bytes] = []

        async def touch() -> None:
            got.append(await s.block.read((PAGES - 1) * TARGET_PAGE, 16))

        async def load() -> None:
            numbers = await s.channel.load()
            assert not numbers.short
            assert (numbers.shortages, numbers.placed) == (2, PAGES if fit else PAGES - 1)
            loaded.set()

        loaded = trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(load)
            await s.wait()
            nursery.start_soon(touch)
            await until(s.service.waiting)
            numbers = s.channel.numbers()
            assert (numbers.shortages, s.service.missing()) == (1, PAGES - max(fit, 1))
            s.disk.resize(12)
            await until(lambda: s.channel.numbers().shortages == 2)
            await until(lambda: s.service.missing() == 4)
            assert got == []
            s.disk.resize(1000)
            await loaded.wait()
        assert got == [bytes(16) if zeros else os.pread(s.disk.fd, 16, (PAGES - 1) * TARGET_PAGE)]
        assert s.service.missing() == 0
        if not fit:
            await s.block.fill(SEED, 0, 1)


async def test_a_load_that_waits_for_memory_can_be_stopped_and_goes_on() -> None:
    """At once, though there is none; nothing that it had received is lost, nor is the end of the section."""
    async with short(4, zeros=True) as s:
        for fit in (4, 5, 11):
            s.disk.resize(fit)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(s.channel.load)
                await s.wait()
                await until(lambda fit=fit: s.service.missing() == PAGES - fit)  # type: ignore[misc]
                nursery.cancel_scope.cancel()
            assert not s.channel.numbers().short
        s.disk.resize(1000)
        numbers = await s.channel.load()
        assert (numbers.placed, numbers.already, s.service.missing()) == (PAGES, 0, 0)
        assert (numbers.data_pages, numbers.zero_pages) == (PAGES // 2, PAGES // 2)


async def test_a_load_that_waits_for_memory_ends_with_its_channel() -> None:
    async with short(4) as s:
        async with trio.open_nursery() as nursery:

            async def load() -> None:
                with pytest.raises(ChannelLost, match="stopped"):
                    await s.channel.load()

            nursery.start_soon(load)
            await s.wait()
            s.channel.close()
        s.disk.resize(1000)
        s.block.set_bits(Bits.RECEIVED)
        await s.block.fill(SEED)


async def test_huge_pages_wait_for_the_pool(huge_pages: int) -> None:
    """What was discarded is no longer set aside: somebody else may have it. The kernel says EEXIST of that."""
    ours, theirs = socket.socketpair()
    with trio.fail_after(30), ours, theirs, RamSet() as original, RamSet() as ram:
        source, block = (r.create("big", 6 * huge_pages, huge_pages) for r in (original, ram))
        await source.fill(SEED)
        source.set_bits(Bits.DIRTY)
        await block.fill(SEED, 0, 2 * huge_pages // TARGET_PAGE)
        block.set_bits(Bits.RECEIVED, 0, 2)
        for page in range(2, 6):  # they come and are discarded
            await block.write(page * huge_pages, b"old")
        block.discard(2 * huge_pages, 4 * huge_pages)
        with (
            FaultService(ram) as service,
            PageSource(original, theirs.fileno(), background_rate=UNLIMITED) as pages,
        ):
            service.arm()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(pages.serve)
                with service.open_channel(ours.fileno()) as channel:

                    async def load() -> None:
                        numbers = await channel.load()
                        assert (numbers.placed, numbers.already, numbers.shortages) == (4, 2, 1)
                        loaded.set()

                    loaded = trio.Event()
                    with none_free():
                        nursery.start_soon(load)
                        await until(lambda: channel.numbers().short)
                        assert service.missing() == 4
                    await loaded.wait()
                nursery.cancel_scope.cancel()
            assert service.missing() == 0
            assert await block.verify(SEED) == (0, None)


async def test_calm_huge_pages_that_are_not_to_be_had(huge_pages: int) -> None:
    """Before anything is lost: an error of the migration, not a SIGBUS of the process."""
    ours, theirs = socket.socketpair()
    with trio.fail_after(30), ours, theirs, RamSet() as original, RamSet() as ram:
        source, block = (r.create("big", 2 * huge_pages, huge_pages) for r in (original, ram))
        await source.fill(SEED)
        source.set_bits(Bits.DIRTY)
        await block.fill(1)
        block.set_bits(Bits.RECEIVED)
        block.discard()
        with (
            FaultService(ram) as service,
            PageSource(original, theirs.fileno(), background_rate=UNLIMITED) as pages,
        ):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(pages.serve)
                with none_free():
                    with pytest.raises(OSError) as caught:
                        await service.load(ours.fileno())
                    assert caught.value.errno == errno.ENOSPC
                nursery.cancel_scope.cancel()
            assert service.missing() == 2


@asynccontextmanager
async def ready(fit: int) -> AsyncIterator[tuple[SmallTmpfs, RamBlock, RamBlock, FaultService]]:
    """Two blocks whose pages lie ready; ``fit`` of the first, on a small tmpfs, have room."""
    length = PAGES * TARGET_PAGE
    with trio.fail_after(30), small_tmpfs(fit, length) as disk:
        with RamSet() as original, RamSet() as ram, FaultService(ram) as service:
            block, other = ram.add("ram0", disk.fd, length), ram.create("rom", length)
            service.arm()
            for b in (block, other):
                source = original.create(b.name, length)
                await source.fill(SEED)
                service.answer_from(b, source.fd)
            yield disk, block, other, service


async def test_pages_that_lie_ready_wait_for_memory() -> None:
    """Only threads that need one wait: the loop answers others, and can be stopped."""
    async with ready(4) as (disk, block, other, service), trio.open_nursery() as nursery:
        good: list[tuple[int, int | None]] = []

        async def touch(page: int) -> None:
            # The two blocks are made in the same order in both sets, so a page has the same content in each.
            good.append(await block.verify(SEED, page, 1))

        nursery.start_soon(service.run)
        for page in range(10):
            nursery.start_soon(touch, page)
        await until(lambda: service.numbers().short_now == 6)
        assert len(good) <= 4
        await other.read(0, PAGES * TARGET_PAGE)
        numbers = service.numbers()
        assert (numbers.shortages, numbers.short_now, numbers.waiting_now, numbers.requests) == (6, 6, 6, 0)
        disk.resize(7)
        await until(lambda: service.numbers().short_now == 3)
        disk.resize(1000)
        await until(lambda: len(good) == 10)
        assert good == [(0, None)] * 10
        assert service.numbers().short_now == service.numbers().waiting_now == 0
        nursery.cancel_scope.cancel()


async def test_the_loop_stops_while_there_is_no_memory() -> None:
    async with ready(1) as (disk, block, _other, service):
        os.pwrite(disk.fd, b"x", 0)
        lost: list[int] = []

        async def touch(page: int) -> None:
            with pytest.raises(MemoryLost):
                await block.read(page * TARGET_PAGE, 4)
            lost.append(page)

        async with trio.open_nursery() as touching:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(service.run)
                touching.start_soon(touch, 3)
                await until(lambda: service.numbers().short_now == 1)
                nursery.cancel_scope.cancel()
        assert lost == [3]
        assert block.holes() == [(TARGET_PAGE, (PAGES - 1) * TARGET_PAGE)]


async def test_zeros_for_a_hole_wait_for_memory() -> None:
    """A page that came and was punched out since: it takes memory again."""
    length = PAGES * TARGET_PAGE
    with trio.fail_after(30), small_tmpfs(1, length) as disk, RamSet() as ram, FaultService(ram) as service:
        block = ram.add("ram0", disk.fd, length)
        os.pwrite(disk.fd, b"x", 0)
        block.set_bits(Bits.RECEIVED)
        service.arm()
        got: list[bytes] = []

        async def touch() -> None:
            got.append(await block.read(5 * TARGET_PAGE, 4))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(service.run)
            nursery.start_soon(touch)
            await until(lambda: service.numbers().short_now == 1)
            assert got == []
            disk.resize(2)
            await until(lambda: got)
            assert got == [bytes(4)]
            nursery.cancel_scope.cancel()
