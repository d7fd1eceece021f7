"""Kicks that bring no work: a counter that does not empty must not keep a core busy."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from tests.backend.test_backend_bridge import Far, far, frame, post_buffers, put_frames
from tests.kit.hostile import Net
from tests.kit.raw_front_end import Guest, connected
from vhostpc.virtio.ring import CALM, VAIN

__all__ = ["far"]

#: Whether a ring is served in Python, by a pump out or by a pump in.
SIDES = ["chains", "out", "in"]
COUNT = 1 << 31


@pytest.fixture
def guest() -> Iterator[Guest]:
    guest = Guest(4 << 20)
    yield guest
    guest.close()


def kicks_left(fd: int) -> int:
    found = re.search(r"^eventfd-count:\s*([0-9a-f]+)$", Path(f"/proc/self/fdinfo/{fd}").read_text(), re.M)
    assert found is not None
    return int(found[1], 16)


@pytest.mark.parametrize("side", SIDES)
async def test_a_semaphore_as_kick(guest: Guest, far: Far, side: str) -> None:
    """EFD_SEMAPHORE: each read takes one from a huge count. The ring is served; between times it is left alone."""
    ring = guest.ring(0 if side != "out" else 1, 64)
    os.close(ring.kick)
    ring.kick = os.eventfd(COUNT, os.EFD_CLOEXEC | os.EFD_NONBLOCK | os.EFD_SEMAPHORE)
    device = Net() if side == "chains" else far.bridge
    async with connected(device) as front:
        await front.negotiate()
        await guest.send_memory(front)
        await ring.send_setup(front)
        for turn in range(3):
            # So many that all but a few of them found a ring that is left alone.
            began, before = trio.current_time(), kicks_left(ring.kick)
            while (taken := before - kicks_left(ring.kick)) < 60:
                await trio.sleep(CALM)
            # What is read at once is a few each time that there is something to do.
            allowed = 2 * VAIN + 4 + (trio.current_time() - began + CALM) / CALM
            assert taken <= allowed, (turn, taken, allowed)
            if side == "chains":
                ring.set_desc(0, guest.put(0x80000, b"x"), 1)
                ring.offer(0)
            elif side == "out":
                ring.offer(*put_frames(guest, [frame(turn, 60)]))
            else:
                post_buffers(guest, 1, 4096)
                far.send(frame(turn, 60))
            await ring.until_used(turn + 1)
