"""Postcopy message by message, with pages that the test holds back.

Back-end and resolver share this process and its trio loop: a touch that held the GIL or the loop while it
waits would stop the very task that brings its page.
"""

from __future__ import annotations

import ctypes
import logging
import os
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
import trio.testing

from tests.kit.absent_guest import LISTEN_FLAGS, PAGE, AbsentGuest, answer_of, prepare
from tests.kit.raw_front_end import GUEST_BASE, NEXT, WRITE, connected
from tests.kit.thread_names import asleep_for_a_page
from tests.kit.until import until
from vhostpc.backend import Chain, Device, Queue
from vhostpc.wire import vhost_user as vu
from vhostpc.wire.vhost_user import ProtocolFeature, Request

pytestmark = pytest.mark.ufd


class Echo(Device):
    num_queues = 2

    def __init__(self) -> None:
        self.seen: list[bytes] = []

    async def handle_queue(self, queue: Queue) -> None:
        async for chain in queue:
            self.seen.append(chain.read())
            chain.write(chain.read()[::-1][: chain.writable])


@pytest.fixture
def guest() -> Iterator[AbsentGuest]:
    guest = AbsentGuest()
    yield guest
    guest.close()


@pytest.mark.parametrize("slots", [False, True])
@pytest.mark.parametrize("ack", sorted(vu.POSTCOPY_ACKS))
async def test_exchange_and_faults(guest: AbsentGuest, slots: bool, ack: int) -> None:
    """Both ways to share memory, each number that the front-end's word may carry; every page comes late."""
    texts = prepare(guest, 0)
    device = Echo()
    async with connected(device) as front, trio.open_nursery() as nursery:
        await front.negotiate()
        await guest.advise(front)
        assert await guest.listen(front) == 0
        await (guest.share_slots if slots else guest.share_table)(front, ack)
        await guest.rings[0].send_setup(front)
        await front.barrier()  # the back-end answers, although it cannot read its ring yet
        assert len(guest.holes()) == guest.size // PAGE
        nursery.start_soon(guest.serve)
        with trio.fail_after(10):
            while len(device.seen) < 3:
                await trio.sleep(0.001)
        await front.barrier()
        base = await front.ask(Request.GET_VRING_BASE, vu.VringState(0, 0).pack())
        assert vu.VringState.unpack(base.payload).num == 3
        guest.place_rest()
        assert await guest.end(front) == 0
        nursery.cancel_scope.cancel()
    assert device.seen == texts
    assert [answer_of(guest, 0, i, len(t)) for i, t in enumerate(texts)] == [t[::-1] for t in texts]
    assert len(guest.requested) >= 6
    # Asked for once each: a page that is here is not waited for again.
    assert len(set(guest.requested)) == len(guest.requested)


