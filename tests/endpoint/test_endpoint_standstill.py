"""A machine of our own around a standstill: the look that goes on beside its stop, what it touches first, RESUME."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import trio
import trio.testing

from tests.kit.fake_backend import listening
from tests.kit.until import until
from tests.migration.test_migration_interleavings import Here, Told, World
from vhostpc.endpoint import Endpoint
from vhostpc.errors import MigrationRefused, UfdError
from vhostpc.guest.own_machine import Block, OwnMachine, Spec, open_machine
from vhostpc.guest.side_by_side import side_by_side
from vhostpc.migration.machine import nobody
from vhostpc.migration.options import Options
from vhostpc.pages.dirty import DirtyTracker
from vhostpc.pages.ramblock import Bits
from vhostpc.units import TARGET_PAGE

pytestmark = pytest.mark.ufd
MIB = 1 << 20
ALONE = Spec([Block("ram", 4 * MIB)], vcpus=2, writes=5000)


async def runs_on(machine: OwnMachine) -> None:
    before = [vcpu.numbers().step for vcpu in machine.vcpus]
    await until(lambda: all(v.numbers().step > b + 50 for v, b in zip(machine.vcpus, before, strict=True)))


async def test_the_last_look_finds_every_write_before_the_stop() -> None:
    async with open_machine(ALONE) as machine:
        block = machine.ram["ram"]
        await machine.cont()
        await machine.start_tracking()
        for _ in range(3):
            await machine.stop()
            await machine.sync_dirty()
            block.set_bits(Bits.DIRTY, value=False)
            before = await block.read(0, block.length)
            await machine.cont()
            await runs_on(machine)
            await machine.stop()
            found = await machine.sync_dirty()
            after = await block.read(0, block.length)
            changed = {
                page
                for page in range(block.pages)
                if before[page * TARGET_PAGE : (page + 1) * TARGET_PAGE]
                != after[page * TARGET_PAGE : (page + 1) * TARGET_PAGE]
            }
            assert len(changed) >= 100
            assert {page for page in range(block.pages) if block.test_bit(Bits.DIRTY, page)} == changed
            assert found == len(changed)
            assert await machine.sync_dirty() == 0
        await machine.stop_tracking()


async def test_a_look_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the error of who asks for its result, not of the stop; and nobody's once the machine runs again."""
    sync = DirtyTracker.sync

    async def fail(tracker: DirtyTracker) -> int:
        raise UfdError("dirty tracking does not run", 0)

    async with open_machine(ALONE) as machine:
        await machine.cont()
        await machine.start_tracking()
        monkeypatch.setattr(DirtyTracker, "sync", fail)
        await machine.stop()
        with pytest.raises(UfdError, match="does not run"):
            await machine.sync_dirty()
        await machine.cont()
        await machine.stop()
        monkeypatch.setattr(DirtyTracker, "sync", sync)
        await machine.cont()
        await runs_on(machine)
        await machine.stop()
        assert await machine.sync_dirty() > 0
        await machine.stop()
        await machine.stop_tracking()


async def test_tracking_ends_behind_a_look(monkeypatch: pytest.MonkeyPatch) -> None:
    sync, go = DirtyTracker.sync, trio.Event()

    async def slow(tracker: DirtyTracker) -> int:
        await go.wait()
        return await sync(tracker)

    async with open_machine(ALONE) as machine, trio.open_nursery() as nursery:
        await machine.cont()
        await machine.start_tracking()
        monkeypatch.setattr(DirtyTracker, "sync", slow)
        await machine.stop()  # it does not wait for it
        tracker = machine.tracker
        assert tracker is not None
        nursery.start_soon(machine.stop_tracking)
        await trio.testing.wait_all_tasks_blocked()
        assert not tracker.closed
        go.set()
        await until(lambda: tracker.closed)


async def test_what_a_vcpu_touches_first_is_what_it_rewrites() -> None:
    async with open_machine(Spec([Block("ram", MIB)], vcpus=2, writes=200, checks=0)) as machine:
        first = machine.first()
        assert len(first) == 2
        before = [await block.read(offset, TARGET_PAGE) for block, offset in first]
        assert before == [await block.read(offset, TARGET_PAGE) for block, offset in machine.first()]
        await machine.cont()
        with pytest.raises(OSError, match="vCPU 0"):
            machine.first()
        await until(lambda: all(vcpu.numbers().step for vcpu in machine.vcpus))
        await machine.stop()
        assert all(
            [
                await block.read(offset, TARGET_PAGE) != was
                for (block, offset), was in zip(first, before, strict=True)
            ]
        )


async def test_what_a_device_touches_first_are_its_rings(tmp_path: Path) -> None:
    path = tmp_path / "net0"
    with trio.fail_after(60):
        async with (
            listening(path, lambda frame: None),
            open_machine(Spec([Block("ram", 16 * MIB)], backends=[str(path)])) as machine,
        ):
            device = machine.devices[0]
            offsets = [offset for _, offset in device.first()]
            layouts = device._layouts
    assert offsets == [at for ring in layouts for at in (ring.used, ring.avail, ring.desc)]
    assert len({offset // TARGET_PAGE for offset in offsets}) == 6


@pytest.mark.parametrize("fails", [False, True])
async def test_resume_is_told_when_vcpus_run(fails: bool) -> None:
    """Not behind back-ends that start slowly; and a start that fails behind it is a stop."""
    events: list[list[str]] = []

    class Starts(Here):
        async def cont(self, runs: Callable[[], None] = nobody) -> None:
            await super().cont()
            runs()
            events.append(list(told.events))
            if fails:
                self.running = False
                raise MigrationRefused("no")

    told = Told()
    world = World()
    with Starts(world) as here:
        endpoint = Endpoint(here, Options("10.0"), told)
        await endpoint.stop()
        told.events.clear()
        if fails:
            with pytest.raises(MigrationRefused):
                await endpoint.cont()
        else:
            await endpoint.cont()
    assert events == [["RESUME"]]
    assert told.events == (["RESUME", "STOP"] if fails else ["RESUME"])


async def test_one_of_several_fails() -> None:
    """No other is broken off; the first error is that of all."""
    done: list[int] = []
    go = trio.Event()

    async def call(number: int) -> int:
        if number == 1:
            raise ValueError("one")
        await go.wait()
        done.append(number)
        return number

    async with trio.open_nursery() as nursery:

        async def all_of_them() -> None:
            with pytest.raises(ValueError, match="one"):
                await side_by_side((lambda n=n: call(n)) for n in range(3))  # type: ignore[misc]

        nursery.start_soon(all_of_them)
        await trio.testing.wait_all_tasks_blocked()
        go.set()
    assert sorted(done) == [0, 2]
    assert await side_by_side((lambda n=n: call(n)) for n in (0, 2)) == [0, 2]  # type: ignore[misc]
