"""Random messages and random rings: whatever comes, a session ends or goes on, and never breaks us.

``make fuzz`` runs many more examples than ``make test``.
"""

from __future__ import annotations

import contextlib
import logging
import os
import struct
from collections.abc import Awaitable, Callable, Iterator

import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.kit.hostile import Net, Scripts
from tests.kit.raw_front_end import GUEST_BASE, USER_BASE, Guest, RawFrontEnd, connected
from vhostpc.wire import vhost_user as vu
from vhostpc.wire.vhost_user import Request

# Numbers that mean something to somebody, and their neighbours.
EDGES = [0, 1, 2, 8, 16, 255, 256, 257, 4095, 4096, 0x7FFF, 0x8000, 0xFFFF, 1 << 20, (1 << 32) - 1]
EDGES += [1 << 32, GUEST_BASE, GUEST_BASE + 0x1000, USER_BASE, USER_BASE + 0x1000, 1 << 63, (1 << 64) - 1]
EDGES += [(1 << 64) - 4096, USER_BASE + (1 << 20) - 16, GUEST_BASE + (1 << 20) - 1]
NUMBER = st.one_of(st.sampled_from(EDGES), st.integers(0, (1 << 64) - 1))
SMALL = st.one_of(st.integers(0, 3), st.sampled_from([16, 256, 1024, 0x8000, 0x8001, (1 << 32) - 1]))

PAYLOAD = st.one_of(
    st.just(b""),
    st.builds(vu.pack_u64, NUMBER),
    st.builds(lambda i, n: struct.pack("=II", i, n), SMALL, SMALL),
    st.builds(lambda i, *a: struct.pack("=IIQQQQ", i, 1, *a), SMALL, NUMBER, NUMBER, NUMBER, NUMBER),
    st.builds(lambda *a: bytes(8) + struct.pack("=QQQQ", *a), NUMBER, NUMBER, NUMBER, NUMBER),
    st.builds(lambda n, *a: struct.pack("=IIQQQQ", n, 0, *a), SMALL, NUMBER, NUMBER, NUMBER, NUMBER),
    st.builds(lambda a, b: struct.pack("=QQ", a, b), NUMBER, NUMBER),
    st.builds(lambda o, n, d: struct.pack("=III", o, n, 0) + d, SMALL, SMALL, st.binary(max_size=30)),
    st.binary(max_size=64),
)
FDS = st.lists(st.sampled_from(["event", "memory", "pipe", "socket"]), max_size=2)
REQUEST = st.one_of(st.sampled_from(sorted(vu.REQUESTS)), st.integers(0, 60))
MESSAGE = st.tuples(REQUEST, PAYLOAD, FDS, st.sampled_from([0, 0, vu.FLAG_NEED_REPLY, vu.FLAG_REPLY]))


class Bugs(logging.Handler):
    """Collects what the framework logs about errors that it did not expect."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info:
            self.found.append(logging.Formatter().format(record))


@contextlib.contextmanager
def no_bugs() -> Iterator[None]:
    """No unexpected error is logged, and no descriptor stays open."""
    log, handler = logging.getLogger("vhostpc"), Bugs()
    before = len(os.listdir("/proc/self/fd"))
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)
    assert not handler.found, handler.found[0]
    assert len(os.listdir("/proc/self/fd")) == before


def run(work: Callable[[], Awaitable[None]]) -> None:
    """Run a scenario; trio's own descriptors are gone when it has ended."""

    async def limited() -> None:
        with trio.fail_after(60):
            await work()

    with no_bugs():
        trio.run(limited)


def open_fd(kind: str) -> list[int]:
    """Descriptors to send along; the first counts, all are closed by the sender."""
    if kind == "event":
        return [os.eventfd(0, os.EFD_NONBLOCK)]
    if kind == "memory":
        fd = os.memfd_create("fuzz")
        os.ftruncate(fd, 1 << 20)
        return [fd]
    if kind == "pipe":
        return list(os.pipe())
    import socket

    return [s.detach() for s in socket.socketpair()]


async def send(front: RawFrontEnd, request: int, payload: bytes, kinds: list[str], flags: int) -> bool:
    """Send one message with descriptors; False when the session is over."""
    opened = [open_fd(kind) for kind in kinds]
    try:
        await front.send(request, payload, [fds[0] for fds in opened], flags)
    except (BrokenPipeError, ConnectionResetError):
        return False
    finally:
        for fd in (fd for fds in opened for fd in fds):
            os.close(fd)
    return True


