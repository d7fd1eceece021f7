"""Sessions that go wrong over time: in any order, cut off at any byte, by the thousand. Nothing is left behind."""

from __future__ import annotations

import gc
import itertools
import os
import resource
import socket
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import pytest
import trio

from tests.kit.hostile import (
    Message,
    Net,
    Scripts,
    all_lines_from_here,
    guest_mappings,
    lines,
    open_fds,
    quiet,
    state,
)
from tests.kit.raw_front_end import GUEST_BASE, WRITE, Guest, RawFrontEnd, connected, store16
from tests.kit.shortages import descriptors_left
from tests.kit.until import until
from vhostpc.backend import Options, serve, serve_connection
from vhostpc.wire import vhost_user as vu
from vhostpc.wire.vhost_user import Request

BUFFER = GUEST_BASE + 0x80000


@pytest.fixture
def guest() -> Iterator[Guest]:
    guest = Guest()
    ring = guest.ring(0)
    ring.set_desc(0, BUFFER, 16, WRITE)
    ring.offer(0)
    yield guest
    guest.close()


@pytest.fixture
def scripts(guest: Guest) -> Iterator[Scripts]:
    scripts = Scripts(guest)
    yield scripts
    scripts.close()


def cuts(script: Sequence[Message]) -> Iterator[tuple[list[Message], bytes, tuple[int, ...]]]:
    """The session cut off before each of its bytes: whole messages, the part of the next, its descriptors."""
    for i, message in enumerate(script):
        for length in range(len(message.data)):
            yield list(script[:i]), message.data[:length], message.fds
    yield list(script), b"", ()


@pytest.mark.ufd
@pytest.mark.parametrize("kind", ["calm", "postcopy"])
async def test_disconnect_at_every_byte(
    caplog: pytest.LogCaptureFixture, scripts: Scripts, kind: str
) -> None:
    """Cut inside a message it is one line, at its end none; each time the process has what it had before."""
    device = Net()
    fds: dict[str, str] = {}
    maps = 0
    for whole, part, part_fds in cuts(getattr(scripts, kind)):
        all_lines_from_here(caplog)
        async with connected(device) as front:
            if not fds:
                await front.barrier()
            for message in whole:
                await message.play(front)
            if part:
                await front.send_bytes(part, part_fds)
        told = [line for line in lines(caplog) if "lost in postcopy" not in line]
        assert len(told) == bool(part), (whole[-1:], part, told)
        assert all("in the middle of a message" in line for line in told)
        assert "Traceback" not in caplog.text
        if not fds:
            fds, maps = open_fds(), guest_mappings()
        assert open_fds() == fds, (whole[-1:], part)
        assert guest_mappings() == maps, (whole[-1:], part)


def all_mappings() -> int:
    return len(Path("/proc/self/maps").read_text().splitlines())


