"""Further queue pairs of QEMU 10.0 and 11.1 wait for answers that they did not ask for: given by option only."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from tests.kit.absent_guest import AbsentGuest
from tests.kit.raw_front_end import RawFrontEnd, connected
from vhostpc.backend import Device, Options, Queue
from vhostpc.wire import vhost_user as vu
from vhostpc.wire.vhost_user import ProtocolFeature, Request

pytestmark = pytest.mark.ufd
EACH = Options(answer_each_pair=True)
HALF = 1 << 19


class Idle(Device):
    num_queues = 6

    async def handle_queue(self, queue: Queue) -> None:
        async for chain in queue:
            chain.write(b"")


@pytest.fixture
def guest() -> Iterator[AbsentGuest]:
    guest = AbsentGuest()
    yield guest
    guest.close()


def regions(guest: AbsentGuest) -> list[vu.MemoryRegion]:
    """Its memory in two."""
    whole = guest.region
    return [
        vu.MemoryRegion(whole.guest_addr + at, HALF, whole.user_addr + at, whole.mmap_offset + at)
        for at in (0, HALF)
    ]


async def begin(guest: AbsentGuest, front: RawFrontEnd, pairs: int, *, hide: int = 0) -> int:
    """As QEMU: ADVISE and LISTEN for each pair. The features."""
    offered = ProtocolFeature(vu.unpack_u64((await front.ask(Request.GET_PROTOCOL_FEATURES)).payload))
    features, _ = await front.negotiate(protocol=ProtocolFeature(int(offered) & ~hide))
    for _ in range(pairs):
        await guest.advise(front)
    for _ in range(pairs):
        assert await guest.listen(front) == 0
    return features


async def start_pair(front: RawFrontEnd, features: int) -> None:
    await front.send(Request.SET_FEATURES, vu.pack_u64(features))
    await front.ask(Request.GET_STATUS)


async def table(guest: AbsentGuest, front: RawFrontEnd) -> list[vu.Frame]:
    sent = vu.pack_table(regions(guest))
    answer = await front.ask(Request.SET_MEM_TABLE, sent, [guest.fd] * 2)
    await front.send(Request.SET_MEM_TABLE, vu.pack_u64(0))
    return [answer]


async def slots(guest: AbsentGuest, front: RawFrontEnd) -> list[vu.Frame]:
    answers = [
        await front.ask(Request.ADD_MEM_REG, vu.pack_single_region(region), [guest.fd])
        for region in regions(guest)
    ]
    await front.send(Request.ADD_MEM_REG, vu.pack_u64(0))
    return answers


SHARE = pytest.mark.parametrize("share", [table, slots])


async def nothing_more(front: RawFrontEnd) -> None:
    """The next answer is the next request's."""
    await front.barrier()


@SHARE
@pytest.mark.parametrize("pairs", [2, 3])
async def test_each_pair_gets_the_answers_of_the_first(
    guest: AbsentGuest, share: object, pairs: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    async with connected(Idle(), EACH) as front:
        features = await begin(guest, front, pairs)
        await start_pair(front, features)
        answers = await share(guest, front)  # type: ignore[operator]
        await nothing_more(front)
        for _ in range(pairs - 1):
            await start_pair(front, features)
            for first in answers:
                again = await front.receive()
                assert again is not None
                assert (again.request, again.flags, again.payload) == (first.request, 0x5, first.payload)
            await nothing_more(front)
        await start_pair(front, features)  # there are no more pairs
        await nothing_more(front)
        for _ in range(pairs):
            assert await guest.end(front) == 0
        await start_pair(front, features)
        await nothing_more(front)
    assert caplog.text.count("a further queue pair, to be answered unasked") == pairs - 1
    assert "wait for ever" not in caplog.text


@SHARE
async def test_where_no_status_is_agreed(guest: AbsentGuest, share: object) -> None:
    async with connected(Idle(), EACH) as front:
        features = await begin(guest, front, 2, hide=ProtocolFeature.STATUS)
        await front.send(Request.SET_FEATURES, vu.pack_u64(features))
        answers = await share(guest, front)  # type: ignore[operator]
        await front.send(Request.SET_FEATURES, vu.pack_u64(features))
        for first in answers:
            again = await front.receive()
            assert again is not None
            assert again.payload == first.payload
        await nothing_more(front)


async def test_a_table_that_comes_again_is_answered_again(guest: AbsentGuest) -> None:
    """Stop and continue in mid-postcopy: a table comes each time; slots only where there are new ones."""
    async with connected(Idle(), EACH) as front:
        features = await begin(guest, front, 2)
        for _ in range(2):
            await start_pair(front, features)
            (first,) = await table(guest, front)
            await start_pair(front, features)
            again = await front.receive()
            assert again is not None
            assert again.payload == first.payload
        await start_pair(front, features)
        await front.send(Request.NONE, vu.pack_u64(0))  # nothing new
        await start_pair(front, features)
        await nothing_more(front)


@SHARE
@pytest.mark.parametrize(("options", "pairs"), [(Options(), 2), (EACH, 1)])
async def test_nothing_unasked(guest: AbsentGuest, share: object, options: Options, pairs: int) -> None:
    """Without the option, and for a front-end with one pair."""
    async with connected(Idle(), options) as front:
        features = await begin(guest, front, pairs)
        await start_pair(front, features)
        await share(guest, front)  # type: ignore[operator]
        for _ in range(3):
            await start_pair(front, features)
            await nothing_more(front)


async def test_outside_of_postcopy_nothing_is_owed(guest: AbsentGuest) -> None:
    async with connected(Idle(), EACH) as front:
        features, _ = await front.negotiate()
        for _ in range(2):
            await guest.advise(front)
        await start_pair(front, features)
        await front.send(Request.SET_MEM_TABLE, vu.pack_table(regions(guest)), [guest.fd] * 2)
        await start_pair(front, features)
        await nothing_more(front)
