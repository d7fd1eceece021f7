"""The back-end channel: config changes, in-band kicks, calls and errors."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest
import trio

from tests.kit.raw_front_end import GUEST_BASE, NEXT, WRITE, Guest, RawFrontEnd, connected
from vhostpc.backend import Device, FrontEnd, Options, Queue
from vhostpc.wire import vhost_user as vu
from vhostpc.wire.vhost_user import BackendRequest, ProtocolFeature, Request


class Configured(Device):
    config_size = 8

    def __init__(self) -> None:
        self.value = 0
        self.change = trio.Event()

    async def handle_queue(self, queue: Queue) -> None:
        async for chain in queue:
            chain.write(chain.read())

    async def handle_session(self, front_end: FrontEnd) -> None:
        await self.change.wait()
        self.value = 7
        await front_end.config_changed()

    def read_config(self, offset: int, size: int) -> bytes:
        return self.value.to_bytes(8, "little")[offset : offset + size]


@pytest.fixture
def guest() -> Iterator[Guest]:
    guest = Guest()
    yield guest
    guest.close()


async def channel(front: RawFrontEnd) -> RawFrontEnd:
    """Give the back-end a channel; the front-end's end of it."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with theirs:
        assert await front.ack(Request.SET_BACKEND_REQ_FD, b"", [theirs.fileno()]) == 0
    return RawFrontEnd(ours)


async def answer(peer: RawFrontEnd, status: int = 0) -> vu.Frame:
    frame = await peer.receive()
    assert frame is not None
    assert frame.need_reply
    await peer.send(frame.request, vu.pack_u64(status), flags=vu.FLAG_REPLY)
    return frame


@pytest.mark.parametrize("status", [0, 1])
async def test_config_change(status: int, caplog: pytest.LogCaptureFixture) -> None:
    """The front-end is told, asks, and may refuse; the session goes on."""
    device = Configured()
    async with connected(device) as front:
        await front.negotiate()
        peer = await channel(front)
        device.change.set()
        frame = await answer(peer, status)
        assert frame.request == BackendRequest.CONFIG_CHANGE_MSG
        reply = await front.ask(Request.GET_CONFIG, vu.ConfigSpace(0, 0, bytes(8)).pack())
        assert vu.ConfigSpace.unpack(reply.payload).data == b"\7" + bytes(7)
        peer.close()
        await front.barrier()
    assert ("refused CONFIG_CHANGE_MSG" in caplog.text) == bool(status)


@pytest.mark.parametrize("told", [0, 3])
async def test_inband(guest: Guest, told: int) -> None:
    """Kicks by VRING_KICK, calls by VRING_CALL, a broken ring by VRING_ERR; no eventfd at all.

    User-Mode Linux says nothing of calls then; libvhost-user takes that for a ring without a descriptor, too.
    """
    ring = guest.ring(0)
    async with connected(Configured(), Options(inband=True)) as front:
        await front.negotiate()
        peer = await channel(front)
        await guest.send_memory(front)
        await front.send(Request.SET_VRING_NUM, vu.VringState(0, 16).pack())
        u = guest.user
        addr = vu.VringAddr(0, 0, u(ring.desc), u(ring.used), u(ring.avail), 0)
        await front.send(Request.SET_VRING_ADDR, addr.pack())
        for _ in range(told):  # each replaces the one before
            await front.send(Request.SET_VRING_CALL, vu.pack_u64(vu.VRING_NOFD))
        await front.send(Request.SET_VRING_ENABLE, vu.VringState(0, 1).pack())
        for i in range(3):
            ring.set_desc(0, guest.put(0x80000, b"%d" % i), 1, NEXT, 1)
            ring.set_desc(1, GUEST_BASE + 0x81000, 1, WRITE)
            ring.offer(0)
            await front.send(Request.VRING_KICK, vu.VringState(0, 0).pack())
            with trio.fail_after(10):
                while ring.used_idx == i:
                    frame = await answer(peer)
                    assert frame.request == BackendRequest.VRING_CALL
                    assert vu.VringState.unpack(frame.payload).index == 0
            assert guest.mem[0x81000:0x81001] == b"%d" % i
        ring.set_desc(0, 0, 16, WRITE)
        ring.offer(0)
        await front.send(Request.VRING_KICK, vu.VringState(0, 0).pack())
        with trio.fail_after(10):
            while (await answer(peer)).request != BackendRequest.VRING_ERR:
                pass
        peer.close()
        await front.barrier()


async def test_inband_is_off_by_default() -> None:
    async with connected(Configured()) as front:
        _, bits = await front.negotiate()
        assert ProtocolFeature.INBAND_NOTIFICATIONS not in bits
        # QEMU acknowledges every number it knows: that does not switch anything on.
        await front.send(Request.SET_PROTOCOL_FEATURES, vu.pack_u64((1 << 20) - 1))
        assert await front.ack(Request.VRING_KICK, vu.VringState(0, 0).pack()) == 1