async def drain(front: RawFrontEnd) -> None:
    """Read what has been answered until the session ends, or nothing has come for a while."""
    with trio.move_on_after(0.02), contextlib.suppress(ConnectionResetError):
        while (frame := await front.receive()) is not None:
            frame.close_fds()


@settings(suppress_health_check=list(HealthCheck))
@given(st.booleans(), st.booleans(), st.lists(MESSAGE, max_size=25))
def test_any_sequence_of_messages(
    negotiated: bool, with_memory: bool, messages: list[tuple[int, bytes, list[str], int]]
) -> None:
    async def scenario() -> None:
        guest = Guest()
        try:
            async with connected(Net()) as front:
                if negotiated:
                    await front.negotiate()
                if with_memory:
                    await guest.send_memory(front)
                    await guest.ring(0).send_setup(front)
                for message in messages:
                    if not await send(front, *message):
                        break
                await drain(front)
        finally:
            guest.close()

    run(scenario)


ADDRESS = st.one_of(
    st.integers(GUEST_BASE, GUEST_BASE + (1 << 20) + 8192),
    st.sampled_from([0, GUEST_BASE - 1, (1 << 64) - 8, 1 << 63]),
)
DESCRIPTOR = st.tuples(
    ADDRESS,
    st.one_of(st.integers(0, 300), st.sampled_from([0xFFFFFFFF, 1 << 20, 16])),
    st.sampled_from([0, 1, 2, 3, 4, 5, 6, 7, 0x80, 0xFFFF]),
    st.one_of(st.integers(0, 17), st.just(0xFFFF)),
)


@settings(suppress_health_check=list(HealthCheck))
@given(
    st.lists(DESCRIPTOR, min_size=1, max_size=16),
    st.lists(DESCRIPTOR, max_size=16),
    st.lists(st.one_of(st.integers(0, 16), st.integers(0, 0xFFFF)), max_size=20),
    st.one_of(st.integers(0, 20), st.integers(0, 0xFFFF)),
    st.integers(0, 0xFFFF),
)
def test_any_ring(
    table: list[tuple[int, int, int, int]],
    indirect: list[tuple[int, int, int, int]],
    heads: list[int],
    avail_idx: int,
    base: int,
) -> None:
    """The ring stops with a sentence, or works; the session goes on in either case."""

    async def scenario() -> None:
        guest = Guest()
        ring = guest.ring(0, 16)
        for i, descriptor in enumerate(table):
            ring.set_desc(i, *descriptor)
        for i, descriptor in enumerate(indirect):
            struct.pack_into("<QIHH", guest.mem, 0x40000 + 16 * i, *descriptor)
        if indirect:
            ring.set_desc(0, GUEST_BASE + 0x40000, 16 * len(indirect), 4, 0)
        for i, head in enumerate(heads):
            struct.pack_into("<H", guest.mem, ring.avail + 4 + 2 * ((base + i) % ring.size), head)
        struct.pack_into("<H", guest.mem, ring.avail + 2, (base + avail_idx) & 0xFFFF)
        try:
            async with connected(Net()) as front:
                await front.negotiate()
                await guest.send_memory(front)
                await ring.send_setup(front, base=base)
                await front.barrier()
                await front.ask(Request.GET_VRING_BASE, vu.VringState(0, 0).pack())
        finally:
            guest.close()

    run(scenario)


@settings(suppress_health_check=list(HealthCheck))
@given(st.booleans(), st.integers(0, 40), st.integers(0, 40), st.sampled_from([4, 8]), NUMBER, st.booleans())
def test_any_number_in_any_message(
    postcopy: bool, which: int, field: int, size: int, number: int, need_reply: bool
) -> None:
    """In the middle of a whole session one number of one message is another; the rest comes all the same."""

    async def scenario() -> None:
        guest = Guest()
        guest.ring(0, 16)
        scripts = Scripts(guest)
        try:
            messages = scripts.postcopy if postcopy else scripts.calm
            numbered = [i for i, m in enumerate(messages) if len(m.payload) >= size]
            changed = numbered[which % len(numbered)]
            async with connected(Net()) as front:
                for i, message in enumerate(messages):
                    payload = bytearray(message.payload)
                    if i == changed:
                        at = size * (field % (len(payload) // size))
                        payload[at : at + size] = (number & ((1 << 8 * size) - 1)).to_bytes(size, "little")
                    flags = message.flags | (vu.FLAG_NEED_REPLY if need_reply and i == changed else 0)
                    data = vu.encode(message.request, bytes(payload), flags=flags)
                    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                        await front.send_bytes(data, message.fds)
                await drain(front)
        finally:
            scripts.close()
            guest.close()

    run(scenario)
