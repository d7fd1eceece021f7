"""The destination with two back-ends of other processes, ours and DPDK's: all meet the same pages, each comes once."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from tests.kit.migration_ends import LIMIT, Received, incoming_of, pair
from tests.kit.rig import HIGH, Guest, backend_child, far_side
from tests.kit.scripted_source import CLOCK, RAM, ScriptedSource
from tests.kit.until import until
from tests.peers.dpdk import needs_dpdk, net_vhost
from vhostpc.errors import PostcopyRefused
from vhostpc.frontend import (
    BackendPostcopy,
    Driver,
    FrontEnd,
    GuestRegion,
    MemoryShare,
    RingLayout,
    connect,
    start_ring,
)
from vhostpc.migration.channel import Channel
from vhostpc.migration.held import HeldMachine
from vhostpc.migration.phase import Event
from vhostpc.pages.pagesource import PageSource
from vhostpc.pages.ramblock import Bits
from vhostpc.pages.service import FaultService
from vhostpc.wire.migration.elements import EndOfStream, Footer, SectionEnd
from vhostpc.wire.migration.return_path import Pong, Shut
from vhostpc.wire.vhost_user import Feature, PostcopyPhase, ProtocolFeature

pytestmark = pytest.mark.ufd
FRAMES = 16


@pytest.fixture
def guest() -> Iterator[Guest]:
    guest = Guest()
    yield guest
    guest.close()


class Backed(HeldMachine):
    """A machine whose back-ends take part: told in postcopy, and given memory where it starts."""

    def __init__(self, fronts: dict[str, FrontEnd]) -> None:
        super().__init__()
        self.fronts = fronts
        self.backends: dict[str, BackendPostcopy] = {}

    async def advise(self, service: FaultService) -> None:
        for name, front in self.fronts.items():
            self.backends[name] = BackendPostcopy(front, service, name=name)
            await self.backends[name].advise()

    async def listen(self) -> None:
        for backend in self.backends.values():
            await backend.listen()

    async def end(self) -> None:
        for backend in self.backends.values():
            if backend.phase is PostcopyPhase.LISTENING:
                await backend.end()
            else:
                backend.forget()


async def pages_once(source: ScriptedSource, ram: PageSource) -> None:
    """The whole last section from a page source that is asked and goes on by itself; it reads the answers."""
    await source.send(SectionEnd(RAM).encode())
    ram.set_tail(Footer(RAM).encode() + EndOfStream().encode())
    await ram.serve()


@pytest.mark.dpdk
async def test_two_back_ends_and_a_local_toucher(tmp_path: Path, guest: Guest) -> None:
    """The frames of both rings lie in the same pages, withheld until all three wait for one of them."""
    needs_dpdk()
    await guest.fill()
    page = guest.page_size
    regions = guest.regions(guest.source)
    tx_at = guest.layout(0, slots=FRAMES)
    # Identical frames in the same buffers, from two rings.
    other_tx_at = dataclasses.replace(guest.layout(4 * page, slots=FRAMES), buffers=tx_at.buffers)
    rx_at = guest.layout(8 * page, slots=FRAMES)
    received = Received()
    ours, theirs = pair()
    with trio.fail_after(2 * LIMIT):
        async with (
            far_side(echo=False) as (far, address),
            backend_child(tmp_path, device="bridge", far=[address]) as bridge,
            net_vhost(tmp_path / "dpdk.sock", forward="io") as testpmd,
            connect(bridge.path) as bridge_front,
            connect(tmp_path / "dpdk.sock") as dpdk_front,
        ):
            await testpmd.start()
            fronts = {"bridge": bridge_front, "net_vhost": dpdk_front}
            for front in fronts.values():
                await front.negotiate(hide_features=Feature.EVENT_IDX)
            assert ProtocolFeature.STATUS in dpdk_front.protocol_features
            with (
                Backed(fronts) as machine,
                Driver(guest.source, regions, tx_at) as tx,
                Driver(guest.source, regions, other_tx_at) as other_tx,
                Driver(guest.source, regions, rx_at, receive=True) as rx,
                PageSource(guest.source, theirs, background_rate=1 << 20) as pages,
            ):
                for driver in (tx, other_tx, rx):
                    await driver.reset()
                    assert await driver.post(FRAMES, 1000) == FRAMES
                for block in guest.source.blocks:
                    block.set_bits(Bits.DIRTY)
                first = tx_at.buffers % (1 << 32) // page
                shared = FRAMES  # a page for each frame
                pages.withhold("high.ram", first, shared)

                async def start(postcopy: bool) -> None:
                    for name, rings in {"bridge": {1: tx}, "net_vhost": {0: rx, 1: other_tx}}.items():
                        memory = MemoryShare(fronts[name], guest.regions(machine.ram))
                        await machine.backends[name].share(memory)
                        for index, driver in rings.items():
                            driver.move(machine.ram)
                            await start_ring(fronts[name], memory, index, driver)
                    await dpdk_front.set_status(0xF)

                async with Channel(ours) as channel, theirs, trio.open_nursery() as nursery:
                    incoming = incoming_of(channel, machine, postcopy=True, report=received.report, run=start)
                    source = ScriptedSource(
                        theirs, {b.name: (b.pages, b.page_size) for b in guest.source.blocks}
                    )

                    async def touch() -> None:
                        """Reads what the back-ends read, the newest first."""
                        high = machine.ram["high.ram"]
                        for n in (0, *range(shared - 1, 0, -1)):
                            here = (first + n) * page
                            assert await high.read(here, page) == await guest.source["high.ram"].read(
                                here, page
                            )

                    nursery.start_soon(incoming.receive)
                    await source.switch()
                    nursery.start_soon(pages_once, source, pages)
                    await incoming.running()
                    nursery.start_soon(touch)

                    def all_wait() -> bool:
                        waiting = incoming.service.waiting()
                        shared_page = [w.client for w in waiting if (w.block, w.page) == ("high.ram", first)]
                        return len(set(shared_page)) == 3

                    await until(all_wait, what="three wait in the shared pages")
                    assert pages.numbers().withheld >= 1
                    pages.release("high.ram")
                    for driver in (tx, other_tx):
                        while driver.numbers().completed < FRAMES:
                            await driver.reap()
                            await trio.sleep(0.005)
                    while rx.numbers().completed < FRAMES:
                        await rx.reap()
                        await trio.sleep(0.005)
                    pages.set_rate(1 << 40)
                # Both ends are done: SHUT has ended the page source.
                assert received.events == [Event.PACKAGE, Event.FINISH]
                assert (
                    machine.backends["bridge"].phase
                    is machine.backends["net_vhost"].phase
                    is PostcopyPhase.ENDED
                )
                await until(lambda: far.numbers().frames == FRAMES)
                assert far.numbers().bad == far.numbers().duplicates == 0
                echoed = rx.numbers().received
                assert (echoed.frames, echoed.bad, echoed.duplicates) == (FRAMES, 0, 0)
                placed = incoming.loads()[-1]
                assert placed.placed == sum(block.pages for block in machine.ram.blocks)
                assert placed.already == 0
                for backend in machine.backends.values():
                    assert backend.client is not None
                    numbers = backend.client.numbers()
                    assert numbers.distinct >= 1  # the shared page; how many more depends on the order
                    assert numbers.found_nothing == numbers.error == 0
                    assert numbers.faults == numbers.wakes + numbers.repeated
                requests = incoming.service.numbers().requests
                assert requests == pages.numbers().requested_pages + pages.numbers().useless
                incoming.close()


async def test_precopy_after_all(tmp_path: Path) -> None:
    """A back-end that was told ADVISE only: its userfaultfd is let go, and it starts as if nothing had been."""
    received = Received()
    ours, theirs = pair()
    with trio.fail_after(LIMIT):
        async with (
            far_side(echo=False) as (far, address),
            backend_child(tmp_path, device="bridge", far=[address]) as backend,
            connect(backend.path) as front,
            Channel(ours) as channel,
            theirs,
            trio.open_nursery() as nursery,
        ):
            await front.negotiate()
            with Backed({"net0": front}) as machine:
                incoming = incoming_of(channel, machine, postcopy=True, report=received.report)
                source = ScriptedSource(theirs, {"low.ram": (64, 4096), "high.ram": (256, 4096)})
                nursery.start_soon(source.listen)
                nursery.start_soon(incoming.receive)
                await source.begin()
                await source.pages("low.ram", *((page, bytes(4096)) for page in range(64)))
                await source.pages("high.ram", *((page, bytes(4096)) for page in range(256)), last=True)
                await source.end([CLOCK])
                await source.heard(Shut(0))
                client = machine.backends["net0"].client
                assert client is not None
                assert client.removed
                low, high = machine.ram.blocks
                regions = [GuestRegion(0, low.length, low), GuestRegion(HIGH, high.length, high)]
                memory = MemoryShare(front, regions)
                with Driver(machine.ram, regions, RingLayout.contiguous_at(0)) as tx:
                    await tx.reset()
                    await memory.share()
                    await start_ring(front, memory, 1, tx)
                    await tx.run(50, 500)
                    await until(lambda: far.numbers().frames == 50)
                nursery.cancel_scope.cancel()
            incoming.close()
    assert received.events == [Event.FINISH]


async def test_a_back_end_that_knows_no_postcopy_is_named(tmp_path: Path) -> None:
    """At ADVISE: the source goes on by itself."""
    received = Received()
    ours, theirs = pair()
    with trio.fail_after(LIMIT):
        async with (
            backend_child(tmp_path, device="echo", hide_protocol=["PAGEFAULT"]) as backend,
            connect(backend.path) as front,
            Channel(ours) as channel,
            theirs,
            trio.open_nursery() as nursery,
        ):
            await front.negotiate()
            with Backed({"disk0": front}) as machine:
                incoming = incoming_of(channel, machine, postcopy=True, report=received.report)
                source = ScriptedSource(theirs, {"ram": (8, 4096)})
                nursery.start_soon(source.listen)
                nursery.start_soon(source.begin)
                with pytest.raises(PostcopyRefused, match="disk0 did not offer it"):
                    await incoming.receive()
                incoming.close()
            await until(lambda: source.closed)
    assert source.said == [Pong(1), Shut(1)]
    assert received.events == [Event.FAIL]
