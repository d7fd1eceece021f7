"""Postcopy in front of a front-end that cannot serve a fault of ours: absent pages are waited for, never touched.

Nobody asks for pages here, they come in an order of their own. After each the file is looked at: it has the pages that
were placed and no other one.
"""

from __future__ import annotations

import logging
import os
import random
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from tests.backend.test_backend_inflight import Region
from tests.kit.absent_guest import PAGE, AbsentGuest, answer_of, prepare
from tests.kit.raw_front_end import GUEST_BASE, RawFrontEnd, Ring, connected
from tests.kit.until import until
from vhostpc.backend import Device, Options, Queue
from vhostpc.errors import UfdError
from vhostpc.ufd import Features, Userfaultfd
from vhostpc.wire import vhost_user as vu
from vhostpc.wire.vhost_user import Feature, Request

pytestmark = pytest.mark.ufd
NONE = Features(0)
NEVER = Options(no_fault=True)
CHAINS = 6
TEXT, ANSWER = 0x40, 0x41  # pages of the first chain


class Echo(Device):
    num_queues = 2

    def __init__(self, *, unordered: bool = False) -> None:
        self.seen: list[bytes] = []
        self.unordered = unordered

    async def handle_queue(self, queue: Queue) -> None:
        async for chain in queue.unordered() if self.unordered else queue:
            self.seen.append(chain.read())
            chain.write(chain.read()[::-1][: chain.writable])


@dataclass
class Pages:
    """Those of a guest, placed one by one; ``check``: nobody else has made one, and no fault was reported."""

    guest: AbsentGuest

    def __post_init__(self) -> None:
        self.absent = self.guest.holes()

    async def come(self, *pages: int) -> None:
        for page in pages:
            if page in self.absent:
                self.guest.place(page)
                self.absent.remove(page)
            await wait_all_tasks_blocked()
            self.check()

    async def come_all(self, *, but: int = -1) -> None:
        """In any order."""
        pages = sorted(self.absent - {but})
        random.Random(7).shuffle(pages)
        for page in pages:
            self.guest.place(page)
            self.absent.remove(page)

    def check(self) -> None:
        assert self.guest.holes() == self.absent, "a page was made that nobody sent"
        for ufd, _ in self.guest.clients:
            assert list(ufd.events(8)) == [], "a fault was reported"


@pytest.fixture
def guest() -> Iterator[AbsentGuest]:
    guest = AbsentGuest()
    yield guest
    guest.close()


async def start(guest: AbsentGuest, front: RawFrontEnd, *, log: int = 0) -> Ring:
    await guest.advise(front)
    assert await guest.listen(front) == 0
    await guest.share_table(front)
    await guest.rings[0].send_setup(front, log=log)
    await front.barrier()
    return guest.rings[0]


async def base_of(front: RawFrontEnd) -> int:
    base = await front.ask(Request.GET_VRING_BASE, vu.VringState(0, 0).pack())
    return vu.VringState.unpack(base.payload).num


