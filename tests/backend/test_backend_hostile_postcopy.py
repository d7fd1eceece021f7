"""A front-end that breaks postcopy's rules: nothing is kept for it, nothing is touched too early, nobody hangs."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import trio

from tests.kit.absent_guest import AbsentGuest, prepare
from tests.kit.hostile import Net, guest_mappings, lines, open_fds, state
from tests.kit.raw_front_end import connected
from tests.kit.until import until
from vhostpc.backend import Device, Queue
from vhostpc.wire import vhost_user as vu
from vhostpc.wire.vhost_user import Request

pytestmark = pytest.mark.ufd


class Echo(Device):
    async def handle_queue(self, queue: Queue) -> None:
        async for chain in queue:
            chain.write(chain.read()[::-1][: chain.writable])


@pytest.fixture
def guest() -> Iterator[AbsentGuest]:
    guest = AbsentGuest()
    yield guest
    guest.close()


@pytest.mark.parametrize("slots", [False, True])
async def test_tables_whose_addresses_are_never_stored(guest: AbsentGuest, slots: bool) -> None:
    """Table after table, or slots that come and go, without the word that ends an exchange: the last one is kept."""
    async with connected(Net()) as front:
        await front.negotiate()
        await guest.advise(front)
        await guest.listen(front)
        fds, maps = len(open_fds()), guest_mappings()
        one = vu.pack_single_region(guest.region)
        for _ in range(300):
            if slots:
                (await front.ask(Request.ADD_MEM_REG, one, [guest.fd])).close_fds()
                await front.send(Request.REM_MEM_REG, one)
            else:
                (
                    await front.ask(Request.SET_MEM_TABLE, vu.pack_table([guest.region]), [guest.fd])
                ).close_fds()
        await front.barrier()
        assert guest_mappings() <= maps + 1
        assert len(open_fds()) <= fds + 1
        # And what is kept works.
        await guest.share_table(front)
        await front.barrier()


async def test_end_before_the_addresses_are_stored(
    guest: AbsentGuest, caplog: pytest.LogCaptureFixture
) -> None:
    """That table allows no access and never will: it is gone, and nothing is built upon it."""
    prepare(guest, 0)
    async with connected(Echo()) as front:
        await front.negotiate()
        await guest.advise(front)
        await guest.listen(front)
        await front.ask(Request.SET_MEM_TABLE, vu.pack_table([guest.region]), [guest.fd])
        assert await guest.end(front) == 0
        far = vu.MemoryRegion(1 << 40, 4096, 1 << 41, 0)
        assert await front.ack(Request.ADD_MEM_REG, vu.pack_single_region(far), [guest.fd]) == 0
        await guest.rings[0].send_setup(front)  # in the table that is not in force
        assert await front.ended()
    (line,) = lines(caplog)
    assert "is not inside one memory region" in line


async def test_hang_up_behind_a_flood_while_a_page_is_absent(
    guest: AbsentGuest, caplog: pytest.LogCaptureFixture
) -> None:
    """A stop waits for a page, more messages than are read ahead follow, the front-end goes: so does the session."""
    prepare(guest, 0)
    before = len(open_fds())
    async with connected(Echo()) as front:
        await front.negotiate()
        await guest.advise(front)
        await guest.listen(front)
        await guest.share_table(front)
        await guest.rings[0].send_setup(front)
        await guest.next_fault()
        await front.send(Request.GET_VRING_BASE, state(0, 0))
        for _ in range(40):
            await front.send(Request.SET_OWNER)
    guest.clients.pop()[0].close()
    await until(lambda: len(open_fds()) == before)
    (line,) = lines(caplog)
    assert "front-end lost in postcopy" in line


async def test_advise_without_end(guest: AbsentGuest, caplog: pytest.LogCaptureFixture) -> None:
    """Each brings a descriptor; so many that no front-end needs them end the session, and all are given back."""
    before = open_fds()
    async with connected(Net()) as front:
        await front.negotiate()
        for _ in range(256):
            (await front.ask(Request.POSTCOPY_ADVISE)).close_fds()
        await front.send(Request.POSTCOPY_ADVISE)
        assert await front.ended()
    assert open_fds() == before
    (line,) = lines(caplog)
    assert "more than 256 times" in line


@pytest.mark.parametrize("order", ["END", "LISTEN END", "ADVISE END LISTEN", "ADVISE LISTEN END LISTEN END"])
async def test_out_of_order(guest: AbsentGuest, caplog: pytest.LogCaptureFixture, order: str) -> None:
    """A LISTEN without its ADVISE is refused, an END too many is nothing; then a whole postcopy still works."""
    caplog.set_level(logging.CRITICAL, logger="vhostpc")
    texts = prepare(guest, 0)
    async with connected(Echo()) as front, trio.open_nursery() as nursery:
        await front.negotiate()
        advised = False
        for step in order.split():
            if step == "ADVISE":
                await guest.advise(front)
                advised = True
            elif step == "LISTEN":
                assert await guest.listen(front) == (0 if advised else 1)
            else:
                assert await guest.end(front) == 0
                advised = False
        for ufd, _ in guest.clients:
            ufd.close()
        guest.clients.clear()
        await guest.advise(front)
        assert await guest.listen(front) == 0
        await guest.share_table(front)
        nursery.start_soon(guest.serve)
        await guest.rings[0].send_setup(front)
        await until(lambda: used_index(guest) == len(texts))
        nursery.cancel_scope.cancel()


def used_index(guest: AbsentGuest) -> int:
    """The used index, read from the file without touching a mapping."""
    return int.from_bytes(guest.memory()[guest.rings[0].used + 2 :][:2], "little")
