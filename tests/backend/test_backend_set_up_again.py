"""Rings that are set up again without GET_VRING_BASE, disabled, or reset, as front-ends other than QEMU do it."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator

import pytest
import trio
import trio.testing

from tests.backend.test_backend_channel import Configured, answer
from tests.backend.test_backend_queue import Echo, Holder
from tests.kit.raw_front_end import GUEST_BASE, NEXT, WRITE, Guest, RawFrontEnd, Ring, connected
from vhostpc.backend import Options
from vhostpc.wire import vhost_user as vu
from vhostpc.wire.vhost_user import BackendRequest, Feature, Request


@pytest.fixture
def guest() -> Iterator[Guest]:
    guest = Guest()
    yield guest
    guest.close()


async def echo(guest: Guest, ring: Ring, text: bytes) -> None:
    """One request, answered."""
    before = ring.used_idx
    offer(guest, ring, text)
    await ring.until_used(before + 1)
    assert guest.mem[0x90000 : 0x90000 + len(text)] == text[::-1]


def offer(guest: Guest, ring: Ring, text: bytes) -> None:
    guest.put(0x90000, bytes(64))
    ring.set_desc(0, guest.put(0x80000, text), len(text), NEXT, 1)
    ring.set_desc(1, GUEST_BASE + 0x90000, 64, WRITE)
    ring.offer(0)


async def started(front: RawFrontEnd, guest: Guest, size: int = 16) -> Ring:
    await front.negotiate()
    await guest.send_memory(front)
    ring = guest.ring(0, size)
    await ring.send_setup(front)
    return ring


@pytest.mark.parametrize("size", [16, 64])
async def test_second_round_of_set_up(guest: Guest, size: int) -> None:
    """The guest was reset: its new rings are elsewhere, empty, of another size perhaps. The session goes on."""
    async with connected(Echo()) as front:
        ring = await started(front, guest)
        for i in range(20):
            await echo(guest, ring, b"first life %d" % i)
        ring = guest.ring(0, size)
        await ring.send_setup(front)
        for i in range(20):
            await echo(guest, ring, b"second life %d" % i)
        assert ring.used_idx == 20


async def test_second_round_in_the_same_place(guest: Guest) -> None:
    """Nothing has changed but that it is said again, from a base of the front-end's: the ring knows where it is."""
    async with connected(Echo()) as front:
        ring = await started(front, guest)
        for base in (0, 0, 3):
            for i in range(5):
                await echo(guest, ring, b"turn %d" % i)
            await ring.send_setup(front, base=base)
        assert ring.used_idx == 15


async def test_set_up_gives_back_what_was_not_answered(guest: Guest) -> None:
    """What the device holds when NUM comes is taken again after KICK, and not before."""
    device = Holder()
    device.expect = 1
    async with connected(device) as front:
        ring = await started(front, guest)
        offer(guest, ring, b"held")
        await device.arrived.wait()
        device.held.clear()
        device.arrived = trio.Event()
        await front.send(Request.SET_VRING_NUM, vu.VringState(0, 16).pack())
        await front.barrier()
        assert not device.held
        await front.send(Request.SET_VRING_KICK, vu.pack_u64(0), [ring.kick])
        await device.arrived.wait()
        device.held[0].complete()
        await ring.until_used(1)


async def test_disabled_and_enabled(guest: Guest) -> None:
    """ENABLE 0 stops the work, and not the ring: requests that come meanwhile are done afterwards, once."""
    async with connected(Echo()) as front:
        ring = await started(front, guest)
        for i in range(5):
            await echo(guest, ring, b"before")
            assert await front.ack(Request.SET_VRING_ENABLE, vu.VringState(0, 0).pack()) == 0
            offer(guest, ring, b"while disabled")
            await trio.testing.wait_all_tasks_blocked(0.01)
            assert ring.used_idx == 2 * i + 1
            assert await front.ack(Request.SET_VRING_ENABLE, vu.VringState(0, 1).pack()) == 0
            await ring.until_used(2 * i + 2)
            assert guest.mem[0x90000:0x9000E] == b"while disabled"[::-1]


@pytest.mark.parametrize("request_", [Request.RESET_OWNER, Request.SET_VRING_ENABLE])
async def test_other_features_after_a_reset(guest: Guest, request_: Request) -> None:
    """The next driver may want other features; the front-end says neither GET_VRING_BASE nor RESET_DEVICE."""
    async with connected(Echo()) as front:
        ring = await started(front, guest)
        await echo(guest, ring, b"first driver")
        payload = b"" if request_ == Request.RESET_OWNER else vu.VringState(0, 0).pack()
        assert await front.ack(request_, payload) == 0
        await front.send(Request.SET_OWNER)
        features = vu.unpack_u64((await front.ask(Request.GET_FEATURES)).payload)
        fewer = features & ~int(Feature.EVENT_IDX | Feature.LOG_ALL)
        assert await front.ack(Request.SET_FEATURES, vu.pack_u64(fewer)) == 0
        ring = guest.ring(0, 16)
        await ring.send_setup(front)
        await echo(guest, ring, b"second driver")


async def test_other_features_while_a_ring_is_at_work(guest: Guest, caplog: pytest.LogCaptureFixture) -> None:
    """Without a message that stops the ring: chains in flight would be served by wrong rules."""
    async with connected(Echo()) as front:
        await started(front, guest)
        features = vu.unpack_u64((await front.ask(Request.GET_FEATURES)).payload)
        await front.send(Request.SET_FEATURES, vu.pack_u64(features & ~int(Feature.EVENT_IDX)))
        assert await front.ended()
    assert "changes more than LOG_ALL while rings run" in caplog.text


async def test_inband_call_before_there_is_a_channel(guest: Guest) -> None:
    """It is told when the channel comes, and so is an error."""
    async with connected(Configured(), Options(inband=True)) as front:
        await front.negotiate()
        await guest.send_memory(front)
        ring = guest.ring(0, 16)
        await front.send(Request.SET_VRING_NUM, vu.VringState(0, 16).pack())
        u = guest.user
        addr = vu.VringAddr(0, 0, u(ring.desc), u(ring.used), u(ring.avail), 0)
        await front.send(Request.SET_VRING_ADDR, addr.pack())
        await front.send(Request.SET_VRING_CALL, vu.pack_u64(vu.VRING_NOFD))
        await front.send(Request.SET_VRING_ENABLE, vu.VringState(0, 1).pack())
        offer(guest, ring, b"x")
        struct.pack_into("<H", guest.mem, ring.avail + 4 + 2 * ring.size, 0)
        await front.send(Request.VRING_KICK, vu.VringState(0, 0).pack())
        with trio.fail_after(10):
            while ring.used_idx == 0:
                await front.barrier()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with theirs:
            await front.send(Request.SET_BACKEND_REQ_FD, b"", [theirs.fileno()])
        peer = RawFrontEnd(ours)
        frame = await answer(peer)
        assert frame.request == BackendRequest.VRING_CALL
        peer.close()
        await front.barrier()
