"""vCPUs on memory whose pages have not come: each waits alone, pages are checked, waits are reported."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass

import pytest
import trio

from tests.kit.until import until
from vhostpc.errors import MemoryLost
from vhostpc.guest.vcpu import UNLIMITED, Area, VCpu, stop_all
from vhostpc.pages import pagesource
from vhostpc.pages.blocktime import NOBODY
from vhostpc.pages.pagesource import PageSource
from vhostpc.pages.ramblock import Bits, RamSet
from vhostpc.pages.service import FaultService
from vhostpc.units import TARGET_PAGE

pytestmark = pytest.mark.ufd
COUNT = 2


@dataclass
class Move:
    """Two machines: ``cpus`` ran on the source and stand; ``others`` have their state and none of their memory."""

    source_ram: RamSet
    ram: RamSet
    source: PageSource
    service: FaultService
    cpus: Sequence[VCpu]
    others: Sequence[VCpu]
    sock: int
    nursery: trio.Nursery


def cpus_of(ram: RamSet, stack: ExitStack, **rates: int) -> list[VCpu]:
    areas = [Area(b, 0, b.length // TARGET_PAGE) for b in ram.blocks if b.name != "device"]
    touch = [Area(b, 0, b.length // TARGET_PAGE) for b in ram.blocks if b.name == "device"]
    return [
        stack.enter_context(VCpu(ram, areas, i, COUNT, seed=3, touch=touch, **rates)) for i in range(COUNT)
    ]


@asynccontextmanager
async def moved(page_size: int = TARGET_PAGE, pages: int = 300) -> AsyncIterator[Move]:
    ours, theirs = socket.socketpair()
    with ours, theirs, ExitStack() as stack:
        sets = [stack.enter_context(RamSet()) for _ in range(2)]
        for ram in sets:
            ram.create("ram", pages * page_size, page_size)
            ram.create("device", 8 * TARGET_PAGE)
        cpus = cpus_of(sets[0], stack, writes=UNLIMITED, reads=UNLIMITED)
        others = cpus_of(sets[1], stack, writes=UNLIMITED, reads=UNLIMITED)
        for cpu in cpus:
            await cpu.fill()
        async with trio.open_nursery() as nursery:
            for cpu in cpus:
                await nursery.start(cpu.run)
            await until(lambda: all(cpu.numbers().step > 2 * pages for cpu in cpus))
            await stop_all(cpus)
        for cpu, other in zip(cpus, others, strict=True):
            other.restore(cpu.save())
        for block in sets[0].blocks:
            block.set_bits(Bits.DIRTY)
        service = stack.enter_context(FaultService(sets[1]))
        source = stack.enter_context(PageSource(sets[0], theirs.fileno(), background_rate=0))
        service.arm()
        service.set_return_path(ours.fileno())
        async with trio.open_nursery() as nursery:
            nursery.start_soon(service.run)
            nursery.start_soon(source.serve)
            yield Move(sets[0], sets[1], source, service, cpus, others, ours.fileno(), nursery)
            nursery.cancel_scope.cancel()


async def all_comes(page_size: int, pages: int) -> None:
    with trio.fail_after(60):
        async with moved(page_size, pages) as m:
            async with trio.open_nursery() as nursery:
                loaded = []

                async def load() -> None:
                    loaded.append(await m.service.load(m.sock))

                nursery.start_soon(load)
                begun = [cpu.numbers().step for cpu in m.others]
                for cpu in m.others:
                    await m.nursery.start(cpu.park)
                m.service.set_vcpus([cpu.thread for cpu in m.others])
                for cpu in m.others:
                    cpu.go()
                # All pages on demand alone, and each rewritten as it came.
                await until(lambda: m.service.missing() == 0)
                await until(lambda: all(c.numbers().step > begun[c.index] + pages for c in m.others))
                await stop_all(m.others)
            assert loaded[0].placed == sum(b.pages for b in m.ram.blocks)
            assert loaded[0].already == 0
            m.service.disarm()
            for cpu in m.others:
                numbers = cpu.numbers()
                assert numbers.bad == 0, str(numbers.first_bad)
                assert await cpu.sweep() == (0, None)
            # Who waited is told by vCPU, and no wait is left out.
            found = m.service.blocktime()
            assert found is not None
            own = m.service.own.numbers()
            assert sum(one.waits.count for one in found.vcpus) == own.waits.count > 0
            assert max(one.waits.longest_ns for one in found.vcpus) == own.waits.longest_ns
            assert found.others == NOBODY
            for cpu, one in zip(m.others, found.vcpus, strict=True):
                waits = one.waits
                assert 0 < waits.p50_ns <= waits.p99_ns <= waits.longest_ns <= one.blocked_ns
                assert cpu.numbers().stalls.longest_ns > 0


async def test_pages_are_checked_as_they_come() -> None:
    await all_comes(TARGET_PAGE, 300)


async def test_huge_pages_are_checked_as_they_come(huge_pages: int) -> None:
    await all_comes(huge_pages, 3)


async def test_a_page_of_an_earlier_generation_is_found_when_it_comes() -> None:
    with trio.fail_after(60):
        async with moved() as m:
            # As a source that sent the pages of one vCPU before it had rewritten them.
            with VCpu(m.source_ram, [Area(m.source_ram["ram"], 0, 300)], 0, COUNT, seed=3) as older:
                await older.fill()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(m.service.load, m.sock)
                for cpu in m.others:
                    await nursery.start(cpu.run)
                await until(lambda: m.others[0].numbers().bad >= 150)
                await until(lambda: m.service.missing() == 0)
                await stop_all(m.others)
            first = m.others[0].numbers().first_bad
            assert first is not None
            assert (first.block, first.found_index, first.found_generation) == ("ram", first.index, 0)
            assert first.generation > 0
            assert m.others[1].numbers().bad == 0


async def test_a_vcpu_that_waits_stops_with_its_page() -> None:
    with trio.fail_after(60):
        async with moved() as m, trio.open_nursery() as nursery:
            m.source.withhold_all()
            nursery.start_soon(m.service.load, m.sock)
            for cpu in m.others:
                await nursery.start(cpu.run)
            await until(lambda: m.service.numbers().waiting_now == COUNT)
            assert {w.thread for w in m.service.waiting()} == {cpu.numbers().thread for cpu in m.others}
            stopped = trio.Event()

            async def stop() -> None:
                await stop_all(m.others)
                stopped.set()

            nursery.start_soon(stop)
            for _ in range(200):  # this thread goes on
                await trio.lowlevel.checkpoint()
            assert not stopped.is_set()
            beats = [cpu.numbers().beats for cpu in m.others]
            m.source.withhold_all(False)
            await stopped.wait()
            # What they waited for came, and no page more was looked at.
            assert all(cpu.numbers().beats <= b + 1 for cpu, b in zip(m.others, beats, strict=True))
            m.source.set_rate(pagesource.UNLIMITED)
            await until(lambda: m.service.missing() == 0)
            for cpu in m.others:
                assert await cpu.sweep() == (0, None)


async def test_vcpus_of_memory_that_is_lost_end_and_count_nothing() -> None:
    with trio.fail_after(60):
        async with moved() as m:
            m.source.withhold_all()
            ended = []

            async def run(cpu: VCpu) -> None:
                with pytest.raises(MemoryLost):
                    await cpu.run()
                ended.append(cpu)

            holes = [b.holes() for b in m.ram.blocks]
            async with trio.open_nursery() as nursery:
                for cpu in m.others:
                    nursery.start_soon(run, cpu)
                await until(lambda: m.service.numbers().waiting_now == COUNT)
                m.service.give_up()
            assert len(ended) == COUNT
            for cpu in m.others:
                numbers = cpu.numbers()
                assert (numbers.bad, numbers.beats) == (0, 0)
                with pytest.raises(MemoryLost):
                    await cpu.sweep()
                with pytest.raises(MemoryLost):
                    await cpu.run()
                assert cpu.numbers().bad == 0
            assert [b.holes() for b in m.ram.blocks] == holes, "a page was made that nobody sent"
