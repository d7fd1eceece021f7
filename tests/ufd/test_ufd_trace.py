"""The trace of answered faults: one entry for each, the last ones only, readable when the service is gone."""

from __future__ import annotations

import errno
import time

import pytest
import trio

from tests.kit.until import until
from vhostpc.pages.pagesource import PageSource
from vhostpc.pages.ramblock import Bits, RamSet
from vhostpc.pages.service import FaultService
from vhostpc.pages.trace import Trace, Way
from vhostpc.units import TARGET_PAGE

PAGES = 40
pytestmark = pytest.mark.ufd


async def traced(room: int, pages: int = PAGES) -> FaultService:
    """A service whose own mapping faulted on ``pages`` pages, one after the other; closed."""
    ours, theirs = trio.socket.socketpair()
    with ours, theirs, RamSet() as source_ram, RamSet() as ram:
        source_ram.create("ram0", PAGES * TARGET_PAGE).set_bits(Bits.DIRTY)
        block = ram.create("ram0", PAGES * TARGET_PAGE)
        with PageSource(source_ram, theirs.fileno()) as source, FaultService(ram, trace=room) as service:
            service.arm()
            service.set_return_path(ours.fileno())
            async with trio.open_nursery() as nursery:
                nursery.start_soon(service.run)
                nursery.start_soon(source.serve)
                nursery.start_soon(service.load, ours.fileno())
                for page in range(pages):
                    await block.read(page * TARGET_PAGE, 1)
                await until(lambda: service.numbers().wakes == service.numbers().events)
                assert service.numbers().events == pages
                if room:
                    live = service.traced()
                nursery.cancel_scope.cancel()
            assert service.name_of(service.own.number) == "own mapping"
        if room:
            assert service.traced() == live
        return service


async def test_each_fault_is_told_with_its_times() -> None:
    begin = time.monotonic_ns()
    service = await traced(1000)
    end = time.monotonic_ns()
    following, rows = service.traced()
    assert following == len(rows) == PAGES
    assert [row.page for row in rows] == list(range(PAGES))
    assert {row.way for row in rows} == {Way.ASKED}
    assert {row.block for row in rows} == {0}
    assert all(row.thread for row in rows)
    assert all(begin < row.read_ns <= row.woken_ns < end for row in rows)
    assert service.traced(following) == (following, [])


async def test_the_last_ones_are_kept_and_read_in_parts() -> None:
    service = await traced(16)
    assert [row.page for row in service.traced()[1]] == list(range(PAGES - 16, PAGES))
    following, rows = service.traced(30, most=4)
    assert (following, [row.page for row in rows]) == (34, [30, 31, 32, 33])


async def test_nothing_is_remembered_unless_asked_for() -> None:
    assert (await traced(0)).traced() == (0, [])


def test_a_trace_is_begun_once() -> None:
    with RamSet() as ram, FaultService(ram, trace=4) as service:
        assert service.traced(9) == (0, [])
        with pytest.raises(OSError, match="trace") as caught:
            Trace(service.handle, 4)
        assert caught.value.errno == errno.EBUSY


@pytest.mark.parametrize("cells", [1, 7, 200])
def test_bits_are_counted_in_parts(cells: int) -> None:
    with RamSet() as ram:
        block = ram.create("ram0", 200 * TARGET_PAGE)
        block.set_bits(Bits.RECEIVED, 3, 90)
        expected = [
            sum(block.test_bit(Bits.RECEIVED, p) for p in range(i * 200 // cells, (i + 1) * 200 // cells))
            for i in range(cells)
        ]
        assert block.count_cells(Bits.RECEIVED, cells) == expected
        for wrong in (0, 201):
            with pytest.raises(OSError, match="RAM bits"):
                block.count_cells(Bits.RECEIVED, wrong)
