"""Pages that nobody sent: found before they are relied on, never taken for those that come, never overwritten."""

from __future__ import annotations

import ctypes
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress

import pytest
import trio

from tests.kit.until import unread_faults, until
from tests.migration.test_migration_incoming_huge import HUGE, advised, huge_page  # noqa: F401  a fixture
from vhostpc.errors import MemoryLost, PageBorn
from vhostpc.pages.faultclient import ClientRange
from vhostpc.pages.ramblock import Bits, RamBlock, RamSet
from vhostpc.pages.service import FaultService
from vhostpc.ufd import Userfaultfd
from vhostpc.units import TARGET_PAGE
from vhostpc.wire.migration.ramrec import RamEncoder

pytestmark = pytest.mark.ufd
A, BORN = b"\xaa" * TARGET_PAGE, b"\xbb" * TARGET_PAGE


@asynccontextmanager
async def serving(ram: RamSet) -> AsyncIterator[tuple[FaultService, socket.socket, socket.socket]]:
    """An armed service whose loop runs, the channel that it loads from, and the other end of that."""
    ours, theirs = socket.socketpair()
    with trio.fail_after(30), ours, theirs, FaultService(ram) as service:
        service.arm()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(service.run)
            yield service, ours, theirs
            nursery.cancel_scope.cancel()


def records(block: RamBlock, page: int, data: bytes) -> bytes:
    """A host page, all of it ``data`` again and again."""
    encoder, parts = RamEncoder(), block.page_size // TARGET_PAGE
    at = page * block.page_size
    if data == bytes(TARGET_PAGE):
        return b"".join(encoder.zero(block.name, at + i * TARGET_PAGE) for i in range(parts)) + encoder.end()
    return (
        b"".join(encoder.page(block.name, at + i * TARGET_PAGE, data) for i in range(parts)) + encoder.end()
    )


async def feed(sock: socket.socket, data: bytes) -> None:
    stream = trio.SocketStream(trio.socket.from_stdlib_socket(sock))
    with suppress(trio.BrokenResourceError):  # a loader that found what it should not have reads no more
        await stream.send_all(data)


@contextmanager
def another_mapping(block: RamBlock) -> Iterator[RamBlock]:
    """The block once more, as a back-end maps it; no ufd watches it."""
    with RamSet() as ram:
        yield ram.add(block.name, block.fd, block.length, block.page_size)


async def born_while_somebody_waits(page_size: int, data: bytes) -> None:
    """A page is waited for, then made by somebody who touches it, then it comes."""
    with RamSet() as ram, RamSet() as theirs:
        block = ram.create("ram0", 4 * page_size, page_size)
        mapped = theirs.add("ram0", block.fd, block.length, page_size)
        got: list[bytes] = []

        async def touch() -> None:
            with pytest.raises(MemoryLost):  # at the end, when all is given up
                got.append(await block.read(2 * page_size, 16))

        async with trio.open_nursery() as nursery:
            async with serving(ram) as (service, ours, source):
                with Userfaultfd.open() as ufd:
                    service.add_client(ufd, "net0")
                nursery.start_soon(touch)
                await until(service.waiting)
                await mapped.write(2 * page_size + 100, BORN[:50])
                async with trio.open_nursery() as feeding:
                    feeding.start_soon(feed, source, records(block, 1, A) + records(block, 2, data))
                    with service.open_channel(ours.fileno()) as channel:
                        assert (await channel.load()).placed == 1
                        with pytest.raises(PageBorn) as caught:
                            await channel.load()
                        assert (channel.numbers().placed, channel.numbers().already) == (1, 0)
                    feeding.cancel_scope.cancel()
                assert (caught.value.block, caught.value.page) == ("ram0", 2)
                for word in ("host page 2 of 'ram0'", "net0", "this process", "cannot be recovered"):
                    assert word in str(caught.value)
                assert not block.test_bit(Bits.RECEIVED, 2)
                assert service.missing() == 3
                assert [(w.block, w.page) for w in service.waiting()] == [("ram0", 2)]
                assert got == []
        assert got == []
        assert os.pread(block.fd, 200, 2 * page_size) == bytes(100) + BORN[:50] + bytes(50)


@pytest.mark.parametrize("data", [A, bytes(TARGET_PAGE)], ids=["data", "zero"])
async def test_a_page_that_was_born_is_not_taken_for_the_one_that_comes(data: bytes) -> None:
    await born_while_somebody_waits(TARGET_PAGE, data)


