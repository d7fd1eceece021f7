"""vCPUs: every page says which generation it must have, damage of each kind is found, the state moves."""

from __future__ import annotations

import os
import re
import struct
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

import pytest
import trio

from tests.kit.until import until
from vhostpc.errors import StreamError
from vhostpc.guest.vcpu import UNLIMITED, Area, VCpu
from vhostpc.pages.ramblock import RamSet
from vhostpc.units import TARGET_PAGE

PAGES = 300
SEED = 77


def areas_of(ram: RamSet) -> list[Area]:
    """Two blocks, and a part of a third; what is left of that one belongs to a device."""
    return [Area(ram["low"], 0, PAGES), Area(ram["high"], 0, 64), Area(ram["mixed"], 10, 50)]


def blocks(ram: RamSet) -> None:
    for name, pages in (("low", PAGES), ("high", 64), ("mixed", 80)):
        ram.create(name, pages * TARGET_PAGE)


@asynccontextmanager
async def machine(
    count: int = 2, *, fill: bool = True, **rates: int
) -> AsyncIterator[tuple[RamSet, list[VCpu]]]:
    with RamSet() as ram:
        blocks(ram)
        touch = [Area(ram["mixed"], 60, 20)]
        cpus = [VCpu(ram, areas_of(ram), i, count, seed=SEED, touch=touch, **rates) for i in range(count)]
        try:
            if fill:
                for cpu in cpus:
                    await cpu.fill()
            yield ram, cpus
        finally:
            for cpu in cpus:
                cpu.close()


async def run_for(cpus: Sequence[VCpu], done: Callable[[VCpu], bool]) -> None:
    async with trio.open_nursery() as nursery:
        for cpu in cpus:
            await nursery.start(cpu.run)
        await until(lambda: all(map(done, cpus)))
        for cpu in cpus:
            await cpu.stop()


def everything(ram: RamSet) -> list[bytes]:
    return [os.pread(b.fd, b.length, 0) for b in ram.blocks]


def heads(ram: RamSet) -> list[tuple[int, int, int]]:
    """(number, generation, owner) that each page of the areas says, in the order of their numbers."""
    found = []
    for area in areas_of(ram):
        for page in range(area.first, area.first + area.count):
            raw = os.pread(area.block.fd, 24, page * TARGET_PAGE)
            number, generation, owner = struct.unpack("=QQQ", raw)
            found.append((number, generation, owner & 0xFFFFFFFF))
    return found


async def sweep(cpus: Sequence[VCpu]) -> int:
    return sum([(await cpu.sweep())[0] for cpu in cpus])


@pytest.mark.parametrize("count", [1, 2, 3, 4])
async def test_pages_name_themselves_and_the_step_says_all_generations(count: int) -> None:
    async with machine(count, writes=UNLIMITED, reads=UNLIMITED) as (ram, cpus):
        assert heads(ram) == [(i, 0, i % count) for i in range(PAGES + 114)]
        rounds = 3 * (PAGES + 114)
        await run_for(cpus, lambda cpu: cpu.numbers().step > rounds)
        assert await sweep(cpus) == 0
        found = heads(ram)
        assert [(n, owner) for n, _, owner in found] == [(i, i % count) for i in range(len(found))]
        for cpu in cpus:
            generations = [g for _, g, owner in found if owner == cpu.index]
            numbers = cpu.numbers()
            assert sum(generations) == numbers.step == numbers.writes
            assert max(generations) - min(generations) <= 1
            assert (numbers.bad, numbers.first_bad) == (0, None)
            assert numbers.checks >= numbers.writes
            assert numbers.reads == numbers.checks + numbers.glances + numbers.touches
            assert numbers.touches > 0
            assert (numbers.glances > 0) == (count > 1)
            assert numbers.stalls.count == numbers.beats
        # Nobody writes where devices live, or outside of the areas.
        mixed = ram["mixed"]
        assert os.pread(mixed.fd, 10 * TARGET_PAGE, 0) == bytes(10 * TARGET_PAGE)
        assert os.pread(mixed.fd, 20 * TARGET_PAGE, 60 * TARGET_PAGE) == bytes(20 * TARGET_PAGE)


def stale(ram: RamSet, before: list[bytes]) -> None:
    os.pwrite(ram["low"].fd, before[0][7 * TARGET_PAGE : 8 * TARGET_PAGE], 7 * TARGET_PAGE)


def torn(ram: RamSet, before: list[bytes]) -> None:
    at = 7 * TARGET_PAGE + 2048
    os.pwrite(ram["low"].fd, before[0][at : at + 2048], at)


def doubled(ram: RamSet, before: list[bytes]) -> None:
    os.pwrite(ram["low"].fd, os.pread(ram["low"].fd, TARGET_PAGE, 9 * TARGET_PAGE), 7 * TARGET_PAGE)


def lost(ram: RamSet, before: list[bytes]) -> None:
    ram["low"].discard(7 * TARGET_PAGE, TARGET_PAGE)