def ring_pages(ring: Ring) -> set[int]:
    return {ring.desc // PAGE, ring.avail // PAGE, ring.used // PAGE}


def used(guest: AbsentGuest, ring: Ring) -> int:
    return int(struct.unpack("<H", os.pread(guest.fd, 2, ring.used + 2))[0])


def check_memory(guest: AbsentGuest, texts: list[bytes], ring: Ring) -> None:
    """All of memory is the source's, but for what the device has written."""
    assert [answer_of(guest, 0, i, len(t)) for i, t in enumerate(texts)] == [t[::-1] for t in texts]
    expected, memory = bytearray(guest.image), guest.memory()
    for i, text in enumerate(texts):
        at = 0x40000 + i * 2 * PAGE + PAGE
        expected[at : at + len(text)] = text[::-1]
    area = slice(ring.used, ring.used + 6 + 8 * ring.size)
    expected[area] = memory[area]
    assert memory == bytes(expected)


@pytest.mark.parametrize("unordered", [False, True])
@pytest.mark.parametrize("seed", range(3))
async def test_pages_come_one_by_one(guest: AbsentGuest, unordered: bool, seed: int) -> None:
    texts = prepare(guest, 0, CHAINS)
    pages, device = Pages(guest), Echo(unordered=unordered)
    async with connected(device, NEVER) as front:
        await front.negotiate()
        ring = await start(guest, front)
        order = [*ring_pages(ring), *range(TEXT, TEXT + 2 * CHAINS)]
        random.Random(seed).shuffle(order)
        await wait_all_tasks_blocked()
        pages.check()
        for page in order:
            await pages.come(page)
            await front.barrier()
        await until(lambda: used(guest, ring) == CHAINS)
        pages.check()
        assert await base_of(front) == CHAINS
        await pages.come_all()
        assert await guest.end(front) == 0
    assert sorted(device.seen) == sorted(texts)
    check_memory(guest, texts, ring)


@pytest.mark.parametrize("unordered", [False, True])
@pytest.mark.parametrize("held", [TEXT, ANSWER])
async def test_stopped_while_a_page_is_waited_for(guest: AbsentGuest, held: int, unordered: bool) -> None:
    """The stop needs no page; the chain stays the guest's, and comes again."""
    texts = prepare(guest, 0, CHAINS)
    pages, device = Pages(guest), Echo(unordered=unordered)
    async with connected(device, NEVER) as front:
        await front.negotiate()
        ring = await start(guest, front)
        await pages.come(*ring_pages(ring))
        if unordered:
            await pages.come_all(but=held)
            await until(lambda: used(guest, ring) == CHAINS - 1)
            # The stop waits for the chain that is older than an answered one.
            await front.send(Request.GET_VRING_BASE, vu.VringState(0, 0).pack())
            await wait_all_tasks_blocked(0.02)
            pages.check()
            await pages.come(held)
            reply = await front.receive()
            assert reply is not None
            base = vu.VringState.unpack(reply.payload).num
        else:
            with trio.fail_after(10):
                base = await base_of(front)
        assert base == used(guest, ring)
        pages.check()
        await ring.send_setup(front, base=base)
        await front.barrier()
        await pages.come_all()
        await until(lambda: used(guest, ring) == CHAINS)
        assert await guest.end(front) == 0
    assert sorted(set(device.seen)) == sorted(texts)
    check_memory(guest, texts, ring)


@pytest.mark.parametrize("held", [TEXT, ANSWER])
async def test_front_end_lost_while_a_page_is_waited_for(
    guest: AbsentGuest, held: int, caplog: pytest.LogCaptureFixture
) -> None:
    texts = prepare(guest, 0, 1)
    pages, device = Pages(guest), Echo()
    async with connected(device, NEVER) as front:
        await front.negotiate()
        await start(guest, front)
        await pages.come_all(but=held)
        await wait_all_tasks_blocked(0.02)
        before = guest.memory()
        front.close()
    pages.check()
    assert guest.memory() == before
    assert device.seen == (texts if held == ANSWER else [])
    assert "front-end lost in postcopy" in caplog.text
    assert "Traceback" not in caplog.text


async def test_a_page_that_nobody_sends_is_empty_at_the_end(guest: AbsentGuest) -> None:
    """END says that every page has arrived: what is not there then is zero for all, and nobody waits for it."""
    prepare(guest, 0, 1)
    pages, device = Pages(guest), Echo()
    async with connected(device, NEVER) as front:
        await front.negotiate()
        await start(guest, front)
        await pages.come_all(but=TEXT)
        await wait_all_tasks_blocked(0.02)
        pages.check()
        assert device.seen == []
        assert await guest.end(front) == 0
        await until(lambda: len(device.seen) == 1)
    assert device.seen == [bytes(len(b"chain 0 of ring 0"))]


async def test_dirty_log_and_inflight_region_as_ever(guest: AbsentGuest) -> None:
    """A page that is waited for is neither marked dirty nor a chain that is in flight before it is here."""
    texts = prepare(guest, 0, CHAINS)
    pages, device, region = Pages(guest), Echo(), Region(queue_size=64)
    log = os.memfd_create("log", os.MFD_CLOEXEC)
    os.ftruncate(log, PAGE)

    def dirty(page: int) -> bool:
        number = GUEST_BASE // PAGE + page
        return bool(os.pread(log, 1, number // 8)[0] >> number % 8 & 1)

    try:
        async with connected(device, NEVER) as front:
            features, _ = await front.negotiate()
            await front.ask(Request.SET_LOG_BASE, vu.LogArea(PAGE, 0).pack(), [log])
            await front.send(Request.SET_FEATURES, vu.pack_u64(features | Feature.LOG_ALL))
            await region.send(front)
            ring = await start(guest, front, log=1)
            await pages.come(*ring_pages(ring), TEXT)
            await front.barrier()
            # A batch is taken when its first chain's pages are here, and the answer's is not.
            assert not dirty(ANSWER)
            assert not dirty(ring.used // PAGE)
            assert (region.used, used(guest, ring)) == (0, 0)
            await pages.come(ANSWER)
            await until(lambda: used(guest, ring) == 1)
            assert dirty(ANSWER)
            assert dirty(ring.used // PAGE)
            assert not dirty(TEXT)
            assert not dirty(ANSWER + 2)
            await until(lambda: region.used == 1)
            await pages.come_all()
            await until(lambda: used(guest, ring) == CHAINS)
            await until(lambda: region.used == CHAINS and region.marked == [])
            assert all(dirty(ANSWER + 2 * i) for i in range(CHAINS))
            assert await guest.end(front) == 0
    finally:
        region.close()
        os.close(log)
    check_memory(guest, texts, ring)


async def test_the_loop_goes_on(guest: AbsentGuest) -> None:
    """One queue waits; the loop beats, control is answered, the other queue works."""
    prepare(guest, 0)
    prepare(guest, 1)
    pages, device = Pages(guest), Echo()
    async with connected(device, NEVER) as front:
        await front.negotiate()
        await start(guest, front)
        second = guest.rings[1]
        await second.send_setup(front)
        await pages.come(*ring_pages(second), *range(0x80, 0x86))
        await until(lambda: used(guest, second) == 3)
        beats = 0
        with trio.move_on_after(0.1):
            while True:
                await trio.sleep(0.01)
                beats += 1
        assert beats >= 2
        await front.barrier()
        pages.check()
        assert all(b"ring 1" in text for text in device.seen)
        await pages.come_all()
        await until(lambda: len(device.seen) == 6)
        await guest.end(front)


async def test_the_log_says_so_once(guest: AbsentGuest, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    async with connected(Echo(), NEVER) as front:
        await front.negotiate()
        await guest.advise(front)
        await guest.advise(front)
        await front.barrier()
    assert caplog.text.count("postcopy without faults") == 1
    assert "refused" not in caplog.text
    caplog.clear()
    async with connected(Echo()) as front:
        await front.negotiate()
        await guest.advise(front)
    assert "without faults" not in caplog.text


def open_without(missing: Features) -> Callable[..., Userfaultfd]:
    """``Userfaultfd.open`` of a kernel that does not know a feature."""
    real = Userfaultfd.open

    def opened(*, features: Features, optional: Features = NONE) -> Userfaultfd:
        if features & missing:
            raise UfdError("this kernel's userfaultfd does not know MINOR_HUGETLBFS")
        return real(features=features, optional=optional)

    return opened


@pytest.mark.parametrize("known", [True, False])
async def test_huge_pages_that_cannot_be_asked_for_are_refused(
    known: bool,
    guest: AbsentGuest,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    huge_pages: int,
) -> None:
    caplog.set_level(logging.INFO)
    if not known:
        monkeypatch.setattr(Userfaultfd, "open", open_without(Features.MINOR_HUGETLBFS))
    size = 2 << 20
    fd = os.memfd_create("huge", os.MFD_CLOEXEC | 4 | 21 << 26)  # MFD_HUGETLB, of 2 MiB
    try:
        os.ftruncate(fd, size)
        async with connected(Echo(), NEVER) as front:
            await front.negotiate()
            await guest.advise(front)
            assert await guest.listen(front) == 0
            table = vu.pack_table([vu.MemoryRegion(GUEST_BASE, size, 0x7F0000000000, 0)])
            await front.send(Request.SET_MEM_TABLE, table, [fd])
            if known:
                reply = await front.receive()
                assert reply is not None
                await front.barrier()
            else:
                assert await front.ended()
    finally:
        os.close(fd)
    assert ("huge pages will be refused" in caplog.text) != known
    assert ("MINOR_HUGETLBFS (Linux 5.13), which cannot be opened here" in caplog.text) != known
