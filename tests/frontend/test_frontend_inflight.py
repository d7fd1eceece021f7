"""Our front-end keeps the inflight region of a back-end that is killed, and hands it to the next one."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from tests.kit.rig import BackendChild, Guest
from tests.kit.until import until
from vhostpc.errors import RemoteProtocolError
from vhostpc.frontend import Driver, FrontEnd, MemoryShare, connect, over, start_ring, stop_ring
from vhostpc.frontend.client import KNOWN_PROTOCOL_FEATURES
from vhostpc.transport import MessageSocket
from vhostpc.wire.vhost_user import FLAG_REPLY, Inflight, ProtocolFeature, Request, encode

WITH_REGION = KNOWN_PROTOCOL_FEATURES | ProtocolFeature.INFLIGHT_SHMFD
NUM = 64


@pytest.fixture
def guest() -> Iterator[Guest]:
    guest = Guest()
    yield guest
    guest.close()


@asynccontextmanager
async def connected(path: Path, guest: Guest) -> AsyncIterator[tuple[FrontEnd, MemoryShare]]:
    async with connect(path) as front:
        await front.negotiate(protocol=WITH_REGION)
        memory = MemoryShare(front, guest.regions(guest.source))
        await memory.share()
        yield front, memory


KILLS = 6


async def test_killed_again_and_again(guest: Guest, tmp_path: Path) -> None:
    """The device answers in any order and is killed with requests in flight: each comes back once, whole."""
    await guest.fill()
    region: tuple[Inflight, int] | None = None
    layout = guest.layout(0, num=NUM, slots=NUM // 4, buffer_len=512, answer_len=256)
    with Driver(guest.source, guest.regions(guest.source), layout, header=0) as driver:
        await driver.reset()
        for turn in range(KILLS + 1):
            child = BackendChild(tmp_path, {"device": "shuffle"}, f"b{turn}")
            try:
                await child.answer()
                async with connected(child.path, guest) as (front, memory):
                    if region is None:
                        region = await front.get_inflight_fd(2, NUM)
                    assert region is not None
                    await front.set_inflight_fd(*region)
                    await start_ring(front, memory, 0, driver)
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(driver.run, 0, 200)
                        enough = driver.numbers().completed + 300
                        await until(lambda n=enough: driver.numbers().completed > n)  # type: ignore[misc]
                        if turn < KILLS:
                            child.process.kill()
                            await front.closed.wait()
                        nursery.cancel_scope.cancel()
                    if turn == KILLS:
                        await finish(front, driver)
                        assert child.process.poll() is None, child.log()
            finally:
                child.end()
                await trio.aclose_forcefully(child.control)
    assert region is not None
    os.close(region[1])


async def finish(front: FrontEnd, driver: Driver) -> None:
    """Frames in flight arrive, and then nothing was lost, doubled or damaged."""
    with trio.fail_after(10):
        while driver.numbers().in_flight:
            await driver.reap()
    numbers = driver.numbers()
    assert await stop_ring(front, 0) == numbers.used_index == numbers.avail_index
    assert numbers.bad_used == 0
    assert numbers.completed == numbers.posted
    assert (numbers.received.bad, numbers.received.duplicates) == (0, 0)
    assert numbers.received.frames == numbers.posted
    assert numbers.received.reordered > 0


@pytest.mark.parametrize(
    ("told", "descriptors", "words"),
    [
        (Inflight(0, 0, 1, 8), 0, None),
        (Inflight(4096, 0, 1, 8), 0, "4096 bytes and 0"),
        (Inflight(0, 0, 1, 8), 1, None),
    ],
)
async def test_a_back_end_that_makes_none(told: Inflight, descriptors: int, words: str | None) -> None:
    ours, theirs = trio.socket.socketpair()
    async with over(ours) as front, trio.open_nursery() as nursery:

        async def answer() -> None:
            stream = MessageSocket(theirs)
            frame = await stream.receive()
            assert frame is not None
            assert frame.payload == Inflight(0, 0, 1, 8).pack()
            fds = [theirs.fileno()] * descriptors
            await stream.send(encode(Request.GET_INFLIGHT_FD, told.pack(), flags=FLAG_REPLY), fds)
            stream.close()

        nursery.start_soon(answer)
        before = len(os.listdir("/proc/self/fd"))
        if words is None:
            assert await front.get_inflight_fd(1, 8) is None
        else:
            with pytest.raises(RemoteProtocolError, match=words):
                await front.get_inflight_fd(1, 8)
        assert len(os.listdir("/proc/self/fd")) <= before
