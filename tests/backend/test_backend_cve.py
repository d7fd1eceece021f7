"""What went wrong in DPDK's vhost library, class by class: one test for each advisory, named after it.

The docstrings say what the class is, and what keeps it away here. Classes without a number are from October 2026.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from tests.backend.test_backend_bridge import HEADER, RX, TX, Far, far, frame, put_frames
from tests.kit.hostile import Net, all_lines_from_here, guest_mappings, lines, open_fds, state
from tests.kit.raw_front_end import (
    GUEST_BASE,
    INDIRECT,
    NEXT,
    USER_BASE,
    WRITE,
    Guest,
    RawFrontEnd,
    Ring,
    connected,
)
from tests.native import FLIP, run
from vhostpc.backend import Chain, Device, Queue
from vhostpc.virtio.features import NetFeature
from vhostpc.wire import vhost_user as vu
from vhostpc.wire.vhost_user import Request

__all__ = ["far"]  # a fixture

BUFFER = 0x80000


@pytest.fixture
def guest() -> Iterator[Guest]:
    guest = Guest()
    yield guest
    guest.close()


class Echo(Device):
    """Keeps what it read."""

    def __init__(self) -> None:
        self.seen: list[bytes] = []

    async def handle_queue(self, queue: Queue) -> None:
        async for chain in queue:
            self.seen.append(chain.read())


async def stopped(ring: Ring) -> None:
    """The ring's error descriptor was signalled."""
    with trio.fail_after(10):
        await trio.lowlevel.wait_readable(ring.err)
        os.eventfd_read(ring.err)


async def share_in_pieces(front: RawFrontEnd, guest: Guest) -> None:
    """Two regions that follow one another for the guest, each a mapping of its own; nothing behind them."""
    half = guest.size // 2
    table = [vu.MemoryRegion(GUEST_BASE + i * half, half, USER_BASE + i * half, i * half) for i in (1, 0)]
    await front.send(Request.SET_MEM_TABLE, vu.pack_table(table), [guest.fd, guest.fd])


async def test_cve_2018_1059_ranges_that_are_not_wholly_mapped(
    caplog: pytest.LogCaptureFixture, guest: Guest
) -> None:
    """Only the first byte of a guest range was translated, and the rest taken to follow it in our address space.

    Here a range is looked up region by region, to its end, before it is used: it is read in pieces, or the ring
    stops.
    """
    device, ring = Echo(), guest.ring(0)
    half = guest.size // 2
    text = bytes(range(200))
    async with connected(device) as front:
        await front.negotiate()
        await share_in_pieces(front, guest)
        await ring.send_setup(front)
        ring.set_desc(0, guest.put(half - 100, text), len(text))
        ring.offer(0)
        await ring.until_used(1)
        assert device.seen == [text]
        for address, length, flags in (
            (GUEST_BASE + guest.size - 100, 101, 0),
            (GUEST_BASE + guest.size - 100, 101, WRITE),
            (GUEST_BASE + half - 1, half + 2, 0),
            (GUEST_BASE + guest.size - 16, 32, INDIRECT),
            (GUEST_BASE - 1, 2, 0),
        ):
            all_lines_from_here(caplog)
            guest.put(guest.size - 16, (GUEST_BASE + BUFFER).to_bytes(8, "little") + b"\4\0\0\0\1\0\1\0")
            ring.set_desc(1, address, length, flags)
            ring.offer(1)
            await stopped(ring)
            assert "outside guest memory" in lines(caplog)[0]
            await front.ask(Request.GET_VRING_BASE, state(0, 0))
            ring.avail_idx = ring.used_idx
            ring.offer()  # nothing: the bad one is taken back
            await ring.send_setup(front, base=ring.used_idx)
            await front.barrier()
    assert device.seen == [text]


