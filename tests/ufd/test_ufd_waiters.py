"""Waiters in the fault service: one waiter a client, thread and page, whatever lets a thread go and come back."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path

import pytest
import trio

from tests.kit.until import until
from vhostpc.pages.faultclient import ClientRange
from vhostpc.pages.pagesource import UNLIMITED, PageSource
from vhostpc.pages.ramblock import Bits, RamBlock, RamSet
from vhostpc.pages.service import FaultService
from vhostpc.ufd import Userfaultfd
from vhostpc.ufd.flags import Features
from vhostpc.units import TARGET_PAGE

pytestmark = pytest.mark.ufd
SEED = 9
SIGNALS = 100


@contextmanager
def handled() -> Iterator[None]:
    """SIGUSR1 ends nothing: it only interrupts."""
    before = signal.signal(signal.SIGUSR1, lambda number, frame: None)
    try:
        yield
    finally:
        signal.signal(signal.SIGUSR1, before)


@asynccontextmanager
async def released(ufd: Userfaultfd, mapped: RamBlock) -> AsyncIterator[None]:
    """What goes wrong in the block is told: no thread waits on for a page that will never come."""
    try:
        yield
    except BaseException:
        ufd.unregister(mapped.base, mapped.length)
        raise


def threads_named(name: str) -> list[int]:
    found = []
    for task in Path("/proc/self/task").iterdir():
        # A thread that was idle since an earlier test may end meanwhile.
        with suppress(FileNotFoundError, ProcessLookupError):
            if (task / "comm").read_text().strip() == name:
                found.append(int(task.name))
    return found


def interrupt(thread: int) -> None:
    tgkill = ctypes.CDLL(None, use_errno=True).tgkill
    assert tgkill(os.getpid(), thread, signal.SIGUSR1) == 0


@pytest.mark.parametrize("told", [True, False], ids=["threads are told", "threads are not told"])
async def test_a_thread_that_signals_interrupt_waits_once(told: bool) -> None:
    """Each signal brings it back to its page, as a fault of its own: counted, and no waiter more."""
    with trio.fail_after(30), handled(), RamSet() as original, RamSet() as ram, RamSet() as theirs:
        source, block = (r.create("ram0", 8 * TARGET_PAGE) for r in (original, ram))
        await source.fill(SEED)
        source.set_bits(Bits.DIRTY)
        mapped = theirs.add("ram0", block.fd, block.length)
        ours, far = socket.socketpair()
        with (
            ours,
            far,
            FaultService(ram) as service,
            PageSource(original, far.fileno()) as pages,
            Userfaultfd.open(optional=Features.THREAD_ID if told else Features(0)) as ufd,
        ):
            service.arm()
            service.set_return_path(ours.fileno())
            ufd.register(mapped.base, mapped.length)
            client = service.add_client(ufd, "net0")
            client.set_ranges([ClientRange(mapped.base, mapped.length, block, 0)])
            good: list[tuple[int, int | None]] = []

            async def touch(page: int) -> None:
                good.append(await mapped.verify(SEED, page, 1))

            async with trio.open_nursery() as nursery, released(ufd, mapped):
                nursery.start_soon(service.run)
                pages.withhold("ram0")
                nursery.start_soon(pages.serve)
                for page in (5, 5, 2):
                    nursery.start_soon(touch, page)
                await until(lambda: client.numbers().faults == 3)
                waiters = 3 if told else 2
                assert client.numbers().waiting_now == waiters
                for _ in range(SIGNALS):
                    before = client.numbers().faults
                    for thread in threads_named("vpc-blocks"):
                        interrupt(thread)
                    await until(lambda before=before: client.numbers().faults > before)  # type: ignore[misc]
                numbers = client.numbers()
                assert numbers.faults >= 3 + SIGNALS
                assert numbers.repeated == numbers.faults - waiters
                assert numbers.waiting_now == len(service.waiting()) == waiters
                assert {w.page for w in service.waiting()} == {5, 2}
                assert service.numbers().requests == 2
                pages.release("ram0")
                pages.set_rate(UNLIMITED)
                await service.load(ours.fileno())
                await until(lambda: len(good) == 3)
                assert good == [(0, None)] * 3
                numbers = client.numbers()
                assert numbers.wakes == numbers.waits.count == numbers.faults - numbers.repeated
                assert numbers.waiting_now == 0
                nursery.cancel_scope.cancel()


async def test_interrupted_before_the_ranges_are_known() -> None:
    """Where the address says nothing yet it is one waiter, too, and is found once they are."""
    with trio.fail_after(30), handled(), RamSet() as ram, RamSet() as theirs, FaultService(ram) as service:
        block = ram.create("ram0", 8 * TARGET_PAGE)
        mapped = theirs.add("ram0", block.fd, block.length)
        with Userfaultfd.open() as ufd:
            ufd.register(mapped.base, mapped.length)
            client = service.add_client(ufd, "net0")
            got: list[bytes] = []

            async def touch() -> None:
                got.append(await mapped.read(3 * TARGET_PAGE, 4))

            async with trio.open_nursery() as nursery, released(ufd, mapped):
                nursery.start_soon(service.run)
                nursery.start_soon(touch)
                await until(lambda: client.numbers().found_nothing == 1)
                for _ in range(5):
                    before = client.numbers().faults
                    interrupt(threads_named("vpc-blocks")[0])
                    await until(lambda before=before: client.numbers().faults > before)  # type: ignore[misc]
                numbers = client.numbers()
                assert (numbers.waiting_now, numbers.found_nothing) == (1, 1)
                assert numbers.repeated == numbers.faults - 1
                os.pwrite(block.fd, b"came", 3 * TARGET_PAGE)
                block.set_bits(Bits.RECEIVED, 3, 1)
                client.set_ranges([ClientRange(mapped.base, mapped.length, block, 0)])
                await until(lambda: got)
                assert got == [b"came"]
                nursery.cancel_scope.cancel()
