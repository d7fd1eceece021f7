"""What stock front-ends do beside the specification: it is taken, and nothing of it acted on."""

from __future__ import annotations

import os
import select
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
import trio
import trio.testing

from tests.kit.hostile import Net, guest_mappings, lines, open_fds, state
from tests.kit.raw_front_end import GUEST_BASE, NEXT, USER_BASE, WRITE, Guest, RawFrontEnd, Ring, connected
from tests.kit.until import until
from vhostpc.backend import Device, Options, Queue, serve, serve_connection
from vhostpc.backend.state import SessionState
from vhostpc.virtio.event import clear_event
from vhostpc.wire import vhost_user as vu
from vhostpc.wire.vhost_user import Request

ONE = (1).to_bytes(8, "little")


class Echo(Device):
    async def handle_queue(self, queue: Queue) -> None:
        async for chain in queue:
            chain.write(chain.read())


@pytest.fixture
def guest() -> Iterator[Guest]:
    guest = Guest()
    yield guest
    guest.close()


def offer(guest: Guest, ring: Ring, data: bytes) -> None:
    ring.set_desc(0, guest.put(0x80000, data), len(data), NEXT, 1)
    ring.set_desc(1, GUEST_BASE + 0x81000, len(data), WRITE)
    ring.offer(0)


async def echoes(guest: Guest, ring: Ring, data: bytes = b"echo") -> None:
    """A chain goes there and back."""
    before = ring.used_idx
    offer(guest, ring, data)
    await ring.until_used(before + 1)
    assert guest.mem[0x81000 : 0x81000 + len(data)] == data


# --- payloads that are longer than what is in them


def padded() -> Iterator[tuple[Request, bytes]]:
    for spec in vu.REQUESTS.values():
        if (
            spec.padded
            and not spec.min_fds
            and spec.request not in (Request.ADD_MEM_REG, Request.REM_MEM_REG)
        ):
            yield spec.request, bytes(spec.min_size)


@pytest.mark.parametrize(("request_", "payload"), list(padded()))
async def test_padding_behind_any_payload(request_: Request, payload: bytes) -> None:
    if request_ in (Request.SET_VRING_NUM, Request.NET_SET_MTU):
        payload = {Request.SET_VRING_NUM: state(0, 16), Request.NET_SET_MTU: vu.pack_u64(1500)}[request_]
    if request_ in (Request.SET_VRING_KICK, Request.SET_VRING_CALL, Request.SET_VRING_ERR):
        payload = vu.pack_u64(vu.VRING_NOFD)
    async with connected(Net(), Options(inband=True)) as front:
        _, bits = await front.negotiate()
        payload = vu.pack_u64(bits) if request_ == Request.SET_PROTOCOL_FEATURES else payload
        frame = await front.ask(request_, payload.ljust(vu.MAX_PAYLOAD, b"\xff"), flags=vu.FLAG_NEED_REPLY)
        frame.close_fds()
        if vu.REQUESTS[request_].reply is not vu.Reply.VALUE:
            assert frame.payload == bytes(8) or request_ == Request.POSTCOPY_LISTEN
        await front.barrier()


@pytest.mark.parametrize("room", [2, 8, 32, 127])
async def test_memory_table_with_room_for_more_regions(guest: Guest, room: int) -> None:
    """User-Mode Linux sends room for two, and has one."""
    ring = guest.ring(0)
    table = vu.pack_table([guest.region]).ljust(8 + 32 * room, b"\xff")
    async with connected(Echo()) as front:
        await front.negotiate()
        assert await front.ack(Request.SET_MEM_TABLE, table, [guest.fd]) == 0
        await ring.send_setup(front)
        await echoes(guest, ring)
        await front.send(Request.SET_MEM_TABLE, table, [guest.fd, guest.fd])
        assert await front.ended()


async def test_memory_slots_with_padding(guest: Guest) -> None:
    ring = guest.ring(0)
    async with connected(Echo()) as front:
        await front.negotiate()
        region = vu.pack_single_region(guest.region) + b"\xff" * 8
        assert await front.ack(Request.ADD_MEM_REG, region, [guest.fd]) == 0
        await ring.send_setup(front)
        await echoes(guest, ring)
        await front.ask(Request.GET_VRING_BASE, state(0, 0))
        assert await front.ack(Request.REM_MEM_REG, region) == 0


@pytest.mark.ufd
async def test_padded_table_in_postcopy_is_answered_at_its_length(guest: Guest) -> None:
    async with connected(Echo()) as front:
        await front.negotiate()
        (await front.ask(Request.POSTCOPY_ADVISE)).close_fds()
        await front.ask(Request.POSTCOPY_LISTEN)
        reply = await front.ask(
            Request.SET_MEM_TABLE, vu.pack_table([guest.region]).ljust(72, b"\xff"), [guest.fd]
        )
        assert len(reply.payload) == 72
        (region,) = vu.unpack_table(reply.payload)
        assert (region.guest_addr, region.size) == (GUEST_BASE, guest.size)
        assert reply.payload[40:] == bytes(32)
        (await front.ask(Request.POSTCOPY_END)).close_fds()


