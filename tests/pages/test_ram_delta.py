"""XBZRLE pages into RAM blocks: the loader in C makes of them what the model makes, and refuses what it refuses."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.pages.test_ram_records import BLOCKS, PAGE_A, load_cut, loader, with_limit
from vhostpc.errors import StreamError
from vhostpc.units import TARGET_PAGE
from vhostpc.wire.migration import xbzrle
from vhostpc.wire.migration.ramrec import REASONS, BadRecord, RamEncoder, RamFlag

# From QEMU's documents: byte 8 to 11 become 1 to 4, byte 200 becomes 5.
DELTA = bytes.fromhex("08 04 01020304 bc01 01 05")


def record(page: int, delta: bytes, encoding: int = 1) -> bytes:
    """In the block that was named last."""
    word = page * TARGET_PAGE | RamFlag.XBZRLE | RamFlag.CONTINUE
    return word.to_bytes(8, "big") + bytes([encoding]) + len(delta).to_bytes(2, "big") + delta


def uleb(number: int) -> bytes:
    return bytes([number]) if number < 0x80 else bytes([number & 0x7F | 0x80, number >> 7])


@st.composite
def deltas(draw: st.DrawFn) -> bytes:
    """Mostly differences; now and then a length of nothing, too long a run, or bytes that are cut off."""
    out = bytearray()
    for _ in range(draw(st.integers(0, 6))):
        stays = draw(st.sampled_from([0, 1, 3, 127, 128, 700, 4095]))
        changes = draw(st.sampled_from([0, 1, 1, 2, 5, 128, 600, 4096]))
        out += (
            uleb(stays)
            + uleb(changes)
            + draw(st.binary(min_size=min(changes, 40), max_size=40)).ljust(changes, b"!")[:changes]
        )
    if draw(st.integers(0, 5)) == 0:
        out = out[: draw(st.integers(0, max(len(out) - 1, 0)))]
    return bytes(out[:TARGET_PAGE])


@settings(deadline=None, max_examples=150)
@given(delta=deltas(), cut=st.integers(1, 5000))
def test_loader_and_model_agree(delta: bytes, cut: int) -> None:
    encoder = RamEncoder()
    before = encoder.page("ram0", TARGET_PAGE, PAGE_A) + encoder.page("ram0", 2 * TARGET_PAGE, PAGE_A)
    stream = before + record(1, delta) + encoder.end()
    try:
        expected, verdict = xbzrle.apply(PAGE_A, delta), "end of section"
    except StreamError:
        expected, verdict = PAGE_A, f"DELTA at {len(before)}"

    async def run() -> None:
        async with trio.open_nursery():
            with loader(BLOCKS) as (ram, service):
                assert (await load_cut(service, stream, [cut])).startswith(verdict)
                assert await ram["ram0"].read(TARGET_PAGE, TARGET_PAGE) == expected
                # The current run was written before the page was read.
                assert await ram["ram0"].read(2 * TARGET_PAGE, TARGET_PAGE) == PAGE_A

    with_limit(run)


async def test_bytes_of_the_documents() -> None:
    """On a page that nobody wrote, whose neighbours stay holes."""
    stream = RamEncoder().zero("ram0", 0) + record(1, DELTA) + RamEncoder().end()
    with trio.fail_after(10), loader(BLOCKS) as (ram, service):
        ours, theirs = socket.socketpair()
        with ours, theirs, service.open_channel(ours.fileno(), holes=True) as channel:
            theirs.send(stream)
            numbers = await channel.load()
        assert await ram["ram0"].read(TARGET_PAGE, 201) == bytes(8) + b"\1\2\3\4" + bytes(188) + b"\5"
        assert ram["ram0"].holes() == [(0, TARGET_PAGE), (2 * TARGET_PAGE, 4 * TARGET_PAGE)]
        assert (numbers.data_pages, numbers.zero_pages) == (1, 1)


def broken() -> Iterator[tuple[str, bytes, BadRecord]]:
    yield "of another encoding", record(1, DELTA, encoding=2), BadRecord.DELTA
    yield "longer than a page", record(1, bytes(4097)), BadRecord.DELTA
    word = TARGET_PAGE | RamFlag.COMPRESS_PAGE | RamFlag.CONTINUE
    yield "compressed", word.to_bytes(8, "big") + bytes(4), BadRecord.COMPRESSED


@pytest.mark.parametrize(
    ("data", "why"), [(d, w) for _, d, w in broken()], ids=[name for name, _, _ in broken()]
)
async def test_what_is_refused(data: bytes, why: BadRecord) -> None:
    before = RamEncoder().zero("ram0", 0)
    with trio.fail_after(10), loader(BLOCKS) as (_, service):
        assert await load_cut(service, before + data, []) == f"{why.name} at {len(before)}"
    assert "capability compress off" in REASONS[BadRecord.COMPRESSED]


async def test_not_in_postcopy() -> None:
    """There a page comes once, and whole."""
    before = RamEncoder().zero("ram0", 0)
    with trio.fail_after(10), loader(BLOCKS) as (_, service):
        service.arm()
        assert await load_cut(service, before + record(1, DELTA), []) == f"FLAGS at {len(before)}"
