"""What is offered hangs together: no bit without those that it needs, nor without the queue that they are about."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.examples.test_examples_blk import ROOT
from tests.kit.net_card import udp
from tests.kit.raw_front_end import GUEST_BASE, NEXT, WRITE, Guest, RawFrontEnd, Ring, connected
from vhostpc.backend import Device, Options, Queue, serve
from vhostpc.backend.disk import Disk
from vhostpc.backend.net import Bridge
from vhostpc.cli.own_device import load_file
from vhostpc.frontend import Driver, FarSide, GuestRegion, MemoryShare, RingLayout, connect, start_ring
from vhostpc.pages.ramblock import RamSet
from vhostpc.virtio.features import NetFeature as N
from vhostpc.virtio.features import closed
from vhostpc.wire import vhost_user as vu
from vhostpc.wire.vhost_user import Feature, ProtocolFeature, Request

#: As a Linux driver looks at it (virtnet_validate_features, and what virtio.c and the specification ask besides).
NEED_CONTROL = [
    N.CTRL_RX,
    N.CTRL_VLAN,
    N.GUEST_ANNOUNCE,
    N.MQ,
    N.CTRL_MAC_ADDR,
    N.RSS,
    N.HASH_REPORT,
    N.NOTF_COAL,
]


def is_refused(features: int) -> bool:
    """Would a driver refuse a network device that has these bits?"""
    has = N(features)
    if N.CTRL_VQ not in has and any(bit in has for bit in NEED_CONTROL):
        return True
    receive, send = N.GUEST_TSO4 | N.GUEST_TSO6, N.HOST_TSO4 | N.HOST_TSO6
    if has & (receive | N.GUEST_UFO | N.GUEST_USO4 | N.GUEST_USO6) and N.GUEST_CSUM not in has:
        return True
    if has & (send | N.HOST_UFO | N.HOST_USO) and N.CSUM not in has:
        return True
    return bool(has & N.GUEST_ECN and not has & receive) or bool(
        has & (N.HOST_ECN | N.RSC_EXT) and not has & send
    )


class Everything(Device):
    """Offers all that a network device can."""

    device_id = 1
    num_queues = 3
    features = sum(N)

    async def handle_queue(self, queue: Queue) -> None: ...


def devices() -> list[Device]:
    rng: Any = load_file(ROOT / "examples" / "rng" / "rng.py")
    disks = [Disk(memory="1M", read_only=r, queues=q) for r in ("", "yes") for q in (1, 4)]
    return [Bridge([0]), Bridge([0], pairs=4), Everything(), rng.Rng(), *disks]


async def offered(device: Device, options: Options) -> tuple[int, ProtocolFeature]:
    async with connected(device, options) as front:
        features = vu.unpack_u64((await front.ask(Request.GET_FEATURES)).payload)
        protocol = vu.unpack_u64((await front.ask(Request.GET_PROTOCOL_FEATURES)).payload)
        return features, ProtocolFeature(protocol)


async def test_offered_bits_have_what_they_need() -> None:
    """Each device, with none of its bits hidden and with each of them."""
    for device in devices():
        bits, _ = await offered(device, Options())
        for hidden in [0, *(1 << n for n in range(64) if bits >> n & 1)]:
            left, _ = await offered(device, Options(hide_features=hidden))
            assert not left & hidden
            if device.device_id == 1:
                assert not is_refused(left), f"{device} without {N(hidden)!r}: {N(left)!r}"
            assert closed(left, device.device_id) == left
            assert left & Feature.PROTOCOL_FEATURES or hidden == Feature.PROTOCOL_FEATURES


def test_closed_over_all_pairs() -> None:
    for first in N:
        for second in N:
            assert not is_refused(closed(first | second, 1))
            assert closed(sum(N) & ~(first | second), 1) & (first | second) == 0
            assert not is_refused(closed(sum(N) & ~(first | second), 1))
    assert closed(sum(N), 1) == sum(N)
    assert closed(1 << 11, 2) == 0
    assert closed(1 << 11 | 1 << 9, 2) == 1 << 11 | 1 << 9
    assert closed(1 << 22, 2) == 1 << 22


async def test_offered_protocol_features_have_what_they_need() -> None:
    P = ProtocolFeature
    assert P.INBAND_NOTIFICATIONS in (await offered(Bridge([0]), Options(inband=True)))[1]
    for hidden in (P.BACKEND_REQ, P.REPLY_ACK):
        _, left = await offered(Bridge([0]), Options(inband=True, hide_protocol_features=hidden))
        assert P.INBAND_NOTIFICATIONS not in left


@pytest.mark.parametrize(("pairs", "wanted"), [(1, [1, 2]), (4, [4, 8])])
async def test_number_of_queues_by_both_readings(pairs: int, wanted: list[int]) -> None:
    """Some front-ends want as many pairs at most as the answer says, some as many queues."""
    async with connected(Bridge([0], pairs=pairs)) as front:
        number = vu.unpack_u64((await front.ask(Request.GET_QUEUE_NUM)).payload)
        assert all(n <= number for n in wanted)


async def test_descriptors_of_a_ring_that_is_not_there(caplog: pytest.LogCaptureFixture) -> None:
    """QEMU says it once for each queue of its command line; with fewer it uses those that are there."""
    async with connected(Bridge([0])) as front:
        await front.negotiate()
        event = os.eventfd(0)
        before = len(os.listdir("/proc/self/fd"))
        assert await front.ack(Request.SET_VRING_CALL, vu.pack_u64(3), [event]) == 0
        assert await front.ack(Request.SET_VRING_ERR, vu.pack_u64(3), [event]) == 0
        assert await front.ack(Request.SET_VRING_ENABLE, vu.VringState(3, 0).pack()) == 0
        assert len(os.listdir("/proc/self/fd")) == before
        os.close(event)
        assert "no ring 3" in caplog.text
        await front.send(Request.SET_VRING_NUM, vu.VringState(3, 16).pack())
        assert await front.ended()
    assert "ring 3, but there are 3: the front-end is configured for more queues" in caplog.text


@pytest.fixture
def guest() -> Iterator[Guest]:
    guest = Guest()
    yield guest
    guest.close()


async def command(guest: Guest, ring: Ring, data: bytes) -> int:
    done = ring.used_idx
    ring.set_desc(0, guest.put(0x80000, data[:2]), 2, NEXT, 1)
    ring.set_desc(1, guest.put(0x80100, data[2:]), len(data) - 2, NEXT, 2)
    ring.set_desc(2, GUEST_BASE + 0x80200, 1, WRITE)
    guest.mem[0x80200] = 0xEE
    ring.offer(0)
    await ring.until_used(done + 1)
    assert ring.used_element(done) == (0, 1)
    return guest.mem[0x80200]


@pytest.mark.parametrize(
    ("pairs", "hide", "index"),
    [(1, 0, 2), (4, 0, 8), (4, N.MQ, 2)],
    ids=["one pair", "four", "four without MQ"],
)
async def test_control_queue(guest: Guest, pairs: int, hide: int, index: int) -> None:
    """Front-ends that hand its ring on find it behind the pairs that the driver knows."""
    async with connected(Bridge([0], pairs=pairs)) as front:
        await front.negotiate(hide=hide)
        await guest.send_memory(front)
        ring = guest.ring(index, 16)
        await ring.send_setup(front)
        for number, answer in [(0, 1), (1, 0), (pairs, 0), (pairs + 1, 1), (0x8000, 1)]:
            assert await command(guest, ring, struct.pack("<BBH", 4, 0, number)) == answer
        assert await command(guest, ring, bytes([3, 0])) == 0  # ANNOUNCE_ACK
        for wrong in (b"\4\0\1", b"\4\1\1\0", b"\0\0\1", b"\3\1", b"\4\0\1\0\0"):
            assert await command(guest, ring, wrong) == (0 if wrong == b"\4\0\1\0\0" else 1)


class Ringed(Device):
    """Answers with nothing."""

    async def handle_queue(self, queue: Queue) -> None:
        async for _ in queue:
            pass


async def large_ring(front: RawFrontEnd, guest: Guest, index: int) -> Ring:
    await front.negotiate()
    await guest.send_memory(front)
    ring = guest.ring(index, 32768)
    await ring.send_setup(front)
    return ring


async def test_rings_of_32768_entries() -> None:
    """All of it offered at once, twice; as large as the format allows."""
    guest = Guest(4 << 20)
    try:
        async with connected(Ringed()) as front:
            ring = await large_ring(front, guest, 0)
            for i in range(32768):
                ring.set_desc(i, GUEST_BASE + 0x200000, 8, WRITE)
            for turn in (1, 2, 3):
                ring.offer(*range(32768))
                await ring.until_used(32768 * turn)
            assert sorted(ring.used_element(i)[0] for i in range(32768)) == list(range(32768))
            reply = await front.ask(Request.GET_VRING_BASE, vu.VringState(0, 0).pack())
            assert vu.VringState.unpack(reply.payload).num == 32768
            assert await front.ack(Request.SET_VRING_NUM, vu.VringState(0, 32768).pack()) == 0
            await front.send(Request.SET_VRING_NUM, vu.VringState(0, 65536).pack())
            assert await front.ended()
    finally:
        guest.close()


async def test_frames_through_rings_of_32768_entries(tmp_path: Path) -> None:
    """Our front-end's drivers and the pumps, with the whole of both rings in flight; the far side echoes."""
    size, num = 192 << 20, 32768
    with closing(RamSet()) as ram, udp() as link, udp() as far:
        regions = [GuestRegion(0, size, ram.create("pc.ram", size))]
        layout = RingLayout.contiguous_at(0x10000, num, buffer_stride=2048)
        back = RingLayout.contiguous_at(layout.end, num, buffer_stride=2048)
        link.connect(far.getsockname())
        far.connect(link.getsockname())
        path = tmp_path / "s"
        with (
            Driver(ram, regions, layout) as tx,
            Driver(ram, regions, back, receive=True) as rx,
            closing(FarSide(far, echo=True)) as echo,
        ):
            async with trio.open_nursery() as nursery:
                await nursery.start(serve, Bridge([link.fileno()]), path)
                nursery.start_soon(echo.run)
                async with connect(path) as front:
                    await front.negotiate(hide_features=Feature.EVENT_IDX)
                    memory = MemoryShare(front, regions)
                    await memory.share()
                    await tx.reset()
                    await rx.reset()
                    assert await rx.post(num) == num
                    assert await tx.post(num, 60) == num
                    await start_ring(front, memory, 0, rx)
                    nursery.start_soon(rx.run)
                    await start_ring(front, memory, 1, tx)
                    await tx.run(num, 60)
                    assert tx.numbers().completed == 2 * num
                    # A burst may be dropped on the way: until all of the receive ring has been used, and some again.
                    while rx.numbers().received.frames < num + 1000:
                        await tx.run(64, 60)
                    assert rx.numbers().received.bad == rx.numbers().bad_used == 0
                    nursery.cancel_scope.cancel()
