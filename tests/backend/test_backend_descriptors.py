"""Descriptors that a front-end passes and that would keep a session, or end it badly."""

from __future__ import annotations

import contextlib
import gc
import os
import socket
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import trio

from tests.kit.hostile import Net, lines, open_fds, state
from tests.kit.raw_front_end import Guest, RawFrontEnd, connected
from tests.kit.until import until
from vhostpc.backend import serve, serve_connection
from vhostpc.wire import vhost_user as vu
from vhostpc.wire.vhost_user import Request

OWN_END = "a descriptor that was passed is the other end of our own connection"
ZERO = vu.pack_u64(0)
TABLE = vu.pack_table([vu.MemoryRegion(0, 1 << 20, 0, 0)])


@contextlib.asynccontextmanager
async def by_path(folder: Path) -> AsyncIterator[socket.socket]:
    """The front-end's socket, connected to a back-end that listens."""
    async with trio.open_nursery() as nursery:
        await nursery.start(serve, Net(), folder / "s")
        front = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        front.connect(str(folder / "s"))
        yield front
        nursery.cancel_scope.cancel()


@contextlib.asynccontextmanager
async def by_connect(folder: Path) -> AsyncIterator[socket.socket]:
    """The front-end listens."""
    async with trio.open_nursery() as nursery:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            listener.bind(str(folder / "s"))
            listener.listen()
            nursery.start_soon(lambda: serve(Net(), folder / "s", connect=True))
            front, _ = await trio.to_thread.run_sync(listener.accept)
        yield front


@contextlib.asynccontextmanager
async def by_descriptor(folder: Path) -> AsyncIterator[socket.socket]:
    """Neither end has a name."""
    front, theirs = socket.socketpair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve_connection, Net(), trio.socket.from_stdlib_socket(theirs))
        yield front


@contextlib.contextmanager
def nothing_left() -> Iterator[None]:
    gc.collect()
    before = len(open_fds())
    yield
    gc.collect()
    assert len(open_fds()) == before


def sockets() -> int:
    return sum(name.startswith("socket:") for name in open_fds().values())


@pytest.mark.parametrize("way", [by_path, by_connect, by_descriptor])
@pytest.mark.parametrize(
    ("request_", "payload", "copies"),
    [
        (Request.SET_BACKEND_REQ_FD, b"", 1),
        (Request.SET_VRING_KICK, ZERO, 1),
        (Request.SET_VRING_CALL, ZERO, 1),
        (Request.SET_MEM_TABLE, TABLE, 1),
        (Request.SET_LOG_BASE, vu.LogArea(4096, 0).pack(), 1),
        (99, b"", 8),
    ],
)
async def test_own_end(
    way: object, request_: int, payload: bytes, copies: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A front-end passes its own end of the connection, and goes: the session goes too."""
    async with way(tmp_path) as front:  # type: ignore[operator]
        await until(lambda: sockets() >= 2)
        raw = RawFrontEnd(front)
        await raw.negotiate()
        await raw.barrier()
        before = sockets()
        await raw.send(request_, payload, [front.fileno()] * copies)
        raw.close()
        await until(lambda: sockets() <= before - 2, what="the session to end")
    assert [OWN_END in line for line in lines(caplog)] == [True]
    assert "Traceback" not in caplog.text


async def test_own_end_with_half_a_message(caplog: pytest.LogCaptureFixture) -> None:
    """The descriptor comes with the first byte; the rest never does."""
    with nothing_left():
        async with connected(Net()) as front:
            await front.barrier()
            data = vu.encode(Request.SET_BACKEND_REQ_FD, b"")
            await front.send_bytes(data[:1], [front.sock.fileno()])
    assert [OWN_END in line for line in lines(caplog)] == [True]


async def test_own_end_of_another_session(tmp_path: Path) -> None:
    """Two sessions, each of which would be kept by the other's."""
    with nothing_left():
        async with trio.open_nursery() as nursery:
            await nursery.start(serve, Net(), tmp_path / "s")
            fronts = []
            for _ in range(2):
                sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                sock.connect(str(tmp_path / "s"))
                fronts.append(RawFrontEnd(sock))
                await fronts[-1].barrier()
            before = sockets()
            for front, other in zip(fronts, reversed(fronts), strict=True):
                with contextlib.suppress(BrokenPipeError):
                    await front.send(Request.SET_BACKEND_REQ_FD, b"", [other.sock.fileno()])
            for front in fronts:
                front.close()
            await until(lambda: sockets() <= before - 4, what="both sessions to end")
            nursery.cancel_scope.cancel()


async def test_own_end_inside_the_channel(caplog: pytest.LogCaptureFixture) -> None:
    """It waits in the queue of the channel that is passed: unexpected messages are taken out."""
    with nothing_left():
        async with connected(Net()) as front:
            await front.negotiate()
            ours, theirs = socket.socketpair()
            with ours, theirs:
                socket.send_fds(ours, [vu.encode(1, ZERO, flags=vu.FLAG_REPLY)], [front.sock.fileno()])
                await front.send(Request.SET_BACKEND_REQ_FD, b"", [theirs.fileno()])
                await front.barrier()
            # ``connected`` sees the session end, although nobody but us had the descriptor.


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_SEQPACKET, socket.SOCK_DGRAM])
@pytest.mark.parametrize("request_", [Request.SET_VRING_CALL, Request.SET_VRING_ERR])
async def test_own_end_inside_a_socket_that_is_only_written(
    request_: Request, kind: socket.SocketKind
) -> None:
    """Nobody here reads a socket through which the driver is called: what waits in it goes, and nothing more comes."""
    with nothing_left():
        async with connected(Net()) as front:
            await front.negotiate()
            ours, theirs = socket.socketpair(type=kind)
            with ours, theirs:
                ours.send(b"")  # a message, where there are messages
                socket.send_fds(ours, [b"12345678"], [front.sock.fileno()])
                await front.send(request_, ZERO, [theirs.fileno()])
                await front.barrier()
                with pytest.raises(BrokenPipeError):
                    socket.send_fds(ours, [b"12345678"], [front.sock.fileno()])