@pytest.mark.parametrize("data", [A, bytes(TARGET_PAGE)], ids=["data", "zero"])
async def test_a_huge_page_that_was_born(huge_pages: int, data: bytes) -> None:
    await born_while_somebody_waits(huge_pages, data)


async def test_born_in_the_midst_of_a_run() -> None:
    """Pages before it are placed, it is named, and earlier pages of this channel are skipped as usual."""
    with RamSet() as ram:
        block = ram.create("ram0", 64 * TARGET_PAGE)
        async with serving(ram) as (service, ours, source):
            os.pwrite(block.fd, b"born", 40 * TARGET_PAGE)
            encoder = RamEncoder()
            run = b"".join(encoder.page("ram0", page * TARGET_PAGE, A) for page in (3, *range(64)))
            source.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
            source.send(run + encoder.end())
            with service.open_channel(ours.fileno()) as channel:
                with pytest.raises(PageBorn, match="host page 40 of 'ram0'"):
                    await channel.load()
                assert (channel.numbers().placed, channel.numbers().already) == (40, 1)
            assert block.count_bits(Bits.RECEIVED) == 40


async def test_a_page_that_lies_ready_was_made_by_somebody_else() -> None:
    """The loop ends with the error: nothing of it is taken for the page that lies ready."""
    await ready_and_born(TARGET_PAGE)


async def test_a_huge_page_that_lies_ready_was_made_by_somebody_else(huge_pages: int) -> None:
    await ready_and_born(huge_pages)


async def ready_and_born(page_size: int) -> None:
    with trio.fail_after(30), RamSet() as ready, RamSet() as ram, FaultService(ram) as service:
        source, block = (r.create("ready", 4 * page_size, page_size) for r in (ready, ram))
        await source.fill(3)
        service.arm()
        service.answer_from(block, source.fd)
        with RamSet() as theirs, Userfaultfd.open() as ufd:
            mapped = theirs.add("ready", block.fd, block.length, page_size)
            ufd.register(mapped.base, mapped.length)
            service.add_client(ufd, "net0").set_ranges([ClientRange(mapped.base, mapped.length, block, 0)])

            async def touch() -> None:
                with pytest.raises(MemoryLost):
                    await block.read(2 * page_size, 8)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(touch)
                await until(lambda: unread_faults(service.place_fd()))
                with another_mapping(block) as other:
                    await other.write(2 * page_size, b"born")
                with pytest.raises(PageBorn, match=r"host page 2 of 'ready'.*net0"):
                    await service.run()
            assert not block.test_bit(Bits.RECEIVED, 2)


async def test_armed_with_a_page_that_did_not_come() -> None:
    """Before anything relies on it: data that was not received is an error of LISTEN."""
    with RamSet() as ram:
        block, other = ram.create("ram0", 300 * TARGET_PAGE), ram.create("rom", 8 * TARGET_PAGE)
        for page in (0, 5, 6, 290):
            os.pwrite(block.fd, b"came", page * TARGET_PAGE)
            block.set_bits(Bits.RECEIVED, page, 1)
        block.set_bits(Bits.RECEIVED, 100, 50)  # came as zeros: holes of the file
        assert block.born() is None
        with FaultService(ram) as service:
            service.arm()
        for where, page in ((other, 7), (block, 299), (block, 99)):
            os.pwrite(where.fd, b"born", page * TARGET_PAGE)
            assert where.born() == page
            with FaultService(ram) as service, Userfaultfd.open() as ufd:
                service.add_client(ufd, "disk0")
                with pytest.raises(
                    PageBorn, match=rf"host page {page} of '{where.name}' .* or by disk0"
                ) as caught:
                    service.arm()
                assert (caught.value.block, caught.value.page) == (where.name, page)
                assert not service.armed
            where.discard(page * TARGET_PAGE, TARGET_PAGE)
        assert block.born(100, 50) is block.born(6, 284) is None


async def test_armed_with_a_huge_page_that_did_not_come(huge_pages: int) -> None:
    """hugetlbfs calls a hole data: it has to be asked in another way, and nothing is made by asking."""
    with RamSet() as ram:
        block = ram.create("big", 8 * huge_pages, huge_pages)
        assert block.born() is None
        await block.write(3 * huge_pages, b"came")
        block.set_bits(Bits.RECEIVED, 3, 1)
        assert block.born() is None
        with another_mapping(block) as mapped:
            await mapped.write(6 * huge_pages, b"born")
        made = os.fstat(block.fd).st_blocks
        assert block.born() == block.born(4, 3) == 6
        assert block.born(0, 6) is block.born(7, 1) is None
        with FaultService(ram) as service, pytest.raises(PageBorn, match="host page 6 of 'big'"):
            service.arm()
        assert os.fstat(block.fd).st_blocks == made
        block.discard(4 * huge_pages, 4 * huge_pages)
        assert os.fstat(block.fd).st_blocks == made // 2
        with FaultService(ram) as service:
            service.arm()