async def test_cve_2019_14818_descriptors_on_messages_that_carry_none() -> None:
    """Descriptors that came with a message which has no use for them stayed open, until there were no more.

    Here a message owns its descriptors, and whatever the handler did not take is closed after it.
    """
    null = os.open("/dev/null", os.O_RDWR)
    before = open_fds()
    for request in [*vu.REQUESTS, 0, 22, 26, 31, 32, 33, 41, 42, 43, 99]:
        spec = vu.REQUESTS.get(request)
        async with connected(Net()) as front:
            await front.negotiate()
            await front.send(request, bytes(spec.min_size if spec else 8), [null] * vu.MAX_FDS)
            await front.send(Request.GET_QUEUE_NUM)
            while (reply := await front.receive()) is not None and reply.request != Request.GET_QUEUE_NUM:
                reply.close_fds()
            assert (reply is None) == (
                spec is not None and spec.gate not in {vu.ProtocolFeature.INBAND_NOTIFICATIONS}
            )
        assert open_fds() == before, vu.request_name(request)
    os.close(null)


@pytest.mark.parametrize(
    ("size", "offset"),
    [
        (2**64 - 4096, 8192),
        (4096, 2**64 - 4096),
        (2**63, 2**63),
        (2**64 - 1, 1),
        (4097, 0),
        (4096, 1),
        (0, 0),
        (1 << 40, 0),
    ],
)
async def test_cve_2020_10722_log_size_and_offset_that_wrap(
    caplog: pytest.LogCaptureFixture, size: int, offset: int
) -> None:
    """The dirty log's size plus its offset wrapped round, and a mapping too small for its use was made.

    Here the sum is checked for that, and against the length of the file.
    """
    fd = os.memfd_create("log", os.MFD_CLOEXEC)
    os.ftruncate(fd, 4096)
    maps = guest_mappings()
    async with connected(Net()) as front:
        await front.negotiate()
        await front.send(Request.SET_LOG_BASE, vu.LogArea(size, offset).pack(), [fd])
        assert await front.ended()
    os.close(fd)
    assert guest_mappings() == maps
    (line,) = lines(caplog)
    assert "dirty log" in line


@pytest.mark.parametrize("index", [2, 0x100, 0x101, 0x10000, 0x10001, 0x80000000, 0xFFFF0000, 0xFFFFFFFF])
@pytest.mark.parametrize(
    "request_",
    [Request.SET_VRING_NUM, Request.SET_VRING_BASE, Request.GET_VRING_BASE, Request.SET_VRING_ENABLE],
)
async def test_cve_2020_10723_ring_index_cut_to_fewer_bits(
    caplog: pytest.LogCaptureFixture, request_: Request, index: int
) -> None:
    """A ring's index of 32 bits was checked in fewer of them, and used whole, or the other way round.

    Here it is a number without a width, and checked where a ring is looked up, which is one place.
    """
    async with connected(Net()) as front:
        await front.negotiate()
        await front.send(request_, state(index, 1))
        assert await front.ended()
    (line,) = lines(caplog)
    assert f"ring {index}, but there are 2" in line


async def test_cve_2020_10724_lengths_that_the_guest_only_claims(guest: Guest, far: Far) -> None:
    """The crypto back-end believed the lengths in requests, and read behind what the guest had given it.

    There is no crypto here, and its messages are declined, in each of the layouts they have had. Elsewhere a device
    sees as many bytes as there are: a frame shorter than the header before it is none, a chain may be empty.
    """
    ring = guest.ring(TX)
    async with connected(far.bridge) as front:
        await front.negotiate()
        for size in (632, 1072, 4096):
            assert await front.ack(Request.CREATE_CRYPTO_SESSION, bytes(size)) == 1
        assert await front.ack(Request.CLOSE_CRYPTO_SESSION, bytes(8)) == 1
        await guest.send_memory(front)
        await ring.send_setup(front)
        where = guest.put(BUFFER, bytes(HEADER) + b"frame")
        for i, length in enumerate((0, 1, HEADER - 1, HEADER, HEADER + 5)):
            ring.set_desc(i, where, length)
        ring.offer(0, 1, 2, 3, 4)
        await ring.until_used(5)
        assert await far.until(1) == [b"frame"]