def flipped(ram: RamSet, before: list[bytes]) -> None:
    last = os.pread(ram["low"].fd, 1, 8 * TARGET_PAGE - 1)
    os.pwrite(ram["low"].fd, bytes([last[0] ^ 1]), 8 * TARGET_PAGE - 1)


@pytest.mark.parametrize(
    ("damage", "word"),
    [(stale, 1), (torn, 256), (doubled, 0), (lost, 0), (flipped, 511)],
    ids=["stale", "torn", "doubled", "lost", "flipped"],
)
async def test_damage_is_found_and_named(damage: Callable[[RamSet, list[bytes]], None], word: int) -> None:
    async with machine(2, writes=UNLIMITED) as (ram, cpus):
        before = everything(ram)
        # Each page is in another generation than it was.
        await run_for(cpus, lambda cpu: cpu.numbers().step > PAGES)
        damage(ram, before)
        bad, first = await cpus[1].sweep()
        assert bad == 1
        assert first is not None
        assert (first.block, first.page, first.index, first.word) == ("low", 7, 7, word)
        assert first.generation >= 1
        assert (first.found_generation == 0) == (damage in (stale, lost))
        assert first.found_index == (9 if damage is doubled else 0 if damage is lost else 7)
        assert re.match(r"page 7 of low: number 7 in generation \d+ expected, found ", str(first))
        assert await cpus[0].sweep() == (0, None)
        # A vCPU that meets it says the same, once: it has rewritten the page then.
        step = cpus[1].numbers().step
        await run_for(cpus, lambda cpu: cpu.numbers().step > step + PAGES)
        numbers = cpus[1].numbers()
        assert numbers.bad == 1
        assert numbers.first_bad == first
        assert await sweep(cpus) == 0


async def test_a_misplaced_page_of_another_vcpu_is_seen_at_a_glance() -> None:
    async with machine(2, reads=UNLIMITED) as (ram, cpus):
        os.pwrite(ram["low"].fd, os.pread(ram["low"].fd, TARGET_PAGE, 9 * TARGET_PAGE), 7 * TARGET_PAGE)
        await run_for(cpus[:1], lambda cpu: cpu.numbers().bad > 0)
        first = cpus[0].numbers().first_bad
        assert first is not None
        assert (first.block, first.page, first.found_index) == ("low", 7, 9)


async def test_stopped_is_stopped() -> None:
    async with machine(2, writes=UNLIMITED, reads=UNLIMITED) as (ram, cpus):
        for _ in range(20):
            beats = [cpu.numbers().beats for cpu in cpus]
            await run_for(cpus, lambda cpu, b=beats: cpu.numbers().beats > b[cpu.index] + 10)  # type: ignore[misc]
            before, numbers = everything(ram), [cpu.numbers() for cpu in cpus]
            assert not any(cpu.running for cpu in cpus)
            for _ in range(10):
                await trio.lowlevel.checkpoint()
            assert everything(ram) == before
            assert [cpu.numbers() for cpu in cpus] == numbers
        assert await sweep(cpus) == 0


async def test_stopping_and_running_in_any_order() -> None:
    async with machine(1, writes=UNLIMITED) as (_, [cpu]):
        await cpu.stop()
        async with trio.open_nursery() as nursery:
            await nursery.start(cpu.run)
            with pytest.raises(OSError, match="is running already"):
                await cpu.run()
            for call in (cpu.save, lambda: cpu.restore(b""), cpu.close):
                with pytest.raises(ValueError, match="stop it first"):
                    call()
            await cpu.stop()
            await cpu.stop()
        with trio.move_on_after(0.05) as scope:
            await cpu.run()
        assert scope.cancelled_caught
        assert not cpu.running
        numbers = cpu.numbers()
        await run_for([cpu], lambda c: c.numbers().beats > numbers.beats)
        again = cpu.numbers()
        assert 0 < numbers.first_beat_ns <= numbers.last_beat_ns < again.first_beat_ns <= again.last_beat_ns
        assert again.thread > 0


async def test_rates() -> None:
    async with machine(1) as (_, [cpu]), trio.open_nursery() as nursery:
        await nursery.start(cpu.run)
        await until(lambda: cpu.numbers().thread)
        assert cpu.numbers().beats == 0
        cpu.set_rates(0, 1000)
        await until(lambda: cpu.numbers().reads > 20)
        assert cpu.numbers().writes == 0
        cpu.set_rates(1000, 0)
        await until(lambda: cpu.numbers().writes > 20)
        cpu.set_rates(0, 0)
        await cpu.stop()
        begun = trio.current_time()
        cpu.set_rates(500, 0)
        before = cpu.numbers().writes
        await nursery.start(cpu.run)
        await until(lambda: cpu.numbers().writes >= before + 50)
        # Never more than the clock allows, and what may be made up for.
        assert cpu.numbers().writes - before <= (trio.current_time() - begun) * 500 + 10
        await cpu.stop()