async def test_loop_goes_on_at_every_touch(guest: AbsentGuest) -> None:
    """Each page in turn is held back: the loop beats, control is answered, the other queue works."""
    prepare(guest, 0)
    other = guest.ring(1, 16)
    other.set_desc(0, guest.put(0xF0000, b"other"), 5, NEXT, 1)
    other.set_desc(1, GUEST_BASE + 0xF1000, 5, WRITE)
    other.offer(0)
    device = Echo()
    async with connected(device) as front:
        await front.negotiate()
        await guest.advise(front)
        await guest.listen(front)
        await guest.share_table(front)
        for page in {other.desc // PAGE, other.avail // PAGE, other.used // PAGE, 0xF0, 0xF1}:
            guest.place(page)
        await guest.rings[0].send_setup(front)
        await other.send_setup(front)
        with trio.fail_after(10):
            while b"other" not in device.seen:
                await trio.sleep(0.001)
        while len(device.seen) < 4:
            page = await guest.next_fault()
            beats = 0
            with trio.move_on_after(0.1):
                while True:
                    await trio.sleep(0.01)
                    beats += 1
            assert beats >= 2
            await front.barrier()
            guest.place(page)
            await trio.testing.wait_all_tasks_blocked(0.02)
        guest.place_rest()
        await guest.end(front)


@pytest.mark.parametrize("stopping", [False, True])
async def test_front_end_lost_while_a_touch_waits(
    guest: AbsentGuest, stopping: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Only the socket is closed: the waiter is let go, nothing came out, no page was born; the guest may live."""
    texts = prepare(guest, 0, 20)
    device = Echo()
    async with connected(device) as front:
        await front.negotiate()
        await guest.advise(front)
        await guest.listen(front)
        await guest.share_slots(front)
        await guest.rings[0].send_setup(front)
        while (page := await guest.next_fault()) != 0x40:  # the first chain's text
            guest.place(page)
        if stopping:
            await front.send(Request.GET_VRING_BASE, vu.VringState(0, 0).pack())
            await trio.testing.wait_all_tasks_blocked(0.05)
        before = guest.holes()
        front.close()
    assert device.seen == []
    assert guest.holes() == before
    guest.place_rest()
    assert guest.memory() == bytes(guest.image)
    assert texts
    assert "front-end lost in postcopy" in caplog.text


async def test_stop_while_a_page_is_absent(guest: AbsentGuest) -> None:
    """Twenty chains whose pages are absent: the stop waits only for the page that is awaited, the rest stays."""
    texts = prepare(guest, 0, 20)
    device = Echo()
    async with connected(device) as front, trio.open_nursery() as nursery:
        await front.negotiate()
        await guest.advise(front)
        await guest.listen(front)
        await guest.share_table(front)
        ring = guest.rings[0]
        await ring.send_setup(front)
        while (page := await guest.next_fault()) != 0x40:
            guest.place(page)
        await front.send(Request.GET_VRING_BASE, vu.VringState(0, 0).pack())
        await trio.testing.wait_all_tasks_blocked(0.05)
        guest.place(page)  # the page that is awaited
        nursery.start_soon(guest.serve)
        reply = await front.receive()
        assert reply is not None
        base = vu.VringState.unpack(reply.payload).num
        used = struct.unpack("<H", os.pread(guest.fd, 2, ring.used + 2))[0]
        assert base == used <= 1
        done = list(device.seen)
        await ring.send_setup(front, base=base)
        with trio.fail_after(10):
            while len(device.seen) < 20:
                await trio.sleep(0.001)
        assert device.seen[: len(done)] == done
        assert device.seen == texts  # each once, in order
        guest.place_rest()
        await front.ask(Request.GET_VRING_BASE, vu.VringState(0, 0).pack())
        await guest.end(front)
        nursery.cancel_scope.cancel()


class Keeper(Device):
    """Keeps its chains until the test completes them."""

    def __init__(self) -> None:
        self.chains: list[Chain] = []

    async def handle_queue(self, queue: Queue) -> None:
        async for chain in queue:
            chain.keep()
            self.chains.append(chain)


async def test_ring_moves_to_absent_pages_with_an_answer_waiting(guest: AbsentGuest) -> None:
    """The answer waits off the loop for the new ring's index, whose page is absent while its entry is here."""
    ring = guest.ring(0, 1024)
    done, moved, text = 600, 0x90000, 0xA0000  # entry 600 is on the used ring's second page
    ring.set_desc(0, GUEST_BASE + 0x80000, 16, WRITE)
    ring.set_desc(1, guest.put(text, b"text"), 4)
    for used in (ring.used, moved):
        struct.pack_into("<H", guest.image, used + 2, done)
    ring.avail_idx = done
    ring.offer(0, 1)
    device = Keeper()
    async with connected(device) as front, trio.open_nursery() as nursery:
        await front.negotiate()
        await guest.advise(front)
        await guest.listen(front)
        await guest.share_table(front)
        await ring.send_setup(front, base=done)
        while (page := await guest.next_fault()) != text // PAGE:
            guest.place(page)
        # The device has one chain, the next one's page is awaited, and the front-end moves the ring.
        u = guest.user
        addr = vu.VringAddr(0, 0, u(ring.desc), u(moved), u(ring.avail), 0)
        await front.send(Request.SET_VRING_ADDR, addr.pack())
        await trio.testing.wait_all_tasks_blocked(0.05)
        device.chains[0].write(b"answer")
        device.chains[0].complete()
        # The buffer, the entry and the event word are here: only the index is absent.
        for here in (0x80000 // PAGE, moved // PAGE + 1, moved // PAGE + 2):
            guest.place(here)
        guest.place(page)
        nursery.start_soon(guest.serve)
        await front.barrier()
        base = await front.ask(Request.GET_VRING_BASE, vu.VringState(0, 0).pack())
        assert vu.VringState.unpack(base.payload).num == done + 1
        assert moved // PAGE in guest.requested
        assert struct.unpack("<H", os.pread(guest.fd, 2, moved + 2)) == (done + 1,)
        guest.place_rest()
        await guest.end(front)
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("slots", [False, True])
async def test_table_comes_again_while_a_touch_waits(guest: AbsentGuest, slots: bool) -> None:
    """With the new addresses the front-end forgets the old: the answer waits for the touch that is under way."""
    texts = prepare(guest, 0, 20)
    device = Echo()
    async with connected(device) as front, trio.open_nursery() as nursery:
        await front.negotiate()
        await guest.advise(front)
        await guest.listen(front)
        share = guest.share_slots if slots else guest.share_table
        await share(front)
        await guest.rings[0].send_setup(front)
        while (page := await guest.next_fault()) != 0x40:
            guest.place(page)
        # The first fault may be of a thread that asks ahead.
        await until(lambda: "vpc-hop" in asleep_for_a_page())
        answered = trio.Event()

        async def again() -> None:
            if slots:
                await front.send(Request.REM_MEM_REG, vu.pack_single_region(guest.region))
            await share(front)
            answered.set()

        nursery.start_soon(again)
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert not answered.is_set()
        guest.place(page)
        with trio.fail_after(10):
            await answered.wait()
        nursery.start_soon(guest.serve)
        with trio.fail_after(10):
            while len(device.seen) < 20:
                await trio.sleep(0.001)
        assert device.seen == texts
        guest.place_rest()
        await guest.end(front)
        nursery.cancel_scope.cancel()


async def test_table_comes_again_while_a_chain_is_kept(guest: AbsentGuest) -> None:
    """An answer goes to the memory that is in force when it comes, where its faults are served."""
    prepare(guest, 0, 1)
    device = Keeper()
    async with connected(device) as front, trio.open_nursery() as nursery:
        await front.negotiate()
        await guest.advise(front)
        await guest.listen(front)
        await guest.share_table(front)
        await guest.rings[0].send_setup(front)
        while not device.chains:
            with trio.move_on_after(0.05):
                guest.place(await guest.next_fault_forever())
        old = guest.clients[-1][1]
        with trio.fail_after(30):  # the old mapping has no user left that would be waited for
            await guest.share_table(front)
            await front.barrier()
        assert guest.clients[-1][1] != old
        nursery.start_soon(guest.serve)
        device.chains[0].write(b"answer")
        device.chains[0].complete()
        base = await front.ask(Request.GET_VRING_BASE, vu.VringState(0, 0).pack())
        assert vu.VringState.unpack(base.payload).num == 1
        assert answer_of(guest, 0, 0, 6) == b"answer"
        guest.place_rest()
        await guest.end(front)
        nursery.cancel_scope.cancel()


async def test_repetitions(guest: AbsentGuest, caplog: pytest.LogCaptureFixture) -> None:
    """As QEMU with several queue pairs: ADVISE, LISTEN and END again and again, the table again."""
    caplog.set_level(logging.INFO)
    prepare(guest, 0)
    device = Echo()
    async with connected(device) as front, trio.open_nursery() as nursery:
        await front.negotiate()
        for _ in range(3):
            await guest.advise(front)
        for _ in range(3):
            assert await guest.listen(front) == 0
        await guest.share_table(front)
        await guest.share_table(front)
        await guest.share_table(front, Request.NONE)
        await front.send(Request.NONE, vu.pack_u64(0))  # QEMU after stop and continue: nothing new
        nursery.start_soon(guest.serve)
        await guest.rings[0].send_setup(front)
        with trio.fail_after(10):
            while len(device.seen) < 3:
                await trio.sleep(0.001)
        await guest.share_table(front)  # while the ring runs
        await front.barrier()
        guest.place_rest()
        for _ in range(3):
            assert await guest.end(front) == 0
        nursery.cancel_scope.cancel()
        # After the end memory is calm: another table needs no exchange.
        assert await front.ack(Request.SET_MEM_TABLE, vu.pack_table([guest.region]), [guest.fd]) == 0
    for words in ("postcopy advised", "postcopy listening", "1 region registered", "postcopy ended"):
        assert words in caplog.text


async def test_slot_is_removed_and_added_in_postcopy(guest: AbsentGuest) -> None:
    async with connected(Echo()) as front:
        await front.negotiate()
        await guest.advise(front)
        await guest.listen(front)
        await guest.share_slots(front)
        # No ack for REM_MEM_REG in this phase, one word for the batch.
        await front.send(Request.REM_MEM_REG, vu.pack_single_region(guest.region))
        await front.send(Request.REM_MEM_REG, vu.pack_u64(0))
        await guest.share_slots(front)
        await front.barrier()
        # An identical region again (QEMU 7.2 with queue pairs): the same answer.
        reply = await front.ask(Request.ADD_MEM_REG, vu.pack_single_region(guest.region), [guest.fd])
        assert vu.unpack_single_region(reply.payload).user_addr == guest.clients[0][1]
        await front.send(Request.ADD_MEM_REG, vu.pack_u64(0))
        await front.barrier()
        guest.place_rest()
        await guest.end(front)


async def test_precopy_that_ends_without_listen(guest: AbsentGuest, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    prepare(guest, 0)
    guest.place_rest()
    device = Echo()
    async with connected(device) as front:
        await front.negotiate()
        await guest.advise(front)
        assert await front.ack(Request.SET_MEM_TABLE, vu.pack_table([guest.region]), [guest.fd]) == 0
        await guest.rings[0].send_setup(front)
        with trio.fail_after(10):
            while len(device.seen) < 3:
                await trio.sleep(0.001)
    assert "ended without postcopy" in caplog.text


async def test_listen_is_refused(guest: AbsentGuest, caplog: pytest.LogCaptureFixture) -> None:
    async with connected(Echo()) as front:
        await front.negotiate()
        assert await guest.listen(front) == 1
        assert "without POSTCOPY_ADVISE" in caplog.text
        await guest.send_memory(front)
        await guest.advise(front)
        assert await guest.listen(front) == 1
        assert "memory was mapped before it" in caplog.text
        await front.barrier()


async def test_memory_on_a_disk_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    """Neither tmpfs nor hugetlbfs: pages would come from the file system; refused before anything is touched."""
    with tempfile.TemporaryFile(dir=Path(__file__).parent) as file:
        file.truncate(1 << 20)
        async with connected(Echo()) as front:
            await front.negotiate()
            reply = await front.ask(Request.POSTCOPY_ADVISE)
            reply.close_fds()
            await front.ask(Request.POSTCOPY_LISTEN, flags=LISTEN_FLAGS)
            region = vu.MemoryRegion(GUEST_BASE, 1 << 20, 0x7F0000000000, 0)
            await front.send(Request.SET_MEM_TABLE, vu.pack_table([region]), [file.fileno()])
            assert await front.ended()
    assert "tmpfs" in caplog.text
    assert "Traceback" not in caplog.text


async def test_mlockall_hides_and_refuses(caplog: pytest.LogCaptureFixture) -> None:
    """With MCL_FUTURE a mapping would be populated, which creates pages: not offered; or refused at ADVISE."""
    libc = ctypes.CDLL(None, use_errno=True)
    async with connected(Echo()) as front:
        _, bits = await front.negotiate()
        assert ProtocolFeature.PAGEFAULT in bits
        assert libc.mlockall(2) == 0  # MCL_FUTURE
        try:
            reply = await front.ask(Request.POSTCOPY_ADVISE)
            assert not reply.fds
            assert "mlockall" in caplog.text
            async with connected(Echo()) as second:
                _, bits = await second.negotiate()
                assert ProtocolFeature.PAGEFAULT not in bits
                await second.barrier()
        finally:
            libc.munlockall()
