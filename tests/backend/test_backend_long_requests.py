"""Requests of any length that a ring can hold: served in pieces by a device, and by the disk."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from tests.backend.test_backend_unordered import Selective, base_of, used
from tests.examples.test_examples_blk import IN, IOERR, OK, OUT
from tests.kit.absent_guest import PAGE, AbsentGuest
from tests.kit.raw_front_end import GUEST_BASE, INDIRECT, NEXT, WRITE, Guest, RawFrontEnd, Ring, connected
from tests.kit.until import until
from vhostpc.backend import Chain, Device, Queue
from vhostpc.backend import disk as blk
from vhostpc.wire import vhost_user as vu
from vhostpc.wire.vhost_user import Feature, Request

MIB = 1 << 20
LONG = 100 * MIB
TABLE, HEADER, STATUS, DATA = 0x100000, 0x200000, 0x201000, 0x400000


@pytest.fixture
def guest() -> Iterator[Guest]:
    guest = Guest(DATA + LONG)
    yield guest
    guest.close()


def content(size: int, seed: int) -> bytes:
    """Bytes in which every 4 KiB name their place."""
    return b"".join(struct.pack("<QQ", seed, i) * 256 for i in range(size // PAGE))


def parts(size: int, each: int, backwards: bool) -> list[tuple[int, int]]:
    """(address, length) of the guest's buffers, in the order of their bytes."""
    found = [(GUEST_BASE + DATA + at, min(each, size - at)) for at in range(0, size, each)]
    return found[::-1] if backwards else found


def ask(
    guest: Guest, ring: Ring, kind: int, sector: int, buffers: list[tuple[int, int]], head: int = 0
) -> None:
    """One request by an indirect table; each head has a table and a status of its own."""
    guest.put(HEADER + 16 * head, struct.pack("<IIQ", kind, 0, sector))
    guest.put(STATUS + head, b"\xee")
    flag = WRITE if kind == IN else 0
    descs = [(GUEST_BASE + HEADER + 16 * head, 16, 0), *((a, n, flag) for a, n in buffers)]
    descs.append((GUEST_BASE + STATUS + head, 1, WRITE))
    table = b"".join(
        struct.pack("<QIHH", a, n, f | (NEXT if i < len(descs) else 0), i % 65536 if i < len(descs) else 0)
        for i, (a, n, f) in enumerate(descs, 1)
    )
    at = TABLE + 0x1000 * head
    ring.set_desc(head, guest.put(at, table), len(table), INDIRECT)
    ring.offer(head)


async def set_up(front: RawFrontEnd, guest: Guest, **options: Any) -> Ring:
    await front.negotiate(**options)
    await guest.send_memory(front)
    ring = guest.ring(0, 64)
    await ring.send_setup(front)
    return ring