# --- regions that are not whole pages


@pytest.mark.parametrize("slots", [False, True])
@pytest.mark.parametrize(
    ("guest_skew", "user_skew", "skip", "short"),
    [(0, 0, 0, 0x4F0), (16, 16, 16, 0), (0x800, 0x10, 0x30, 0x20), (1, 3, 0, 5), (0, 0, 2048 + 64, 1)],
)
async def test_region_of_parts_of_pages(
    guest: Guest, guest_skew: int, user_skew: int, skip: int, short: int, slots: bool
) -> None:
    """libblkio sends its rings as a region of just their length."""
    region = vu.MemoryRegion(GUEST_BASE + guest_skew, guest.size - skip - short, USER_BASE + user_skew, skip)
    ring = guest.ring(0)
    before = guest_mappings()
    async with connected(Echo()) as front:
        await front.negotiate()
        if slots:
            assert await front.ack(Request.ADD_MEM_REG, vu.pack_single_region(region), [guest.fd]) == 0
        else:
            assert await front.ack(Request.SET_MEM_TABLE, vu.pack_table([region]), [guest.fd]) == 0
        u = region.user_addr - skip
        await front.send(Request.SET_VRING_NUM, state(0, ring.size))
        where = vu.VringAddr(0, 0, u + ring.desc, u + ring.used, u + ring.avail, 0)
        await front.send(Request.SET_VRING_ADDR, where.pack())
        await front.send(Request.SET_VRING_CALL, vu.pack_u64(0), [ring.call])
        await front.send(Request.SET_VRING_KICK, vu.pack_u64(0), [ring.kick])
        await front.send(Request.SET_VRING_ENABLE, state(0, 1))
        guest.put(0x80000, b"echo")
        ring.set_desc(0, region.guest_addr - skip + 0x80000, 4, NEXT, 1)
        ring.set_desc(1, region.guest_addr - skip + 0x81000, 4, WRITE)
        ring.offer(0)
        await ring.until_used(1)
        assert guest.mem[0x81000:0x81004] == b"echo"
    assert guest_mappings() == before


async def test_end_of_a_region_in_a_page(guest: Guest, caplog: pytest.LogCaptureFixture) -> None:
    """What follows it in its page is no guest memory."""
    size = guest.size - 100
    ring = guest.ring(0)
    table = vu.pack_table([vu.MemoryRegion(GUEST_BASE, size, USER_BASE, 0)])
    async with connected(Echo()) as front:
        await front.negotiate()
        assert await front.ack(Request.SET_MEM_TABLE, table, [guest.fd]) == 0
        await ring.send_setup(front)
        ring.set_desc(0, GUEST_BASE + size - 4, 4, NEXT, 1)
        ring.set_desc(1, GUEST_BASE + size - 4, 4, WRITE)
        ring.offer(0)
        await ring.until_used(1)
        ring.set_desc(0, GUEST_BASE + size - 4, 5, WRITE)
        ring.offer(0)
        await trio.lowlevel.wait_readable(ring.err)
    assert "outside guest memory" in "\n".join(lines(caplog))


async def test_ring_is_aligned_where_it_lies(guest: Guest, caplog: pytest.LogCaptureFixture) -> None:
    """Its addresses are, and its region is not."""
    ring = guest.ring(0)
    region = vu.MemoryRegion(GUEST_BASE, guest.size - 8, USER_BASE, 8)
    async with connected(Echo()) as front:
        await front.negotiate()
        assert await front.ack(Request.SET_MEM_TABLE, vu.pack_table([region]), [guest.fd]) == 0
        await ring.send_setup(front)
        assert await front.ended()
    assert "misaligned" in "\n".join(lines(caplog))


@pytest.mark.ufd
@pytest.mark.parametrize(
    "region",
    [
        vu.MemoryRegion(GUEST_BASE, 4095, USER_BASE, 0),
        vu.MemoryRegion(GUEST_BASE, 4096, USER_BASE, 16),
        vu.MemoryRegion(GUEST_BASE + 1, 4096, USER_BASE, 0),
        vu.MemoryRegion(GUEST_BASE, 4096, USER_BASE + 1, 0),
    ],
)
async def test_none_such_in_postcopy(
    guest: Guest, region: vu.MemoryRegion, caplog: pytest.LogCaptureFixture
) -> None:
    """Pages arrive, and faults are reported."""
    before = open_fds(), guest_mappings()
    async with connected(Echo()) as front:
        await front.negotiate()
        (await front.ask(Request.POSTCOPY_ADVISE)).close_fds()
        await front.ask(Request.POSTCOPY_LISTEN)
        await front.send(Request.SET_MEM_TABLE, vu.pack_table([region]), [guest.fd])
        assert await front.ended()
    assert (open_fds(), guest_mappings()) == before
    assert "unaligned" in "\n".join(lines(caplog))


