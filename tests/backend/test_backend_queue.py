"""A plain-Python device over a ring that is written by hand."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator

import pytest
import trio
import trio.testing

from tests.kit.raw_front_end import GUEST_BASE, INDIRECT, NEXT, WRITE, Guest, connected
from vhostpc.backend import Chain, Device, Queue
from vhostpc.backend.vring import GRACE
from vhostpc.wire import vhost_user as vu
from vhostpc.wire.vhost_user import Feature, Request


class Echo(Device):
    """Answers each chain with what it reads, reversed."""

    num_queues = 2

    async def handle_queue(self, queue: Queue) -> None:
        async for chain in queue:
            chain.write(chain.read()[::-1][: chain.writable])


@pytest.fixture
def guest() -> Iterator[Guest]:
    guest = Guest()
    yield guest
    guest.close()


@pytest.mark.parametrize(
    "hidden", [0, Feature.EVENT_IDX, Feature.INDIRECT_DESC, Feature.EVENT_IDX | Feature.INDIRECT_DESC]
)
async def test_echo(guest: Guest, hidden: int) -> None:
    ring = guest.ring(0, 4)
    async with connected(Echo()) as front:
        await front.negotiate(hide=hidden)
        await guest.send_memory(front)
        await ring.send_setup(front)
        for i in range(1, 40):  # round the ring many times
            text = b"request %d" % i
            ring.set_desc(0, guest.put(0x80000, text[:3]), 3, NEXT, 1)
            ring.set_desc(1, guest.put(0x81000, text[3:]), len(text) - 3, NEXT, 2)
            guest.put(0x82000, bytes(64))
            ring.set_desc(2, GUEST_BASE + 0x82000, 5, NEXT | WRITE, 3)
            ring.set_desc(3, GUEST_BASE + 0x82010, 32, WRITE)
            ring.offer(0)
            await ring.until_used(i)
            assert ring.used_element(i - 1) == (0, len(text))
            answer = guest.mem[0x82000:0x82005] + guest.mem[0x82010 : 0x82010 + len(text) - 5]
            assert answer == text[::-1]
        base = await front.ask(Request.GET_VRING_BASE, vu.VringState(0, 0).pack())
        assert vu.VringState.unpack(base.payload) == vu.VringState(0, 39)


async def test_indirect_table_across_regions(guest: Guest) -> None:
    """Two regions that touch in guest addresses only; the table crosses from one to the other."""
    ring = guest.ring(0, 4)
    half = guest.size // 2
    async with connected(Echo()) as front:
        await front.negotiate()
        table = [
            vu.MemoryRegion(GUEST_BASE + half, half, 0x5000_0000_0000, half),
            vu.MemoryRegion(GUEST_BASE, half, guest.user(0), 0),
        ]
        await front.send(Request.SET_MEM_TABLE, vu.pack_table(table), [guest.fd, guest.fd])
        await ring.send_setup(front)
        at = half - 16
        text = guest.put(0x7000, b"0123456789")
        indirect = struct.pack("<QIHH", text, 10, NEXT, 1) + struct.pack(
            "<QIHH", GUEST_BASE + 0x9000, 10, WRITE, 0
        )
        ring.set_desc(2, guest.put(at, indirect), 32, INDIRECT)
        ring.offer(2)
        await ring.until_used(1)
        assert ring.used_element(0) == (2, 10)
        assert guest.mem[0x9000:0x900A] == b"9876543210"


class Holder(Device):
    """Keeps every chain until it is told to complete some."""

    def __init__(self) -> None:
        self.held: list[Chain] = []
        self.arrived = trio.Event()
        self.expect = 0

    async def handle_queue(self, queue: Queue) -> None:
        async for chain in queue:
            chain.keep()
            self.held.append(chain)
            if len(self.held) == self.expect:
                self.arrived.set()


async def test_stop_gives_back_what_was_not_answered(guest: Guest) -> None:
    ring = guest.ring(0, 16)
    device = Holder()
    device.expect = 5
    async with connected(device) as front:
        await front.negotiate()
        await guest.send_memory(front)
        await ring.send_setup(front)
        for i in range(5):
            ring.set_desc(i, guest.put(0x80000 + 64 * i, b"%d" % i), 1, 0)
        ring.offer(0, 1, 2, 3, 4)
        await device.arrived.wait()
        device.held[0].complete()
        device.held[1].complete()
        await ring.until_used(2)
        base = await front.ask(Request.GET_VRING_BASE, vu.VringState(0, 0).pack())
        assert vu.VringState.unpack(base.payload).num == 2 == ring.used_idx
        # The next start takes the other three again, in order.
        device.held.clear()
        device.expect, device.arrived = 3, trio.Event()
        await ring.send_setup(front, base=2)
        await device.arrived.wait()
        assert [c.read() for c in device.held] == [b"2", b"3", b"4"]
        for chain in reversed(device.held):
            chain.complete()
        await ring.until_used(5)
        assert [ring.used_element(i)[0] for i in range(5)] == [0, 1, 4, 3, 2]


async def test_stop_waits_for_the_gap_in_the_answers(guest: Guest) -> None:
    """A younger chain is answered: the older one cannot be given back, the device must answer it."""
    ring = guest.ring(0, 16)
    device = Holder()
    device.expect = 2
    async with connected(device) as front, trio.open_nursery() as nursery:
        await front.negotiate()
        await guest.send_memory(front)
        await ring.send_setup(front)
        ring.set_desc(0, guest.put(0x80000, b"a"), 1, 0)
        ring.set_desc(1, guest.put(0x80040, b"b"), 1, 0)
        ring.offer(0, 1)
        await device.arrived.wait()
        device.held[1].complete()
        await ring.until_used(1)

        async def stop() -> None:
            base = await front.ask(Request.GET_VRING_BASE, vu.VringState(0, 0).pack())
            assert vu.VringState.unpack(base.payload).num == 2

        nursery.start_soon(stop)
        await trio.sleep(2 * GRACE)  # the time itself is the matter
        device.held[0].complete()
    assert ring.used_idx == 2


class Juggler(Device):
    """Answers the second request at once and the first when it is told to; its tasks end with its handler."""

    def __init__(self) -> None:
        self.go = trio.Event()
        self.stopped = trio.Event()

    async def handle_queue(self, queue: Queue) -> None:
        async def late(chain: Chain) -> None:
            await self.go.wait()
            chain.complete()

        async with trio.open_nursery() as nursery:
            first = True
            async for chain in queue:
                if first:
                    chain.keep()
                    nursery.start_soon(late, chain)
                first = False
            self.stopped.set()


async def test_stop_does_not_cancel_a_handler_that_must_close_a_gap(guest: Guest) -> None:
    ring = guest.ring(0, 16)
    device = Juggler()
    async with connected(device) as front, trio.open_nursery() as nursery:
        await front.negotiate()
        await guest.send_memory(front)
        await ring.send_setup(front)
        ring.set_desc(0, guest.put(0x80000, b"a"), 1, 0)
        ring.set_desc(1, guest.put(0x80040, b"b"), 1, 0)
        ring.offer(0, 1)
        await ring.until_used(1)

        async def stop() -> None:
            base = await front.ask(Request.GET_VRING_BASE, vu.VringState(0, 0).pack())
            assert vu.VringState.unpack(base.payload).num == 2

        nursery.start_soon(stop)
        await device.stopped.wait()
        await trio.sleep(
            2 * GRACE
        )  # the time itself is the matter: a handler without a gap is cancelled by now
        device.go.set()
    assert ring.used_idx == 2


async def test_memory_and_descriptors_change_under_traffic(guest: Guest) -> None:
    """Every configuration message on a running ring: no request is lost or done twice."""
    ring = guest.ring(0, 16)
    async with connected(Echo()) as front:
        await front.negotiate()
        await guest.send_memory(front)
        await ring.send_setup(front)
        for i in range(200):
            ring.set_desc(i % 16, guest.put(0x80000, b"%05d" % i), 5, 0)
            ring.offer(i % 16)
            match i % 4:
                case 0:
                    await guest.send_memory(front)
                case 1:
                    os.close(ring.call)
                    ring.call = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
                    await front.send(Request.SET_VRING_CALL, vu.pack_u64(0), [ring.call])
                case 2:
                    os.close(ring.kick)
                    ring.kick = os.eventfd(1, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
                    await front.send(Request.SET_VRING_KICK, vu.pack_u64(0), [ring.kick])
                case 3:
                    u = guest.user
                    addr = vu.VringAddr(0, 0, u(ring.desc), u(ring.used), u(ring.avail), 0)
                    await front.send(Request.SET_VRING_ADDR, addr.pack())
            await front.barrier()
            await ring.until_used(i + 1)
            assert ring.used_element(i)[0] == i % 16


async def test_dirty_log(guest: Guest) -> None:
    """With LOG_ALL every page that the device wrote has its bit: buffers and the used ring."""
    ring = guest.ring(0, 4)
    log = os.memfd_create("log", os.MFD_CLOEXEC)
    os.ftruncate(log, 4096)
    async with connected(Echo()) as front:
        features, _ = await front.negotiate()
        await guest.send_memory(front)
        await ring.send_setup(front, log=1)
        reply = await front.ask(Request.SET_LOG_BASE, vu.LogArea(4096, 0).pack(), [log])
        assert len(reply.payload) == 16
        assert await front.ack(Request.SET_FEATURES, vu.pack_u64(features | Feature.LOG_ALL)) == 0
        ring.set_desc(0, guest.put(0x80000, b"x" * 100), 100, NEXT, 1)
        ring.set_desc(1, GUEST_BASE + 0x81FF0, 100, WRITE)  # crosses a page
        ring.offer(0)
        await ring.until_used(1)
        bits = os.pread(log, 4096, 0)
        dirty = {p for p in range(4096 * 8) if bits[p >> 3] >> (p & 7) & 1}
        first = (GUEST_BASE + 0x81FF0) >> 12
        assert dirty == {first, first + 1, (GUEST_BASE + ring.used) >> 12}
    os.close(log)
