"""Transparent huge pages in shared memory, of somebody else's making: what is discarded out of one is missing."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio

from tests.kit.migration_ends import LIMIT, incoming_of, pair
from tests.kit.scripted_source import ScriptedSource
from tests.kit.until import until
from vhostpc.migration.channel import Channel
from vhostpc.migration.held import HeldMachine
from vhostpc.wire.migration.return_path import Pong, Shut

pytestmark = pytest.mark.ufd
PAGE, HUGE = 4096, 2 << 20
A, B = bytes([0xAA]) * PAGE, bytes([0xBB]) * PAGE
SHMEM = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
MADV_HUGEPAGE = 14


@pytest.fixture
def advised() -> Iterator[None]:
    """shmem_enabled is ``advise`` for the length of a test."""
    before = SHMEM.read_text().split("[")[1].split("]")[0]
    SHMEM.write_text("advise")
    yield
    SHMEM.write_text(before)


def pmd_mapped(address: int) -> int:
    """Bytes that the mapping of ``address`` maps by huge pages of shared memory (proc(5), smaps)."""
    inside = False
    with open("/proc/self/smaps") as smaps:
        for line in smaps:
            words = line.split()
            if not words[0].endswith(":"):
                low, high = (int(part, 16) for part in words[0].split("-"))
                inside = low <= address < high
            elif inside and words[0] == "ShmemPmdMapped:":
                return int(words[1]) << 10
    raise AssertionError(f"{address:#x} is not mapped")


@contextmanager
def huge_page(fd: int) -> Iterator[int]:
    """A mapping of another's, as a back-end has one: it asks for huge pages, and touches. Its address."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t] + [ctypes.c_int] * 3 + [ctypes.c_long]
    spare = libc.mmap(None, 2 * HUGE, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    at = (spare + HUGE - 1) // HUGE * HUGE
    both = mmap.PROT_READ | mmap.PROT_WRITE
    assert libc.mmap(at, HUGE, both, mmap.MAP_SHARED | 0x10, fd, 0) == at  # MAP_FIXED
    try:
        assert libc.madvise(ctypes.c_void_p(at), HUGE, MADV_HUGEPAGE) == 0
        ctypes.memset(at, 0xAA, HUGE)
        assert pmd_mapped(at) == HUGE, "the kernel made no huge page"
        yield int(at)
    finally:
        libc.munmap(ctypes.c_void_p(spare), 2 * HUGE)


async def test_one_page_out_of_a_huge_one(advised: None) -> None:
    """Its discard leaves one hole of 4 KiB; a touch there is a fault, and all others are there."""
    ours, theirs = pair()
    with trio.fail_after(LIMIT), HeldMachine() as machine:
        async with Channel(ours) as channel, theirs, trio.open_nursery() as nursery:
            incoming = incoming_of(channel, machine, postcopy=True)
            source = ScriptedSource(theirs, {"ram": (HUGE // PAGE, PAGE)})
            nursery.start_soon(source.listen)
            nursery.start_soon(incoming.receive)
            await source.begin()
            await until(lambda: machine.ram.blocks)
            block = machine.ram["ram"]
            with huge_page(block.fd):
                assert block.holes() == []
                await source.pages("ram", *((page, A) for page in range(HUGE // PAGE)))
                await source.discard("ram", 77, 1)
                await source.package()
                await source.heard(Pong(3))
                assert block.holes() == [(77 * PAGE, PAGE)]
                assert incoming.missing() == 1
                got: list[bytes] = []

                async def touch() -> None:
                    got.append(await block.read(76 * PAGE, 3 * PAGE))

                nursery.start_soon(touch)
                await source.asked("ram", 77)
                assert got == []
                await source.pages("ram", (77, B), last=True)
                await source.end()
                await source.heard(Shut(0))
                await until(lambda: got)
                assert got == [A + B + A]
                assert block.holes() == []
            nursery.cancel_scope.cancel()
        incoming.close()
