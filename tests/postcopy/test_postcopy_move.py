"""Our front-end and page source with our own back-end, each in its process, through whole postcopy moves."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from tests.kit.rig import Guest, backend_child, far_side, moving
from tests.kit.until import until
from vhostpc.frontend import Driver, Mode
from vhostpc.wire.vhost_user import Feature, Request

pytestmark = pytest.mark.ufd
FRAMES = 16


@pytest.fixture
def guest() -> Iterator[Guest]:
    guest = Guest()
    yield guest
    guest.close()


async def check_move(
    tmp_path: Path,
    guest: Guest,
    mode: Mode,
    *,
    ack: Request | None = None,
    indirect: int = 0,
    event: bool = True,
) -> None:
    """Frames that the guest had queued before it moved go out and come back, page by page."""
    hide = 0 if event else Feature.EVENT_IDX
    async with far_side(echo=True) as (far, address):
        async with backend_child(tmp_path, device="bridge", far=[address]) as backend:
            await guest.fill()
            p = guest.page_size
            tx_at = guest.layout(0, slots=FRAMES, indirect=indirect, parts=2)
            rx_at = guest.layout(4 * p, slots=FRAMES, indirect=indirect)
            regions = guest.regions(guest.source)
            with (
                Driver(guest.source, regions, tx_at, event_idx=event) as tx,
                Driver(guest.source, regions, rx_at, receive=True, event_idx=event) as rx,
            ):
                for driver in (tx, rx):
                    await driver.reset()
                    assert await driver.post(FRAMES, 1000) == FRAMES
                async with moving(guest, backend, mode=mode, ack=ack, hide_features=hide) as m:
                    await m.start(0, rx)
                    await m.start(1, tx)
                    async with trio.open_nursery() as nursery:

                        async def drive(driver: Driver) -> None:
                            while driver.numbers().completed < FRAMES:
                                await driver.reap()
                                await trio.sleep(0.005)

                        nursery.start_soon(drive, tx)
                        nursery.start_soon(drive, rx)
                    assert far.numbers().frames == far.echoed == FRAMES
                    assert far.numbers().bad == far.numbers().duplicates == 0
                    got = rx.numbers().received
                    assert (got.frames, got.bad, got.duplicates) == (FRAMES, 0, 0)
                    client = m.postcopy.client
                    assert client is not None
                    # At least the ring parts and the buffers of both rings were missing and were met.
                    assert client.numbers().distinct >= 2 * 3 + 2 * FRAMES * 1000 // 65536
                    assert client.numbers().found_nothing == 0
                    numbers = await m.finish()
                    # Ring parts that the driver touched itself came too: each page once.
                    assert numbers.placed == sum(b.pages for b in guest.ram.blocks)
                    assert numbers.already == 0
                    assert client.numbers().faults == client.numbers().wakes
                    # After END the same session goes on, calm.
                    await tx.run(50, 500)
                    await until(lambda: far.numbers().frames == FRAMES + 50)
                assert await backend.ask("state")


@pytest.mark.parametrize("mode", list(Mode))
@pytest.mark.parametrize("indirect", [0, 1])
async def test_move(tmp_path: Path, guest: Guest, mode: Mode, indirect: int) -> None:
    with trio.fail_after(60):
        await check_move(tmp_path, guest, mode, indirect=indirect)


async def test_move_without_event_index(tmp_path: Path, guest: Guest) -> None:
    with trio.fail_after(60):
        await check_move(tmp_path, guest, Mode.SLOTS, event=False)


@pytest.mark.parametrize("mode", list(Mode))
@pytest.mark.parametrize(
    "ack", [Request.NONE, Request.SET_MEM_TABLE, Request.ADD_MEM_REG, Request.REM_MEM_REG]
)
async def test_every_form_of_the_last_step(tmp_path: Path, guest: Guest, mode: Mode, ack: Request) -> None:
    with trio.fail_after(60):
        await check_move(tmp_path, guest, mode, ack=ack)