@pytest.mark.parametrize("way", [TX, RX])
async def test_cve_2020_10725_a_bad_address_in_the_midst_of_a_batch(
    caplog: pytest.LogCaptureFixture, guest: Guest, far: Far, way: int
) -> None:
    """Where chains were taken in batches, an address that could not be translated was used all the same.

    Here each descriptor is looked up before its chain is taken; the good ones before a bad one are done.
    """
    ring = guest.ring(way, 64)
    frames = [frame(i, 60) for i in range(8)]
    async with connected(far.bridge) as front:
        await front.negotiate()
        await guest.send_memory(front)
        if way == TX:
            heads = put_frames(guest, frames, at=0x40000)
            for bad in (0, 2**64 - 64):
                ring.set_desc(30, bad, 72)
                ring.offer(*heads[:5], 30, *heads[5:])
                await ring.send_setup(front, base=ring.used_idx)
                await stopped(ring)
                await front.ask(Request.GET_VRING_BASE, state(way, 0))
                ring.avail_idx = ring.used_idx
            assert await far.until(10) == frames[:5] * 2
        else:
            for i in range(8):
                ring.set_desc(i, GUEST_BASE + BUFFER + 2048 * i, 2048, WRITE)
            ring.set_desc(5, 0, 2048, WRITE)
            await ring.send_setup(front)
            await front.barrier()
            ring.offer(*range(8))
            with trio.fail_after(10):
                while ring.used_idx < 5:  # frames that come before the ring runs are dropped
                    far.send(frames[0])
                    await trio.sleep(0.001)
                while not lines(caplog):
                    far.send(frames[0])
                    await trio.sleep(0.001)
            await stopped(ring)
            assert ring.used_idx == 5
    assert all("outside guest memory" in line for line in lines(caplog))


async def test_cve_2020_10726_the_same_message_again_and_again(guest: Guest) -> None:
    """A message that makes something, a mapping or a descriptor, made another each time, and kept them all.

    Here the new one takes the old one's place.
    """
    log = os.memfd_create("log", os.MFD_CLOEXEC)
    os.ftruncate(log, 4096)
    ours, theirs = socket.socketpair()
    ring = guest.ring(0)
    area = vu.LogArea(4096, 0).pack()
    table = vu.pack_table([guest.region])
    zero = vu.pack_u64(0)
    async with connected(Net()) as front:
        await front.negotiate()
        await guest.send_memory(front)
        await ring.send_setup(front)
        (await front.ask(Request.SET_LOG_BASE, area, [log])).close_fds()
        await front.send(Request.SET_BACKEND_REQ_FD, b"", [theirs.fileno()])
        await front.barrier()
        fds, maps = len(open_fds()), guest_mappings()
        for _ in range(300):
            await front.ask(Request.SET_LOG_BASE, area, [log])
            (await front.ask(Request.GET_INFLIGHT_FD, vu.Inflight(0, 0, 2, 128).pack())).close_fds()
            await front.send(Request.SET_MEM_TABLE, table, [guest.fd])
            await front.send(Request.SET_VRING_KICK, zero, [ring.kick])
            await front.send(Request.SET_VRING_CALL, zero, [ring.call])
            await front.send(Request.SET_VRING_ERR, zero, [ring.err])
            await front.send(Request.SET_VRING_KICK, vu.pack_u64(vu.VRING_NOFD))
            await front.send(Request.SET_VRING_KICK, zero, [ring.kick])
            await front.send(Request.SET_BACKEND_REQ_FD, b"", [theirs.fileno()])
        await front.barrier()
        assert guest_mappings() == maps
        assert len(open_fds()) == fds
    os.close(log)
    ours.close()
    theirs.close()


