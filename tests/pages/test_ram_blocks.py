"""RAM blocks: bits, holes, discards, copies, and what is refused."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.kit.hugepages import HUGE
from vhostpc.errors import BadAddress
from vhostpc.pages.ramblock import Bits, RamBlock, RamSet, make_memfd, total_pages
from vhostpc.units import TARGET_PAGE

PAGES = 200


@pytest.fixture
def ram() -> Iterator[RamSet]:
    with RamSet() as ram:
        ram.create("ram0", PAGES * TARGET_PAGE)
        yield ram


def bits_of(block: RamBlock, which: Bits) -> set[int]:
    return {page for page in range(block.pages) if block.test_bit(which, page)}


@given(
    st.lists(st.tuples(st.integers(0, PAGES), st.integers(0, PAGES), st.booleans()), max_size=8),
    st.sampled_from(list(Bits)),
)
def test_bits_are_a_set(changes: list[tuple[int, int, bool]], which: Bits) -> None:
    with RamSet() as ram:
        block = ram.create("ram0", PAGES * TARGET_PAGE)
        model: set[int] = set()
        for first, count, value in changes:
            count = min(count, PAGES - first)
            block.set_bits(which, first, count, value)
            pages = set(range(first, first + count))
            model = model | pages if value else model - pages
        assert bits_of(block, which) == model
        assert block.count_bits(which) == total_pages(ram.blocks, which) == len(model)
        assert not any(bits_of(block, other) for other in Bits if other is not which)


def test_bits_outside_are_refused(ram: RamSet) -> None:
    block = ram["ram0"]
    for first, count in ((PAGES, 1), (0, PAGES + 1), (1 << 63, 1 << 63), (PAGES - 1, 1 << 63)):
        with pytest.raises(OSError):
            block.set_bits(Bits.DIRTY, first, count)
    with pytest.raises(OSError):
        block.test_bit(Bits.DIRTY, PAGES)


async def test_discard_punches_and_forgets(ram: RamSet) -> None:
    block = ram["ram0"]
    await block.fill(1)
    block.set_bits(Bits.RECEIVED)
    block.set_bits(Bits.REQUESTED)
    assert block.holes() == []
    block.discard(10 * TARGET_PAGE, 3 * TARGET_PAGE)
    block.discard(199 * TARGET_PAGE)
    assert block.holes() == [(10 * TARGET_PAGE, 3 * TARGET_PAGE), (199 * TARGET_PAGE, TARGET_PAGE)]
    gone = {10, 11, 12, 199}
    assert bits_of(block, Bits.RECEIVED) == bits_of(block, Bits.REQUESTED) == set(range(PAGES)) - gone
    for offset, length in ((1, TARGET_PAGE), (0, 100), (PAGES * TARGET_PAGE, TARGET_PAGE), (0, 1 << 63)):
        with pytest.raises(OSError):
            block.discard(offset, length)


async def test_copies(ram: RamSet) -> None:
    block = ram["ram0"]
    await block.write(5000, b"hello")
    assert await block.read(4999, 7) == b"\0hello\0"
    assert await block.read(0, 0) == b""
    assert os.pread(block.fd, 5, 5000) == b"hello"
    for offset, length in ((PAGES * TARGET_PAGE, 1), (PAGES * TARGET_PAGE - 1, 2)):
        with pytest.raises(OSError):
            await block.read(offset, length)
        with pytest.raises(OSError):
            await block.write(offset, bytes(length))


async def test_pages_that_name_themselves(ram: RamSet) -> None:
    block = ram["ram0"]
    await block.fill(3)
    assert await block.verify(3) == (0, None)
    assert await block.verify(4) == (PAGES, 0)
    page = os.pread(block.fd, TARGET_PAGE, 7 * TARGET_PAGE)
    await block.write(90 * TARGET_PAGE, page)  # a page in another's place
    await block.write(50 * TARGET_PAGE + 8, b"\0")
    bad, first = await block.verify(3)
    assert (bad, first) == (2, 50)
    assert len({os.pread(block.fd, TARGET_PAGE, i * TARGET_PAGE) for i in range(PAGES)}) == PAGES - 1


def test_blocks_that_cannot_be(ram: RamSet) -> None:
    fd = make_memfd("x", 4 * TARGET_PAGE)
    cases = [
        ("a", 0, TARGET_PAGE, 0, errno.EINVAL),
        ("a", 100, TARGET_PAGE, 0, errno.EINVAL),
        ("a", TARGET_PAGE, 2048, 0, errno.EINVAL),
        ("a", TARGET_PAGE, 3 * TARGET_PAGE, 0, errno.EINVAL),
        ("a", 5 * TARGET_PAGE, TARGET_PAGE, 0, errno.ERANGE),
        ("a", 4 * TARGET_PAGE, TARGET_PAGE, TARGET_PAGE, errno.ERANGE),
        ("a", TARGET_PAGE, TARGET_PAGE, 100, errno.EINVAL),
        ("", TARGET_PAGE, TARGET_PAGE, 0, errno.EINVAL),
        ("n" * 256, TARGET_PAGE, TARGET_PAGE, 0, errno.EINVAL),
        ("ram0", TARGET_PAGE, TARGET_PAGE, 0, errno.EEXIST),
    ]
    for name, length, page_size, offset, number in cases:
        with pytest.raises(OSError) as caught:
            ram.add(name, fd, length, page_size, offset)
        assert caught.value.errno == number, (name, length, page_size, offset)
    inner = ram.add("inner", fd, 2 * TARGET_PAGE, TARGET_PAGE, TARGET_PAGE)
    os.pwrite(fd, b"x", TARGET_PAGE)
    assert inner.holes() == [(TARGET_PAGE, TARGET_PAGE)]
    os.close(fd)
    assert inner.holes() == [(TARGET_PAGE, TARGET_PAGE)], "a copy of the descriptor is ours"


@pytest.mark.parametrize("page_size", [TARGET_PAGE, HUGE])
def test_nobody_changes_the_length_of_a_block(huge_pages: int, page_size: int) -> None:
    """A back-end that has the descriptor could end us by it; or lock us out, by sealing it against writes."""
    with RamSet() as ram:
        block = ram.create("ram", 4 * page_size, page_size)
        for length in (0, 3 * page_size, 5 * page_size):
            with pytest.raises(PermissionError):
                os.ftruncate(block.fd, length)
        for seal in (fcntl.F_SEAL_WRITE, 0x10):  # and F_SEAL_FUTURE_WRITE
            with pytest.raises(PermissionError):
                fcntl.fcntl(block.fd, fcntl.F_ADD_SEALS, seal)
        block.discard(page_size, page_size)


def test_addresses(ram: RamSet) -> None:
    block = ram["ram0"]
    assert ram.locate(block.base + 5) == (block, 5)
    with pytest.raises(BadAddress):
        ram.locate(block.base + block.length)
    with pytest.raises(KeyError):
        ram["none"]


def test_nothing_leaks_and_closed_is_closed() -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        with RamSet() as ram:
            block = ram.create("ram0", 1 << 20)
    assert len(os.listdir("/proc/self/fd")) == before
    with pytest.raises(ValueError, match="closed"):
        block.count_bits(Bits.DIRTY)
    ram.close()  # again is fine
