"""Descriptors, addresses and memory of the bridge's rings change a thousand times while frames flow both ways.

Each change is acknowledged, so the test knows from when on the old descriptor or address is nobody's. Frames are
offered right before and right behind each change; all must arrive whole, once, in order.
"""

from __future__ import annotations

import gc
import os
import socket
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from tests.kit.net_card import MEMORY, Card, frame, udp
from tests.kit.raw_front_end import GUEST_BASE, USER_BASE, Guest, RawFrontEnd, Ring, connected
from tests.kit.until import until
from vhostpc.backend.net import Bridge
from vhostpc.wire import vhost_user as vu
from vhostpc.wire.vhost_user import Request

CHANGES = 1000
WINDOW = 40  # frames of a direction under way when a turn begins, at most
LENGTHS = (60, 1514, 1, 300, 60, 1514, 100, 9000)
ALIAS = 1 << 32  # the rings' memory a second time, so far behind the first
ALIAS_SIZE = 0x100000
KEPT = 100  # replaced descriptors that are watched


def numbered(number: int) -> bytes:
    return frame(number, max(9, LENGTHS[number % len(LENGTHS)]))


class AliasedGuest(Guest):
    """The rings' memory has two places in the guest's address space: a ring's address can change under traffic."""

    @property
    def regions(self) -> list[vu.MemoryRegion]:
        return [self.region, vu.MemoryRegion(GUEST_BASE + ALIAS, ALIAS_SIZE, USER_BASE + ALIAS, 0)]

    async def send_memory(self, front: RawFrontEnd) -> None:
        await front.send(Request.SET_MEM_TABLE, vu.pack_table(self.regions), [self.fd] * 2)


class Stale:
    """Descriptors that were replaced: their counters must stay what they were made."""

    def __init__(self, expected: int) -> None:
        self.expected = expected
        self._fds: deque[int] = deque()

    def add(self, fd: int) -> None:
        """From now on it is nobody's."""
        while read_event(fd):
            pass
        if self.expected:
            os.eventfd_write(fd, self.expected)
        self._fds.append(fd)
        if len(self._fds) > KEPT:
            self._retire()

    def _retire(self) -> None:
        fd = self._fds.popleft()
        assert read_event(fd) == self.expected, "a replaced descriptor was used"
        os.close(fd)

    def close(self) -> None:
        while self._fds:
            self._retire()


def read_event(fd: int) -> int:
    try:
        return os.eventfd_read(fd)
    except BlockingIOError:
        return 0


def new_event() -> int:
    return os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)


class Traffic:
    """Numbered frames in both directions."""

    def __init__(self, card: Card, link: socket.socket, far: socket.socket, bridge: Bridge) -> None:
        self.card, self.link, self.far, self.bridge = card, link, far, bridge
        self.sent = {"out": 0, "in": 0}
        self.came = {"out": 0, "in": 0}

    def send(self, count: int) -> None:
        """``count`` frames each way, fewer out if the card is full."""
        for _ in range(min(count, self.card.free)):
            self.card.send(numbered(self.sent["out"]))
            self.sent["out"] += 1
        for _ in range(count):
            self.far.sendto(numbered(self.sent["in"]), self.link.getsockname())
            self.sent["in"] += 1

    def look(self) -> None:
        """Take the received frames; each must be the next one."""
        for data in self.card.take():
            self._next("in", data)
        try:
            while True:
                self._next("out", self.far.recv(65536))
        except BlockingIOError:
            pass

    def _next(self, way: str, data: bytes) -> None:
        number = self.came[way]
        assert data == numbered(
            number
        ), f"{way}: frame {number} expected, {data[:8]!r} came ({len(data)} bytes)"
        self.came[way] += 1

    async def until_under_way(self, most: int) -> None:
        def few() -> bool:
            self.look()
            return all(self.sent[way] - self.came[way] <= most for way in self.sent)

        await until(few, 20, f"at most {most} frames under way")


Change = Callable[[int], Coroutine[Any, Any, None]]


