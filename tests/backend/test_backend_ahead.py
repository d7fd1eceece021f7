"""Missing pages of one batch are asked for together, and by no more threads than a session may have."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

from tests.backend.test_backend_unordered import Selective, base_of, start, used
from tests.kit.absent_guest import PAGE, AbsentGuest, answer_of, prepare
from tests.kit.hostile import open_fds
from tests.kit.raw_front_end import GUEST_BASE, WRITE, Guest, RawFrontEnd, Ring, connected
from tests.kit.thread_names import thread_names
from tests.kit.until import until
from vhostpc.backend import Chain, Device, Options, Queue
from vhostpc.memory.mapping import PAGES_AHEAD, Supply
from vhostpc.wire import vhost_user as vu
from vhostpc.wire.vhost_user import Request

pytestmark = pytest.mark.ufd
CHAINS = 20
MANY = 100
TEXT, ANSWER = 0x40, 0x41  # pages of the first chain's text and answer; the next chain's are two further on
TEXTS = {TEXT + 2 * i for i in range(CHAINS)}
ANSWERS = {ANSWER + 2 * i for i in range(CHAINS)}


class Echo(Device):
    """Reverses texts, in one of the ways in which a device takes chains."""

    def __init__(self, way: str = "in order") -> None:
        self.way = way
        self.seen: list[bytes] = []
        self.supply: Supply | None = None

    async def handle_queue(self, queue: Queue) -> None:
        self.supply = queue._ring.gate.supply
        if self.way == "batches":
            async for chains in queue.batches():
                for chain in chains:
                    self.answer(chain)
        else:
            async for chain in queue.unordered() if self.way == "unordered" else queue:
                self.answer(chain)

    def answer(self, chain: Chain) -> None:
        self.seen.append(chain.read())
        chain.write(chain.read()[::-1][: chain.writable])


class Pumped(Device):
    """Its frames come from a socket, or go to one."""

    def __init__(self, sock: socket.socket, inward: bool) -> None:
        self.sock = sock
        self.inward = inward

    async def handle_queue(self, queue: Queue) -> None:
        if self.inward:
            await queue.pump_in(self.sock.fileno(), keep_stale=True)
        else:
            await queue.pump_out(self.sock.fileno())


@pytest.fixture
def guest() -> Iterator[AbsentGuest]:
    guest = AbsentGuest()
    yield guest
    guest.close()


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with near, far:
        far.settimeout(10)
        yield near, far


def helpers() -> int:
    """Threads of this process that wait for pages ahead."""
    return sum(name == "vpc-ahead" for name in thread_names().values())


@asynccontextmanager
async def held_back(
    guest: AbsentGuest,
    device: Device,
    held: set[int],
    options: Options = Options(),  # noqa: B008
) -> AsyncIterator[tuple[RawFrontEnd, Ring, Selective]]:
    """A session in postcopy whose pages come at once, but for some. No thread is left behind it."""
    pages = Selective(guest, *held)
    async with connected(device, options) as front, trio.open_nursery() as nursery:
        ring = await start(guest, front)
        nursery.start_soon(pages.run)
        yield front, ring, pages
        nursery.cancel_scope.cancel()
    await until(lambda: not helpers())


async def end(guest: AbsentGuest, front: RawFrontEnd) -> None:
    guest.place_rest()
    await front.ask(Request.GET_VRING_BASE, vu.VringState(0, 0).pack())
    await guest.end(front)


@pytest.mark.parametrize("held", [TEXTS, ANSWERS], ids=["texts", "answers"])
@pytest.mark.parametrize("slow", [False, True], ids=["", "slow"])
@pytest.mark.parametrize("way", ["in order", "batches", "unordered"])
async def test_all_pages_are_asked_for_before_one_has_come(
    guest: AbsentGuest, way: str, slow: bool, held: set[int]
) -> None:
    texts = prepare(guest, 0, CHAINS)
    device = Echo(way)
    async with held_back(guest, device, held, Options(slow=slow)) as (front, ring, pages):
        await until(lambda: pages.waiting == held)
        assert used(guest, ring) == 0
        pages.let_go()
        await until(lambda: used(guest, ring) == CHAINS)
        assert sorted(device.seen) == sorted(texts)
        if way != "unordered":
            assert device.seen == texts
        assert [answer_of(guest, 0, i, len(t)) for i, t in enumerate(texts)] == [t[::-1] for t in texts]
        await end(guest, front)


async def test_a_pump_asks_for_the_frames_behind_the_one_that_it_waits_for(
    guest: AbsentGuest, pair: tuple[socket.socket, socket.socket]
) -> None:
    texts = prepare(guest, 0, CHAINS)
    near, far = pair
    async with held_back(guest, Pumped(near, inward=False), TEXTS) as (front, ring, pages):
        await until(lambda: pages.waiting == TEXTS)
        pages.let_go()
        await until(lambda: used(guest, ring) == CHAINS)
        assert [far.recv(100) for _ in texts] == texts
        await end(guest, front)


async def test_a_pump_asks_for_the_buffers_of_all_frames_that_it_has(
    guest: AbsentGuest, pair: tuple[socket.socket, socket.socket]
) -> None:
    """And for no other: only twelve frames have come for twenty buffers."""
    near, far = pair
    ring = guest.ring(0, 64)
    for i in range(CHAINS):
        ring.set_desc(i, GUEST_BASE + (ANSWER + 2 * i) * PAGE, 64, WRITE)
    ring.offer(*range(CHAINS))
    frames = [b"frame %d" % i for i in range(12)]
    for frame in frames:
        far.send(frame)
    needed = {ANSWER + 2 * i for i in range(12)}
    async with held_back(guest, Pumped(near, inward=True), ANSWERS) as (front, ring, pages):
        await until(lambda: pages.waiting == needed)
        pages.let_go()
        await until(lambda: used(guest, ring) == 12)
        assert pages.waiting == needed
        assert [guest.memory()[page * PAGE :][:8] for page in sorted(needed)] == [
            f.ljust(8, b"\0") for f in frames
        ]
        await end(guest, front)


def many(guest: AbsentGuest) -> set[int]:
    """A ring of many chains, each text on a page of its own; the pages."""
    ring = guest.ring(0, 256)
    for i in range(MANY):
        text = b"chain %d" % i
        ring.set_desc(i, guest.put((TEXT + i) * PAGE, text), len(text))
    ring.offer(*range(MANY))
    return {TEXT + i for i in range(MANY)}


@pytest.mark.parametrize("way", ["in order", "unordered"])
@pytest.mark.parametrize("limit", [PAGES_AHEAD, 3])
async def test_no_more_than_the_limit(guest: AbsentGuest, way: str, limit: int) -> None:
    """With each page that comes, others are asked for. A thread that waits for one itself does not count."""
    held = many(guest)
    device = Echo(way)
    async with held_back(guest, device, held, Options(pages_ahead=limit)) as (front, ring, pages):
        placed = most = 0
        while pages.held:
            some = min(limit, MANY - placed) if way == "unordered" else limit // 2 + 1 if placed == 1 else 1
            await until(lambda: len(pages.waiting) - placed >= some)  # noqa: B023
            most = max(most, len(pages.waiting) - placed)
            assert device.supply is not None
            assert device.supply.ahead().waiting <= limit
            assert device.supply.ahead().threads <= limit
            first = min(pages.held & pages.waiting)
            pages.held.discard(first)
            guest.place(first)
            placed += 1
        assert limit // 2 < most <= limit + 1
        await until(lambda: used(guest, ring) == MANY)
        await end(guest, front)


@pytest.mark.parametrize("way", ["in order", "batches", "unordered"])
async def test_nothing_is_asked_for_ahead(guest: AbsentGuest, way: str) -> None:
    """Then a plain iteration waits for one page after the other, and each chain of the others on a thread."""
    texts = prepare(guest, 0, CHAINS)
    device = Echo(way)
    async with held_back(guest, device, TEXTS, Options(pages_ahead=0)) as (front, ring, pages):
        expected = TEXTS if way == "unordered" else {TEXT}
        await until(lambda: pages.waiting == expected)
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert pages.waiting == expected
        assert not helpers()
        pages.let_go()
        await until(lambda: used(guest, ring) == CHAINS)
        assert sorted(device.seen) == sorted(texts)
        await end(guest, front)


async def test_a_broken_chain_is_not_judged_before_its_turn(guest: AbsentGuest) -> None:
    texts = prepare(guest, 0, CHAINS)
    guest.rings[0].set_desc(2 * 5, 0xDEAD0000, 64)
    device = Echo()
    async with held_back(guest, device, TEXTS) as (front, ring, pages):
        await until(lambda: pages.waiting == {TEXT + 2 * i for i in range(5)})
        pages.let_go()
        await until(lambda: used(guest, ring) == 5)
        assert device.seen == texts[:5]
        await end(guest, front)


@pytest.mark.parametrize("way", ["in order", "unordered"])
async def test_front_end_lost(guest: AbsentGuest, way: str) -> None:
    """All threads end, no page is made, nothing is left open."""
    prepare(guest, 0, CHAINS)
    before = open_fds()
    async with held_back(guest, Echo(way), TEXTS) as (front, _, pages):
        await until(lambda: pages.waiting == TEXTS)
        assert helpers() >= CHAINS
        holes = guest.holes()
        front.close()
    assert guest.holes() == holes
    while guest.clients:
        guest.clients.pop()[0].close()
    assert open_fds() == before


async def test_a_stop_waits_for_none_of_them(guest: AbsentGuest) -> None:
    """The chains are given back at once; the threads go on until their pages come."""
    texts = prepare(guest, 0, CHAINS)
    device = Echo("unordered")
    async with held_back(guest, device, TEXTS) as (front, ring, pages):
        await until(lambda: pages.waiting == TEXTS)
        assert await base_of(front) == 0
        assert helpers() >= CHAINS
        await ring.send_setup(front)
        pages.let_go()
        await until(lambda: used(guest, ring) == CHAINS)
        assert sorted(device.seen) == sorted(texts)
        await end(guest, front)
        await until(lambda: not helpers())


async def test_the_table_comes_again(guest: AbsentGuest) -> None:
    """The front-end forgets the old addresses: their threads are released, and make no page; all is asked for anew."""
    texts = prepare(guest, 0, CHAINS)
    device = Echo("unordered")
    async with held_back(guest, device, TEXTS) as (front, ring, pages):
        for _ in range(3):
            await until(lambda: pages.waiting == TEXTS)
            holes = guest.holes()
            pages.waiting.clear()
            await guest.share_table(front)
            await front.barrier()
            await until(lambda: pages.waiting == TEXTS)
            assert guest.holes() == holes
            assert device.supply is not None
            assert device.supply.ahead().waiting == CHAINS
        pages.let_go()
        await until(lambda: used(guest, ring) == CHAINS)
        assert sorted(device.seen) == sorted(texts)
        await end(guest, front)


async def test_without_postcopy_there_is_nothing() -> None:
    guest = Guest()
    device = Echo("unordered")
    try:
        async with connected(device) as front:
            await front.negotiate()
            await guest.send_memory(front)
            ring = guest.ring(0, 16)
            ring.set_desc(0, guest.put(0x8000, b"text"), 4)
            ring.offer(0)
            await ring.send_setup(front)
            await ring.until_used(1)
            assert device.supply is not None
            assert device.supply.ahead_fd is None
            assert not helpers()
    finally:
        guest.close()
