"""Dirty tracking by each way that this kernel has: exact, nothing lost, nothing made, nobody left waiting."""

from __future__ import annotations

import ctypes
import errno
import os
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio

from tests.kit.until import until
from vhostpc.errors import UfdError
from vhostpc.guest.vcpu import UNLIMITED, Area, VCpu
from vhostpc.pages import dirty
from vhostpc.pages.dirty import DirtyTracker, DirtyWay, probe_dirty
from vhostpc.pages.ramblock import Bits, RamBlock, RamSet, total_pages
from vhostpc.pages.service import FaultService
from vhostpc.ufd import kernel_version
from vhostpc.ufd.flags import Features
from vhostpc.units import TARGET_PAGE

pytestmark = pytest.mark.ufd

HUGE = 2 << 20
MADV_DONTNEED = 4
#: By the kernel's version, not by what our own probe says.
WAYS = [DirtyWay.WP_ASYNC, DirtyWay.WP_SYNC] if kernel_version() >= (6, 7) else [DirtyWay.WP_SYNC]
by_each_way = pytest.mark.parametrize("way", WAYS, ids=lambda way: way.value)


@asynccontextmanager
async def tracking(ram: RamSet, way: DirtyWay | None) -> AsyncIterator[DirtyTracker]:
    with DirtyTracker(ram, way) as tracker:
        async with trio.open_nursery() as nursery:
            await tracker.start(nursery)
            yield tracker
            await tracker.stop()


async def refusal(ram: RamSet, way: DirtyWay) -> UfdError:
    with DirtyTracker(ram, way) as tracker:
        async with trio.open_nursery() as nursery:
            with pytest.raises(UfdError) as e:
                await tracker.start(nursery)
    return e.value


def dirty_pages(ram: RamSet) -> set[tuple[str, int]]:
    return {(b.name, page) for b in ram.blocks for page in range(b.pages) if b.test_bit(Bits.DIRTY, page)}


def forget(ram: RamSet) -> None:
    for block in ram.blocks:
        block.set_bits(Bits.DIRTY, value=False)


def made(block: RamBlock) -> int:
    """Bytes of memory that its file has."""
    return os.fstat(block.fd).st_blocks * 512


# --- exactness, page by page


