"""Block time: what the fault service counts, beside the clocks of the touching threads and the trace of faults."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import ExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial

import pytest
import trio

from tests.kit.until import until
from vhostpc._native import ffi, lib
from vhostpc.errors import MemoryLost
from vhostpc.guest.vcpu import Area, VCpu
from vhostpc.pages.blocktime import NOBODY, Blocktime
from vhostpc.pages.faultclient import Client, ClientRange
from vhostpc.pages.pagesource import UNLIMITED, PageSource
from vhostpc.pages.ramblock import Bits, RamBlock, RamSet
from vhostpc.pages.service import FaultService
from vhostpc.ufd import Userfaultfd
from vhostpc.ufd.flags import Features
from vhostpc.units import TARGET_PAGE

pytestmark = pytest.mark.ufd
PAGES = 64
HALF = 500_000_000
"""Nanoseconds for which pages are held back."""
LEAST = 0.75
"""Of what a thread measured: the rest is the way from its fault to the loop that reads it, and back."""
CHECKS = 2000
"""Pages a second that a vCPU reads: its clock is to show waits, not work."""


@dataclass
class Bench:
    """A destination whose pages are held back, and those who touch them: vCPUs here, a back-end in its own mapping."""

    ram: RamSet
    source: PageSource
    service: FaultService
    vcpus: Sequence[VCpu]
    backend: VCpu
    client: Client
    ours: socket.socket
    ufd: Userfaultfd
    mapped: RamBlock

    def found(self) -> Blocktime:
        found = self.service.blocktime()
        assert found is not None
        return found

    def waiting(self) -> list[int]:
        """How many threads of each vCPU, and of the back-end, wait now."""
        return [one.waiting_now for one in self.found().vcpus] + [self.client.numbers().waiting_now]

    async def hold(self, ns: int = HALF) -> None:
        until_ns = time.monotonic_ns() + ns
        await until(lambda: time.monotonic_ns() >= until_ns)

    def release_backend(self) -> None:
        """Let its thread go on although nobody serves it."""
        self.ufd.unregister(self.mapped.base, self.mapped.length)

    async def release(self) -> None:
        """Every page comes; all threads stand."""
        self.source.withhold_all(False)
        self.source.set_rate(UNLIMITED)
        await until(lambda: self.service.missing() == 0 and not any(self.waiting()))
        if self.client.removed:
            self.release_backend()
        for cpu in (*self.vcpus, self.backend):
            await cpu.stop()


async def live(cpu: VCpu, *, task_status: trio.TaskStatus[None]) -> None:
    with suppress(MemoryLost):
        await cpu.park(task_status=task_status)


@asynccontextmanager
async def bench(vcpus: int = 2, *, known: bool = True) -> AsyncIterator[Bench]:
    """``known``: the service is told of the vCPUs."""
    ours, theirs = socket.socketpair()
    with trio.fail_after(60), ours, theirs, ExitStack() as stack:
        original, ram, far = (stack.enter_context(RamSet()) for _ in range(3))
        source_block = original.create("ram", PAGES * TARGET_PAGE)
        block = ram.create("ram", PAGES * TARGET_PAGE)
        mapped = far.add("ram", block.fd, block.length)

        def cpus(of: RamSet) -> list[VCpu]:
            area = [Area(of["ram"], 0, PAGES)]
            return [stack.enter_context(VCpu(of, area, i, vcpus, seed=3, reads=CHECKS)) for i in range(vcpus)]

        for cpu in cpus(original):
            await cpu.fill()
        source_block.set_bits(Bits.DIRTY)
        service = stack.enter_context(FaultService(ram, trace=10_000))
        source = stack.enter_context(PageSource(original, theirs.fileno(), background_rate=0))
        here, backend = cpus(ram), cpus(far)[0]
        ufd = stack.enter_context(Userfaultfd.open(optional=Features.THREAD_ID))
        ufd.register(mapped.base, mapped.length)
        client = service.add_client(ufd, "net0")
        client.set_ranges([ClientRange(mapped.base, mapped.length, block, 0)])
        source.withhold_all()
        async with trio.open_nursery() as nursery:
            for cpu in (*here, backend):
                await nursery.start(live, cpu)
            if known:
                service.set_vcpus([cpu.thread for cpu in here])
            service.arm()
            service.set_return_path(ours.fileno())
            nursery.start_soon(service.run)
            nursery.start_soon(source.serve)
            nursery.start_soon(service.load, ours.fileno())
            try:
                yield Bench(ram, source, service, here, backend, client, ours, ufd, mapped)
            except BaseException:
                service.give_up()
                ufd.unregister(mapped.base, mapped.length)
                raise
            nursery.cancel_scope.cancel()


def beside(counted: int, measured: int) -> None:
    """The thread's own clock runs from its fault to its next instruction; the service's from the reading of the fault
    to the moment when the page was placed and the thread woken, whichever of the two goes on first."""
    assert LEAST * measured <= counted <= measured / LEAST, (counted, measured)


Spans = list[tuple[int, int]]


def union(spans: Iterable[tuple[int, int]]) -> Spans:
    found: Spans = []
    for begin, end in sorted(spans):
        if found and begin <= found[-1][1]:
            found[-1] = found[-1][0], max(end, found[-1][1])
        else:
            found.append((begin, end))
    return found


def both(one: Spans, other: Spans) -> Spans:
    met = [(max(a, c), min(b, d)) for a, b in one for c, d in other]
    return [(begin, end) for begin, end in met if begin < end]


def length(spans: Spans) -> int:
    return sum(end - begin for begin, end in spans)


def by_the_trace(b: Bench) -> tuple[list[int], int, int, int]:
    """Each vCPU's block time, the back-end's, that of all vCPUs at once, of all: from the single faults."""
    _, rows = b.service.traced(most=10_000)
    own = b.service.own.number
    each = [
        union((r.read_ns, r.woken_ns) for r in rows if (r.client, r.thread) == (own, cpu.numbers().thread))
        for cpu in b.vcpus
    ]
    backend = union((r.read_ns, r.woken_ns) for r in rows if r.client == b.client.number)
    together = each[0]
    for one in each[1:]:
        together = both(together, one)
    return [length(one) for one in each], length(backend), length(together), length(both(together, backend))


def agree(b: Bench, found: Blocktime) -> None:
    """With the trace. Faults that are read at once begin at once there, here not before others have ended."""
    vcpus, backend, all_vcpus, everybody = by_the_trace(b)
    near = partial(pytest.approx, rel=0.01, abs=200_000)
    assert [one.blocked_ns for one in found.vcpus] == near(vcpus)
    assert b.client.numbers().blocked_ns == near(backend)
    assert found.all_vcpus_ns == near(all_vcpus)
    assert found.all_ns == near(everybody)


async def test_half_a_second_is_what_the_threads_measured() -> None:
    """One after the other begins to wait; all are let go at once."""
    async with bench() as b:
        begun = time.monotonic_ns()
        for number, cpu in enumerate((*b.vcpus, b.backend), 1):
            cpu.go()
            await until(lambda n=number: sum(map(bool, b.waiting())) == n)  # type: ignore[misc]
            await b.hold()
        live = b.found()
        assert live.vcpus[0].blocked_ns > live.vcpus[1].blocked_ns > b.client.numbers().blocked_ns > HALF
        assert [one.waits.count for one in live.vcpus] == [0, 0]  # none has ended
        await b.release()
        passed = time.monotonic_ns() - begun
        found, client = b.found(), b.client.numbers()
        for one, cpu in zip(found.vcpus, b.vcpus, strict=True):
            beside(one.blocked_ns, cpu.numbers().stalled_ns)
            beside(one.waits.longest_ns, cpu.numbers().stalls.longest_ns)
            assert one.waiting_now == 0
        beside(client.blocked_ns, b.backend.numbers().stalled_ns)
        # Two held pages for the first and one for the second: what they have in common is the second's.
        assert found.vcpus[0].blocked_ns - found.vcpus[1].blocked_ns > LEAST * HALF
        assert found.vcpus[1].blocked_ns - client.blocked_ns > LEAST * HALF
        beside(found.all_vcpus_ns, found.vcpus[1].blocked_ns)
        beside(found.all_ns, client.blocked_ns)
        assert found.all_ns < found.all_vcpus_ns < passed
        assert found.others == NOBODY
        remote = sum(one.remote for one in found.vcpus)
        assert 0 < remote <= sum(one.waits.count for one in found.vcpus)
        assert sum(found.latency) == remote
        # Those that were held, and no wait so long was another.
        assert sum(found.latency[18:]) == 2
        agree(b, found)


async def test_a_backend_alone_blocks_no_vcpu() -> None:
    async with bench() as b:
        b.backend.go()
        await until(lambda: b.waiting() == [0, 0, 1])
        await b.hold()
        await b.release()
        found = b.found()
        assert found == Blocktime((NOBODY, NOBODY), NOBODY, 0, 0, (0,) * 24)
        beside(b.client.numbers().blocked_ns, b.backend.numbers().stalled_ns)


async def test_all_vcpus_are_not_all() -> None:
    """A back-end that goes on keeps the time of all from running; without it they are all."""
    async with bench() as b:
        for cpu in b.vcpus:
            cpu.go()
        await until(lambda: b.waiting() == [1, 1, 0])
        await b.hold(HALF // 5)
        assert b.found().all_vcpus_ns > HALF // 5
        assert b.found().all_ns == 0
        b.client.remove()
        await b.hold(HALF // 5)
        found = b.found()
        assert found.all_vcpus_ns - found.all_ns > HALF // 5 < found.all_ns + HALF // 5
        assert 0 < found.all_ns < found.all_vcpus_ns
        await b.release()


async def test_a_client_that_goes_while_it_waits_has_waited_until_then() -> None:
    async with bench() as b:
        for cpu in (*b.vcpus, b.backend):
            cpu.go()
        await until(lambda: b.waiting() == [1, 1, 1])
        b.client.remove()
        gone = b.client.numbers()
        assert gone.waiting_now == 0
        assert gone.waits.count == 0
        assert gone.blocked_ns > 0
        await b.hold(HALF // 10)
        assert b.client.numbers().blocked_ns == gone.blocked_ns
        await b.release()


async def test_a_fault_goes_on_while_the_link_is_lost() -> None:
    """The thread waits all the time: before, in the pause, and until its page comes over another link."""
    async with bench() as b:
        for cpu in b.vcpus:
            cpu.go()
        await until(lambda: b.waiting() == [1, 1, 0])
        await b.hold(HALF // 5)
        b.service.mute(None)
        await b.hold()
        paused = b.found()
        assert min(one.blocked_ns for one in paused.vcpus) > HALF + HALF // 5
        b.service.set_return_path(b.ours.fileno())
        b.service.resume(b"")
        await b.release()
        found = b.found()
        assert found.all_vcpus_ns > HALF + HALF // 5
        for one, cpu in zip(found.vcpus, b.vcpus, strict=True):
            beside(one.blocked_ns, cpu.numbers().stalled_ns)
            beside(one.waits.longest_ns, cpu.numbers().stalls.longest_ns)
        agree(b, found)


async def test_a_thread_that_signals_interrupt_is_blocked_once() -> None:
    tgkill = ctypes.CDLL(None, use_errno=True).tgkill
    before = signal.signal(signal.SIGUSR1, lambda number, frame: None)
    try:
        async with bench() as b:
            b.vcpus[0].go()
            await until(lambda: b.waiting() == [1, 0, 0])
            for _ in range(50):
                faults = b.service.own.numbers().faults
                assert tgkill(os.getpid(), b.vcpus[0].thread, signal.SIGUSR1) == 0
                await until(lambda n=faults: b.service.own.numbers().faults > n)  # type: ignore[misc]
            assert b.waiting() == [1, 0, 0]
            await b.hold(HALF // 5)
            await b.release()
            found, own = b.found(), b.service.own.numbers()
            assert own.repeated >= 50
            assert found.vcpus[0].waits.count == own.waits.count
            beside(found.vcpus[0].blocked_ns, b.vcpus[0].numbers().stalled_ns)
            agree(b, found)
    finally:
        signal.signal(signal.SIGUSR1, before)


async def test_what_is_open_at_the_end_has_lasted_until_then() -> None:
    """Nothing is counted any more once the service is closed, or its memory is given up."""
    async with bench() as b:
        b.vcpus[0].go()
        b.backend.go()
        await until(lambda: b.waiting() == [1, 0, 1])
        b.service.give_up()
        await until(lambda: not b.vcpus[0].running)
        given_up = b.found()
        assert given_up.vcpus[0].waiting_now == 0
        assert given_up.vcpus[0].waits.count == 0
        assert given_up.vcpus[0].blocked_ns > 0
        await b.hold(HALF // 10)
        assert b.found() == given_up
        waiting = b.client.numbers()
        assert waiting.blocked_ns > HALF // 10
        b.release_backend()
        b.service.close()
        assert b.service.blocktime() == given_up


async def test_a_thread_that_is_a_vcpu_for_a_time() -> None:
    """An id that another thread gets, when its vCPU has none any more, is not taken for that vCPU's."""
    async with bench() as b:
        first, second = (cpu.thread for cpu in b.vcpus)
        b.service.set_vcpus([0, second])
        for cpu in b.vcpus:
            cpu.go()
        await until(lambda: b.waiting() == [0, 1, 0])
        await until(lambda: b.found().others.waiting_now == 1)
        await b.hold(HALF // 10)
        found = b.found()
        assert found.vcpus[0] == NOBODY
        assert found.all_vcpus_ns > HALF // 10  # the one that is left is all
        b.service.set_vcpus([first, second])  # what has begun keeps its name
        assert b.waiting() == [0, 1, 0]
        standing = b.found().all_vcpus_ns
        await b.hold(HALF // 10)
        assert b.found().all_vcpus_ns == standing
        await b.release()
        found = b.found()
        assert found.others.waits.count == 1
        assert found.vcpus[0].waits.count > 0
        for wrong in ([first], [first, second, 1]):
            with pytest.raises(ValueError, match="there are 2 vCPUs"):
                b.service.set_vcpus(wrong)


async def test_two_vcpus_cannot_be_one_thread() -> None:
    async with bench() as b:
        b.service.set_vcpus([b.vcpus[0].thread] * 2)
        b.vcpus[0].go()
        await until(lambda: b.waiting() == [1, 0, 0])
        await b.hold(HALF // 10)
        assert b.found().all_vcpus_ns > HALF // 10
        await b.release()
        assert b.found().vcpus[1] == NOBODY


async def test_faults_that_do_not_name_their_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is said of vCPUs; the client as a whole is known."""
    real = Userfaultfd.open
    monkeypatch.setattr(Userfaultfd, "open", classmethod(lambda cls, **more: real()))
    async with bench() as b:
        for cpu in b.vcpus:
            cpu.go()
        await until(lambda: b.service.own.numbers().waiting_now > 0)
        await b.hold(HALF // 10)
        assert b.service.blocktime() is None
        assert b.service.own.numbers().blocked_ns > HALF // 10
        b.source.withhold_all(False)
        b.source.set_rate(UNLIMITED)
        await until(lambda: b.service.missing() == 0)
        assert b.service.blocktime() is None


async def test_vcpus_that_nobody_named() -> None:
    async with bench(known=False) as b:
        assert b.service.blocktime() is None
        b.vcpus[0].go()
        await until(lambda: b.service.own.numbers().waiting_now == 1)
        b.service.set_vcpus([cpu.thread for cpu in b.vcpus])
        assert b.waiting() == [1, 0, 0]  # also what has begun before
        await b.release()


def touch(ram: RamSet, page: int, go: threading.Event) -> None:
    go.wait()
    lib.vpc_ram_read(ram.handle, 0, page * TARGET_PAGE, ffi.new("char[1]"), 1)


async def test_hundreds_of_vcpus() -> None:
    """Each has its own row, whatever their number; and all of them are only blocked when the last one is."""
    count = 300
    with trio.fail_after(60), RamSet() as ram, FaultService(ram, trace=10_000) as service:
        ram.create("ram", count * TARGET_PAGE)
        goes = [threading.Event() for _ in range(count)]
        threads = [threading.Thread(target=touch, args=(ram, page, go)) for page, go in enumerate(goes)]
        for thread in threads:
            thread.start()
        ids = [thread.native_id or 0 for thread in threads]
        service.set_vcpus(ids)
        service.arm()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(service.run)
            for go in goes[1:]:
                go.set()
            await until(lambda: service.own.numbers().waiting_now == count - 1)
            found = service.blocktime()
            assert found is not None
            assert found.all_vcpus_ns == 0
            assert [one.waiting_now for one in found.vcpus] == [0] + [1] * (count - 1)
            goes[0].set()
            await until(lambda: service.own.numbers().waiting_now == count)
            service.settle()
            await until(lambda: not any(thread.is_alive() for thread in threads))
            nursery.cancel_scope.cancel()
        found = service.blocktime()
        assert found is not None
        counts = [one.waits.count for one in found.vcpus]  # woken, some go back to a hole, for zeros
        assert min(counts) >= 1
        assert sum(counts) == service.own.numbers().waits.count
        assert 0 < found.all_vcpus_ns <= min(one.blocked_ns for one in found.vcpus)
        _, rows = service.traced(most=10_000)
        assert {row.thread: row.page for row in rows} == {ids[page]: page for page in range(count)}
        with pytest.raises(ValueError, match="there are 300 vCPUs"):
            service.set_vcpus([0] * 299)


async def test_a_machine_has_so_many_at_most() -> None:
    with RamSet() as ram, FaultService(ram) as service:
        ram.create("ram", TARGET_PAGE)
        service.set_vcpus([0] * 65537)
        with pytest.raises(OSError, match="vCPUs"):
            service.arm()
        assert not service.armed
