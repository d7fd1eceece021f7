"""Postcopies in which QEMU loses a device or never ends, with our front-end in its place: every page compared."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest
import trio

from tests.kit.rig import Guest, Move, backend_child, far_side, moving
from tests.kit.until import until
from vhostpc.frontend import BackendPostcopy, Driver, MemoryShare, Mode, connect, start_ring

pytestmark = pytest.mark.ufd
FRAMES = 16


@pytest.fixture
def guest() -> Iterator[Guest]:
    guest = Guest()
    yield guest
    guest.close()


async def full_queues(guest: Guest, stack: ExitStack, count: int) -> list[Driver]:
    """As of net: even ones receive. All are full when the guest moves."""
    await guest.fill()
    drivers = []
    for index in range(count):
        layout = guest.layout(4 * guest.page_size * index, slots=FRAMES)
        drivers.append(
            stack.enter_context(
                Driver(guest.source, guest.regions(guest.source), layout, receive=index % 2 == 0)
            )
        )
        await drivers[-1].reset()
        assert await drivers[-1].post(FRAMES, 700) == FRAMES
    return drivers


async def done(drivers: Sequence[Driver]) -> None:
    with trio.fail_after(20):
        while min(driver.numbers().completed for driver in drivers) < FRAMES:
            for driver in drivers:
                await driver.reap()
            await trio.sleep(0.002)


async def finished(guest: Guest, m: Move, drivers: Sequence[Driver]) -> None:
    """Every page came once, and nobody had made one; every frame is whole."""
    numbers = await m.rest()
    assert numbers.already == 0
    assert numbers.placed == sum(block.pages for block in guest.ram.blocks)
    assert all(driver.numbers().bad_used == 0 for driver in drivers)
    for driver in drivers[::2]:
        got = driver.numbers().received
        assert (got.frames, got.bad, got.duplicates) == (FRAMES, 0, 0)


@pytest.mark.parametrize("mode", list(Mode))
async def test_two_queue_pairs(tmp_path: Path, guest: Guest, mode: Mode) -> None:
    """ADVISE, LISTEN and END for each pair as QEMU sends them, the memory once: each answer is the one asked for."""
    with trio.fail_after(60), ExitStack() as stack:
        async with (
            far_side(echo=True) as (first, first_address),
            far_side(echo=True) as (second, second_address),
            backend_child(tmp_path, device="bridge", far=[first_address, second_address]) as backend,
        ):
            drivers = await full_queues(guest, stack, 4)
            async with moving(guest, backend, mode=mode, exchange=False) as m:
                await m.postcopy.advise()
                await m.postcopy.listen()
                await m.postcopy.share(m.memory)
                for index, driver in enumerate(drivers):
                    await m.start(index, driver)
                await done(drivers)
                client = m.postcopy.client
                assert client is not None
                assert client.numbers().distinct >= 4 * 3
                await finished(guest, m, drivers)
                await m.postcopy.end()
                assert await m.front.get_vring_base(0) == FRAMES
            for far in (first, second):
                assert (far.numbers().frames, far.numbers().bad, far.numbers().duplicates) == (FRAMES, 0, 0)
            assert backend.log().count("postcopy advised") == 2


@pytest.mark.parametrize("mode", list(Mode))
async def test_a_device_plugged_in_between_advise_and_end(tmp_path: Path, guest: Guest, mode: Mode) -> None:
    """It is advised, told to listen and registered when it comes; its pages are asked for like all others."""
    with trio.fail_after(60), ExitStack() as stack:
        async with (
            far_side(echo=True) as (old_far, old_address),
            far_side(echo=True) as (new_far, new_address),
            backend_child(tmp_path, device="bridge", far=[old_address]) as old,
            backend_child(tmp_path, "plugged", device="bridge", far=[new_address]) as new,
        ):
            drivers = await full_queues(guest, stack, 4)
            async with moving(guest, old, mode=mode) as m:
                for index in (0, 1):
                    await m.start(index, drivers[index])
                await done(drivers[:2])
                async with connect(new.path) as front:
                    await front.negotiate()
                    memory = MemoryShare(front, guest.regions(guest.ram), mode)
                    postcopy = BackendPostcopy(front, m.service, name="plugged")
                    await postcopy.advise()
                    await postcopy.listen()
                    await postcopy.share(memory)
                    for index in (0, 1):
                        drivers[2 + index].move(guest.ram)
                        await start_ring(front, memory, index, drivers[2 + index], base=0)
                    await done(drivers)
                    assert postcopy.client is not None
                    assert postcopy.client.numbers().distinct >= 2 * 3
                    assert postcopy.client.numbers().found_nothing == 0
                    await finished(guest, m, drivers)
                    await m.postcopy.end()
                    await postcopy.end()
                    await until(lambda: "postcopy ended" in new.log())
            for far in (old_far, new_far):
                assert (far.numbers().frames, far.numbers().bad, far.numbers().duplicates) == (FRAMES, 0, 0)