class Session:
    """One front-end, its card, and the ways to change a ring under it."""

    def __init__(self, front: RawFrontEnd, guest: AliasedGuest, traffic: Traffic) -> None:
        self.front, self.guest, self.traffic = front, guest, traffic
        self.stale_calls, self.stale_kicks = Stale(0), Stale(1)
        self.extra = Guest(1 << 20)
        self._aliased = [False, False]

    def ring(self, turn: int) -> Ring:
        card = self.traffic.card
        return (card.rx, card.tx)[turn % 2]

    async def ack(self, request: int, payload: bytes, fds: list[int]) -> None:
        """Send a change amid frames; return when it is in force."""
        self.traffic.send(4)
        await self.front.send(request, payload, fds, vu.FLAG_NEED_REPLY)
        self.traffic.send(4)
        reply = await self.front.receive()
        assert reply is not None
        assert reply.request == request
        assert vu.unpack_u64(reply.payload) == 0

    async def call(self, turn: int) -> None:
        ring = self.ring(turn)
        old, ring.call = ring.call, new_event()
        await self.ack(Request.SET_VRING_CALL, vu.pack_u64(ring.index), [ring.call])
        self.stale_calls.add(old)

    async def kick(self, turn: int) -> None:
        ring = self.ring(turn)
        old, fresh = ring.kick, new_event()
        self.traffic.send(4)
        await self.front.send(Request.SET_VRING_KICK, vu.pack_u64(ring.index), [fresh], vu.FLAG_NEED_REPLY)
        self.traffic.send(2)  # still kicked by the old one
        ring.kick = fresh
        self.traffic.send(2)
        reply = await self.front.receive()
        assert reply is not None
        assert vu.unpack_u64(reply.payload) == 0
        self.stale_kicks.add(old)

    async def address(self, turn: int) -> None:
        """On a running ring, between the two places of the same memory."""
        ring = self.ring(turn)
        self._aliased[turn % 2] ^= True
        add = ALIAS if self._aliased[turn % 2] else 0
        desc, used, avail = (USER_BASE + add + at for at in (ring.desc, ring.used, ring.avail))
        addr = vu.VringAddr(ring.index, 0, desc, used, avail, GUEST_BASE + add + ring.used)
        await self.ack(Request.SET_VRING_ADDR, addr.pack(), [])

    async def restart(self, turn: int) -> None:
        """Stop a ring, move it in memory with what it holds, start it with descriptors of its own."""
        ring, card = self.ring(turn), self.traffic.card
        self.traffic.send(4)
        await self.front.send(Request.GET_VRING_BASE, vu.VringState(ring.index, 0).pack())
        self.traffic.send(4)
        reply = await self.front.receive()
        assert reply is not None
        base = vu.VringState.unpack(reply.payload).num
        assert base == ring.used_idx, "chains are neither used nor given back"
        # It is nobody's now. Frames go on coming for the other ring, and for this one when it starts.
        old = ring.call, ring.kick
        ring.call, ring.kick = new_event(), new_event()
        self.stale_calls.add(old[0])
        self.stale_kicks.add(old[1])
        card.move(
            ring, 0x80000 + 0x10000 * ring.index if ring.desc < 0x80000 else 0x1000 + 0x10000 * ring.index
        )
        self.traffic.send(2)
        await ring.send_setup(self.front, base=base)
        self.traffic.send(2)
        await self.front.barrier()

    async def table(self, turn: int) -> None:
        """The whole table again; the rings stay where they are in it."""
        await self.ack(Request.SET_MEM_TABLE, vu.pack_table(self.guest.regions), [self.guest.fd] * 2)

    async def slots(self, turn: int) -> None:
        """Another region comes and goes."""
        region = vu.MemoryRegion(1 << 40, self.extra.size, USER_BASE + (1 << 40), 0)
        if turn % 2:
            await self.ack(Request.REM_MEM_REG, vu.pack_single_region(region), [])
        else:
            await self.ack(Request.ADD_MEM_REG, vu.pack_single_region(region), [self.extra.fd])

    def close(self) -> None:
        self.stale_calls.close()
        self.stale_kicks.close()
        self.extra.close()


@pytest.fixture
def guest() -> Iterator[AliasedGuest]:
    guest = AliasedGuest(MEMORY)
    yield guest
    guest.close()


@asynccontextmanager
async def running(guest: AliasedGuest) -> AsyncIterator[Session]:
    with udp() as link, udp() as far:
        bridge = Bridge([link.fileno()], to=far.getsockname())
        traffic = Traffic(Card(guest), link, far, bridge)
        async with connected(bridge) as front:
            session = Session(front, guest, traffic)
            await front.negotiate()
            await guest.send_memory(front)
            far.sendto(b"stale", link.getsockname())
            for ring in guest.rings:
                await ring.send_setup(front)
            await until(lambda: bridge.counters()["in"].discarded == 1, 10, "the rings to run")
            await front.barrier()
            yield session
            session.close()


def open_descriptors() -> int:
    gc.collect()  # what tests before this one left behind must not be closed in the middle
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("kind", ["call", "kick", "address", "restart", "table", "slots"])
async def test_a_thousand_changes_under_traffic(guest: AliasedGuest, kind: str) -> None:
    async with running(guest) as session:
        traffic, change = session.traffic, getattr(session, kind)
        fds = open_descriptors()
        for turn in range(CHANGES):
            await change(turn)
            await traffic.until_under_way(WINDOW)
        # Nobody sends any more: what was sent comes, without another kick or change.
        await traffic.until_under_way(0)
        session.stale_calls.close()
        session.stale_kicks.close()
        assert open_descriptors() == fds
        counters = traffic.bridge.counters()
    for way in ("out", "in"):
        assert counters[way].frames == traffic.sent[way] == traffic.came[way] > 4 * CHANGES
        assert counters[way].dropped == 0
    assert counters["in"].discarded == 1
