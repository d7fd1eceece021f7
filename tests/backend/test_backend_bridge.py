"""The bridge's device and its pumps, over rings written by hand: calm memory, then memory that is absent."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
import trio
import trio.testing

from tests.kit.absent_guest import AbsentGuest
from tests.kit.raw_front_end import GUEST_BASE, NEXT, WRITE, Guest, RawFrontEnd, connected
from vhostpc.backend.net import Bridge, rarp
from vhostpc.virtio.features import NetFeature
from vhostpc.wire import vhost_user as vu
from vhostpc.wire.vhost_user import Feature, Request

RX, TX = 0, 1
HEADER = 12


def frame(number: int, length: int) -> bytes:
    """``length`` bytes that name themselves."""
    return (b"%08d" % number + bytes((number * 7 + i) & 0xFF for i in range(length)))[:length]


@dataclass
class Far:
    """The network's end of the bridge."""

    bridge: Bridge
    sock: socket.socket
    link: socket.socket
    arrived: list[bytes] = field(default_factory=list)

    async def until(self, count: int) -> list[bytes]:
        with trio.fail_after(10):
            while len(self.arrived) < count:
                self.drain()
                await trio.sleep(0.001)
        return self.arrived

    def drain(self) -> None:
        try:
            while True:
                self.arrived.append(self.sock.recv(65536))
        except BlockingIOError:
            pass

    def send(self, data: bytes) -> None:
        self.sock.sendto(data, self.link.getsockname())


@pytest.fixture
def far() -> Iterator[Far]:
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
    sock.bind(("127.0.0.1", 0))
    sock.setblocking(False)
    link = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    link.bind(("127.0.0.1", 0))
    yield Far(Bridge([link.fileno()], to=sock.getsockname()), sock, link)
    sock.close()
    link.close()


@pytest.fixture
def guest() -> Iterator[Guest]:
    guest = Guest(4 << 20)
    yield guest
    guest.close()


def put_frames(guest: Guest, frames: list[bytes], *, at: int = 0x100000, stride: int = 16384) -> list[int]:
    """Header and frame of each in descriptors of the TX ring; returns their heads."""
    ring = guest.rings[-1]
    heads = []
    for i, data in enumerate(frames):
        where = guest.put(at + i * stride, bytes(HEADER) + data)
        cut = HEADER + len(data) // 2  # two descriptors, the cut inside the frame
        ring.set_desc(2 * i, where, cut, NEXT, 2 * i + 1)
        ring.set_desc(2 * i + 1, where + cut, HEADER + len(data) - cut, 0, 0)
        heads.append(2 * i)
    return heads


SIZES = [60, 60, 60, 1514, 1514, 9000, 9000, 60, 1, 1, 2, 1514, 60]


async def test_frames_out(guest: Guest, far: Far) -> None:
    ring = guest.ring(TX, 64)
    async with connected(far.bridge) as front:
        await front.negotiate()
        await guest.send_memory(front)
        await ring.send_setup(front)
        sent: list[bytes] = []
        for turn in range(10):
            frames = [frame(len(sent) + i, n) for i, n in enumerate(SIZES)]
            ring.offer(*put_frames(guest, frames))
            sent += frames
            await ring.until_used(len(sent))
            assert await far.until(len(sent)) == sent, turn
        counters = far.bridge.counters()["out"]
        assert (counters.frames, counters.bytes) == (len(sent), sum(map(len, sent)))
        assert counters.dropped == 0


async def test_frames_to_the_null_device(guest: Guest) -> None:
    """They are read and counted as frames that went out; the device itself, not open for writing, is not asked."""
    frames = [frame(i, n) for i, n in enumerate(SIZES)]
    ring = guest.ring(TX, 64)
    null = os.open(os.devnull, os.O_RDONLY)
    try:
        bridge = Bridge([null])
        async with connected(bridge) as front:
            await front.negotiate()
            await guest.send_memory(front)
            await ring.send_setup(front)
            ring.offer(*put_frames(guest, frames))
            await ring.until_used(len(frames))
            counters = bridge.counters()["out"]
    finally:
        os.close(null)
    assert (counters.frames, counters.bytes) == (len(frames), sum(map(len, frames)))
    assert counters.dropped == counters.discarded == 0


def post_buffers(guest: Guest, count: int, size: int) -> None:
    ring = guest.rings[-1]
    for i in range(count):
        ring.set_desc(i, GUEST_BASE + 0x100000 + i * 16384, size, WRITE)
    ring.offer(*range(count))