async def exact(way: DirtyWay, page_size: int, pages: int) -> None:
    dice = random.Random(5)
    with RamSet() as ram:
        big = ram.create("big", pages * page_size, page_size)
        small = ram.create("small", 70 * TARGET_PAGE)
        # Some pages are there before, some are born while they are watched.
        for page in range(0, pages, 2):
            await big.write(page * page_size, b"old")
        async with tracking(ram, way) as tracker:
            assert await tracker.sync() == 0
            for _ in range(8):
                written = set()
                for block in (big, small):
                    for page in dice.sample(range(block.pages), block.pages // 3):
                        await block.write((page + 1) * block.page_size - 1, b"x")
                        await block.write(page * block.page_size, b"again")
                        written.add((block.name, page))
                assert await tracker.sync() == len(written)
                assert dirty_pages(ram) == written
                # Dirty already: written again they are not new, and stay.
                name, page = next(iter(written))
                await ram[name].write(page * ram[name].page_size, b"y")
                assert await tracker.sync() == 0
                assert dirty_pages(ram) == written
                forget(ram)
            # A write over two pages, and one over the end of a run of 64 bits.
            await small.write(TARGET_PAGE - 1, b"xy")
            await small.write(63 * TARGET_PAGE, bytes(2 * TARGET_PAGE))
            assert await tracker.sync() == 4
            assert dirty_pages(ram) == {("small", n) for n in (0, 1, 63, 64)}
            assert await tracker.sync() == 0
            numbers = tracker.numbers()
            assert numbers.syncs == 19
            assert (numbers.faults > 0) == (way is DirtyWay.WP_SYNC)


@by_each_way
async def test_exactly_what_was_written(way: DirtyWay) -> None:
    await exact(way, TARGET_PAGE, 200)


@by_each_way
async def test_exactly_what_was_written_of_huge_pages(way: DirtyWay, huge_pages: int) -> None:
    await exact(way, huge_pages, 6)


@by_each_way
async def test_reading_is_not_writing(way: DirtyWay) -> None:
    with RamSet() as ram:
        block = ram.create("ram", 64 * TARGET_PAGE)
        await block.write(0, b"x" * TARGET_PAGE)
        async with tracking(ram, way) as tracker:
            assert await block.read(0, 3) == b"xxx"
            assert await block.read(9 * TARGET_PAGE, 3) == bytes(3)  # this makes a page, and writes nothing
            await block.verify(0)
            assert await tracker.sync() == 0
            await block.write(9 * TARGET_PAGE, b"x")
            assert await tracker.sync() == 1


@by_each_way
async def test_what_the_kernel_takes_from_the_page_table_is_not_forgotten(way: DirtyWay) -> None:
    """As it does with pages that it moves or puts out: a written one counts, a protected one stays protected."""
    libc = ctypes.CDLL(None, use_errno=True)
    with RamSet() as ram:
        block = ram.create("ram", 600 * TARGET_PAGE)

        def take() -> None:
            address, length = ctypes.c_void_p(block.base), ctypes.c_size_t(block.length)
            assert libc.madvise(address, length, MADV_DONTNEED) == 0

        await block.fill(1)
        async with tracking(ram, way) as tracker:
            for page in (5, 6, 550):
                await block.write(page * TARGET_PAGE, b"x")
            take()
            assert await tracker.sync() == 3
            assert dirty_pages(ram) == {("ram", n) for n in (5, 6, 550)}
            forget(ram)
            assert await tracker.sync() == 0
            take()
            await block.write(7 * TARGET_PAGE, b"x")
            assert await tracker.sync() == 1
            assert dirty_pages(ram) == {("ram", 7)}


# --- nothing is lost


class Copier:
    """The source's and the destination's side of precopy: what is dirty is copied round by round."""

    def __init__(self, page_size: int, pages: int) -> None:
        self.source, self.there = RamSet(), RamSet()
        for ram in (self.source, self.there):
            ram.create("big", pages * page_size, page_size)
            ram.create("small", 64 * TARGET_PAGE)
        self.copied = 0

    def cpus_of(self, ram: RamSet, *, writes: int = 0, reads: int = 0) -> list[VCpu]:
        areas = [Area(b, 0, b.length // TARGET_PAGE) for b in ram.blocks]
        return [VCpu(ram, areas, i, 2, seed=9, writes=writes, reads=reads) for i in range(2)]

    async def copy_dirty(self) -> None:
        for block, to in zip(self.source.blocks, self.there.blocks, strict=True):
            for page in range(block.pages):
                if block.test_bit(Bits.DIRTY, page):
                    block.set_bits(Bits.DIRTY, page, 1, value=False)
                    content = os.pread(block.fd, block.page_size, page * block.page_size)
                    if block.page_size == TARGET_PAGE:
                        os.pwrite(to.fd, content, page * block.page_size)
                    else:  # hugetlbfs has no write(2)
                        await to.write(page * block.page_size, content)
                    self.copied += 1

    def close(self) -> None:
        self.source.close()
        self.there.close()


async def migrate(way: DirtyWay, page_size: int, pages: int, *, lose: bool = False) -> int:
    """Copy the memory of two running vCPUs; returns the number of bad pages at the destination."""
    c = Copier(page_size, pages)
    cpus = c.cpus_of(c.source, writes=UNLIMITED, reads=2000)
    others = c.cpus_of(c.there)
    for cpu in cpus:
        await cpu.fill()
    async with tracking(c.source, way) as tracker, trio.open_nursery() as nursery:
        for block in c.source.blocks:
            block.set_bits(Bits.DIRTY)
        for cpu in cpus:
            await nursery.start(cpu.run)
        for _ in range(8):
            steps = [cpu.numbers().step for cpu in cpus]
            await c.copy_dirty()
            await until(lambda s=steps: all(cpu.numbers().step > s[cpu.index] + 50 for cpu in cpus))  # type: ignore[misc]
            await tracker.sync()
        for cpu in cpus:
            await cpu.stop()
        await tracker.sync()
        if lose:  # one that the last sync found
            block = next(b for b in c.source.blocks if b.count_bits(Bits.DIRTY))
            page = next(p for p in range(block.pages) if block.test_bit(Bits.DIRTY, p))
            block.set_bits(Bits.DIRTY, page, 1, value=False)
        await c.copy_dirty()
        assert await tracker.sync() == 0, "a stopped machine writes nothing"
    bad = 0
    for cpu, other in zip(cpus, others, strict=True):
        assert await cpu.sweep() == (0, None)
        other.restore(cpu.save())
        bad += (await other.sweep())[0]
    assert sum(cpu.numbers().bad for cpu in cpus) == 0
    for block, to in zip(c.source.blocks, c.there.blocks, strict=True):
        same = os.pread(block.fd, block.length, 0) == os.pread(to.fd, to.length, 0)
        assert same or lose
    assert c.copied > total_pages(c.source.blocks, Bits.DIRTY)
    for cpu in cpus + others:
        cpu.close()
    c.close()
    return bad


@by_each_way
async def test_memory_of_running_vcpus_arrives_whole(way: DirtyWay) -> None:
    assert await migrate(way, TARGET_PAGE, 600) == 0


@by_each_way
async def test_huge_memory_of_running_vcpus_arrives_whole(way: DirtyWay, huge_pages: int) -> None:
    assert await migrate(way, huge_pages, 3) == 0


@by_each_way
async def test_one_lost_bit_is_found(way: DirtyWay) -> None:
    assert await migrate(way, TARGET_PAGE, 600, lose=True) > 0


# --- what it costs


async def costs(way: DirtyWay, page_size: int, length: int) -> None:
    """No page is made by watching; the numbers can be read at any time."""
    with RamSet() as ram:
        block = ram.create("ram", length, page_size)
        begun = time.perf_counter()
        async with tracking(ram, way) as tracker:
            started = time.perf_counter() - begun
            assert await tracker.sync() == 0
            begun = time.perf_counter()
            assert await tracker.sync() == 0
            clean = time.perf_counter() - begun
            assert made(block) == 0, "watching made memory"
            count = min(block.pages, 256)
            for page in range(count):
                await block.write(page * page_size, b"x")
            begun = time.perf_counter()
            assert await tracker.sync() == count
            wrote = time.perf_counter() - begun
            assert made(block) == count * page_size
        assert made(block) == count * page_size
        print(
            f"{way.value}, {length >> 20} MiB of {page_size >> 10} KiB: start {started * 1e3:.2f} ms, "
            f"sync {clean * 1e3:.2f} ms, of {count} written pages {wrote * 1e3:.2f} ms"
        )


@by_each_way
async def test_watching_makes_no_memory(way: DirtyWay) -> None:
    await costs(way, TARGET_PAGE, 256 << 20)


@by_each_way
async def test_watching_makes_no_huge_pages(way: DirtyWay, huge_pages: int) -> None:
    await costs(way, huge_pages, 6 * huge_pages)


# --- its end, and what is refused


@by_each_way
async def test_after_the_end_nobody_waits_and_nothing_is_watched(way: DirtyWay) -> None:
    with RamSet() as ram:
        block = ram.create("ram", 64 * TARGET_PAGE)
        cpus = [VCpu(ram, [Area(block, 0, 64)], writes=UNLIMITED)]
        await cpus[0].fill()
        descriptors = len(os.listdir("/proc/self/fd"))
        async with trio.open_nursery() as nursery:
            await nursery.start(cpus[0].run)
            for _ in range(10):
                tracker = DirtyTracker(ram, way)
                with pytest.raises(UfdError, match="does not run"):
                    await tracker.sync()
                await tracker.start(nursery)
                with pytest.raises(ValueError, match="started before"):
                    await tracker.start(nursery)
                await tracker.sync()
                await tracker.stop()
                await tracker.stop()
                with pytest.raises(UfdError, match="does not run"):
                    await tracker.sync()
                tracker.close()
                tracker.close()
                with pytest.raises(ValueError, match="closed"):
                    await tracker.sync()
                step = cpus[0].numbers().step
                await until(lambda s=step: cpus[0].numbers().step > s + 64)  # type: ignore[misc]
            await cpus[0].stop()
        assert await cpus[0].sweep() == (0, None)
        assert len(os.listdir("/proc/self/fd")) == descriptors
        cpus[0].close()


@by_each_way
async def test_a_nursery_that_ends_lets_all_writers_go(way: DirtyWay) -> None:
    """Also when the tracking task is cancelled, and does not reach its stop."""
    with RamSet() as ram:
        block = ram.create("ram", 64 * TARGET_PAGE)
        with VCpu(ram, [Area(block, 0, 64)], writes=UNLIMITED) as cpu, DirtyTracker(ram, way) as tracker:
            await cpu.fill()
            async with trio.open_nursery() as outer:
                await outer.start(cpu.run)
                async with trio.open_nursery() as nursery:
                    await tracker.start(nursery)
                    await tracker.sync()
                    nursery.cancel_scope.cancel()
                step = cpu.numbers().step
                await until(lambda: cpu.numbers().step > step + 640)
                await cpu.stop()
            if way is DirtyWay.WP_SYNC:
                with pytest.raises(UfdError, match="does not run"):
                    await tracker.sync()
            assert await cpu.sweep() == (0, None)


@by_each_way
async def test_memory_that_is_watched_already_is_refused(way: DirtyWay) -> None:
    with RamSet() as ram:
        ram.create("first", 4 * TARGET_PAGE)
        with FaultService(ram) as service:
            service.arm()
            ram.create("second", 4 * TARGET_PAGE)
            error = await refusal(ram, way)
            assert "writes to first cannot be tracked: another userfaultfd" in str(error)
            assert error.errno == errno.EBUSY
            for block in ram.blocks:
                block.set_bits(Bits.RECEIVED)
            service.disarm()
        async with tracking(ram, way) as tracker:
            await ram["first"].write(0, b"x")
            assert "another userfaultfd" in str(await refusal(ram, way))
            assert await tracker.sync() == 1, "the one that was refused took nothing away"


def test_what_this_kernel_has() -> None:
    found = probe_dirty()
    assert found[DirtyWay.WP_SYNC] == ""
    if DirtyWay.WP_ASYNC in WAYS:
        assert found[DirtyWay.WP_ASYNC] == ""
    else:
        assert "lacks WP_ASYNC" in found[DirtyWay.WP_ASYNC]
        assert "needs Linux 6.7" in found[DirtyWay.WP_ASYNC]
    with RamSet() as ram:
        ram.create("ram", TARGET_PAGE)
        with DirtyTracker(ram) as tracker:
            assert tracker.way is WAYS[0]
        if DirtyWay.WP_ASYNC not in WAYS:
            with pytest.raises(
                UfdError, match="lacks WP_ASYNC of userfaultfd: tracking writes by wp-async needs"
            ):
                DirtyTracker(ram, DirtyWay.WP_ASYNC)


async def test_a_kernel_that_lacks_it(monkeypatch: pytest.MonkeyPatch) -> None:
    unknown = Features(1 << 60)
    with RamSet() as ram:
        ram.create("ram", TARGET_PAGE)
        monkeypatch.setitem(dirty._FEATURES, DirtyWay.WP_ASYNC, unknown)
        with DirtyTracker(ram) as tracker:
            assert tracker.way is DirtyWay.WP_SYNC
        with pytest.raises(
            UfdError, match=r"the kernel lacks bit 60 of userfaultfd: .* needs Linux 6\.7, this is"
        ):
            DirtyTracker(ram, DirtyWay.WP_ASYNC)
        monkeypatch.setitem(dirty._FEATURES, DirtyWay.WP_SYNC, unknown)
        with pytest.raises(UfdError, match=r"needs Linux 5\.19, this is"):
            DirtyTracker(ram)
