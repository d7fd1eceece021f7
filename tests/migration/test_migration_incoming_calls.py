"""No Python per page: calls counted while four times as many pages come."""

from __future__ import annotations

import os
import socket
import sys
import threading
from collections import Counter
from types import FrameType
from typing import Any

import pytest
import trio

from tests.kit.migration_ends import LIMIT, incoming_of
from tests.kit.scripted_source import CLOCK, RAM
from vhostpc.migration import long_waits
from vhostpc.migration.channel import Channel
from vhostpc.migration.held import HeldMachine
from vhostpc.wire.migration.elements import (
    BlockInfo,
    Configuration,
    EndOfStream,
    Footer,
    Header,
    OpenReturnPath,
    Package,
    PostcopyAdvise,
    PostcopyListen,
    PostcopyRun,
    RamBlocks,
    RamDiscard,
    SectionEnd,
    SectionPart,
    SectionStart,
)
from vhostpc.wire.migration.ramrec import RamEncoder

PAGE = 4096
PER_PART = 1000
"""Pages of a part: one in ten with data."""


def parts(pages: int, length: int) -> list[bytes]:
    """So many pages in parts of RAM, over and over those of a block of ``length`` pages; the last is the END."""
    encoder, data, out = RamEncoder(), bytes([0xAA]) * PAGE, []
    for begin in range(0, pages, PER_PART):
        last = begin + PER_PART >= pages
        numbers = range(begin % length, begin % length + PER_PART)
        records = [
            encoder.page("ram", page * PAGE, data) if page % 10 == 0 else encoder.zero("ram", page * PAGE)
            for page in numbers
        ]
        head = SectionEnd(RAM) if last else SectionPart(RAM)
        out.append(head.encode() + b"".join(records) + encoder.end() + Footer(RAM).encode())
    return out


def stream(pages: int, postcopy: bool) -> list[bytes]:
    """A whole migration: in precopy of a small block, in postcopy of one in which each page is another."""
    length = pages if postcopy else 10 * PER_PART
    blocks = RamBlocks((BlockInfo("ram", length * PAGE),))
    head = Header().encode() + Configuration("toyvm").encode()
    if postcopy:
        head += OpenReturnPath().encode() + PostcopyAdvise(PAGE, PAGE).encode()
    head += SectionStart(RAM).encode() + blocks.encode() + Footer(RAM).encode()
    if postcopy:
        inside = PostcopyListen().encode() + CLOCK.encode() + PostcopyRun().encode()
        head += RamDiscard("ram", ((0, length * PAGE),)).encode() + Package(inside).encode()
        return [head, *parts(pages, length), EndOfStream().encode()]
    return [head, *parts(pages, length), CLOCK.encode() + EndOfStream().encode()]


async def calls(pages: int, postcopy: bool) -> int:
    """Calls of Python functions, and out of Python into C, while a destination receives so many pages."""
    ours, theirs = socket.socketpair()
    pieces = stream(pages, postcopy)
    count: Counter[int] = Counter()

    def source() -> None:
        """Not counted; a whole-blocking thread that reads nothing before it has sent all."""
        sys.setprofile(None)
        with theirs:
            for piece in pieces:
                theirs.sendall(piece)
            if postcopy:
                assert theirs.recv(8)  # SHUT

    def note(frame: FrameType, event: str, arg: Any) -> None:
        if event in ("call", "c_call"):
            count[threading.get_ident()] += 1

    channel = Channel(trio.SocketStream(trio.socket.from_stdlib_socket(ours)))
    with trio.fail_after(2 * LIMIT), HeldMachine() as machine:
        async with channel, trio.open_nursery() as nursery:
            incoming = incoming_of(channel, machine, postcopy=postcopy)
            nursery.start_soon(trio.to_thread.run_sync, source)
            threading.setprofile(note)
            sys.setprofile(note)
            try:
                await incoming.receive()
            finally:
                sys.setprofile(None)
                threading.setprofile(None)
        assert incoming.missing() == 0
        assert os.pread(machine.ram["ram"].fd, 1, (machine.ram["ram"].pages - 10) * PAGE) == b"\xaa"
        incoming.close()
    return count.total()


@pytest.mark.ufd
@pytest.mark.parametrize("postcopy", [False, True], ids=["precopy", "postcopy"])
async def test_python_calls_do_not_grow_with_pages(postcopy: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    # Checking the waiters costs calls by the second, not by the page.
    monkeypatch.setattr(long_waits, "FIRST", 3600.0)
    await calls(10 * PER_PART, postcopy)  # what is done once
    few, many = await calls(100_000, postcopy), await calls(400_000, postcopy)
    assert few > 100  # it counts
    # What grows is a turn of the loop for each 512 MiB of a discard, and whatever else wakes a busy machine's loop.
    # A call for each page, or for each batch of 64 pages, would be more than this.
    assert many - few < (400_000 - 100_000) / 100, f"{few} calls for 100 000 pages, {many} for 400 000"
