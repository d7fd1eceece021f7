"""Whole moves to a back-end that never faults: pages come in the background, and no page is made that nobody sent.

Each end is a process of its own. The front-end would serve a fault; it is to see none.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from tests.kit.rig import HIGH, Guest, backend_child, far_side, moving
from tests.kit.until import until
from vhostpc.frontend import Driver, Mode

pytestmark = pytest.mark.ufd
FRAMES = 16
HUGE = 2 << 20


def check_memory(guest: Guest, receives: Driver, sends: Driver) -> None:
    """All of memory is as at the source, but for what the devices and the drivers write."""
    p = guest.page_size
    written = {"low.ram": set[int](), "high.ram": set[int]()}
    for driver in (receives, sends):
        layout = driver.layout
        written["low.ram"] |= {layout.avail // p, layout.used // p}
        if driver is receives:
            first, size = layout.buffers - HIGH, layout.slots * layout.buffer_stride
            written["high.ram"] |= set(range(first // p, (first + size - 1) // p + 1))
    for block, ours, theirs in zip(
        guest.ram.blocks, guest.bytes_of(guest.ram), guest.bytes_of(guest.source), strict=True
    ):
        different = {
            i for i in range(len(ours) // p) if ours[i * p : (i + 1) * p] != theirs[i * p : (i + 1) * p]
        }
        assert different <= written[block.name], (block.name, different - written[block.name])


@pytest.mark.parametrize("mode", list(Mode))
@pytest.mark.parametrize("pages", ["4k", "2M"])
@pytest.mark.parametrize("device", ["bridge", "echo"])
async def test_move(
    tmp_path: Path, device: str, pages: str, mode: Mode, request: pytest.FixtureRequest
) -> None:
    if pages == "2M":
        request.getfixturevalue("huge_pages")
    guest = Guest() if pages == "4k" else Guest(page_size=HUGE, low=8, high=4)
    try:
        with trio.fail_after(60):
            async with (
                far_side(echo=True) as (far, address),
                backend_child(tmp_path, device=device, far=[address], no_fault=True) as backend,
            ):
                await guest.fill()
                regions = guest.regions(guest.source)
                rx_at = guest.layout(0, slots=FRAMES)
                tx_at = guest.layout(4 * guest.page_size, slots=FRAMES, indirect=device == "bridge", parts=2)
                with (
                    Driver(guest.source, regions, rx_at, receive=True, event_idx=True) as rx,
                    Driver(guest.source, regions, tx_at, event_idx=True) as tx,
                ):
                    for driver in (rx, tx):
                        await driver.reset()
                        assert await driver.post(FRAMES) == FRAMES
                    async with moving(guest, backend, mode=mode) as m:
                        await m.start(0, rx)
                        await m.start(1, tx)
                        await m.front.barrier()
                        client = m.postcopy.client
                        assert client is not None
                        numbers = await m.rest()
                        await until(lambda: "registered" in backend.log())
                        while min(d.numbers().completed for d in (rx, tx)) < FRAMES:
                            await rx.reap()
                            await tx.reap()
                            await trio.sleep(0.002)
                        await m.postcopy.end()
                        assert client.numbers().faults == 0
                        assert numbers.already == 0  # each page was placed: none had been made by anybody
                        assert numbers.placed == sum(b.pages for b in guest.ram.blocks)
                        if device == "bridge":
                            assert far.numbers().frames == FRAMES
                            got = rx.numbers().received
                            assert (got.frames, got.bad, got.duplicates) == (FRAMES, 0, 0)
                        check_memory(guest, rx, tx)
                await until(lambda: "postcopy ended" in backend.log())
                assert "postcopy without faults" in backend.log()
                assert " 0 touches waited" not in backend.log()
    finally:
        guest.close()
