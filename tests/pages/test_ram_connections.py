"""A scan outlives the connection that its pages are sent on; what belonged to that connection ends with it."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
import trio

from vhostpc.pages.pagesource import UNLIMITED, Ended, PageScan, PageSource
from vhostpc.pages.ramblock import Bits, RamSet
from vhostpc.units import TARGET_PAGE
from vhostpc.wire.migration.ramrec import EndOfSection, RamDecoder, RamPage
from vhostpc.wire.migration.return_path import PageRequest, Shut

PAGES = 64


async def cut_in_the_middle(source: PageSource, theirs: trio.socket.SocketType) -> set[int]:
    """Pages 3 and 40 are asked for, 3 is withheld, then the link is cut. The pages that arrived whole."""
    decoder, arrived = RamDecoder({"ram0": PAGES * TARGET_PAGE}), set[int]()
    source.withhold("ram0", 3, 1)
    async with trio.open_nursery() as nursery:

        async def serve() -> None:
            assert await source.serve() is Ended.PEER_CLOSED
            nursery.cancel_scope.cancel()

        nursery.start_soon(serve)
        for page in (3, 40):
            await theirs.send(PageRequest("ram0", page * TARGET_PAGE, TARGET_PAGE).encode())
        # Its head, its name, and half of its content: the record is never whole.
        cut = await theirs.recv(8 + 5 + TARGET_PAGE // 2)
        arrived |= {e.offset // TARGET_PAGE for e in decoder.feed(cut) if isinstance(e, RamPage)}
        while source.numbers().withheld == 0:
            await source.changed()
        theirs.close()
        await trio.sleep_forever()
    return arrived


async def test_a_second_connection_goes_on_with_the_scan() -> None:
    with trio.fail_after(30), ExitStack() as stack:
        ram = stack.enter_context(RamSet())
        block = ram.create("ram0", PAGES * TARGET_PAGE)
        await block.fill(1)
        block.set_bits(Bits.DIRTY)
        scan = PageScan(ram)
        stack.callback(scan.close)

        ours, theirs = trio.socket.socketpair()
        with ours, PageSource(ram, ours.fileno(), scan=scan) as first:
            assert await cut_in_the_middle(first, theirs) == set()
            before = first.numbers()
        assert (before.requested_pages, before.withheld_ever, before.dirty_left) == (1, 1, PAGES - 1)

        block.set_bits(Bits.DIRTY)  # as the destination's bitmap says: nothing has arrived
        scan.set_rate(UNLIMITED)
        block.set_bits(Bits.WITHHELD, value=False)
        ours, theirs = trio.socket.socketpair()
        with ours, theirs, PageSource(ram, ours.fileno(), scan=scan) as second:
            assert second.numbers().withheld == 0
            order: list[int] = []
            async with trio.open_nursery() as nursery:
                nursery.start_soon(second.serve)
                # A new decoder takes no CONTINUE before a name, and no rest of a record.
                decoder, ended = RamDecoder({"ram0": block.length}), False
                while not ended:
                    for event in decoder.feed(await theirs.recv(65536)):
                        ended |= isinstance(event, EndOfSection)
                        if isinstance(event, RamPage):
                            order.append(event.offset // TARGET_PAGE)
                await theirs.send(Shut(0).encode())
            after = second.numbers()
        # The scan stands where the first connection left it, and what that one was asked for is forgotten.
        assert order == [*range(41, PAGES), *range(41)]
        assert (after.requested_pages, after.background_pages) == (1, PAGES)
        assert (after.requests, after.withheld, after.dirty_left) == (0, 0, 0)


async def test_what_was_asked_for_and_withheld_is_asked_for_again() -> None:
    with trio.fail_after(30), ExitStack() as stack:
        ram = stack.enter_context(RamSet())
        block = ram.create("ram0", PAGES * TARGET_PAGE)
        await block.fill(1)
        block.set_bits(Bits.DIRTY)
        scan = PageScan(ram)
        stack.callback(scan.close)
        ours, theirs = trio.socket.socketpair()
        with ours, PageSource(ram, ours.fileno(), scan=scan) as first:
            await cut_in_the_middle(first, theirs)
        ours, theirs = trio.socket.socketpair()
        with ours, theirs, PageSource(ram, ours.fileno(), scan=scan) as second:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(second.serve)
                await theirs.send(PageRequest("ram0", 3 * TARGET_PAGE, TARGET_PAGE).encode())
                while second.numbers().withheld == 0:
                    await second.changed()
                second.release("ram0")
                decoder = RamDecoder({"ram0": block.length})
                found: list[int] = []
                while not found:
                    for event in decoder.feed(await theirs.recv(65536)):
                        assert isinstance(event, RamPage)
                        found.append(event.offset // TARGET_PAGE)
                nursery.cancel_scope.cancel()
            assert found == [3]


async def test_its_last_word_stands_behind_more_requests_than_are_kept() -> None:
    """The link is gone and nothing is served any more, so they do not hold it up."""
    pages = 3 * 4096
    with trio.fail_after(30), RamSet() as ram:
        block = ram.create("ram0", pages * TARGET_PAGE)
        block.set_bits(Bits.DIRTY)
        ours, theirs = trio.socket.socketpair()
        with ours, PageSource(ram, ours.fileno()) as source:
            await theirs.send(PageRequest("ram0", 0, block.length).encode())
            await theirs.send(PageRequest("ram0", 0, block.length).encode() + Shut(1).encode())
            theirs.close()
            assert await source.serve() is Ended.SHUT
            assert source.numbers().shut == 1


async def test_its_last_word_counts_whatever_the_error_of_a_write() -> None:
    """Not only a closed connection: a network that is down, for example, is told in other ways."""
    with trio.fail_after(30), ExitStack() as stack:
        ram = stack.enter_context(RamSet())
        ram.create("ram0", PAGES * TARGET_PAGE).set_bits(Bits.DIRTY)
        full = os.open("/dev/full", os.O_WRONLY)
        stack.callback(os.close, full)
        ours, theirs = trio.socket.socketpair()
        for end in (ours, theirs):
            stack.enter_context(end)
        source = stack.enter_context(
            PageSource(ram, full, background_rate=UNLIMITED, return_path=ours.fileno())
        )
        await theirs.send(Shut(1).encode())
        assert await source.serve() is Ended.SHUT
        assert source.numbers().shut == 1


GONE = """
import socket, sys, trio
from tests.kit.confine import deny
from vhostpc.errors import ChannelLost
from vhostpc.pages.ramblock import RamSet
from vhostpc.pages.service import FaultService

async def main():
    ours, theirs = socket.socketpair()
    with ours, theirs, RamSet() as ram:
        ram.create("ram0", 4096)
        with FaultService(ram) as service, service.open_channel(ours.fileno()) as channel:
            theirs.send(b"0")
            try:
                await channel.load()
            except ChannelLost as error:
                print(error)

deny("preadv2", int(sys.argv[1]))
trio.run(main)
"""


@pytest.mark.parametrize("name", ["ETIMEDOUT", "EHOSTUNREACH", "ENETUNREACH", "ECONNRESET"])
def test_a_peer_that_is_gone_is_a_lost_channel(name: str) -> None:
    """Whatever the network says of it: after a silence TCP gives another error than a reset (tcp(7))."""
    argv = [sys.executable, "-c", GONE, str(getattr(errno, name))]
    done = subprocess.run(
        argv, capture_output=True, text=True, timeout=60, cwd=Path(__file__).parents[2], check=False
    )
    assert done.returncode == 0, done.stderr
    assert "host pages are missing" in done.stdout, done.stderr