async def test_cve_2022_2132_header_spread_over_descriptors(guest: Guest, far: Far) -> None:
    """A device header that lay in more descriptors than expected was skipped wrongly, or for ever.

    Here header and frame are bytes of the chain, wherever its descriptors are cut, empty ones between them.
    """
    out, into = guest.ring(TX, 64), guest.ring(RX, 64)
    data = frame(1, 60)
    for i, byte in enumerate(bytes(HEADER) + data[:10]):
        guest.put(BUFFER + 64 * i, bytes([byte]))
        out.set_desc(2 * i, GUEST_BASE + BUFFER + 64 * i, 1, NEXT, 2 * i + 1)
        out.set_desc(2 * i + 1, GUEST_BASE + BUFFER, 0, NEXT, 2 * i + 2)
    out.set_desc(44, guest.put(BUFFER + 0x4000, data[10:]), 50)
    for i in range(36):  # 72 bytes in twos
        into.set_desc(i, GUEST_BASE + BUFFER + 0x8000 + 32 * i, 2, WRITE | (NEXT if i < 35 else 0), i + 1)
    async with connected(far.bridge) as front:
        await front.negotiate()
        await guest.send_memory(front)
        await out.send_setup(front)
        await into.send_setup(front)
        await front.barrier()
        out.offer(0)
        await out.until_used(1)
        assert await far.until(1) == [data]
        into.offer(0)
        with trio.fail_after(10):
            while not into.used_idx:
                far.send(data)
                await trio.sleep(0.001)
        assert into.used_element(0) == (0, HEADER + 60)
        pieces = [guest.mem[BUFFER + 0x8000 + 32 * i :][:2] for i in range(36)]
        assert b"".join(pieces) == bytes(10) + b"\1\0" + data


async def test_cve_2024_11614_offsets_in_a_header_that_lie_outside_the_frame(
    caplog: pytest.LogCaptureFixture, guest: Guest, far: Far
) -> None:
    """For a checksum the guest's header says where in the frame it belongs; the places were not checked.

    Here no such work is offered, a driver that takes it nevertheless is refused, and of the header of a frame
    that goes out not a byte is believed.
    """
    ring = guest.ring(TX)
    data = frame(1, 60)
    headers = [
        b"\xff" * HEADER,
        b"\1\1" + b"\xff\xff" * 5,
        b"\1\5\xff\xff\xff\xff" + b"\xfe\xff\xfe\xff" + b"\0\0",
    ]
    async with connected(far.bridge) as front:
        offered, _ = await front.negotiate()
        # Bits 0 to 14 of virtio 1.2, 5.1.3, but for MTU and MAC, are about checksums and segments.
        assert offered & 0x7FFF == 0
        await guest.send_memory(front)
        await ring.send_setup(front)
        for i, header in enumerate(headers):
            ring.set_desc(i, guest.put(BUFFER + 1024 * i, header + data), HEADER + 60)
        ring.offer(*range(len(headers)))
        await ring.until_used(len(headers))
        assert await far.until(len(headers)) == [data] * len(headers)
        assert lines(caplog) == []
        await front.send(Request.SET_FEATURES, vu.pack_u64(offered | NetFeature.CSUM))
        assert await front.ended()
    (line,) = lines(caplog)
    assert "not offered" in line


# --- October 2026 ---


@pytest.mark.parametrize("ahead", [17, 18, 1000, 0x7FFF, 0x8000, 0xFFFF])
async def test_october_2026_avail_index_unchecked(
    caplog: pytest.LogCaptureFixture, guest: Guest, ahead: int
) -> None:
    """The index said how many chains there are, and as many were taken, from a ring that does not hold them.

    Here an index that is further ahead than the ring is long, or behind, stops the ring.
    """
    device, ring = Echo(), guest.ring(0, 16)
    ring.set_desc(0, GUEST_BASE + BUFFER, 4)
    async with connected(device) as front:
        await front.negotiate()
        await guest.send_memory(front)
        await ring.send_setup(front)
        ring.offer(0)
        await ring.until_used(1)
        ring.avail_idx = (1 + ahead) & 0xFFFF
        ring.offer()
        await stopped(ring)
    (line,) = lines(caplog)
    assert "avail index jumped" in line
    assert len(device.seen) == 1