async def test_the_state_moves() -> None:
    async with (
        machine(3, writes=UNLIMITED, reads=UNLIMITED) as (ram, cpus),
        machine(3, fill=False, writes=UNLIMITED, reads=UNLIMITED) as (there, others),
    ):
        for cpu in others:  # its seed comes with the state
            cpu.restore(cpu.save()[:12] + bytes(8) + cpu.save()[20:])
        await run_for(cpus, lambda cpu: cpu.numbers().step > 1000)
        early = everything(ram)
        steps = [cpu.numbers().step for cpu in cpus]
        await run_for(cpus, lambda cpu: cpu.numbers().step > steps[cpu.index] + 20)
        own = Counter(owner for _, _, owner in heads(ram))
        assert set(own) == {cpu.index for cpu in cpus}
        # A vCPU that has gone round more than once has none of its pages left.
        moved = sum(
            min(cpu.numbers().step - step, own[cpu.index]) for cpu, step in zip(cpus, steps, strict=True)
        )
        for cpu, other in zip(cpus, others, strict=True):
            other.restore(cpu.save())
            assert other.save() == cpu.save()
        for block, content in zip(there.blocks, early, strict=True):
            os.pwrite(block.fd, content, 0)
        # Memory of an earlier moment: each page that was rewritten since is stale, and no other.
        assert await sweep(others) == moved
        for block, content in zip(there.blocks, everything(ram), strict=True):
            os.pwrite(block.fd, content, 0)
        assert await sweep(others) == 0
        steps = [cpu.numbers().step for cpu in others]
        await run_for(others, lambda cpu: cpu.numbers().step > steps[cpu.index] + 1000)
        assert await sweep(others) == 0
        assert sum(cpu.numbers().bad for cpu in others) == 0


def at(offset: int, value: int, size: int) -> Callable[[bytes], bytes]:
    return lambda s: s[:offset] + value.to_bytes(size, "big") + s[offset + size :]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda s: s[:3], "ends after 3 bytes"),
        (lambda s: s[:30], "ends after 30 bytes"),
        (lambda s: s[:-1], r"has \d+ bytes, but needs \d+ with the areas of this machine"),
        (lambda s: s + b"x", r"has \d+ bytes, but needs \d+ with the areas of this machine"),
        (at(0, 2, 4), "has version 2, only 1 is known here"),
        (at(4, 1, 4), "the state of vCPU 0 is that of vCPU 1"),
        (at(8, 3, 4), "the incoming machine has 3 vCPUs, this one has 2"),
        (at(20, 1 << 63, 8), "says step 9223372036854775808"),
        (at(36, 2, 2), "other areas than vCPU 0"),
        (lambda s: s.replace(b"low", b"row"), "other areas than vCPU 0"),
        (lambda s: s[:-8] + (21).to_bytes(8, "big"), "other areas than vCPU 0"),
    ],
)
async def test_states_that_do_not_fit(change: Callable[[bytes], bytes], sentence: str) -> None:
    async with machine(2) as (_, cpus):
        state = cpus[0].save()
        with pytest.raises(StreamError, match=sentence):
            cpus[0].restore(change(state))
        assert cpus[0].save() == state


async def test_vcpus_that_cannot_be() -> None:
    with RamSet() as ram:
        block = ram.create("ram", 4 * TARGET_PAGE)
        for index, count in ((2, 2), (-1, 2), (0, 0)):
            with pytest.raises(ValueError, match="there is no vCPU"):
                VCpu(ram, [Area(block, 0, 4)], index, count)
        with pytest.raises(ValueError, match="5 vCPUs need at least a page"):
            VCpu(ram, [Area(block, 0, 4)], 0, 5)
        for first, count in ((0, 5), (4, 1), (0, 0), (1 << 52, 1)):
            with pytest.raises(OSError, match="of ram"):
                VCpu(ram, [Area(block, first, count)])
        for pages in (1, 2, 3, 4):
            with VCpu(ram, [Area(block, 0, pages)], writes=UNLIMITED) as cpu:
                await cpu.fill()
                await run_for([cpu], lambda c: c.numbers().step > 40)
                assert await cpu.sweep() == (0, None)
                with pytest.raises(OSError):
                    await cpu.fill()


async def test_huge_pages(huge_pages: int) -> None:
    with RamSet() as ram:
        ram.create("big", 3 * huge_pages, huge_pages)
        areas = [Area(ram["big"], 0, 3 * huge_pages // TARGET_PAGE)]
        cpus = [VCpu(ram, areas, i, 2, seed=SEED, writes=UNLIMITED, reads=UNLIMITED) for i in range(2)]
        for cpu in cpus:
            await cpu.fill()
        await run_for(cpus, lambda cpu: cpu.numbers().step > 2000)
        assert await sweep(cpus) == 0
        for cpu in cpus:
            cpu.close()
