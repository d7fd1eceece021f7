"""A front-end that breaks the protocol: one clear line, the session ends, the server and its process live on."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest
import trio
import trio.testing

from tests.kit.hostile import Net, all_lines_from_here, guest_mappings, lines, open_fds, state
from tests.kit.raw_front_end import GUEST_BASE, Guest, connected
from vhostpc.backend import Device, Options
from vhostpc.wire import vhost_user as vu
from vhostpc.wire.vhost_user import ProtocolFeature, Request


@pytest.fixture
def guest() -> Iterator[Guest]:
    guest = Guest()
    yield guest
    guest.close()


async def refused(
    caplog: pytest.LogCaptureFixture, request: int, payload: bytes, fds: int, device: Device | None = None
) -> str:
    """The session ends because of this message; returns the one line that says why. Nothing stays open."""
    before = open_fds()
    null = os.open("/dev/null", os.O_RDWR)
    async with connected(device or Net(), Options(inband=True)) as front:
        await front.negotiate()
        all_lines_from_here(caplog)
        await front.send(request, payload, [null] * fds)
        assert await front.ended()
    os.close(null)
    assert open_fds() == before
    (line,) = lines(caplog)
    assert "Traceback" not in caplog.text
    return line


def wrong_sizes() -> Iterator[tuple[Request, int]]:
    for spec in vu.REQUESTS.values():
        if spec.min_size:
            yield spec.request, spec.min_size - 1
        if not spec.padded:
            yield spec.request, spec.max_size + 1
            yield spec.request, vu.MAX_PAYLOAD


@pytest.mark.parametrize(("request_", "size"), list(wrong_sizes()))
async def test_wrong_size(caplog: pytest.LogCaptureFixture, request_: Request, size: int) -> None:
    line = await refused(caplog, request_, bytes(size), vu.REQUESTS[request_].min_fds)
    assert request_.name in line
    assert f"{size} bytes" in line


@pytest.mark.parametrize("request_", [s.request for s in vu.REQUESTS.values()])
async def test_too_many_descriptors(caplog: pytest.LogCaptureFixture, request_: Request) -> None:
    spec = vu.REQUESTS[request_]
    fds = spec.max_fds + 1
    line = await refused(caplog, request_, bytes(spec.min_size), fds)
    assert "descriptors" in line


@pytest.mark.parametrize("request_", [s.request for s in vu.REQUESTS.values() if s.min_fds])
async def test_missing_descriptor(caplog: pytest.LogCaptureFixture, request_: Request) -> None:
    line = await refused(caplog, request_, bytes(vu.REQUESTS[request_].min_size), 0)
    assert f"{request_.name}: 0 descriptors" in line


@pytest.mark.parametrize(
    ("request_", "payload", "fds", "words"),
    [
        (Request.SET_VRING_NUM, state(2, 16), 0, "ring 2, but there are 2"),
        (Request.SET_VRING_NUM, state(0, 0), 0, "0 entries"),
        (Request.SET_VRING_NUM, state(0, 24), 0, "24 entries"),
        (Request.SET_VRING_NUM, state(0, 65536), 0, "65536 entries"),
        (Request.SET_VRING_BASE, state(0xFFFFFFFF, 0), 0, "there are 2"),
        (Request.SET_VRING_BASE, state(0, 0x10000), 0, "not an index"),
        (Request.GET_VRING_BASE, state(7, 0), 0, "ring 7"),
        (Request.SET_VRING_ENABLE, state(2, 1), 0, "ring 2"),
        (Request.SET_VRING_ENABLE, state(0, 2), 0, "expected 0 or 1"),
        (Request.VRING_KICK, state(9, 0), 0, "ring 9"),
        (Request.SET_VRING_ADDR, vu.VringAddr(5, 0, 0, 0, 0, 0).pack(), 0, "ring 5"),
        (Request.SET_VRING_KICK, vu.pack_u64(0xFF), 1, "ring 255"),
        (Request.SET_VRING_KICK, vu.pack_u64(0), 1, "not an eventfd"),
        (Request.SET_VRING_CALL, vu.pack_u64(0), 1, "not an eventfd"),
        (Request.SET_VRING_ERR, vu.pack_u64(1), 1, "not an eventfd"),
        (Request.SET_VRING_KICK, vu.pack_u64(vu.VRING_NOFD), 1, "no-descriptor bit"),
        (Request.SET_VRING_CALL, vu.pack_u64(0), 0, "no-descriptor bit"),
        (Request.SET_BACKEND_REQ_FD, b"", 1, "not a socket"),
        (Request.SET_FEATURES, vu.pack_u64(1 << 63), 0, "not offered"),
        (Request.SET_PROTOCOL_FEATURES, vu.pack_u64(ProtocolFeature.INBAND_NOTIFICATIONS), 0, "INBAND"),
        (Request.SET_LOG_BASE, vu.LogArea(4096, 0).pack(), 1, "dirty log"),
        (Request.SET_LOG_BASE, vu.LogArea(2**64 - 1, 4096).pack(), 1, "dirty log"),
        (Request.GET_CONFIG, vu.ConfigSpace(300, 0, b"").pack(), 0, "GET_CONFIG"),
        (Request.GET_CONFIG, b"\0\0\0\0\xff\xff\xff\xff\0\0\0\0", 0, "GET_CONFIG"),
        (Request.SET_CONFIG, vu.ConfigSpace(20, 0, b"12345").pack(), 0, "SET_CONFIG failed"),
        (Request.NET_SET_MTU, vu.pack_u64(1), 0, "NET_SET_MTU failed"),
        (Request.SET_MEM_TABLE, (2).to_bytes(4, "little") + bytes(36), 1, "2 regions in 40 bytes"),
        (Request.SET_MEM_TABLE, (2**32 - 1).to_bytes(4, "little") + bytes(36), 1, "regions"),
        (Request.SET_MEM_TABLE, vu.pack_table([vu.MemoryRegion(0, 4096, 0, 0)]), 0, "1 regions and 0"),
        (Request.SET_MEM_TABLE, vu.pack_table([vu.MemoryRegion(0, 4096, 0, 0)]), 1, "memory region"),
        (Request.ADD_MEM_REG, bytes(8), 0, "ADD_MEM_REG: 8 bytes"),
        (Request.REM_MEM_REG, bytes(8), 0, "REM_MEM_REG: 8 bytes"),
        (Request.REM_MEM_REG, bytes(40), 0, "REM_MEM_REG failed"),
    ],
)
async def test_wrong_content(
    caplog: pytest.LogCaptureFixture, request_: Request, payload: bytes, fds: int, words: str
) -> None:
    before = open_fds()
    null = os.open("/dev/null", os.O_RDWR)
    async with connected(Net(), Options(inband=True)) as front:
        await front.negotiate()
        all_lines_from_here(caplog)
        await front.send(request_, payload, [null] * fds)
        assert await front.ended()
    os.close(null)
    assert open_fds() == before
    assert words in "\n".join(lines(caplog))
    assert "Traceback" not in caplog.text


R = vu.MemoryRegion
SIZE = 1 << 20


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ([R(0, 0, 0, 0)], "empty"),
        ([R(0, SIZE + 4096, 0, 0)], "after the end"),
        ([R(0, SIZE, 0, 4096)], "after the end"),
        ([R(0, 2**64 - 4096, 0, 8192)], "empty, wrapping"),
        ([R(0, 4096, 0, 2**64 - 4096)], "empty, wrapping"),
        ([R(0, SIZE, 0, 1)], "after the end"),
        ([R(2**64 - 4096, 8192, 0, 0)], "wrapping"),
        ([R(0, 8192, 2**64 - 4096, 0)], "wrapping"),
        ([R(0, 8192, 0, 0), R(4096, 8192, 0x10000, 0)], "overlaps"),
        ([R(0, 8192, 0, 0), R(0x10000, 8192, 4096, 0)], "overlaps"),
        ([R(0, 8192, 0, 0), R(0, 8192, 0, 0)], "overlaps"),
        ([R(0, 4097, 0, 0), R(4096, 4096, 0x10000, 0)], "overlaps"),
    ],
)
@pytest.mark.parametrize("slots", [False, True])
async def test_wrong_regions(
    caplog: pytest.LogCaptureFixture, guest: Guest, table: list[vu.MemoryRegion], words: str, slots: bool
) -> None:
    if slots and len(table) == 2 and table[0] == table[1]:
        table = [
            table[0],
            R(0, 8192, 4096, 0),
        ]  # added twice as it is, it is what QEMU 7.2 does, and no error
    before, maps = open_fds(), guest_mappings()
    async with connected(Net()) as front:
        await front.negotiate()
        if slots:
            for region in table:
                await front.send(Request.ADD_MEM_REG, vu.pack_single_region(region), [guest.fd])
        else:
            await front.send(Request.SET_MEM_TABLE, vu.pack_table(table), [guest.fd] * len(table))
        assert await front.ended()
    assert open_fds() == before
    assert guest_mappings() == maps
    (line,) = lines(caplog)
    assert words in line


@pytest.mark.parametrize("which", ["desc", "avail", "used", "all", "misaligned"])
async def test_ring_outside_memory(caplog: pytest.LogCaptureFixture, guest: Guest, which: str) -> None:
    ring = guest.ring(0)
    end = guest.user(guest.size)
    where = {
        "desc": (end - 128, guest.user(ring.used), guest.user(ring.avail)),
        "avail": (guest.user(ring.desc), guest.user(ring.used), end - 16),
        "used": (guest.user(ring.desc), end - 16, guest.user(ring.avail)),
        "all": (0, 0, 0),
        "misaligned": (guest.user(ring.desc) + 8, guest.user(ring.used), guest.user(ring.avail)),
    }[which]
    async with connected(Net()) as front:
        await front.negotiate()
        await guest.send_memory(front)
        await front.send(Request.SET_VRING_NUM, state(0, 16))
        await front.send(Request.SET_VRING_ADDR, vu.VringAddr(0, 0, *where, 0).pack())
        await front.send(Request.SET_VRING_KICK, vu.pack_u64(0), [ring.kick])
        await front.send(Request.SET_VRING_ENABLE, state(0, 1))
        assert await front.ended()
    (line,) = lines(caplog)
    assert "ring 0" in line


NEXT, WRITE, INDIRECT = 1, 2, 4
BUFFER = GUEST_BASE + 0x80000
Chain = list[tuple[int, int, int, int]]


def indirect(guest: Guest, *descs: tuple[int, int, int, int]) -> int:
    at = 0x90000
    for i, (addr, length, flags, following) in enumerate(descs):
        guest.put(
            at + 16 * i,
            addr.to_bytes(8, "little")
            + length.to_bytes(4, "little")
            + flags.to_bytes(2, "little")
            + following.to_bytes(2, "little"),
        )
    return GUEST_BASE + at


@pytest.mark.parametrize(
    ("chain", "words"),
    [
        (lambda g: [(BUFFER, 16, NEXT, 1), (BUFFER, 16, NEXT, 0)], "loop"),
        (lambda g: [(BUFFER, 16, NEXT, 0)], "loop"),
        (lambda g: [(BUFFER, 16, NEXT, 16)], "outside the ring"),
        (lambda g: [(BUFFER, 16, NEXT, 65535)], "outside the ring"),
        (lambda g: [(BUFFER, 16, WRITE | NEXT, 1), (BUFFER, 16, 0, 0)], "follows a writable"),
        (lambda g: [(0, 16, 0, 0)], "outside guest memory"),
        (lambda g: [(GUEST_BASE + g.size - 8, 16, WRITE, 0)], "outside guest memory"),
        (lambda g: [(2**64 - 8, 16, 0, 0)], "outside guest memory"),
        (lambda g: [(BUFFER, 2**32 - 1, 0, 0)], "outside guest memory"),
        (lambda g: [(indirect(g, (BUFFER, 4, 0, 0)), 15, INDIRECT, 0)], "multiple of 16"),
        (lambda g: [(indirect(g, (BUFFER, 4, 0, 0)), 0, INDIRECT, 0)], "multiple of 16"),
        (
            lambda g: [(indirect(g, (BUFFER, 4, 0, 0)), 16, INDIRECT | NEXT, 1), (BUFFER, 1, 0, 0)],
            "with a next",
        ),
        (lambda g: [(indirect(g, (BUFFER, 16, INDIRECT, 0)), 16, INDIRECT, 0)], "inside an indirect"),
        (lambda g: [(indirect(g, (BUFFER, 4, NEXT, 1)), 16, INDIRECT, 0)], "outside its indirect table"),
        (lambda g: [(indirect(g, (BUFFER, 4, NEXT, 0)), 16, INDIRECT, 0)], "loop in an indirect"),
        (lambda g: [(GUEST_BASE + g.size - 16, 32, INDIRECT, 0)], "outside guest memory"),
        (lambda g: [(2**64 - 16, 2**32 - 16, INDIRECT, 0)], "32768 entries"),
        (lambda g: [(2**64 - 16, 32, INDIRECT, 0)], "outside guest memory"),
    ],
)
async def test_broken_chains(
    caplog: pytest.LogCaptureFixture, guest: Guest, chain: Callable[[Guest], Chain], words: str
) -> None:
    """The ring stops, its error descriptor is signalled, the session and the other ring go on."""
    ring, other = guest.ring(0), guest.ring(1)
    async with connected(Net()) as front:
        await front.negotiate()
        await guest.send_memory(front)
        await ring.send_setup(front)
        await other.send_setup(front)
        # The last descriptor of an indirect table at the end of memory continues behind it.
        guest.put(guest.size - 16, (BUFFER).to_bytes(8, "little") + b"\4\0\0\0\1\0\1\0")
        for i, desc in enumerate(chain(guest)):
            ring.set_desc(i, *desc)
        ring.offer(0)
        with trio.fail_after(10):
            await trio.lowlevel.wait_readable(ring.err)
        (line,) = lines(caplog)
        assert "ring 0 stopped" in line
        assert words in line
        assert ring.used_idx == 0
        other.set_desc(0, BUFFER, 16, WRITE)
        other.offer(0)
        await other.until_used(1)
        # Set up again, the ring works.
        all_lines_from_here(caplog)
        await front.ask(Request.GET_VRING_BASE, state(0, 0))
        ring.set_desc(3, BUFFER, 16, WRITE)
        ring.avail_idx = 0
        await ring.send_setup(front)
        ring.offer(3)
        await ring.until_used(1)
        assert lines(caplog) == []


async def test_avail_index_jumps(caplog: pytest.LogCaptureFixture, guest: Guest) -> None:
    ring = guest.ring(0)
    async with connected(Net()) as front:
        await front.negotiate()
        await guest.send_memory(front)
        await ring.send_setup(front)
        ring.avail_idx = 100
        ring.offer()
        with trio.fail_after(10):
            await trio.lowlevel.wait_readable(ring.err)
    (line,) = lines(caplog)
    assert "jumped" in line


async def test_header_that_is_none(caplog: pytest.LogCaptureFixture) -> None:
    for data, words in (
        (vu.HEADER.pack(1, 0, 0), "version is not 1"),
        (vu.HEADER.pack(1, 2, 0), "version is not 1"),
        (vu.HEADER.pack(1, 1, 4097), "4097 bytes"),
        (vu.HEADER.pack(1, 1, 2**32 - 1), "4294967295 bytes"),
        (vu.HEADER.pack(1, 5, 0), "a reply"),
    ):
        all_lines_from_here(caplog)
        async with connected(Net()) as front:
            await front.send_bytes(data)
            assert await front.ended()
        (line,) = lines(caplog)
        assert words in line


async def test_more_descriptors_than_a_message_may_have(caplog: pytest.LogCaptureFixture) -> None:
    before = open_fds()
    null = os.open("/dev/null", os.O_RDWR)
    async with connected(Net()) as front:
        await front.send(Request.SET_OWNER, b"", [null] * 200)
        assert await front.ended()
    os.close(null)
    assert open_fds() == before
    (line,) = lines(caplog)
    assert "descriptors" in line


async def test_not_offered_is_declined() -> None:
    """An unknown or not offered request with NEED_REPLY is answered 1, its descriptors are closed."""
    null = os.open("/dev/null", os.O_RDWR)
    async with connected(Net()) as front:
        await front.negotiate()
        before = open_fds()
        for number in (0, 22, 23, 26, 27, 33, 35, 41, 42, 43, 44, 99, 2**32 - 1):
            assert await front.ack(number, bytes(8), [null, null]) == 1
        assert open_fds() == before
        # Without NEED_REPLY nothing is said, and the session goes on.
        await front.send(77, bytes(100), [null])
        await front.barrier()
        assert await front.ack(Request.SET_CONFIG, vu.ConfigSpace(0, 0, b"no").pack()) == 1
        assert await front.ack(Request.SET_CONFIG, vu.ConfigSpace(0, 0, b"ok").pack()) == 0
        assert await front.ack(Request.NET_SET_MTU, vu.pack_u64(1)) == 1
        config = vu.ConfigSpace.unpack(
            (await front.ask(Request.GET_CONFIG, bytes(4) + b"\x20" + bytes(39))).payload
        )
        assert config.data == bytes(range(24)) + bytes(8)
    os.close(null)


async def test_half_a_message_and_silence() -> None:
    """It holds up its own session only; the connection's end ends it."""
    async with connected(Net()) as silent:
        await silent.send_bytes(vu.encode(Request.SET_FEATURES, bytes(8))[:15])
        async with connected(Net()) as front:
            await front.negotiate()
            await front.barrier()