def received(guest: Guest, first: int) -> tuple[bytes, int]:
    """The frame whose first used entry is ``first``, and how many entries it has."""
    ring = guest.rings[-1]
    head, length = ring.used_element(first)
    at = 0x100000 + head * 16384
    data = guest.mem[at : at + length]
    assert data[:10] == bytes(10)
    (buffers,) = struct.unpack("<H", data[10:12])
    for i in range(1, buffers):
        head, length = ring.used_element(first + i)
        data += guest.mem[0x100000 + head * 16384 :][:length]
    return bytes(data[HEADER:]), buffers


@pytest.mark.parametrize("mergeable", [True, False])
async def test_frames_in(guest: Guest, far: Far, mergeable: bool) -> None:
    ring = guest.ring(RX, 64)
    size = 1024 if mergeable else 4096
    async with connected(far.bridge) as front:
        await front.negotiate(hide=0 if mergeable else NetFeature.MRG_RXBUF)
        await guest.send_memory(front)
        post_buffers(guest, 64, size)
        await ring.send_setup(front)
        await front.barrier()
        await trio.testing.wait_all_tasks_blocked(0.05)
        used = 0
        for number, length in enumerate([1, 60, 1012, 1013, 1514, 4000, 9000, 60, 4085]):
            data = frame(number, length)
            far.send(data)
            if not mergeable and HEADER + length > size:
                continue  # dropped, never cut short
            buffers = -(-(HEADER + length) // size)
            await ring.until_used(used + buffers)
            assert received(guest, used) == (data, buffers)
            used += buffers
        # A sender from a foreign port is heard as well.
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stranger:
            stranger.sendto(b"hello from elsewhere", far.link.getsockname())
        await ring.until_used(used + 1)
        assert received(guest, used)[0] == b"hello from elsewhere"
        assert far.bridge.counters()["in"].dropped == (0 if mergeable else 2)


async def test_stale_frames_are_not_delivered(guest: Guest, far: Far) -> None:
    """Frames that came while no guest was running may have gone to it elsewhere: they must not come twice."""
    ring = guest.ring(RX, 64)
    for i in range(20):
        far.send(frame(i, 100))
    async with connected(far.bridge) as front:
        await front.negotiate()
        await guest.send_memory(front)
        post_buffers(guest, 32, 2048)
        await ring.send_setup(front)
        with trio.fail_after(10):
            while far.bridge.counters()["in"].discarded < 20:
                await trio.sleep(0.001)
        far.send(b"fresh")
        await ring.until_used(1)
        assert received(guest, 0) == (b"fresh", 1)


async def test_rings_change_under_traffic(guest: Guest, far: Far) -> None:
    """Call, kick, addresses and memory change between frames: each frame goes out once."""
    ring = guest.ring(TX, 64)
    async with connected(far.bridge) as front:
        await front.negotiate()
        await guest.send_memory(front)
        await ring.send_setup(front)
        count = 0
        for turn in range(60):
            frames = [frame(count + i, 100) for i in range(8)]
            count += len(frames)
            ring.offer(*put_frames(guest, frames, at=0x100000 + (turn % 4) * 0x40000))
            match turn % 4:
                case 0:
                    await guest.send_memory(front)
                case 1:
                    os.close(ring.call)
                    ring.call = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
                    await front.send(Request.SET_VRING_CALL, vu.pack_u64(TX), [ring.call])
                case 2:
                    os.close(ring.kick)
                    ring.kick = os.eventfd(1, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
                    await front.send(Request.SET_VRING_KICK, vu.pack_u64(TX), [ring.kick])
                case 3:
                    u = guest.user
                    addr = vu.VringAddr(TX, 0, u(ring.desc), u(ring.used), u(ring.avail), 0)
                    await front.send(Request.SET_VRING_ADDR, addr.pack())
            await front.barrier()
            await ring.until_used(count)
        assert await far.until(count) == [frame(i, 100) for i in range(count)]


async def test_rarp_goes_to_the_network(far: Far) -> None:
    async with connected(far.bridge) as front:
        await front.negotiate(hide=NetFeature.GUEST_ANNOUNCE)
        mac = bytes.fromhex("525400123456")
        assert await front.ack(Request.SEND_RARP, mac + bytes(2)) == 0
        (announced,) = await far.until(1)
    assert announced == rarp(mac)
    assert len(announced) == 60
    assert announced[:14] == b"\xff" * 6 + mac + b"\x80\x35"


async def test_nothing_is_dropped_between_start_and_enable(guest: Guest, far: Far) -> None:
    """As after a migration: the ring holds frames when it starts, and is enabled a moment later."""
    ring = guest.ring(TX, 64)
    async with connected(far.bridge) as front:
        await front.negotiate()
        await guest.send_memory(front)
        frames = [frame(i, 100) for i in range(8)]
        ring.offer(*put_frames(guest, frames))
        await ring.send_setup(front, enable=False)
        await front.barrier()
        await front.send(Request.SET_VRING_ENABLE, vu.VringState(TX, 1).pack())
        assert await far.until(len(frames)) == frames
        assert far.bridge.counters()["out"].discarded == 0


async def test_disabled_queue_drops(guest: Guest, far: Far) -> None:
    ring = guest.ring(TX, 64)
    async with connected(far.bridge) as front:
        await front.negotiate()
        await guest.send_memory(front)
        await ring.send_setup(front, enable=False)
        ring.offer(*put_frames(guest, [frame(i, 100) for i in range(4)]))
        await ring.until_used(4)
        await front.send(Request.SET_VRING_ENABLE, vu.VringState(TX, 1).pack())
        await front.barrier()
        ring.offer(*put_frames(guest, [b"now"]))
        await ring.until_used(5)
        assert await far.until(1) == [b"now"]


async def test_polled_ring(guest: Guest, far: Far) -> None:
    """SET_VRING_KICK without a descriptor: the ring is looked at by itself."""
    ring = guest.ring(TX, 64)
    async with connected(far.bridge) as front:
        await front.negotiate()
        await guest.send_memory(front)
        await ring.send_setup(front)
        await front.send(Request.SET_VRING_KICK, vu.pack_u64(TX | vu.VRING_NOFD))
        await front.barrier()
        for i in range(3):
            ring.offer(*put_frames(guest, [b"seen %d" % i]))
            os.eventfd_read(ring.kick)
            await ring.until_used(i + 1)
            assert (await far.until(i + 1))[-1] == b"seen %d" % i


# --- absent memory ----------------------------------------------------------------------------------


@pytest.fixture
def absent() -> Iterator[AbsentGuest]:
    guest = AbsentGuest(2 << 20)
    yield guest
    guest.close()


async def start_postcopy(guest: AbsentGuest, front: RawFrontEnd) -> None:
    await front.negotiate()
    await guest.advise(front)
    assert await guest.listen(front) == 0
    await guest.share_table(front)
    await guest.rings[0].send_setup(front)


FRAMES = [frame(i, 200) for i in range(24)]


@pytest.mark.ufd
async def test_out_in_postcopy(absent: AbsentGuest, far: Far) -> None:
    """Every page comes late, a page a frame: all frames go out once, in order."""
    ring = absent.ring(TX, 64)
    ring.offer(*put_frames(absent, FRAMES, stride=8192))
    async with connected(far.bridge) as front, trio.open_nursery() as nursery:
        await start_postcopy(absent, front)
        nursery.start_soon(absent.serve)
        assert await far.until(24) == FRAMES
        base = await front.ask(Request.GET_VRING_BASE, vu.VringState(TX, 0).pack())
        assert vu.VringState.unpack(base.payload).num == 24
        absent.place_rest()
        assert await absent.end(front) == 0
        nursery.cancel_scope.cancel()


@pytest.mark.ufd
async def test_stop_in_postcopy(absent: AbsentGuest, far: Far) -> None:
    """Chains whose pages are absent: the pump stops after the page that it waits for, nothing is sent twice later."""
    ring = absent.ring(TX, 64)
    ring.offer(*put_frames(absent, FRAMES, stride=8192))
    async with connected(far.bridge) as front, trio.open_nursery() as nursery:
        await start_postcopy(absent, front)
        while (page := await absent.next_fault()) < 0x100:
            absent.place(page)
        await front.send(Request.GET_VRING_BASE, vu.VringState(TX, 0).pack())
        await trio.testing.wait_all_tasks_blocked(0.05)
        absent.place(page)
        reply = await front.receive()
        assert reply is not None
        base = vu.VringState.unpack(reply.payload).num
        far.drain()
        assert base == struct.unpack("<H", os.pread(absent.fd, 2, ring.used + 2))[0] == len(far.arrived) <= 1
        assert len(set(absent.requested)) == len(absent.requested)
        nursery.start_soon(absent.serve)
        await ring.send_setup(front, base=base)
        assert await far.until(24) == FRAMES
        absent.place_rest()
        await front.ask(Request.GET_VRING_BASE, vu.VringState(TX, 0).pack())
        await absent.end(front)
        nursery.cancel_scope.cancel()


@pytest.mark.ufd
@pytest.mark.parametrize("stopping", [False, True])
@pytest.mark.parametrize("pages_first", [0, 1, 2, 3, 4])
async def test_loss_in_postcopy(absent: AbsentGuest, far: Far, stopping: bool, pages_first: int) -> None:
    """The front-end goes while a page is awaited: no frame of zeros goes out, no page is born."""
    ring = absent.ring(TX, 64)
    ring.offer(*put_frames(absent, FRAMES, stride=8192))
    async with connected(far.bridge) as front:
        await start_postcopy(absent, front)
        for _ in range(pages_first):
            absent.place(await absent.next_fault())
        await absent.next_fault()
        if stopping:
            await front.send(Request.GET_VRING_BASE, vu.VringState(TX, 0).pack())
            await trio.testing.wait_all_tasks_blocked(0.05)
        before = absent.holes()
        front.close()
    far.drain()
    assert all(data in FRAMES for data in far.arrived)
    assert absent.holes() == before
    sent = len(far.arrived)
    used = struct.unpack("<H", os.pread(absent.fd, 2, ring.used + 2))[0]
    assert used == sent
    absent.place_rest()
    if sent == 0:
        assert absent.memory() == bytes(absent.image)


@pytest.mark.ufd
async def test_loss_while_a_frame_comes_in(absent: AbsentGuest, far: Far) -> None:
    ring = absent.ring(RX, 64)
    for i in range(32):
        ring.set_desc(i, GUEST_BASE + 0x100000 + i * 16384, 2048, WRITE)
    ring.offer(*range(32))
    async with connected(far.bridge) as front:
        await start_postcopy(absent, front)
        while (page := await absent.next_fault()) < 0x100:
            absent.place(page)
            far.send(frame(page, 500))
        before = absent.holes()
        front.close()
    assert absent.holes() == before
    absent.place_rest()
    assert absent.memory() == bytes(absent.image)


@pytest.mark.ufd
async def test_in_in_postcopy(absent: AbsentGuest, far: Far) -> None:
    ring = absent.ring(RX, 64)
    for i in range(32):
        ring.set_desc(i, GUEST_BASE + 0x100000 + i * 16384, 2048, WRITE)
    ring.offer(*range(32))
    frames = [frame(i, 1000) for i in range(20)]
    async with connected(far.bridge) as front, trio.open_nursery() as nursery:
        await start_postcopy(absent, front)
        absent.place(await absent.next_fault())  # the pump has begun: frames that come now are fresh
        nursery.start_soon(absent.serve)
        with trio.fail_after(10):
            while 0x100 not in absent.requested:
                far.send(b"wake up")
                await trio.sleep(0.01)
        early = far.bridge.counters()["in"].frames
        for data in frames:
            far.send(data)
        with trio.fail_after(10):
            while far.bridge.counters()["in"].frames < early + 20:
                await trio.sleep(0.001)
        await front.ask(Request.GET_VRING_BASE, vu.VringState(RX, 0).pack())
        absent.place_rest()
        await absent.end(front)
        nursery.cancel_scope.cancel()
    used = struct.unpack("<H", os.pread(absent.fd, 2, ring.used + 2))[0]
    got = []
    for i in range(used):
        head, length = struct.unpack("<II", os.pread(absent.fd, 8, ring.used + 4 + 8 * i))
        got.append(os.pread(absent.fd, length, 0x100000 + head * 16384)[HEADER:])
    assert [g for g in got if g != b"wake up"] == frames


async def test_ipv6_address() -> None:
    """The address of datagrams is packed by hand; check it where the kernel can tell."""
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sock:
        sock.bind(("::1", 0))
        sock.setblocking(False)
        with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as link:
            link.bind(("::1", 0))
            guest = Guest(4 << 20)
            ring = guest.ring(TX, 16)
            bridge = Bridge([link.fileno()], to=sock.getsockname())
            async with connected(bridge) as front:
                await front.negotiate(hide=Feature.EVENT_IDX)
                await guest.send_memory(front)
                await ring.send_setup(front)
                ring.offer(*put_frames(guest, [b"six"] * 2))
                await ring.until_used(2)
                assert sock.recv(100) == b"six"
            guest.close()