async def test_what_comes_unasked_does_no_harm(caplog: pytest.LogCaptureFixture) -> None:
    """A channel's message that nobody asked for is dropped with its descriptors, and the session goes on."""
    with nothing_left():
        async with connected(Net()) as front:
            await front.negotiate()
            ours, theirs = socket.socketpair()
            with ours, theirs:
                await front.send(Request.SET_BACKEND_REQ_FD, b"", [theirs.fileno()])
                await front.barrier()
                before = len(open_fds())
                for _ in range(50):
                    socket.send_fds(ours, [vu.encode(2, ZERO, flags=vu.FLAG_REPLY)], [0, 1])
                await until(lambda: "they are only counted" in caplog.text)
                await until(lambda: len(open_fds()) == before)
            await front.barrier()


@pytest.fixture
def guest() -> Iterator[Guest]:
    guest = Guest()
    yield guest
    guest.close()


@pytest.mark.parametrize("kind", ["kick", "call", "err", "table", "add", "log", "inflight", "channel"])
async def test_descriptors_that_are_only_places(
    guest: Guest, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    """O_PATH (open(2)): neither read, written nor mapped. One sentence, no traceback."""
    event, memory = os.eventfd(0), os.memfd_create("place")
    os.ftruncate(memory, 1 << 20)
    ours, theirs = socket.socketpair()
    source = {"kick": event, "call": event, "err": event, "channel": theirs.fileno()}.get(kind, memory)
    place = os.open(f"/proc/self/fd/{source}", os.O_PATH)
    region = vu.MemoryRegion(0, 1 << 20, 0, 0)
    request, payload = {
        "kick": (Request.SET_VRING_KICK, ZERO),
        "call": (Request.SET_VRING_CALL, ZERO),
        "err": (Request.SET_VRING_ERR, ZERO),
        "table": (Request.SET_MEM_TABLE, vu.pack_table([region])),
        "add": (Request.ADD_MEM_REG, vu.pack_single_region(region)),
        "log": (Request.SET_LOG_BASE, vu.LogArea(4096, 0).pack()),
        "inflight": (Request.SET_INFLIGHT_FD, vu.Inflight(4096, 0, 1, 16).pack()),
        "channel": (Request.SET_BACKEND_REQ_FD, b""),
    }[kind]
    try:
        async with connected(Net()) as front:
            await front.negotiate()
            await front.send(request, payload, [place])
            assert await front.ended()
    finally:
        for fd in (event, memory, place):
            os.close(fd)
        ours.close()
        theirs.close()
    assert len(lines(caplog)) == 1
    assert "session ended" in lines(caplog)[0]
    assert "Traceback" not in caplog.text


@pytest.mark.parametrize("flood", ["declined", "advise", "no ring", "mtu"])
async def test_a_flood_writes_few_lines(flood: str, caplog: pytest.LogCaptureFixture) -> None:
    request, payload = {
        "declined": (99, b""),
        "advise": (Request.POSTCOPY_ADVISE, b""),
        "no ring": (Request.SET_VRING_ENABLE, state(77, 0)),
        "mtu": (Request.NET_SET_MTU, vu.pack_u64(1)),
    }[flood]
    async with connected(Net()) as front:
        await front.negotiate()
        for _ in range(200):
            await front.send(request, payload, flags=vu.FLAG_NEED_REPLY)
            frame = await front.receive()
            assert frame is not None
            frame.close_fds()
    assert 10 < len(caplog.records) < 40
    assert "more lines like the last one follow: they are only counted" in caplog.text


async def test_a_flood_of_connections_writes_few_lines(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    async with trio.open_nursery() as nursery:
        await nursery.start(serve, Net(), tmp_path / "s")
        for _ in range(200):
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
                sock.connect(str(tmp_path / "s"))
                sock.send(b"not a header, 12")
                with contextlib.suppress(ConnectionResetError):
                    await trio.to_thread.run_sync(sock.recv, 1)
        nursery.cancel_scope.cancel()
    assert 20 < len(caplog.records) < 80
