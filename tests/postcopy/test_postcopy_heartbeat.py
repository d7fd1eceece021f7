"""Pages withheld for seconds, on every path that touches guest memory, one after the other.

The back-end measures its own heart. While a queue waits for a page: the trio loop goes on, control messages
are answered, queues that miss nothing move. When the page comes, everything is as it should be.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio

from tests.kit.heart import Heart
from tests.kit.rig import HIGH, BackendChild, Guest, Move, backend_child, far_side, moving
from tests.kit.thread_names import asleep_for_a_page
from tests.kit.until import until
from vhostpc.frontend import Driver, FarSide, Mode, RingLayout, SharedLog, start_ring
from vhostpc.wire.vhost_user import Feature

pytestmark = pytest.mark.ufd
HOLD = 3.0
FRAMES = 12


@pytest.fixture
def guest() -> Iterator[Guest]:
    guest = Guest()
    yield guest
    guest.close()


def part_of(layout: RingLayout, part: str) -> list[tuple[str, int, int]]:
    """(block, offset, length) of a part of a queue in the guest's blocks (low at 0, high at HIGH)."""
    if part == "buffers":
        return [("high.ram", layout.buffers - HIGH, layout.slots * layout.buffer_stride)]
    start = getattr(layout, part)
    length = {
        "desc": 16 * layout.num,
        "avail": 6 + 2 * layout.num,
        "used": 6 + 8 * layout.num,
        "tables": layout.table_stride * layout.slots,
    }[part]
    return [("low.ram", start, length)]