class Hoarder(Device):
    """Never answers."""

    def __init__(self) -> None:
        self.held: list[Chain] = []
        self.enough = trio.Event()

    async def handle_queue(self, queue: Queue) -> None:
        async for chain in queue:
            chain.keep()
            self.held.append(chain)
            if len(self.held) == 16:
                self.enough.set()


@pytest.mark.parametrize("hang_up", [False, True])
async def test_october_2026_cleanup_loop_without_end(guest: Guest, hang_up: bool) -> None:
    """What was under way was cleaned up until an index in guest memory was met, which the guest need not grant.

    Here what is given back, or let go, is what we hold; the driver's indices are not looked at.
    """
    device, ring = Hoarder(), guest.ring(0, 16)
    for i in range(16):
        ring.set_desc(i, GUEST_BASE + BUFFER, 4)
    maps = guest_mappings()
    async with connected(device) as front:
        await front.negotiate()
        await guest.send_memory(front)
        await ring.send_setup(front)
        ring.offer(*range(16))
        with trio.fail_after(10):
            await device.enough.wait()
        guest.put(ring.avail + 2, b"\xff\x7f")
        guest.put(ring.used + 2, b"\x55\xaa")
        if not hang_up:
            base = vu.VringState.unpack((await front.ask(Request.GET_VRING_BASE, state(0, 0))).payload)
            assert base.num == 0
            await front.barrier()
    assert guest_mappings() == maps


def test_october_2026_double_fetch_of_next_and_table_length(tmp_path: Path) -> None:
    """``next`` in an indirect table, or the table's length, was checked, and then read again from guest memory.

    Here a descriptor is copied once, and each entry's address is looked up before it is read. A thread that changes
    all of them meanwhile brings about broken rings, and nothing that a sanitizer sees.
    """
    numbers = run(FLIP.build(tmp_path), "pop", 200_000, 11)
    assert numbers["moved"] >= 200_000
    assert numbers["broken"] > 1000


async def test_october_2026_sizes_out_of_step_with_the_queue(
    caplog: pytest.LogCaptureFixture, guest: Guest
) -> None:
    """A ring's size was changed under what had been made for the old one.

    Here a running ring is stopped before its size changes, and at each start the addresses are looked up for the size
    of then.
    """
    ring = guest.ring(0, 16)
    async with connected(Net()) as front:
        await front.negotiate()
        await guest.send_memory(front)
        await ring.send_setup(front)
        await front.barrier()
        await front.send(Request.SET_VRING_NUM, state(0, 1024))
        await front.barrier()
        ring.set_desc(0, BUFFER, 16, WRITE)
        ring.offer(0)
        await front.barrier()
        assert ring.used_idx == 0
        assert lines(caplog) == []

    ring.avail_idx = 0
    u, end = guest.user, guest.size
    addr = vu.VringAddr(0, 0, u(end - 16 * 16), u(ring.used), u(ring.avail), 0).pack()
    async with connected(Net()) as front:  # 16 descriptors fit behind that address, 1024 do not
        await front.negotiate()
        await guest.send_memory(front)
        await ring.send_setup(front)
        await front.ask(Request.GET_VRING_BASE, state(0, 0))
        await front.send(Request.SET_VRING_ADDR, addr)
        await front.send(Request.SET_VRING_KICK, vu.pack_u64(0), [ring.kick])
        await front.barrier()
        await front.ask(Request.GET_VRING_BASE, state(0, 0))
        assert lines(caplog) == []
        await front.send(Request.SET_VRING_NUM, state(0, 1024))
        await front.send(Request.SET_VRING_KICK, vu.pack_u64(0), [ring.kick])
        assert await front.ended()
    (line,) = lines(caplog)
    assert "with 1024 entries is not inside one memory region" in line