@pytest.mark.ufd
async def test_a_thousand_sessions_leak_nothing(guest: Guest, scripts: Scripts, tmp_path: Path) -> None:
    """Of any length, calm or in postcopy, ended by the front-end or for a broken message; also whole mappings."""
    path = tmp_path / "s"
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] < 100_000, "a leak could go unnoticed"
    endings = [
        Message(Request.SET_VRING_KICK, vu.pack_u64(0), guest_fds := (guest.rings[0].kick,)),
        Message(Request.SET_VRING_KICK, vu.pack_u64(77), guest_fds),
        Message(Request.SET_MEM_TABLE, vu.pack_table([vu.MemoryRegion(0, 1 << 40, 0, 0)]), (guest.fd,)),
        Message(Request.SET_LOG_BASE, vu.LogArea(1 << 40, 0).pack(), (scripts.log,)),
        Message(Request.SET_OWNER, b"", (guest.fd, guest.fd, scripts.log)),
        Message(99, bytes(4000), (guest.fd,) * 32),
    ]

    async def one(number: int) -> None:
        script = scripts.postcopy if number % 2 else scripts.calm
        front = RawFrontEnd(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        await front.sock.connect(str(path))
        for message in script[: number // 2 % (len(script) + 1)]:
            await message.play(front)
        last = endings[number % len(endings)]
        data = last.data[: 1 + number % 19] if number % 3 == 0 else last.data
        await front.send_bytes(data, last.fds)
        front.close()

    async with trio.open_nursery() as nursery:
        await nursery.start(serve, Net, path)
        fds, maps = len(open_fds()), guest_mappings()
        with quiet():
            for number in range(60):  # libraries, threads and arenas come to be with the first ones
                await one(number)
            await until(lambda: len(open_fds()) <= fds and guest_mappings() <= maps)
            everything = all_mappings()
            for number in range(1000):
                await one(number)
            await until(
                lambda: len(open_fds()) <= fds and guest_mappings() <= maps, what="all sessions to end"
            )
            assert len(open_fds()) == fds
            assert guest_mappings() == maps
            assert all_mappings() < everything + 100
        nursery.cancel_scope.cancel()
    assert not path.exists()


def tasks() -> int:
    """All that trio runs."""
    count, found = 0, [trio.lowlevel.current_root_task()]
    while found and (task := found.pop()) is not None:
        count += 1
        for nursery in task.child_nurseries:
            found.extend(nursery.child_tasks)
    return count


async def test_errors_in_band_that_nobody_reads(caplog: pytest.LogCaptureFixture) -> None:
    """A ring that is broken and set up again without end; the front-end is told on a channel that it does not read."""
    guest = Guest()
    ring = guest.ring(0)
    ours, theirs = socket.socketpair()
    with ours, theirs, quiet():
        async with connected(Net(), Options(inband=True)) as front:
            await front.negotiate()
            await front.send(Request.SET_BACKEND_REQ_FD, b"", [theirs.fileno()])
            await guest.send_memory(front)
            await ring.send_setup(front)
            await front.barrier()
            before = tasks()
            for _ in range(50):
                store16(guest.mem, ring.avail + 2, ring.used_idx + 1000)
                os.eventfd_write(ring.kick, 1)
                with trio.fail_after(10):
                    await trio.lowlevel.wait_readable(ring.err)
                os.eventfd_read(ring.err)
                (await front.ask(Request.GET_VRING_BASE, state(0, 0))).close_fds()
                store16(guest.mem, ring.avail + 2, ring.used_idx)
                await ring.send_setup(front)
                await front.barrier()
            assert tasks() <= before + 2
            # One was told, and one is for all that followed.
            channel = RawFrontEnd(ours)
            for _ in range(2):
                frame = await channel.receive()
                assert frame is not None
                assert (frame.request, frame.payload) == (vu.BackendRequest.VRING_ERR, state(0, 0))
                await channel.send(frame.request, vu.pack_u64(0), flags=vu.FLAG_REPLY)
            await until(lambda: tasks() == before)
            with pytest.raises(BlockingIOError):
                ours.recv(1)
            channel.close()
    guest.close()


async def test_a_dirty_log_on_huge_pages_is_unmapped(guest: Guest, huge_pages: int) -> None:
    """Whatever part of a huge page it takes: the kernel unmaps whole ones."""
    fd = os.memfd_create("huge-log", os.MFD_CLOEXEC | 0x4 | 21 << 26)  # MFD_HUGETLB | MFD_HUGE_2MB
    os.ftruncate(fd, huge_pages)

    def mapped() -> int:
        return Path("/proc/self/maps").read_text().count("huge")

    before = mapped()
    async with connected(Net()) as front:
        await front.negotiate()
        for offset in (0, 8192):
            log = vu.LogArea(4096, offset).pack()
            (await front.ask(Request.SET_LOG_BASE, log, [fd])).close_fds()
            assert mapped() == before + 1
    os.close(fd)
    assert mapped() == before


# NUM, ADDR, KICK and SET_FEATURES make a ring; it starts with the last of them, and then memory must be there.
NEEDED = (Request.SET_VRING_NUM, Request.SET_VRING_ADDR, Request.SET_VRING_KICK, Request.SET_FEATURES)


async def test_set_up_in_any_order(caplog: pytest.LogCaptureFixture, scripts: Scripts, guest: Guest) -> None:
    """720 orders of six messages: the ring works, unless it was complete before there was memory."""
    steps = [
        m for m in scripts.calm if m.request in {*NEEDED, Request.SET_VRING_ENABLE, Request.SET_MEM_TABLE}
    ][:6]
    assert len({m.request for m in steps}) == 6
    works = ends = 0
    for order in itertools.permutations(steps):
        requests = [m.request for m in order]
        all_lines_from_here(caplog)
        guest.put(guest.rings[0].used, bytes(4))
        async with connected(Net()) as front:
            for message in order:
                await message.play(front)
            if requests.index(Request.SET_MEM_TABLE) > max(map(requests.index, NEEDED)):
                ends += 1
                assert await front.ended(), requests
                (line,) = lines(caplog)
                assert "is not inside one memory region" in line
            else:
                works += 1
                await front.send(Request.SET_VRING_CALL, vu.pack_u64(0), [guest.rings[0].call])
                await guest.rings[0].until_used(1)
                assert lines(caplog) == []
    assert (works, ends) == (576, 144)  # memory is the last of five in a fifth of all orders


@pytest.mark.parametrize("request_", [s.request for s in vu.REQUESTS.values()])
async def test_any_request_comes_first(caplog: pytest.LogCaptureFixture, request_: Request) -> None:
    """Before anything was negotiated: what was not offered is declined, the rest is answered or ends it in one line."""
    spec = vu.REQUESTS[request_]
    before = open_fds()
    event = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    async with connected(Net(), Options(inband=True)) as front:
        await front.send(request_, bytes(spec.min_size), [event] * spec.min_fds)
        await front.send(Request.GET_QUEUE_NUM)
        while (frame := await front.receive()) is not None and frame.request != Request.GET_QUEUE_NUM:
            assert frame.request == request_
            assert spec.gate is None
            frame.close_fds()
    os.close(event)
    assert open_fds() == before
    assert len(lines(caplog)) == (frame is None)
    assert "Traceback" not in caplog.text
    if spec.gate is not None:
        assert frame is not None, "a request that was not offered must not end the session"


async def test_flood_and_hang_up() -> None:
    """More messages than are read ahead, and nobody for the answers: the session ends all the same."""
    before = len(open_fds())
    ours, theirs = socket.socketpair()
    null = os.open("/dev/null", os.O_RDWR)
    front = RawFrontEnd(ours)
    for _ in range(60):
        await front.send(Request.GET_FEATURES)
        await front.send(99, b"", [null])
    os.close(null)
    front.close()
    with trio.fail_after(10):
        await serve_connection(Net(), trio.socket.from_stdlib_socket(theirs))
    assert len(open_fds()) == before


async def test_flood_without_reading_the_answers(guest: Guest) -> None:
    """It stops its own session; another one goes on, and the end of the connection ends it."""
    async with connected(Net()) as flood:
        with trio.move_on_after(0.5):
            while True:
                await flood.send(Request.GET_FEATURES)
        async with connected(Net()) as front:
            await front.negotiate()
            await front.barrier()


async def test_half_a_message_with_descriptors_and_silence() -> None:
    before = open_fds()
    null = os.open("/dev/null", os.O_RDWR)
    async with connected(Net()) as silent:
        await silent.send_bytes(vu.encode(Request.SET_MEM_TABLE, bytes(40))[:30], [null] * 20)
        async with connected(Net()) as front:
            await front.negotiate()
            await front.barrier()
    os.close(null)
    assert open_fds() == before


async def test_message_in_single_bytes_with_descriptors_on_each(caplog: pytest.LogCaptureFixture) -> None:
    """Each byte may bring descriptors; together they may not be more than one message can have."""
    before = open_fds()
    null = os.open("/dev/null", os.O_RDWR)
    async with connected(Net()) as front:
        for byte in vu.encode(Request.SET_OWNER)[:7]:  # the last one is too many
            await front.send_bytes(bytes([byte]), [null] * 5)
        assert await front.ended()
    os.close(null)
    assert open_fds() == before
    (line,) = lines(caplog)
    assert "descriptors in one message" in line


def too_small(scripts: Scripts) -> list[Message]:
    """Of a log of one byte: 8 pages have a bit, memory has 272 (with the hole below it)."""
    return [
        Message(m.request, vu.LogArea(1, 0).pack(), m.fds, answered=m.answered)
        for m in scripts.calm
        if m.request == Request.SET_LOG_BASE
    ]


@pytest.mark.parametrize("when", ["before the ring", "while it runs", "log first", "memory grows"])
async def test_log_area_too_small(
    caplog: pytest.LogCaptureFixture, scripts: Scripts, guest: Guest, when: str
) -> None:
    """A write that has no bit would be lost in the migration: the session ends before there is one."""
    calm = scripts.calm
    end = next(i for i, m in enumerate(calm) if m.request == Request.SET_LOG_BASE)
    features = Message(Request.SET_FEATURES, calm[end + 1].payload)
    kick = next(i for i, m in enumerate(calm) if m.request == Request.SET_VRING_KICK)
    (small,) = too_small(scripts)
    if when == "before the ring":
        order = [*calm[:kick], small, features, *calm[kick:end]]
    elif when == "while it runs":
        order = [*calm[:end], small, features]
    elif when == "log first":
        order = [*calm[:end], features, small]
    else:
        far = vu.MemoryRegion(1 << 40, 4096, 1 << 45, 0)
        order = [
            *calm[:end],
            calm[end],
            features,
            Message(Request.ADD_MEM_REG, vu.pack_single_region(far), (guest.fd,)),
        ]
    async with connected(Net()) as front:
        for message in order:
            await front.send_bytes(message.data, message.fds)
        assert await front.ended()
    (line,) = lines(caplog)
    assert "does not cover all memory" in line


async def test_no_descriptors_left_for_a_connection(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    """The server waits until there is room again, says so once, and then takes the front-end."""
    path = tmp_path / "s"
    async with trio.open_nursery() as nursery:
        await nursery.start(serve, Net(), path)
        front = RawFrontEnd(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        with descriptors_left(0):
            await front.sock.connect(str(path))
            await until(lambda: lines(caplog))
        await front.negotiate()
        await front.barrier()
        front.close()
        nursery.cancel_scope.cancel()
    (line,) = lines(caplog)
    assert "have to wait" in line


@pytest.mark.parametrize("left", range(5))
async def test_no_descriptors_left_in_a_session(
    caplog: pytest.LogCaptureFixture, guest: Guest, left: int
) -> None:
    """Too many regions for this process's limit: one line, and what the session had is given back."""
    before = open_fds()
    async with connected(Net()) as front:
        await front.negotiate()
        await front.barrier()
        with descriptors_left(left):
            with suppress(BrokenPipeError, ConnectionResetError):
                for i in range(10):
                    region = vu.MemoryRegion(i << 20, 4096, i << 20, 0)
                    await front.send(Request.ADD_MEM_REG, vu.pack_single_region(region), [guest.fd])
            assert await front.ended()
    assert open_fds() == before
    (line,) = lines(caplog)
    assert "Too many open files" in line or "more than this process may open" in line
    assert "Traceback" not in caplog.text


async def test_more_slots_than_there_are(caplog: pytest.LogCaptureFixture, guest: Guest) -> None:
    maps = guest_mappings()
    async with connected(Net()) as front:
        await front.negotiate()
        for i in range(vu.MAX_MEM_SLOTS):
            region = vu.MemoryRegion(i << 20, 4096, i << 20, 0)
            assert await front.ack(Request.ADD_MEM_REG, vu.pack_single_region(region), [guest.fd]) == 0
        region = vu.MemoryRegion(1 << 40, 4096, 1 << 40, 0)
        await front.send(Request.ADD_MEM_REG, vu.pack_single_region(region), [guest.fd])
        assert await front.ended()
    assert guest_mappings() == maps
    (line,) = lines(caplog)
    assert "memory slots are taken" in line


@pytest.mark.parametrize("how", ["table", "slot"])
async def test_memory_taken_from_under_running_rings(
    caplog: pytest.LogCaptureFixture, scripts: Scripts, guest: Guest, how: str
) -> None:
    """The session ends, and the table of before is gone at once, without the garbage collector."""
    other = guest.ring(1)
    maps, fds = guest_mappings(), len(open_fds())
    end = next(i for i, m in enumerate(scripts.calm) if m.request == Request.SET_LOG_BASE)
    gc.disable()
    try:
        async with connected(Net()) as front:
            for message in scripts.calm[:end]:
                await message.play(front)
            await other.send_setup(front)
            await front.barrier()
            if how == "table":
                elsewhere = vu.MemoryRegion(1 << 40, 4096, 1 << 45, 0)
                await front.send(Request.SET_MEM_TABLE, vu.pack_table([elsewhere]), [guest.fd])
            else:
                await front.send(Request.REM_MEM_REG, vu.pack_single_region(guest.region))
            assert await front.ended()
        assert guest_mappings() == maps
        assert len(open_fds()) == fds
    finally:
        gc.enable()
    (line,) = lines(caplog)
    assert "is not inside one memory region" in line
