"""What a front-end may repeat or leave out in postcopy; huge pages; one back-end through several moves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import trio

from tests.kit.hugepages import GIB, HUGE, hugepages
from tests.kit.rig import SEED, BackendChild, Guest, Move, backend_child, far_side, moving
from tests.kit.until import until
from vhostpc.errors import PostcopyRefused, RequestFailed
from vhostpc.frontend import Driver, FarSide, MemoryShare, Mode, connect, start_ring, stop_ring
from vhostpc.wire.vhost_user import FLAG_NEED_REPLY, Feature, ProtocolFeature, Request

pytestmark = pytest.mark.ufd
FRAMES = 12


@pytest.fixture
def guest() -> Iterator[Guest]:
    guest = Guest()
    yield guest
    guest.close()


async def queue(guest: Guest, driver: Driver) -> None:
    await guest.fill()
    await driver.reset()
    assert await driver.post(FRAMES, 800) == FRAMES


async def sent(far: FarSide, driver: Driver, count: int) -> None:
    """All frames came out, each once, and the guest has its buffers back."""
    await until(lambda: far.numbers().frames == count)
    with trio.fail_after(20):
        while driver.numbers().completed < count:
            await driver.reap()
            await trio.sleep(0.002)
    assert (far.numbers().bad, far.numbers().duplicates) == (0, 0)


@pytest.mark.parametrize("mode", list(Mode))
async def test_everything_twice(tmp_path: Path, guest: Guest, mode: Mode) -> None:
    """ADVISE, LISTEN, the exchange and END come again, as with several queue pairs and stop and continue."""
    with trio.fail_after(60):
        async with far_side(echo=False) as (far, address):
            async with backend_child(tmp_path, device="bridge", far=[address]) as backend:
                layout = guest.layout(0, slots=FRAMES)
                with Driver(guest.source, guest.regions(guest.source), layout, event_idx=True) as tx:
                    await queue(guest, tx)
                    async with moving(guest, backend, mode=mode, exchange=False) as m:
                        await m.postcopy.advise()  # the last one counts
                        await m.postcopy.listen()
                        await m.postcopy.share(m.memory)
                        await m.postcopy.share(m.memory)
                        await m.start(1, tx)
                        await sent(far, tx, FRAMES)
                        # Stop and continue in the middle: the ring goes on where it was.
                        base = await stop_ring(m.front, 1)
                        assert base == FRAMES
                        await m.postcopy.share(m.memory)
                        await start_ring(m.front, m.memory, 1, tx, base=base)
                        await tx.run(FRAMES, 800)
                        await sent(far, tx, 2 * FRAMES)
                        assert m.postcopy.client is not None
                        assert m.postcopy.client.numbers().found_nothing == 0
                        await m.rest()
                        await m.postcopy.end()
                        await m.front.ask_u64(Request.POSTCOPY_END, flags=FLAG_NEED_REPLY)
                        await tx.run(FRAMES, 800)
                        await sent(far, tx, 3 * FRAMES)
                assert "ERROR" not in backend.log()


async def test_memory_goes_and_comes_in_postcopy(tmp_path: Path, guest: Guest) -> None:
    """A slot that no ring uses is removed, and added again, while another queue works."""
    with trio.fail_after(60):
        async with far_side(echo=False) as (far, address):
            async with backend_child(tmp_path, device="bridge", far=[address]) as backend:
                layout = guest.layout(0, slots=FRAMES)
                with Driver(guest.source, guest.regions(guest.source), layout, event_idx=True) as tx:
                    await queue(guest, tx)
                    async with moving(guest, backend, mode=Mode.SLOTS) as m:
                        high = m.memory.regions.pop()
                        await m.postcopy.share(m.memory)  # removed: number 38
                        m.memory.regions.append(high)
                        await m.postcopy.share(m.memory)  # added: number 37
                        await m.postcopy.share(m.memory)  # nothing: number 0
                        await m.start(1, tx)
                        await sent(far, tx, FRAMES)
                        assert m.postcopy.client is not None
                        assert m.postcopy.client.numbers().found_nothing == 0
                        await m.finish()


async def test_precopy_that_ends_without_listen(tmp_path: Path, guest: Guest) -> None:
    """ADVISE, and then the guest simply starts: neither LISTEN nor END ever come."""
    with trio.fail_after(60):
        async with far_side(echo=False) as (far, address):
            async with backend_child(tmp_path, device="bridge", far=[address]) as backend:
                layout = guest.layout(0, slots=FRAMES)
                with Driver(guest.source, guest.regions(guest.source), layout, event_idx=True) as tx:
                    await queue(guest, tx)
                    async with connect(backend.path) as front:
                        await front.negotiate()
                        (await front.request(Request.POSTCOPY_ADVISE)).close_fds()
                        memory = MemoryShare(front, guest.regions(guest.source))
                        await memory.share()
                        await start_ring(front, memory, 1, tx)
                        await sent(far, tx, FRAMES)


async def test_listen_where_it_cannot_be(tmp_path: Path, guest: Guest) -> None:
    with trio.fail_after(60):
        async with far_side(echo=False) as (_, address):
            async with backend_child(tmp_path, device="bridge", far=[address]) as backend:
                async with connect(backend.path) as front:
                    await front.negotiate()
                    status = await front.ask_u64(Request.POSTCOPY_LISTEN, flags=FLAG_NEED_REPLY)
                    assert status != 0, "LISTEN without ADVISE"
                    await front.barrier()
                async with connect(backend.path) as front:
                    await front.negotiate()
                    await MemoryShare(front, guest.regions(guest.source)).share()
                    (await front.request(Request.POSTCOPY_ADVISE)).close_fds()
                    status = await front.ask_u64(Request.POSTCOPY_LISTEN, flags=FLAG_NEED_REPLY)
                    assert status != 0, "LISTEN with memory mapped before it"


async def test_hidden_postcopy(tmp_path: Path, guest: Guest) -> None:
    async with far_side(echo=False) as (_, address):
        async with backend_child(
            tmp_path, device="bridge", far=[address], hide_protocol=["PAGEFAULT"]
        ) as backend:
            refused = 0
            try:
                async with moving(guest, backend):
                    raise AssertionError("postcopy was begun")
            except* PostcopyRefused:
                refused = 1
            assert refused


async def move_once(backend: BackendChild, far: FarSide, frames_before: int, mode: Mode) -> None:
    guest = Guest()
    try:
        layout = guest.layout(0, slots=FRAMES)
        regions = guest.regions(guest.source)
        with Driver(guest.source, regions, layout, event_idx=True, stream=frames_before) as tx:
            await queue(guest, tx)
            async with moving(guest, backend, mode=mode) as m:
                await m.start(1, tx)
                with trio.fail_after(20):
                    while tx.numbers().completed < FRAMES:
                        await tx.reap()
                        await trio.sleep(0.002)
                loaded = await m.finish()
                assert loaded.already == 0
                assert (await guest.ram["high.ram"].verify(SEED, 200, 56)) == (0, None)
                await stop_ring(m.front, 1)
    finally:
        guest.close()


async def test_one_back_end_through_many_moves(tmp_path: Path) -> None:
    """The process is reused; it keeps no descriptor and no mapping of a session that has ended."""
    with trio.fail_after(120):
        async with far_side(echo=False) as (far, address):
            async with backend_child(tmp_path, device="bridge", far=[address]) as backend:
                for mode in (Mode.TABLE, Mode.SLOTS):
                    await move_once(backend, far, 0, mode)
                await until(lambda: backend.log().count("disconnected") == 2)
                before = await backend.ask("state")
                for i in range(8):
                    await move_once(backend, far, 0, list(Mode)[i % 2])
                await until(lambda: backend.log().count("disconnected") == 10)
                after = await backend.ask("state")
                assert after["fds"] == before["fds"]
                # Thread stacks come and go in the C library's cache.
                assert after["maps"] <= before["maps"] + 16


@pytest.mark.parametrize("mode", list(Mode))
async def test_huge_pages(tmp_path: Path, mode: Mode, huge_pages: int) -> None:
    """Whole 2 MiB pages: each is asked for once, placed whole, and wakes every thread that waits in it."""
    guest = Guest(page_size=HUGE, low=8, high=4)
    try:
        with trio.fail_after(90):
            async with far_side(echo=True) as (far, address):
                async with backend_child(tmp_path, device="bridge", far=[address]) as backend:
                    regions = guest.regions(guest.source)
                    with (
                        Driver(
                            guest.source, regions, guest.layout(0, slots=FRAMES, indirect=1), event_idx=True
                        ) as tx,
                        Driver(
                            guest.source,
                            regions,
                            guest.layout(4 * HUGE, slots=FRAMES),
                            event_idx=True,
                            receive=True,
                        ) as rx,
                    ):
                        await queue(guest, tx)
                        await rx.reset()
                        await rx.post(FRAMES)
                        async with moving(guest, backend, mode=mode) as m:
                            before = m.service.numbers().requests
                            await m.start(0, rx)
                            await until(lambda: m.service.numbers().requests > before)
                            await m.start(1, tx)
                            await sent(far, tx, FRAMES)
                            with trio.fail_after(20):
                                while rx.numbers().completed < FRAMES:
                                    await rx.reap()
                                    await trio.sleep(0.002)
                            got = rx.numbers().received
                            assert (got.frames, got.bad, got.duplicates) == (FRAMES, 0, 0)
                            loaded = await m.finish()
                            assert (loaded.placed, loaded.already) == (12, 0)
                            assert (await guest.ram["high.ram"].verify(SEED, 3 * 512, 512)) == (0, None)
    finally:
        guest.close()


@pytest.mark.parametrize("size", [HUGE, GIB], ids=["2 MiB", "1 GiB"])
async def test_huge_pages_beside_small_ones(tmp_path: Path, size: int) -> None:
    """Rings in pages of 4 KiB, all frames in one huge page: it comes once, and all who wait in it go on."""
    with hugepages(2 * size >> 20, size), closing(Guest(low=64, high=1, high_page=size)) as guest:
        with trio.fail_after(120):
            async with (
                far_side(echo=False) as (far, address),
                backend_child(tmp_path, device="bridge", far=[address]) as backend,
            ):
                regions = guest.regions(guest.source)
                with Driver(guest.source, regions, guest.layout(0, slots=FRAMES), event_idx=True) as tx:
                    await queue(guest, tx)
                    async with moving(guest, backend) as m:
                        await m.start(1, tx)
                        await sent(far, tx, FRAMES)
                        loaded = await m.finish()
                        assert (loaded.placed, loaded.already) == (64 + 1, 0)
                        last = size // 4096 - 256  # behind the frames
                        assert (await guest.ram["high.ram"].verify(SEED, last, 256)) == (0, None)


async def test_requests_between_the_steps(tmp_path: Path, guest: Guest) -> None:
    """Messages that touch no memory are answered between the steps of an exchange."""
    with trio.fail_after(60):
        async with far_side(echo=False) as (far, address):
            async with backend_child(tmp_path, device="bridge", far=[address]) as backend:
                layout = guest.layout(0, slots=FRAMES)
                with Driver(guest.source, guest.regions(guest.source), layout, event_idx=True) as tx:
                    await queue(guest, tx)
                    async with moving(guest, backend, exchange=False) as m:

                        async def share() -> None:
                            await ask_in_between(m)
                            await m.postcopy.share(m.memory)

                        await share()
                        await m.start(1, tx)
                        await share()
                        await sent(far, tx, FRAMES)
                        await m.finish()


async def ask_in_between(m: Move) -> None:
    await m.front.barrier()
    await m.front.set_features(m.front.features & ~Feature.LOG_ALL)
    if ProtocolFeature.STATUS in m.front.protocol_features:
        await m.front.get_status()
    with pytest.raises(RequestFailed):
        await m.front.tell(Request.GPU_SET_SOCKET)  # declined, and the session goes on