# --- events that are no eventfds


def pipe() -> tuple[int, int]:
    return os.pipe2(os.O_CLOEXEC)


def stream() -> tuple[int, int]:
    left, right = socket.socketpair()
    return left.detach(), right.detach()


def datagrams() -> tuple[int, int]:
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    return left.detach(), right.detach()


def packets() -> tuple[int, int]:
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    return left.detach(), right.detach()


Pair = Callable[[], tuple[int, int]]
pairs = pytest.mark.parametrize("pair", [pipe, stream, datagrams, packets])


async def set_up(front: RawFrontEnd, guest: Guest, ring: Ring, **others: int) -> None:
    """The ring with these descriptors in the place of its own."""
    await front.negotiate()
    await guest.send_memory(front)
    await ring.send_setup(front, enable=False)
    for name, fd in others.items():
        request = Request[f"SET_VRING_{name.upper()}"]
        assert await front.ack(request, vu.pack_u64(ring.index), [fd]) == 0
    assert await front.ack(Request.SET_VRING_ENABLE, state(ring.index, 1)) == 0


@pairs
async def test_call(guest: Guest, pair: Pair) -> None:
    """An interrupt is a write of 8 bytes, as eventfd_write has it. User-Mode Linux gives one end of a socket pair."""
    ring = guest.ring(0)
    ours, theirs = pair()
    os.set_blocking(ours, False)
    async with connected(Echo()) as front:
        await set_up(front, guest, ring, call=theirs)
        os.close(theirs)
        for turn in range(3):
            offer(guest, ring, b"turn%d" % turn)
            while ring.used_idx == turn:
                await trio.lowlevel.wait_readable(ours)
                assert os.read(ours, 8) == ONE
        # A ring that has stopped holds it no more: its other end sees that.
        await front.ask(Request.GET_VRING_BASE, state(0, 0))
        with pytest.raises(BlockingIOError) if pair is datagrams else ExitStack():
            while os.read(ours, 8):
                pass
    os.close(ours)


@pairs
@pytest.mark.parametrize("blocking", [False, True])
async def test_call_that_is_full(guest: Guest, pair: Pair, blocking: bool) -> None:
    """Nobody reads it: nothing waits for that, whatever its flags."""
    ring = guest.ring(0)
    ours, theirs = pair()
    os.set_blocking(theirs, False)
    with suppress(BlockingIOError):
        while True:
            os.write(theirs, ONE)
    os.set_blocking(theirs, blocking)
    async with connected(Echo()) as front:
        await set_up(front, guest, ring, call=theirs)
        for turn in range(3):
            offer(guest, ring, b"turn%d" % turn)
            await until(lambda turn=turn: ring.used_idx == turn + 1)  # type: ignore[misc]
        await front.barrier()
    os.close(ours)
    os.close(theirs)


@pairs
async def test_call_whose_other_end_is_closed(guest: Guest, pair: Pair) -> None:
    """Not even where a broken pipe would end the process."""
    ring = guest.ring(0)
    ours, theirs = pair()
    os.close(ours)
    before = signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    try:
        async with connected(Echo()) as front:
            await set_up(front, guest, ring, call=theirs)
            for turn in range(3):
                offer(guest, ring, b"turn%d" % turn)
                await until(lambda turn=turn: ring.used_idx == turn + 1)  # type: ignore[misc]
            assert signal.SIGPIPE not in signal.sigpending()
            await front.barrier()
    finally:
        signal.signal(signal.SIGPIPE, before)
        os.close(theirs)


@pairs
async def test_kick(guest: Guest, pair: Pair, caplog: pytest.LogCaptureFixture) -> None:
    """Whatever comes kicks. What has ended kicks no more, and is not looked at for ever."""
    ring = guest.ring(0)
    theirs, ours = pair()
    async with connected(Echo()) as front:
        await set_up(front, guest, ring, kick=theirs)
        os.close(theirs)
        for turn in range(3):
            offer(guest, ring, b"turn%d" % turn)
            os.write(ours, ONE)
            await ring.until_used(turn + 1)
        os.close(ours)
        if pair is not datagrams:
            await until(lambda: "it gets no more kicks" in caplog.text)
        assert await front.ack(Request.SET_VRING_KICK, vu.pack_u64(0), [ring.kick]) == 0
        await echoes(guest, ring)