@contextmanager
def held_for_io(address: int) -> Iterator[None]:
    """One more reference to the page at ``address``, as I/O that is under way has it (vmsplice(2))."""
    libc = ctypes.CDLL(None, use_errno=True)
    read, write = os.pipe()
    try:
        vector = (ctypes.c_void_p * 2)(address, TARGET_PAGE)
        assert libc.vmsplice(write, vector, ctypes.c_ulong(1), 0) == TARGET_PAGE
        yield
    finally:
        os.close(read)
        os.close(write)


async def test_a_discard_that_leaves_a_page(advised: None) -> None:  # noqa: F811
    """PUNCH_HOLE succeeds and only clears it: zeros would be read there, and nothing asked for."""
    with RamSet() as ram:
        block = ram.create("ram0", HUGE)
        with huge_page(block.fd) as at:
            with held_for_io(at + 300 * TARGET_PAGE):
                with pytest.raises(PageBorn, match="host page 77 of 'ram0' is still there") as caught:
                    block.discard(77 * TARGET_PAGE, 2 * TARGET_PAGE)
                assert (caught.value.block, caught.value.page) == ("ram0", 77)
                assert not block.test_bit(Bits.RECEIVED, 77)
            block.discard(77 * TARGET_PAGE, 2 * TARGET_PAGE)
            assert block.holes() == [(77 * TARGET_PAGE, 2 * TARGET_PAGE)]


LEFT = """
import sys
import trio
from tests.kit.confine import deny
from vhostpc.errors import PageBorn
from vhostpc.pages.ramblock import Bits, RamSet

async def discard(size):
    with RamSet() as ram:
        block = ram.create("ram0", 4 * size, size)
        await block.write(2 * size, b"stays")
        block.set_bits(Bits.RECEIVED, 2, 1)
        deny("fallocate", 0)
        try:
            block.discard(size, 3 * size)
        except PageBorn as born:
            print(born.block, born.page)
        block.discard(0, 2 * size)
        print("the holes are gone")

trio.run(discard, int(sys.argv[1]))
"""


def discard_that_leaves_all(page_size: int) -> None:
    """A kernel that says that it has punched, and has not: no page stays unnoticed, and no hole is taken for one."""
    command = [sys.executable, "-c", LEFT, str(page_size)]
    child = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (child.stdout, child.stderr) == ("ram0 2\nthe holes are gone\n", "")


def test_a_discard_that_leaves_all() -> None:
    discard_that_leaves_all(TARGET_PAGE)


def test_a_discard_that_leaves_a_huge_page(huge_pages: int) -> None:
    """hugetlbfs calls its holes data, too: they are told apart in another way."""
    discard_that_leaves_all(huge_pages)


async def test_a_page_that_came_and_is_a_hole_is_zero() -> None:
    """Somebody has punched it out since: a thread that faults there gets zeros, and waits for nobody."""
    await hole_that_came(TARGET_PAGE)


async def test_a_huge_page_that_came_and_is_a_hole_is_zero(huge_pages: int) -> None:
    await hole_that_came(huge_pages)


async def hole_that_came(page_size: int) -> None:
    with RamSet() as ram, RamSet() as theirs, Userfaultfd.open() as ufd:
        block = ram.create("ram0", 4 * page_size, page_size)
        mapped = theirs.add("ram0", block.fd, block.length, page_size)
        ufd.register(mapped.base, mapped.length)
        block.set_bits(Bits.RECEIVED, 0, 3)
        async with serving(ram) as (service, _ours, _source):
            client = service.add_client(ufd, "net0")
            client.set_ranges([ClientRange(mapped.base, mapped.length, block, 0)])
            assert await mapped.read(2 * page_size, 64) == bytes(64)
            assert await block.read(2 * page_size, 64) == bytes(64)
            assert await block.read(page_size, 64) == bytes(64)
            assert service.numbers().requests == 0
            assert service.missing() == 1
            for one in (client, service.own):
                assert one.numbers().received_already == one.numbers().wakes <= 4