async def withhold(m: Move, layout: RingLayout, part: str) -> None:
    for block, offset, length in part_of(layout, part):
        page = m.guest.page_size
        await m.source.withhold(block, offset // page, (offset % page + length + page - 1) // page)


@dataclass
class Watch:
    """What went on while pages were withheld."""

    asked: int = 0
    """Control messages answered."""
    ours: float = 0
    """The largest gap of our own loop, which waits for no page: the machine's hiccups."""


async def ask_for_seconds(m: Move, seconds: float) -> Watch:
    """Control messages while pages are missing: each is answered within the front-end's usual time."""
    watch, heart = Watch(), Heart()
    until_then = trio.current_time() + seconds
    async with trio.open_nursery() as nursery:
        nursery.start_soon(heart.beat)
        while trio.current_time() < until_then:
            with trio.fail_after(5):
                await m.front.barrier()
            watch.asked += 1
            await trio.sleep(0.02)
        nursery.cancel_scope.cancel()
    watch.ours = heart.take()
    return watch


def judge(name: str, gap: float, calm: float, watch: Watch) -> None:
    """The promise: under a second, and under three times that of a run without faults.

    A calm loop beats every 5 ms, and on a machine with other work its largest gap is the scheduler's. So what
    is compared with is at least one such hiccup, or what our own loop saw in the same seconds.
    """
    print(
        f"{name}: largest gap {gap * 1e3:.0f} ms; without faults {calm * 1e3:.0f} ms, our own loop's "
        f"{watch.ours * 1e3:.0f} ms; {watch.asked} messages answered"
    )
    assert watch.asked > 10
    assert gap < 1
    assert gap < 3 * max(calm, watch.ours, 0.1)


@asynccontextmanager
async def bridge(tmp_path: Path) -> AsyncIterator[tuple[BackendChild, list[FarSide]]]:
    """A bridge with two queue pairs, each with an echoing far side."""
    async with AsyncExitStack() as stack:
        fars = [await stack.enter_async_context(far_side(echo=True)) for _ in range(2)]
        backend = await stack.enter_async_context(
            backend_child(tmp_path, device="bridge", far=[address for _, address in fars])
        )
        yield backend, [far for far, _ in fars]


@asynccontextmanager
async def queues(guest: Guest, *, indirect: int, count: int = 4) -> AsyncIterator[list[Driver]]:
    """Queues as of net: even ones receive. All are full when the guest moves."""
    await guest.fill()
    p = guest.page_size
    with_drivers: list[Driver] = []
    with ExitStack() as stack:
        for index in range(count):
            layout = guest.layout(4 * p * index, slots=FRAMES, indirect=indirect, parts=2)
            driver = Driver(
                guest.source, guest.regions(guest.source), layout, receive=index % 2 == 0, event_idx=True
            )
            with_drivers.append(stack.enter_context(driver))
            await driver.reset()
            assert await driver.post(FRAMES, 900) == FRAMES
        yield with_drivers


async def start_all(m: Move, drivers: list[Driver]) -> None:
    """Start the rings, receiving ones first: a bridge drops frames from before its ring was started."""
    for index in (0, 2):
        before = m.service.numbers().requests
        await m.start(index, drivers[index])
        # It has looked at its ring, so it is ready.
        await until(lambda before=before: m.service.numbers().requests > before)  # type: ignore[misc]
    for index in (1, 3):
        await m.start(index, drivers[index])


async def calm_gap(backend: BackendChild, m: Move, traffic: list[Driver]) -> float:
    """The same loop, the same traffic, nothing missing."""
    await backend.gap()
    async with trio.open_nursery() as nursery:
        for driver in traffic:
            nursery.start_soon(driver.run, 0, 900)
        await ask_for_seconds(m, 1)
        nursery.cancel_scope.cancel()
    return await backend.gap()


@pytest.mark.parametrize(
    ("part", "indirect"),
    [("avail", 0), ("desc", 0), ("used", 0), ("buffers", 0), ("buffers", 1), ("tables", 1)],
)
@pytest.mark.parametrize("queue", [0, 1], ids=["rx", "tx"])
async def test_bridge(tmp_path: Path, guest: Guest, queue: int, part: str, indirect: int) -> None:
    with trio.fail_after(60):
        async with bridge(tmp_path) as (backend, fars), queues(guest, indirect=indirect) as drivers:
            async with moving(guest, backend, mode=Mode.SLOTS) as m:
                await withhold(m, drivers[queue].layout, part)
                await backend.gap()
                await start_all(m, drivers)
                # Somebody waits for what is withheld, and the second pair misses nothing for long.
                await m.source.wait_withheld(1)
                await until(lambda: fars[1].echoed == FRAMES)
                watch = await ask_for_seconds(m, HOLD)
                gap = await backend.gap()
                waiting = m.service.waiting()
                assert waiting
                held = await m.source.numbers()
                assert held.withheld >= 1
                if queue == 1 and part != "used":
                    assert fars[0].numbers().frames == 0, "a frame left the guest without its pages"
                assert m.postcopy.client is not None
                assert m.postcopy.client.numbers().found_nothing == 0
                await m.finish()
                await until(lambda: fars[0].echoed == FRAMES)
                for index in (0, 2):
                    await reap_until(drivers[index], FRAMES)
                for index in (1, 3):
                    await reap_until(drivers[index], FRAMES)
                for index in (0, 2):
                    got = drivers[index].numbers().received
                    assert (got.frames, got.bad, got.duplicates) == (FRAMES, 0, 0)
                for far in fars:
                    assert (far.numbers().frames, far.numbers().bad, far.numbers().duplicates) == (
                        FRAMES,
                        0,
                        0,
                    )
                calm = await calm_gap(backend, m, drivers)
            judge(f"bridge {'rx' if queue == 0 else 'tx'} {part}", gap, calm, watch)


async def reap_until(driver: Driver, count: int) -> None:
    with trio.fail_after(20):
        while driver.numbers().completed < count:
            await driver.reap()
            await trio.sleep(0.002)


@pytest.mark.parametrize("part", ["avail", "desc", "tables", "buffers", "used"])
async def test_plain_python_device(tmp_path: Path, guest: Guest, part: str) -> None:
    """A device whose chains come to Python: queue 0 waits, queue 1 moves."""
    await guest.fill()
    p = guest.page_size
    regions = guest.regions(guest.source)
    with trio.fail_after(60):
        async with backend_child(tmp_path, device="echo") as backend:
            layouts = [
                guest.layout(4 * p * i, slots=FRAMES, indirect=1, parts=2, answer_len=1024) for i in (0, 1)
            ]
            with (
                Driver(guest.source, regions, layouts[0], header=0, event_idx=True) as first,
                Driver(guest.source, regions, layouts[1], header=0, event_idx=True) as second,
            ):
                for driver in (first, second):
                    await driver.reset()
                    assert await driver.post(FRAMES, 900) == FRAMES
                async with moving(guest, backend, mode=Mode.TABLE) as m:
                    await withhold(m, layouts[0], part)
                    await backend.gap()
                    await m.start(0, first)
                    await m.start(1, second)
                    await m.source.wait_withheld(1)
                    await reap_until(second, FRAMES)
                    watch = await ask_for_seconds(m, HOLD)
                    assert await m.front.get_config(2, 3) == bytes([2, 3, 4])
                    gap = await backend.gap()
                    await m.finish()
                    await reap_until(first, FRAMES)
                    for driver in (first, second):
                        got = driver.numbers().received
                        assert (got.frames, got.bad, got.duplicates) == (FRAMES, 0, 0)
                    calm = await calm_gap(backend, m, [first, second])
                judge(f"echo {part}", gap, calm, watch)


@pytest.mark.parametrize("queue", [0, 1], ids=["rx", "tx"])
async def test_log(tmp_path: Path, guest: Guest, queue: int) -> None:
    """The dirty log is on, and the page that a logged write goes to is withheld: no bit before its write."""
    with trio.fail_after(60):
        async with bridge(tmp_path) as (backend, fars), queues(guest, indirect=0) as drivers:
            async with moving(guest, backend, mode=Mode.TABLE) as m:
                log = SharedLog(m.memory.regions)
                try:
                    await m.memory.set_log(log)
                    await m.front.set_features(m.front.features | Feature.LOG_ALL)
                    used_page = drivers[queue].layout.used // 4096
                    await withhold(m, drivers[queue].layout, "used")
                    await backend.gap()
                    await start_all(m, drivers)
                    await m.source.wait_withheld(1)
                    await until(lambda: fars[1].echoed == FRAMES)
                    await until(lambda: drivers[3].layout.used // 4096 in log.dirty_pages())
                    watch = await ask_for_seconds(m, HOLD)
                    gap = await backend.gap()
                    assert used_page not in log.dirty_pages()
                    await m.finish()
                    await until(lambda: fars[0].echoed == FRAMES)
                    await reap_until(drivers[0], FRAMES)
                    assert used_page in log.dirty_pages()
                    buffers = {(drivers[0].layout.buffers + i * 4096) // 4096 for i in range(FRAMES)}
                    assert buffers <= log.dirty_pages()
                    calm = await calm_gap(backend, m, drivers)
                finally:
                    log.close()
            judge(f"log {'rx' if queue == 0 else 'tx'}", gap, calm, watch)


async def test_stopping_a_queue_of_64_absent_chains(tmp_path: Path) -> None:
    """GET_VRING_BASE comes while a queue waits: it ends after the awaited page, with the truth."""
    count, guest = 64, Guest()
    try:
        await guest.fill()
        regions = guest.regions(guest.source)
        layout = guest.layout(16 * guest.page_size, slots=count)
        with trio.fail_after(60), Driver(guest.source, regions, layout, event_idx=True) as tx:
            await tx.reset()
            assert await tx.post(count, 900) == count
            async with bridge(tmp_path) as (backend, fars), moving(guest, backend) as m:
                await withhold(m, layout, "buffers")
                await m.start(1, tx)
                # They are asked for together, before the stop, and the pump waits for the first of them.
                await m.source.wait_withheld(count // 2)
                await until(lambda: "vpc-pump" in asleep_for_a_page(backend.process.pid))
                await backend.gap()
                base: list[int] = []

                async def stop() -> None:
                    base.append(await m.front.get_vring_base(1, timeout=30))

                async with trio.open_nursery() as nursery:
                    nursery.start_soon(stop)
                    await trio.sleep(1)
                    gap = await backend.gap()
                    assert not base, "answered although a touch of the ring's memory was under way"
                    await m.source.release("high.ram")
                # Only the first was waited for, for the sake of the stop.
                assert base[0] < count
                await until(lambda: fars[0].numbers().frames == base[0])
                used = os.pread(guest.ram["low.ram"].fd, 2, layout.used + 2)
                assert int.from_bytes(used, "little") == base[0]
                # Where it was stopped it goes on: nothing is lost, nothing is sent twice.
                await start_ring(m.front, m.memory, 1, tx, base=base[0])
                await m.finish()
                await reap_until(tx, count)
                await until(lambda: fars[0].numbers().frames == count)
                assert fars[0].numbers().duplicates == 0
        assert gap < 1
    finally:
        guest.close()
