"""Our front-end and page source with DPDK's net_vhost, the other back-end that lives through postcopy.

It runs without locked memory: mlockall would create the pages that postcopy has to bring.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
import trio

from tests.kit.rig import Guest, Move, moving
from tests.kit.until import until
from tests.peers.dpdk import Testpmd, needs_dpdk, net_vhost
from vhostpc.errors import PeerClosed, PostcopyRefused
from vhostpc.frontend import BackendPostcopy, Driver, Mode, connect, stop_ring
from vhostpc.pages.ramblock import RamSet
from vhostpc.pages.service import FaultService
from vhostpc.wire.vhost_user import Feature, ProtocolFeature

pytestmark = [pytest.mark.dpdk, pytest.mark.ufd]
FRAMES = 16
LIMIT = 60


@pytest.fixture(autouse=True)
def dpdk() -> None:
    needs_dpdk()


@pytest.fixture
def guest() -> Iterator[Guest]:
    guest = Guest()
    yield guest
    guest.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "vhost.sock"


@asynccontextmanager
async def echo_port(path: Path, options: str = "postcopy-support=1") -> AsyncIterator[Testpmd]:
    """A back-end that sends each frame of the guest back to it, unchanged."""
    async with net_vhost(path, forward="io", options=options) as testpmd:
        await testpmd.start()
        yield testpmd


async def driver_ok(m: Move) -> None:
    """With STATUS negotiated DPDK runs no queue before the driver says that it is ready."""
    assert ProtocolFeature.STATUS in m.front.protocol_features
    await m.front.set_status(0xF)


async def drain(driver: Driver, count: int) -> None:
    """Reap until the device has done ``count`` chains. The device may wait for pages meanwhile."""
    while driver.numbers().completed < count:
        await driver.reap()
        await trio.sleep(0.005)


async def check_move(path: Path, guest: Guest, *, indirect: int = 0, rate: int = 0) -> None:
    await guest.fill()
    page = guest.page_size
    regions = guest.regions(guest.source)
    tx_at = guest.layout(0, slots=FRAMES, indirect=indirect, parts=2)
    rx_at = guest.layout(4 * page, slots=FRAMES, indirect=0)
    with (
        Driver(guest.source, regions, tx_at) as tx,
        Driver(guest.source, regions, rx_at, receive=True) as rx,
    ):
        for driver in (tx, rx):
            await driver.reset()
            assert await driver.post(FRAMES, 1000) == FRAMES
        async with moving(guest, path, mode=Mode.TABLE, rate=rate, hide_features=Feature.EVENT_IDX) as m:
            assert m.postcopy.client is not None
            assert ProtocolFeature.CONFIGURE_MEM_SLOTS not in m.front.protocol_features
            await m.start(0, rx)
            await m.start(1, tx)
            await driver_ok(m)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(drain, tx, FRAMES)
                nursery.start_soon(drain, rx, FRAMES)
            check_received(rx, FRAMES)
            client = m.postcopy.client.numbers()
            assert client.distinct >= 3 + 2 * FRAMES * 1000 // 65536
            assert client.found_nothing == client.error == 0
            numbers = await m.finish()
            assert numbers.placed == sum(block.pages for block in guest.ram.blocks)
            assert numbers.already == 0
            await after_the_end(m, tx, rx)


def check_received(rx: Driver, count: int) -> None:
    got = rx.numbers().received
    assert (got.frames, got.bad, got.duplicates) == (count, 0, 0)
    assert rx.numbers().bad_used == 0


async def after_the_end(m: Move, tx: Driver, rx: Driver) -> None:
    """The same session goes on with all memory there; then its rings stop where they stand."""
    assert await rx.post(FRAMES) == FRAMES
    await tx.run(FRAMES, 500)
    await drain(rx, 2 * FRAMES)
    check_received(rx, 2 * FRAMES)
    assert await stop_ring(m.front, 0) == 2 * FRAMES
    assert await stop_ring(m.front, 1) == 2 * FRAMES


@pytest.mark.parametrize("indirect", [1, 0], ids=["indirect", "chains"])
async def test_move(path: Path, guest: Guest, indirect: int) -> None:
    """Every page that DPDK touches comes on demand; frames queued before the move come back whole."""
    with trio.fail_after(LIMIT):
        async with echo_port(path):
            await check_move(path, guest, indirect=indirect)


async def test_move_while_pages_flow(path: Path, guest: Guest) -> None:
    """The source sends the rest in the background meanwhile: no page comes twice."""
    with trio.fail_after(LIMIT):
        async with echo_port(path):
            await check_move(path, guest, rate=2 << 20)


async def test_two_moves(path: Path) -> None:
    """The same testpmd takes one guest after the other."""
    with trio.fail_after(LIMIT):
        async with echo_port(path) as testpmd:
            for number in (1, 2):
                guest = Guest()
                try:
                    await check_move(path, guest)
                finally:
                    guest.close()
                await testpmd.child.until("(vhost peer closed.*)" * number)


async def test_back_end_that_dies_is_forgotten(path: Path, guest: Guest) -> None:
    """DPDK is killed while it waits for a page that is withheld: we notice, and our own memory is served."""
    await guest.fill()
    with trio.fail_after(LIMIT):
        async with net_vhost(path, forward="io") as testpmd:
            await testpmd.start()
            regions = guest.regions(guest.source)
            with Driver(guest.source, regions, guest.layout(0, slots=FRAMES)) as tx:
                await tx.reset()
                await tx.post(FRAMES, 1000)
                async with moving(guest, path, mode=Mode.TABLE, hide_features=Feature.EVENT_IDX) as m:
                    await m.source.withhold_all()
                    async with trio.open_nursery() as nursery:

                        async def start() -> None:
                            # DPDK looks into the ring while it handles the messages, so none that asks for
                            # an answer gets one.
                            with suppress(PeerClosed):
                                await m.start(1, tx)

                        nursery.start_soon(start)
                        await m.source.wait_withheld()
                        testpmd.child.process.kill()
                    client = m.postcopy.client
                    assert client is not None
                    await until(lambda: client.removed)
                    for block in guest.ram.blocks:
                        await m.source.release(block.name)
                    await m.source.withhold_all(False)
                    await m.source.set_rate(1 << 40)
                    await m.load_ended.wait()
                    assert m.service.missing() == 0


async def test_postcopy_is_refused_without_its_option(path: Path) -> None:
    """Without postcopy-support=1 DPDK does not offer it; asked all the same, we refuse with one sentence."""
    with trio.fail_after(LIMIT), RamSet() as ram:
        ram.create("ram", 1 << 20)
        async with echo_port(path, options=""):
            async with connect(path) as front:
                await front.negotiate()
                with FaultService(ram) as service:
                    with pytest.raises(PostcopyRefused, match="PAGEFAULT"):
                        await BackendPostcopy(front, service, name="net_vhost").advise()