@pytest.mark.parametrize("each", [LONG, 4 * PAGE], ids=["one segment", "6400 segments"])
async def test_disk_reads_and_writes_a_hundred_mebibytes(guest: Guest, tmp_path: Path, each: int) -> None:
    """In one request each way, the buffers lying backwards in memory: firmware loads an image like that."""
    first, second = content(LONG, 1), content(LONG, 2)
    image = tmp_path / "disk"
    image.write_bytes(bytes(MIB) + first)
    buffers = parts(LONG, each, backwards=True)
    async with connected(blk.Disk(str(image))) as front:
        ring = await set_up(front, guest)
        ask(guest, ring, IN, MIB // 512, buffers)
        await ring.until_used(1)
        assert guest.mem[STATUS] == OK
        assert ring.used_element(0) == (0, LONG + 1)
        assert b"".join(guest.mem[a - GUEST_BASE : a - GUEST_BASE + n] for a, n in buffers) == first
        at = 0
        for address, length in buffers:
            guest.put(address - GUEST_BASE, second[at : at + length])
            at += length
        ask(guest, ring, OUT, MIB // 512, buffers)
        await ring.until_used(2)
        assert guest.mem[STATUS] == OK
        assert ring.used_element(1) == (0, 1)
    assert image.read_bytes() == bytes(MIB) + second


async def test_long_requests_that_fail(
    guest: Guest, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Beyond the disk's end, or in the middle of the medium: an error status, and the ring goes on."""
    device = blk.Disk(memory="100M")
    buffers = parts(LONG, LONG, backwards=False)
    done = 0

    async def fails(offset: int, data: memoryview, *, through: bool) -> None:
        nonlocal done
        done += 1
        if done == 50:
            raise OSError(5, "Input/output error")

    async with connected(device) as front:
        ring = await set_up(front, guest)
        for i, kind in enumerate((IN, OUT)):
            ask(guest, ring, kind, 1, buffers)
            await ring.until_used(1 + i)
            assert guest.mem[STATUS] == IOERR
        monkeypatch.setattr(device.medium, "write", fails)
        ask(guest, ring, OUT, 0, buffers)
        await ring.until_used(3)
        assert guest.mem[STATUS] == IOERR
        assert done == 50
        monkeypatch.undo()
        ask(guest, ring, OUT, 0, buffers)
        await ring.until_used(4)
        assert guest.mem[STATUS] == OK
    assert "OUT of 104857600 bytes at 0: Input/output error" in caplog.text


async def test_many_long_requests_share_a_few_buffers(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sixteen requests of 64 MiB each, all into the same buffers: what is in memory for them is eight pieces."""
    device = blk.Disk(memory="100M")
    size, now, most = 64 * MIB, 0, 0
    real = device.medium.read

    async def read(offset: int, length: int) -> bytes:
        nonlocal now, most
        now += length
        most = max(most, now)
        try:
            return await real(offset, length)
        finally:
            now -= length

    monkeypatch.setattr(device.medium, "read", read)
    async with connected(device) as front:
        ring = await set_up(front, guest)
        for head in range(16):
            ask(guest, ring, IN, 0, parts(size, size, backwards=False), head)
        await ring.until_used(16)
        assert guest.mem[STATUS : STATUS + 16] == bytes(16)
    assert MIB < most <= 8 * MIB


@pytest.mark.parametrize("kind", [IN, OUT])
async def test_stop_in_the_midst_gives_it_back_whole(
    guest: Guest, monkeypatch: pytest.MonkeyPatch, kind: int
) -> None:
    """A long request that is at work when its ring stops comes again, from its first byte."""
    device = blk.Disk(memory="100M")
    offsets: list[int] = []
    some = trio.Event()
    name = "read" if kind == IN else "write"
    real = getattr(device.medium, name)

    async def slow(offset: int, *args: Any, **kwargs: Any) -> Any:
        offsets.append(offset)
        if len(offsets) == 3:
            some.set()
        if len(offsets) >= 3 and not stopped:
            await trio.sleep(0.05)  # a medium that would take 5 s for the whole
        return await real(offset, *args, **kwargs)

    stopped = False
    monkeypatch.setattr(device.medium, name, slow)
    async with connected(device) as front:
        ring = await set_up(front, guest)
        guest.put(DATA, content(LONG, 7))
        ask(guest, ring, kind, 0, parts(LONG, LONG, backwards=False))
        await some.wait()
        assert await base_of(front) == 0 == ring.used_idx
        assert len(offsets) < 100
        assert guest.mem[STATUS] == 0xEE
        stopped = True
        offsets.clear()
        await ring.send_setup(front)
        await ring.until_used(1)
        assert guest.mem[STATUS] == OK
        assert offsets == list(range(0, LONG, MIB))
    if kind == OUT:
        assert os.pread(device.medium.fd, LONG, 0) == content(LONG, 7)


async def test_pieces_are_logged(guest: Guest) -> None:
    """Every page that a long read filled is in the dirty log, and so are the status and the used ring."""
    log = os.memfd_create("log", os.MFD_CLOEXEC)
    size = (GUEST_BASE + guest.size) // PAGE // 8 + 1
    os.ftruncate(log, size)
    async with connected(blk.Disk(memory="100M")) as front:
        features, _ = await front.negotiate()
        await guest.send_memory(front)
        (await front.ask(Request.SET_LOG_BASE, vu.LogArea(size, 0).pack(), [log])).close_fds()
        await front.send(Request.SET_FEATURES, vu.pack_u64(features | Feature.LOG_ALL))
        ring = guest.ring(0, 64)
        await ring.send_setup(front, log=1)
        ask(guest, ring, IN, 0, parts(3 * MIB, 3 * MIB, backwards=False))
        await ring.until_used(1)
    bits = os.pread(log, size, 0)
    os.close(log)
    dirty = {page for page in range(size * 8) if bits[page // 8] >> page % 8 & 1}
    expected = set(range((GUEST_BASE + DATA) // PAGE, (GUEST_BASE + DATA + 3 * MIB) // PAGE))
    assert dirty == expected | {(GUEST_BASE + STATUS) // PAGE, (GUEST_BASE + ring.used) // PAGE}


class Reverser(Device):
    """Answers a request of any length with its bytes and their number, a piece at a time."""

    def __init__(self) -> None:
        self.seen: list[Chain] = []

    async def handle_queue(self, queue: Queue) -> None:
        async for chain in queue.unordered():
            self.seen.append(chain)
            for at in range(0, chain.readable, 300_000):
                piece = await chain.read_at(at, min(300_000, chain.readable - at))
                await chain.write_at(chain.readable - at - len(piece), piece[::-1])
            chain.seek(chain.readable)
            chain.write(struct.pack("<Q", chain.readable))


class Naive(Device):
    """Reads its requests whole."""

    async def handle_queue(self, queue: Queue) -> None:
        async for chain in queue:
            chain.write(chain.read()[: chain.writable])


def offer(guest: Guest, ring: Ring, readable: int, writable: int) -> None:
    """The readable bytes at DATA in two descriptors, the writable ones behind them in two."""
    base, half = GUEST_BASE + DATA, readable // 2
    ring.set_desc(0, base, half, NEXT, 1)
    ring.set_desc(1, base + half, readable - half, NEXT, 2)
    ring.set_desc(2, base + readable, 1000, NEXT | WRITE, 3)
    ring.set_desc(3, base + readable + 1000, writable - 1000, WRITE)
    ring.offer(0)


@pytest.mark.parametrize("size", [2000, 262144, 262145, 3_000_001])
async def test_read_at_and_write_at(guest: Guest, size: int) -> None:
    device = Reverser()
    async with connected(device) as front:
        ring = await set_up(front, guest)
        data = os.urandom(size)
        guest.put(DATA, data)
        offer(guest, ring, size, size + 9)
        await ring.until_used(1)
        assert ring.used_element(0) == (0, size + 8)
        found = guest.mem[DATA + size : DATA + 2 * size + 8]
        assert found[:size] == data[::-1]
        assert struct.unpack("<Q", found[size:]) == (size,)
    (chain,) = device.seen
    for call in (lambda: chain.read_at(0, 1), lambda: chain.write_at(0, b"x")):
        with pytest.raises(ValueError, match="completed"):
            await call()
    with pytest.raises(ValueError, match="completed"):
        chain.seek(0)


async def test_wrong_ranges_and_completion_in_the_midst(guest: Guest) -> None:
    """What a device may get wrong is said to it, and nothing is copied."""

    class Wrong(Device):
        async def handle_queue(self, queue: Queue) -> None:
            async for chain in queue:
                for offset, length in ((-1, 1), (0, 400_001), (400_001, 0), (1 << 63, 1)):
                    with pytest.raises(ValueError, match="400000 readable bytes"):
                        await chain.read_at(offset, length)
                for offset, data in ((-1, b"x"), (1998, b"xyz"), (2001, b"")):
                    with pytest.raises(ValueError, match="2000 writable bytes"):
                        await chain.write_at(offset, data)
                assert chain.peek(3) == b"abc"
                assert len(chain.peek(400_000)) == 262_144
                chain.write(b"0")
                with pytest.raises(ValueError, match="already"):
                    chain.seek(2)

    async with connected(Wrong()) as front:
        ring = await set_up(front, guest)
        guest.put(DATA, b"abc")
        offer(guest, ring, 400_000, 2000)
        await ring.until_used(1)
        assert ring.used_element(0) == (0, 1)


async def test_device_that_reads_whole_requests(guest: Guest, caplog: pytest.LogCaptureFixture) -> None:
    """256 KiB are read as ever; a longer one stops the ring of such a device, with a sentence."""
    async with connected(Naive()) as front:
        ring = await set_up(front, guest)
        guest.put(DATA, b"x" * 262_144)
        offer(guest, ring, 262_144, 262_144)
        await ring.until_used(1)
        assert ring.used_element(0) == (0, 262_144)
        offer(guest, ring, 262_145, 2000)
        with trio.fail_after(10):
            await trio.lowlevel.wait_readable(ring.err)
        await front.barrier()
    assert "a request of 262145 bytes" in caplog.text


async def test_chain_as_long_as_a_table_may_be(guest: Guest) -> None:
    """32768 descriptors of an indirect table, half of them readable, on a ring of four."""
    half = 16384
    async with connected(Reverser()) as front:
        await front.negotiate()
        await guest.send_memory(front)
        ring = guest.ring(0, 4)
        await ring.send_setup(front)
        data = os.urandom(half - 8)
        guest.put(DATA, data)
        table = b"".join(
            struct.pack("<QIHH", GUEST_BASE + DATA + i, 1, NEXT | (WRITE if i >= half - 8 else 0), i + 1)
            for i in range(2 * half - 1)
        ) + struct.pack("<QIHH", GUEST_BASE + DATA + 2 * half, 1, WRITE, 0)
        ring.set_desc(1, guest.put(TABLE, table), len(table), INDIRECT)
        ring.offer(1)
        await ring.until_used(1)
        assert ring.used_element(0) == (1, half)
        assert guest.mem[DATA + half - 8 : DATA + 2 * (half - 8)] == data[::-1]


# --- in postcopy

ABSENT_DATA, ABSENT_ANSWER = 0x100, 0x300  # pages


@pytest.fixture
def absent() -> Iterator[AbsentGuest]:
    guest = AbsentGuest(8 * MIB)
    yield guest
    guest.close()


def absent_request(guest: AbsentGuest, size: int) -> tuple[Ring, bytes]:
    """A long request to a Reverser whose pages have not come, and behind it a short one."""
    ring = guest.ring(0, 16)
    data = os.urandom(size)
    ring.set_desc(0, guest.put(ABSENT_DATA * PAGE, data), size, NEXT, 1)
    ring.set_desc(1, GUEST_BASE + ABSENT_ANSWER * PAGE, size + 8, WRITE)
    ring.set_desc(2, guest.put(0x600 * PAGE, b"short"), 5, NEXT, 3)
    ring.set_desc(3, GUEST_BASE + 0x601 * PAGE, 64, WRITE)
    for i, head in enumerate((0, 2)):
        struct.pack_into("<H", guest.image, ring.avail + 4 + 2 * i, head)
    struct.pack_into("<H", guest.image, ring.avail + 2, 2)
    return ring, data


class Beside(Reverser):
    """The same, each request in a task of its own."""

    async def handle_queue(self, queue: Queue) -> None:
        async def work(chain: Chain) -> None:
            for at in range(0, chain.readable, PAGE):
                piece = await chain.read_at(at, min(PAGE, chain.readable - at))
                await chain.write_at(chain.readable - at - len(piece), piece[::-1])
            chain.seek(chain.readable)
            chain.write(struct.pack("<Q", chain.readable))
            chain.complete()

        async with trio.open_nursery() as nursery:
            async for chain in queue.unordered():
                chain.keep()
                self.seen.append(chain)
                nursery.start_soon(work, chain)


async def started(guest: AbsentGuest, front: RawFrontEnd) -> None:
    await front.negotiate()
    await guest.advise(front)
    assert await guest.listen(front) == 0
    await guest.share_table(front)
    await guest.rings[0].send_setup(front)


@pytest.mark.ufd
@pytest.mark.parametrize(
    "held",
    [ABSENT_DATA + 100, ABSENT_ANSWER + 20, ABSENT_DATA + 1],
    ids=["data", "answer", "data that is loaded"],
)
async def test_a_piece_waits_and_nothing_else_does(absent: AbsentGuest, held: int) -> None:
    """The message loop, and the other request, go on; a piece's page is asked for and not touched before."""
    size = 128 * PAGE
    ring, data = absent_request(absent, size)
    pages = Selective(absent, held)
    async with connected(Beside()) as front, trio.open_nursery() as nursery:
        await started(absent, front)
        nursery.start_soon(pages.run)
        await until(lambda: used(absent, ring) == 1 and held in pages.waiting)
        assert held in absent.holes()
        assert os.pread(absent.fd, 5, 0x601 * PAGE) == b"trohs"
        await front.barrier()
        pages.let_go()
        await until(lambda: used(absent, ring) == 2)
        assert os.pread(absent.fd, size, ABSENT_ANSWER * PAGE) == data[::-1]
        assert await base_of(front) == 2
        absent.place_rest()
        await absent.end(front)
        nursery.cancel_scope.cancel()


@pytest.mark.ufd
@pytest.mark.parametrize("change", ["pause", "stop", "loss"])
async def test_change_while_a_piece_waits(absent: AbsentGuest, change: str) -> None:
    """Another call descriptor, a stop, and the end of the front-end, while a long request waits for a page."""
    size, held = 128 * PAGE, ABSENT_DATA + 100
    ring, data = absent_request(absent, size)
    pages = Selective(absent, held)
    device = Beside()
    async with connected(device) as front, trio.open_nursery() as nursery:
        await started(absent, front)
        nursery.start_soon(pages.run)
        await until(lambda: used(absent, ring) == 1 and held in pages.waiting)
        if change == "loss":
            front.close()
            nursery.cancel_scope.cancel()
            return
        if change == "pause":
            await front.send(Request.SET_VRING_KICK, vu.pack_u64(0), [ring.kick])
            pages.let_go()
        else:  # a younger request is answered: this one cannot be given back, and the stop waits for it
            await front.send(Request.GET_VRING_BASE, vu.VringState(0, 0).pack())
            await trio.testing.wait_all_tasks_blocked(0.05)
            assert used(absent, ring) == 1
            pages.let_go()
            reply = await front.receive()
            assert reply is not None
            assert vu.VringState.unpack(reply.payload).num == 2
        await until(lambda: used(absent, ring) == 2)
        assert os.pread(absent.fd, size, ABSENT_ANSWER * PAGE) == data[::-1]
        absent.place_rest()
        await absent.end(front)
        nursery.cancel_scope.cancel()


# --- what a disk says of its segments


async def seg_max(front: RawFrontEnd) -> int:
    reply = await front.ask(Request.GET_CONFIG, struct.pack("<III", 0, 57, 0) + bytes(57))
    return int(struct.unpack_from("<I", reply.payload, 12 + 12)[0])


@pytest.mark.parametrize(
    ("hide", "size", "told"),
    [
        (0, 64, 126),
        (Feature.INDIRECT_DESC, 64, 62),
        (Feature.INDIRECT_DESC, 256, 126),
        (Feature.INDIRECT_DESC, 4, 2),
    ],
)
async def test_segments_fit_the_ring(guest: Guest, hide: int, size: int, told: int) -> None:
    """A request that can never fit its ring hangs the guest that tries."""
    async with connected(blk.Disk(memory="1M")) as front:
        # What a front-end is told that asks before it says which features there will be: QEMU is one.
        await front.send(Request.SET_PROTOCOL_FEATURES, vu.pack_u64(vu.ProtocolFeature.CONFIG))
        assert await seg_max(front) == 62
        await front.negotiate(hide=hide)
        await front.send(Request.SET_VRING_NUM, vu.VringState(0, size).pack())
        assert await seg_max(front) == told
    async with connected(blk.Disk(memory="1M", ring_size="16")) as front:
        await front.send(Request.SET_PROTOCOL_FEATURES, vu.pack_u64(vu.ProtocolFeature.CONFIG))
        assert await seg_max(front) == 14
