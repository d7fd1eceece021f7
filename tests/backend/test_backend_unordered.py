"""Requests of one queue that do not wait for each other's missing pages."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator

import pytest
import trio
import trio.testing

from tests.kit.absent_guest import PAGE, AbsentGuest, answer_of, prepare
from tests.kit.raw_front_end import GUEST_BASE, INDIRECT, NEXT, WRITE, RawFrontEnd, Ring, connected
from tests.kit.until import until
from vhostpc.backend import Chain, Device, Queue
from vhostpc.virtio import late as late_module
from vhostpc.virtio.late import Late
from vhostpc.wire import vhost_user as vu
from vhostpc.wire.vhost_user import Request

pytestmark = pytest.mark.ufd
CHAINS = 20
TEXT, ANSWER = 0x40, 0x41  # pages of the first chain's text and answer; the next chain's are two further on


class Echo(Device):
    """Answers in any order; asks for a page that is absent only by its chains."""

    def __init__(self) -> None:
        self.seen: list[bytes] = []

    async def handle_queue(self, queue: Queue) -> None:
        async for chain in queue.unordered():
            self.seen.append(chain.read())
            chain.write(chain.read()[::-1][: chain.writable])


class Selective:
    """Places each page that is asked for, but for those held back."""

    def __init__(self, guest: AbsentGuest, *held: int) -> None:
        self.guest = guest
        self.held = set(held)
        self.waiting: set[int] = set()

    async def run(self) -> None:
        while True:
            page = await self.guest.next_fault_forever()
            if page in self.held:
                self.waiting.add(page)
            elif page in self.guest.holes():
                self.guest.place(page)
            else:
                for ufd, base in self.guest.clients:
                    ufd.wake(base + page * PAGE, PAGE)

    def let_go(self) -> None:
        held, self.held = self.held, set()
        for page in held & self.waiting:
            self.guest.place(page)


@pytest.fixture
def guest() -> Iterator[AbsentGuest]:
    guest = AbsentGuest()
    yield guest
    guest.close()


async def start(guest: AbsentGuest, front: RawFrontEnd) -> Ring:
    await front.negotiate()
    await guest.advise(front)
    assert await guest.listen(front) == 0
    await guest.share_table(front)
    await guest.rings[0].send_setup(front)
    return guest.rings[0]


def used(guest: AbsentGuest, ring: Ring) -> int:
    return int(struct.unpack("<H", os.pread(guest.fd, 2, ring.used + 2))[0])


async def base_of(front: RawFrontEnd) -> int:
    base = await front.ask(Request.GET_VRING_BASE, vu.VringState(0, 0).pack())
    return vu.VringState.unpack(base.payload).num


def indirect(guest: AbsentGuest, texts: list[bytes]) -> None:
    """The same chains by indirect tables, each table on a page of its own."""
    ring = guest.rings[0]
    for i, text in enumerate(texts):
        at = 0x40000 + i * 2 * PAGE
        table = struct.pack("<QIHH", GUEST_BASE + at, len(text), NEXT, 1)
        table += struct.pack("<QIHH", GUEST_BASE + at + PAGE, 64, WRITE, 0)
        ring.set_desc(2 * i, guest.put(0x80000 + i * PAGE, table), len(table), INDIRECT)


@pytest.mark.parametrize("held", [TEXT, ANSWER, 0x80], ids=["text", "answer", "table"])
async def test_one_request_waits_and_the_others_do_not(guest: AbsentGuest, held: int) -> None:
    texts = prepare(guest, 0, CHAINS)
    if held == 0x80:
        indirect(guest, texts)
    device = Echo()
    pages = Selective(guest, held)
    async with connected(device) as front, trio.open_nursery() as nursery:
        ring = await start(guest, front)
        nursery.start_soon(pages.run)
        await until(lambda: used(guest, ring) == CHAINS - 1 and held in pages.waiting)
        assert [answer_of(guest, 0, i, len(t)) for i, t in enumerate(texts)][1:] == [
            t[::-1] for t in texts[1:]
        ]
        await front.barrier()
        pages.let_go()
        await until(lambda: used(guest, ring) == CHAINS)
        assert answer_of(guest, 0, 0, len(texts[0])) == texts[0][::-1]
        assert sorted(device.seen) == sorted(texts)
        assert await base_of(front) == CHAINS
        guest.place_rest()
        await guest.end(front)
        nursery.cancel_scope.cancel()


async def test_a_few_are_taken_before_their_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """A large ring full of chains whose pages have not come: a batch more than the limit become tasks at most."""
    guest = AbsentGuest(2048 * PAGE)
    most = 0
    real = Late.await_chain

    def counted(late: Late, chain: Chain) -> None:
        nonlocal most
        real(late, chain)
        most = max(most, late._count)

    monkeypatch.setattr(Late, "await_chain", counted)
    monkeypatch.setattr(late_module, "MOST_LATE", 128)
    try:
        ring = guest.ring(0, 1024)
        texts = [b"chain %d" % i for i in range(1024)]
        for i, text in enumerate(texts):
            ring.set_desc(i, guest.put((512 + i) * PAGE, text), len(text))
            struct.pack_into("<H", guest.image, ring.avail + 4 + 2 * i, i)
        struct.pack_into("<H", guest.image, ring.avail + 2, 1024)
        device = Echo()
        async with connected(device) as front, trio.open_nursery() as nursery:
            await start(guest, front)
            nursery.start_soon(guest.serve)
            await until(lambda: used(guest, ring) == 1024, 30)
            assert sorted(device.seen) == sorted(texts)
            assert 128 <= most < 128 + 64
            await front.barrier()
            guest.place_rest()
            await guest.end(front)
            nursery.cancel_scope.cancel()
    finally:
        guest.close()


async def test_many_wait_at_once(guest: AbsentGuest) -> None:
    """All texts are asked for before the first of them comes."""
    texts = prepare(guest, 0, CHAINS)
    held = {TEXT + 2 * i for i in range(CHAINS)}
    pages = Selective(guest, *held)
    device = Echo()
    async with connected(device) as front, trio.open_nursery() as nursery:
        ring = await start(guest, front)
        nursery.start_soon(pages.run)
        await until(lambda: pages.waiting == held)
        pages.let_go()
        await until(lambda: used(guest, ring) == CHAINS)
        assert sorted(device.seen) == sorted(texts)
        guest.place_rest()
        await guest.end(front)
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("held", [TEXT, ANSWER], ids=["text", "answer"])
async def test_stop_waits_for_what_is_older_than_an_answer(guest: AbsentGuest, held: int) -> None:
    """The first chain cannot be given back: the others are answered. The stop brings it to the device."""
    texts = prepare(guest, 0, CHAINS)
    device = Echo()
    pages = Selective(guest, held)
    async with connected(device) as front, trio.open_nursery() as nursery:
        ring = await start(guest, front)
        nursery.start_soon(pages.run)
        await until(lambda: used(guest, ring) == CHAINS - 1)
        await front.send(Request.GET_VRING_BASE, vu.VringState(0, 0).pack())
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert used(guest, ring) == CHAINS - 1
        pages.let_go()
        reply = await front.receive()
        assert reply is not None
        assert vu.VringState.unpack(reply.payload).num == CHAINS == used(guest, ring)
        assert sorted(device.seen) == sorted(texts)
        guest.place_rest()
        await guest.end(front)
        nursery.cancel_scope.cancel()


async def test_stop_gives_back_what_is_younger(guest: AbsentGuest) -> None:
    """The last three chains wait: the stop lasts until the awaited pages arrive, and the three come again."""
    texts = prepare(guest, 0, CHAINS)
    held = {TEXT + 2 * (CHAINS - i) for i in (1, 2, 3)}
    device = Echo()
    pages = Selective(guest, *held)
    async with connected(device) as front, trio.open_nursery() as nursery:
        ring = await start(guest, front)
        nursery.start_soon(pages.run)
        await until(lambda: used(guest, ring) == CHAINS - 3 and pages.waiting == held)
        await front.send(Request.GET_VRING_BASE, vu.VringState(0, 0).pack())
        await trio.testing.wait_all_tasks_blocked(0.05)
        pages.let_go()
        reply = await front.receive()
        assert reply is not None
        assert vu.VringState.unpack(reply.payload).num == CHAINS - 3 == used(guest, ring)
        assert sorted(device.seen) == sorted(texts[:-3])
        await ring.send_setup(front, base=CHAINS - 3)
        await until(lambda: used(guest, ring) == CHAINS)
        assert sorted(device.seen) == sorted(texts)
        guest.place_rest()
        await front.ask(Request.GET_VRING_BASE, vu.VringState(0, 0).pack())
        await guest.end(front)
        nursery.cancel_scope.cancel()


async def test_change_while_requests_wait(guest: AbsentGuest) -> None:
    """The ring's addresses are set anew while a chain waits: it goes on waiting, and comes once."""
    texts = prepare(guest, 0, CHAINS)
    device = Echo()
    pages = Selective(guest, TEXT, ANSWER + 2)
    async with connected(device) as front, trio.open_nursery() as nursery:
        ring = await start(guest, front)
        nursery.start_soon(pages.run)
        await until(lambda: used(guest, ring) == CHAINS - 2)
        u = guest.user
        addr = vu.VringAddr(0, 0, u(ring.desc), u(ring.used), u(ring.avail), 0)
        moved = vu.VringAddr(0, 0, u(ring.desc), u(0x90000), u(ring.avail), 0)
        guest.image[0x90000 : 0x90000 + 8 * 64 + 6] = os.pread(guest.fd, 8 * 64 + 6, ring.used)
        for change in (moved, addr):
            await front.send(Request.SET_VRING_ADDR, change.pack())
        await trio.testing.wait_all_tasks_blocked(0.05)
        pages.let_go()
        await front.barrier()
        await until(lambda: used(guest, ring) == CHAINS)
        assert sorted(device.seen) == sorted(texts)
        guest.place_rest()
        await guest.end(front)
        nursery.cancel_scope.cancel()


async def test_front_end_lost_while_requests_wait(guest: AbsentGuest) -> None:
    prepare(guest, 0, CHAINS)
    held = {TEXT, TEXT + 2, ANSWER + 4}
    pages = Selective(guest, *held)
    async with trio.open_nursery() as nursery:
        async with connected(Echo()) as front:
            ring = await start(guest, front)
            nursery.start_soon(pages.run)
            await until(lambda: used(guest, ring) == CHAINS - 3 and pages.waiting == held)
            before = guest.holes()
            front.close()
        nursery.cancel_scope.cancel()
    assert guest.holes() == before
