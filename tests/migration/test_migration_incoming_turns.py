"""A few bytes of stream that make much work: a destination does it in pieces, and everybody else has turns between.

Turns are counted from the moment at which all of the stream has been read to the first thing that is said of it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import trio

from tests.kit.migration_ends import Received, feed
from tests.kit.streams import CLOCK, CONFIGURATION, HEADER, PRECOPY, h
from tests.migration.test_migration_incoming import ADVISED, HEAD, LISTEN, PING3, RUN, package
from vhostpc.errors import StreamError
from vhostpc.memory import available
from vhostpc.migration import held
from vhostpc.migration.channel import Channel
from vhostpc.migration.held import HeldMachine
from vhostpc.migration.incoming import DISCARD
from vhostpc.migration.phase import Event
from vhostpc.migration.turns import pieces
from vhostpc.pages.ramblock import RamBlock
from vhostpc.wire.migration.elements import (
    BlockInfo,
    DeviceSection,
    Footer,
    Ping,
    RamBlocks,
    RamDiscard,
    SectionStart,
)

MIB, GIB = 1 << 20, 1 << 30


async def turns(
    data: bytes, monkeypatch: pytest.MonkeyPatch, machine: HeldMachine | None = None, **more: Any
) -> tuple[Received, int]:
    """What became of a stream, and how many turns others had from its last byte to the first report."""
    read = had = 0
    receive_some = Channel.receive_some

    async def receive(channel: Channel, most: int) -> bytes:
        nonlocal read
        got = await receive_some(channel, most)
        read += len(got)
        return got

    monkeypatch.setattr(Channel, "receive_some", receive)
    told = False
    report = Received.report

    def tell(received: Received, event: Event, error: BaseException | None) -> None:
        nonlocal told
        told = True
        report(received, event, error)

    monkeypatch.setattr(Received, "report", tell)

    async def others() -> None:
        nonlocal had
        while True:
            await trio.lowlevel.checkpoint()
            had += read == len(data) and not told

    async with trio.open_nursery() as nursery:
        nursery.start_soon(others)
        with machine or HeldMachine() as held_machine:
            received = await feed(data, held_machine, **more)
        nursery.cancel_scope.cancel()
    return received, had


def sections(count: int) -> Iterator[bytes]:
    for i in range(10, 10 + count):
        yield DeviceSection(i, f"d{i}", 0, 1, b"12345678").encode()


FOOTER = h("7e 00000009 04")
PACKAGES = {
    "sections": b"".join(sections(20_000)),
    "footers": CLOCK[:-5] + FOOTER * 20_000 + CLOCK[-5:],
    "zeros": CLOCK[:-5] + bytes(16 * MIB) + CLOCK[-5:],
    "the first byte of a footer": CLOCK[:-5] + b"\x7e" * (4 * MIB) + CLOCK[-5:],
    "commands": CLOCK + Ping(3).encode() * 20_000,
}


@pytest.mark.parametrize("kind", PACKAGES)
async def test_a_package(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = HEAD + package(LISTEN, PACKAGES[kind], PING3, RUN)
    received, had = await turns(data, monkeypatch, postcopy=True)
    assert received.events[0] is Event.PACKAGE
    assert had > 8


async def test_sections_and_a_wide_description(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the end of a precopy; what is too wide to be parsed at once is not needed."""
    devices = [{"name": f"d{i}", "instance_id": 0, "version": 1, "size": 8} for i in range(10, 60_010)]
    text = json.dumps({"devices": devices}).encode()
    begin = PRECOPY[: PRECOPY.index(CLOCK)]
    data = begin + b"".join(sections(60_000)) + h("00 06") + len(text).to_bytes(4, "big") + text
    with HeldMachine() as machine:
        received, had = await turns(data, monkeypatch, machine, postcopy=False)
        assert received.error is None
        assert len(machine.devices) == 60_000
    assert had > 50


async def test_sections_without_a_description(monkeypatch: pytest.MonkeyPatch) -> None:
    begin = PRECOPY[: PRECOPY.index(CLOCK)]
    with HeldMachine() as machine:
        received, had = await turns(
            begin + b"".join(sections(20_000)) + b"\0", monkeypatch, machine, postcopy=False
        )
        assert received.error is None
        assert len(machine.devices) == 20_000
    assert had > 20


BLOCK = 8 * GIB


async def test_a_discard_covers_a_page_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thousands of ranges, each of which is the whole block; and not all of the block in one turn."""
    blocks = RamBlocks((BlockInfo("ram0", BLOCK),))
    whole = RamDiscard("ram0", ((0, BLOCK),) * 4000)
    setup = SectionStart(7).encode() + blocks.encode() + Footer(7).encode()
    data = ADVISED + setup + whole.encode()
    calls: list[int] = []
    discard = RamBlock.discard_for

    def counted(block: RamBlock, ranges: Sequence[tuple[int, int]]) -> None:
        calls.append(sum(length for _, length in ranges))
        discard(block, ranges)

    monkeypatch.setattr(RamBlock, "discard_for", counted)
    with HeldMachine(lengths={"ram0": BLOCK}) as machine:
        received, had = await turns(data, monkeypatch, machine, postcopy=True)
    assert "ends where its next element belongs" in str(received.error)
    assert sum(calls) == BLOCK
    assert max(calls) <= DISCARD
    assert had > BLOCK // DISCARD // 2


@pytest.mark.parametrize(
    ("ranges", "found"),
    [
        ([], []),
        ([(0, 4)], [(0, 4)]),
        ([(0, 10)], [(0, 4), (4, 4), (8, 2)]),
        ([(8, 4), (0, 4)], [(0, 4), (8, 4)]),
        ([(0, 4), (0, 4), (2, 4)], [(0, 4), (4, 2)]),
        ([(0, 12), (2, 2), (12, 1)], [(0, 4), (4, 4), (8, 4), (12, 1)]),
    ],
)
def test_pieces(ranges: list[tuple[int, int]], found: list[tuple[int, int]]) -> None:
    assert list(pieces(ranges, 4)) == found


@pytest.mark.parametrize("said", [False, True])
async def test_more_memory_than_there_is(said: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks, each of which would fit; they are held where it was said that they come."""
    monkeypatch.setattr(held, "available_memory", lambda: 3 * GIB)
    names = [f"ram{i}" for i in range(4)]
    blocks = RamBlocks(tuple(BlockInfo(name, GIB) for name in names))
    data = HEADER + CONFIGURATION + SectionStart(7).encode() + blocks.encode() + Footer(7).encode()
    with HeldMachine(lengths=dict.fromkeys(names, GIB) if said else None) as machine:
        received = await feed(data, machine, postcopy=False)
    assert isinstance(received.error, StreamError)
    refused = "RAM blocks of 4096 MiB, but this computer has only 3072 MiB left" in str(received.error)
    assert refused is not said


def test_what_is_available() -> None:
    assert 16 * MIB < available.available_memory() < 1 << 60