@pairs
async def test_error(guest: Guest, pair: Pair) -> None:
    ring = guest.ring(0)
    ours, theirs = pair()
    async with connected(Echo()) as front:
        await set_up(front, guest, ring, err=theirs)
        ring.set_desc(0, 0, 16, WRITE)
        ring.offer(0)
        await trio.lowlevel.wait_readable(ours)
        assert os.read(ours, 8) == ONE
        await front.barrier()
    os.close(ours)
    os.close(theirs)


async def test_a_replaced_kick_is_let_go(guest: Guest) -> None:
    ring = guest.ring(0)
    async with connected(Echo()) as front:
        await set_up(front, guest, ring)
        before = open_fds()
        for pair in (pipe, stream, pipe):
            theirs, ours = pair()
            assert await front.ack(Request.SET_VRING_KICK, vu.pack_u64(0), [theirs]) == 0
            os.close(theirs)
            os.close(ours)
        assert await front.ack(Request.SET_VRING_KICK, vu.pack_u64(0), [ring.kick]) == 0
        await until(lambda: len(open_fds()) == len(before))
        await echoes(guest, ring)


@pytest.mark.parametrize("request_", [Request.SET_VRING_KICK, Request.SET_VRING_CALL, Request.SET_VRING_ERR])
@pytest.mark.parametrize("what", ["file", "memfd", "eventfd by path", "pipe by path", "tcp", "epoll"])
async def test_what_carries_no_event(
    request_: Request, what: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A write could wait for a disk, a look at it never does, or it can be neither read nor written."""
    with ExitStack() as stack:

        def hold(fd: int) -> int:
            stack.callback(os.close, fd)
            return fd

        def by_path(fd: int) -> int:
            return os.open(f"/proc/self/fd/{fd}", os.O_PATH)

        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as sock, select.epoll() as epoll:
            read_end, _ = (hold(fd) for fd in pipe())
            made: dict[str, Callable[[], int]] = {
                "file": lambda: os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT),
                "memfd": lambda: os.memfd_create("event"),
                "eventfd by path": lambda: by_path(hold(os.eventfd(0))),
                "pipe by path": lambda: by_path(read_end),
                "tcp": lambda: os.dup(sock.fileno()),
                "epoll": lambda: os.dup(epoll.fileno()),
            }
            fd = hold(made[what]())
        before = open_fds()
        async with connected(Net()) as front:
            await front.negotiate()
            await front.send(request_, vu.pack_u64(0), [fd])
            assert await front.ended()
        assert open_fds() == before
    (line,) = lines(caplog)
    assert "not an eventfd, pipe or unix socket" in line


@pytest.mark.parametrize(
    "request_",
    [Request.SET_VRING_KICK, Request.SET_VRING_CALL, Request.SET_VRING_ERR, Request.SET_BACKEND_REQ_FD],
)
@pytest.mark.parametrize("connects", [False, True])
async def test_front_ends_own_end(
    request_: Request, connects: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Held by us it would keep the session for ever, though its front-end is long gone."""
    path = tmp_path / "socket"
    async with trio.open_nursery() as nursery:
        with socket.socket(socket.AF_UNIX) as sock:
            if connects:
                with socket.socket(socket.AF_UNIX) as listener:
                    listener.bind(str(path))
                    listener.listen()
                    theirs = socket.socket(socket.AF_UNIX)
                    theirs.connect(str(path))
                    theirs.setblocking(False)
                    nursery.start_soon(serve_connection, Net(), trio.socket.from_stdlib_socket(theirs))
                    ours, _ = listener.accept()
            else:
                await nursery.start(serve, Net(), path)
                ours = sock
                ours.connect(str(path))
            ours.setblocking(False)
            front = RawFrontEnd(ours)
            await front.negotiate()
            payload = b"" if request_ == Request.SET_BACKEND_REQ_FD else vu.pack_u64(0)
            await front.send(request_, payload, [ours.fileno()])
            assert await front.ended()
            front.close()
        nursery.cancel_scope.cancel()
    assert "the other end of our own connection" in "\n".join(lines(caplog))


async def test_a_kick_that_is_replaced_as_it_comes() -> None:
    """The number of what it was handed to may be another descriptor's by then, in the same turn of the loop."""
    for _ in range(30):
        session = SessionState(Echo(), Options(), pagefault=False, name="test")
        (theirs, ours), (seen, other) = pipe(), pipe()
        same = os.dup(theirs)
        async with trio.open_nursery() as nursery:
            session.nursery = nursery
            fd, scope = session.kick_from(theirs, 0)
            await trio.testing.wait_all_tasks_blocked()
            os.write(ours, ONE)
            await trio.lowlevel.wait_readable(same)
            handed_on = clear_event(fd)
            scope.cancel()
            os.dup2(other, fd)
        os.set_blocking(seen, False)
        with suppress(BlockingIOError):
            assert os.read(seen, 8) == b"", handed_on
        for one in (fd, ours, seen, other, same):
            os.close(one)
        session.close()
