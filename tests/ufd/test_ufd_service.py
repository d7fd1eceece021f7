"""The fault service: each page is placed once, every waiter is woken, the content is exact."""

from __future__ import annotations

import errno
import json
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import pytest
import trio
import trio.testing

from tests.kit.until import unread_faults, until
from vhostpc._native import lib
from vhostpc.errors import ChannelLost, MemoryLost
from vhostpc.pages.faultclient import Client, ClientRange
from vhostpc.pages.pagesource import UNLIMITED, PageSource
from vhostpc.pages.ramblock import Bits, RamSet
from vhostpc.pages.service import FaultService
from vhostpc.ufd import Userfaultfd
from vhostpc.units import TARGET_PAGE

SEED = 7
HUGE = 2 << 20
pytestmark = pytest.mark.ufd


@dataclass
class Machine:
    """Two sets of the same blocks (source: filled; destination: holes) joined by a socket pair."""

    source_ram: RamSet
    ram: RamSet
    source: PageSource
    service: FaultService
    sock: socket.socket
    peer: socket.socket


@dataclass
class Child:
    """A process that touches; ``sock`` takes b"go" and gives its result."""

    client: Client
    sock: socket.socket
    ranges: list[ClientRange]


@asynccontextmanager
async def machine(
    blocks: dict[str, tuple[int, int]], *, rate: int = 0, arm: bool = True
) -> AsyncIterator[Machine]:
    ours, theirs = socket.socketpair()
    with ours, theirs, RamSet() as source_ram, RamSet() as ram:
        for name, (length, page_size) in blocks.items():
            block = source_ram.create(name, length, page_size)
            await block.fill(SEED)
            block.set_bits(Bits.DIRTY)
            ram.create(name, length, page_size)
        with (
            PageSource(source_ram, theirs.fileno(), background_rate=rate) as source,
            FaultService(ram) as service,
        ):
            if arm:
                service.arm()
            service.set_return_path(ours.fileno())
            async with trio.open_nursery() as nursery:
                nursery.start_soon(service.run)
                nursery.start_soon(source.serve)
                yield Machine(source_ram, ram, source, service, ours, theirs)
                nursery.cancel_scope.cancel()


@asynccontextmanager
async def toucher(
    m: Machine, name: str, orders: list[int], *, know_ranges: bool = True
) -> AsyncIterator[Child]:
    """A child that registered its mappings; write b"go" to let it touch."""
    ours, theirs = socket.socketpair()
    with ours:
        command = [sys.executable, "-m", "tests.kit.ram_client", str(theirs.fileno())]
        child = subprocess.Popen(  # noqa: ASYNC220  not waited for
            command, pass_fds=[theirs.fileno()], stderr=subprocess.PIPE
        )
        theirs.close()
        try:
            spec = {
                "seed": SEED,
                "orders": orders,
                "blocks": [
                    {"name": b.name, "length": b.length, "page_size": b.page_size} for b in m.ram.blocks
                ],
            }
            socket.send_fds(ours, [json.dumps(spec).encode()], [b.fd for b in m.ram.blocks])
            await trio.lowlevel.wait_readable(ours)
            data, fds, _, _ = socket.recv_fds(ours, 4096, 4)
            if not data:
                child.kill()
                raise AssertionError(child.communicate()[1].decode())
            with Userfaultfd.from_fd(fds[0]) as ufd:
                client = m.service.add_client(ufd, name)
            ranges = [
                ClientRange(base, block.length, block, 0)
                for base, block in zip(json.loads(data), m.ram.blocks, strict=True)
            ]
            if know_ranges:
                client.set_ranges(ranges)
            yield Child(client, ours, ranges)
        finally:
            child.kill()
            child.communicate()


async def result_of(sock: socket.socket) -> dict[str, int]:
    await trio.lowlevel.wait_readable(sock)
    data = sock.recv(4096)
    assert data, "the touching process died"
    result: dict[str, int] = json.loads(data)
    return result


async def place_once_wake_all(blocks: dict[str, tuple[int, int]], rate: int) -> None:
    pages = sum(length // page_size for length, page_size in blocks.values())
    with trio.fail_after(120):
        async with machine(blocks, rate=rate) as m:
            async with toucher(m, "one", [1, 2, 3]) as one, toucher(m, "two", [4, 5]) as two:
                for child in (one, two):
                    child.sock.send(b"go")
                bad = []
                numbers = []

                async def load() -> None:
                    numbers.append(await m.service.load(m.sock.fileno()))

                async def touch_ourselves() -> None:
                    order = [(b, page) for b in m.ram.blocks for page in range(b.pages)]
                    random.Random(6).shuffle(order)
                    for block, page in order:
                        step = block.page_size // TARGET_PAGE
                        bad.append((await block.verify(SEED, page * step, step))[0])

                async with trio.open_nursery() as nursery:
                    nursery.start_soon(load)
                    nursery.start_soon(touch_ourselves)
                    results = [await result_of(child.sock) for child in (one, two)]
                assert [r["bad"] for r in results] == [0, 0]
                assert sum(bad) == 0
                assert numbers[0].placed == pages
                assert numbers[0].already == 0
                assert m.source.numbers().dirty_left == 0
                total = m.service.numbers()
                assert total.requests <= pages
                assert total.waiting_now == 0
                clients = [c.numbers() for c in (one.client, two.client, m.service.own)]
                assert all(c.found_nothing == 0 and c.error == 0 for c in clients)
                assert all(c.wakes == c.waits.count == c.faults - c.repeated for c in clients)
                if rate == 0:
                    assert total.requests == pages
                    # A client that comes late may find everything there; together they met every page.
                    assert all(c.distinct <= pages for c in clients)
                    assert sum(c.distinct for c in clients) >= pages
                    for waits in (c.waits for c in clients if c.faults):
                        assert 0 < waits.p50_ns <= waits.p99_ns <= waits.longest_ns
            for block, original in zip(m.ram.blocks, m.source_ram.blocks, strict=True):
                assert block.holes() == []
                for offset in range(0, block.length, HUGE):
                    size = min(HUGE, block.length - offset)
                    assert os.pread(block.fd, size, offset) == os.pread(original.fd, size, offset)


@pytest.mark.parametrize("rate", [0, 20 << 20, UNLIMITED])
async def test_each_page_once_every_waiter_woken(rate: int) -> None:
    await place_once_wake_all({"ram0": (200 * 4096, 4096), "rom": (17 * 4096, 4096)}, rate)


@pytest.mark.parametrize("rate", [0, UNLIMITED])
async def test_huge_pages(rate: int, huge_pages: int) -> None:
    await place_once_wake_all({"big": (6 * huge_pages, huge_pages), "small": (64 * 4096, 4096)}, rate)


async def test_faults_before_the_ranges_are_known() -> None:
    """The client's ufd is read from ADVISE on; where its addresses lie is known later."""
    with trio.fail_after(30):
        async with machine({"ram0": (4 * 4096, 4096)}, rate=UNLIMITED) as m:
            async with toucher(m, "early", [1], know_ranges=False) as child:
                child.sock.send(b"go")
                await until(lambda: child.client.numbers().found_nothing)
                waiter = m.service.waiting()[0]
                assert waiter.block is None
                assert waiter.address == child.client.numbers().last_unknown
                await m.service.load(m.sock.fileno())
                child.client.set_ranges(child.ranges)
                assert (await result_of(child.sock))["bad"] == 0
                assert m.service.waiting() == []


@pytest.mark.parametrize("stopped", [False, True], ids=["", "stopped"])
async def test_a_fault_that_is_read_after_its_page_came(stopped: bool) -> None:
    """It finds the mark: no wake is lost, and nothing is asked for; also when the loop was told to stop before."""
    with trio.fail_after(30), RamSet() as ram, RamSet() as original, FaultService(ram) as service:
        source, block = (r.create("ram0", 16 * TARGET_PAGE) for r in (original, ram))
        await source.fill(SEED)
        source.set_bits(Bits.DIRTY)
        ours, theirs = socket.socketpair()
        service.arm()
        good: list[tuple[int, int | None]] = []

        async def touch(page: int) -> None:
            good.append(await block.verify(SEED, page, 1))

        with ours, theirs, PageSource(original, theirs.fileno(), background_rate=UNLIMITED) as pages:
            async with trio.open_nursery() as touching:
                for page in (3, 3, 7):
                    touching.start_soon(touch, page)
                await until(lambda: unread_faults(service.place_fd()) == 3)
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(pages.serve)
                    await service.load(ours.fileno())
                    nursery.cancel_scope.cancel()
                assert unread_faults(service.place_fd()) == 3
                try:
                    if stopped:
                        lib.vpc_fault_stop(service.handle)  # before the loop has looked once
                        await service.run()
                    else:
                        async with trio.open_nursery() as nursery:
                            nursery.start_soon(service.run)
                            await until(lambda: len(good) == 3)
                            nursery.cancel_scope.cancel()
                    await until(lambda: len(good) == 3)
                except BaseException:
                    service.disarm()  # nobody else would let them go
                    raise
        assert good == [(0, None)] * 3
        assert not ram.lost
        assert service.numbers().requests == 0
        numbers = service.own.numbers()
        assert (numbers.received_already, numbers.wakes, numbers.waiting_now) == (3, 3, 0)


async def test_a_page_that_is_there_is_never_overwritten() -> None:
    """One that came before, and is newer here. (One that did not come is an error: ``test_ufd_born``.)"""
    with trio.fail_after(30):
        async with machine({"ram0": (130 * 4096, 4096)}, rate=UNLIMITED) as m:
            os.pwrite(m.ram["ram0"].fd, b"newer" * 100, 64 * 4096)
            m.ram["ram0"].set_bits(Bits.RECEIVED, 64, 1)
            numbers = await m.service.load(m.sock.fileno())
            assert (numbers.placed, numbers.already) == (129, 1)
            assert os.pread(m.ram["ram0"].fd, 500, 64 * 4096) == b"newer" * 100
            assert (await m.ram["ram0"].verify(SEED)) == (1, 64)


async def test_who_waits_is_told_and_a_removed_client_is_forgotten() -> None:
    with trio.fail_after(30):
        async with machine({"ram0": (8 * 4096, 4096)}) as m:
            m.source.withhold_all()
            async with toucher(m, "first", [1, 2]) as first, toucher(m, "second", [3]) as second:
                before = time.monotonic_ns()
                first.sock.send(b"go")
                second.sock.send(b"go")
                both = {first.client.number, second.client.number}
                await until(lambda: {w.client for w in m.service.waiting()} == both)
                waiters = m.service.waiting()
                assert all(w.block == "ram0" and w.page < 8 and w.since_ns > before for w in waiters)
                assert m.service.numbers().waiting_now == len(waiters)
                second.client.remove()
                assert {w.client for w in m.service.waiting()} == {first.client.number}
                m.source.withhold_all(False)
                m.source.set_rate(UNLIMITED)
                await m.service.load(m.sock.fileno())
                assert (await result_of(first.sock))["bad"] == 0
                assert second.client.numbers().faults >= 1  # still readable


async def test_clients_come_and_go_while_the_loop_runs() -> None:
    with trio.fail_after(60):
        async with machine({"ram0": (8 * 4096, 4096)}, rate=UNLIMITED) as m:
            await m.service.load(m.sock.fileno())
            fds_before = len(os.listdir("/proc/self/fd"))
            for _ in range(200):
                with Userfaultfd.open() as ufd:
                    client = m.service.add_client(ufd, "visitor")
                client.set_ranges([ClientRange(0x1000, 4096, m.ram["ram0"], 0)])
                client.remove()
            assert len(os.listdir("/proc/self/fd")) == fds_before


async def test_what_is_no_ufd_is_not_read() -> None:
    with trio.fail_after(30):
        async with machine({"ram0": (8 * 4096, 4096)}) as m:
            ours, theirs = socket.socketpair()
            with ours:
                client = m.service.add_client(ours.fileno(), "a socket")
            theirs.close()
            await until(lambda: client.numbers().error)


async def test_a_client_that_makes_its_ufd_blocking() -> None:
    """While the loop runs. A read of it could wait, with the lock held: it is given up, and all others are served."""
    with trio.fail_after(30), RamSet() as ram, RamSet() as original, RamSet() as theirs:
        source, block = (r.create("ram0", 16 * TARGET_PAGE) for r in (original, ram))
        await source.fill(SEED)
        source.set_bits(Bits.DIRTY)
        mapped = theirs.add("ram0", block.fd, block.length)
        ours, far = socket.socketpair()
        with ours, far, FaultService(ram) as service, PageSource(original, far.fileno()) as pages:
            service.arm()
            service.set_return_path(ours.fileno())
            with Userfaultfd.open() as ufd:
                ufd.register(mapped.base, mapped.length)
                client = service.add_client(ufd, "net0")
                client.set_ranges([ClientRange(mapped.base, mapped.length, block, 0)])
                async with trio.open_nursery() as touching, trio.open_nursery() as nursery:
                    nursery.start_soon(service.run)
                    nursery.start_soon(pages.serve)
                    nursery.start_soon(service.load, ours.fileno())
                    assert await block.verify(SEED, 7, 1) == (0, None)  # it runs
                    os.set_blocking(ufd.fileno(), True)
                    touching.start_soon(mapped.read, 3 * TARGET_PAGE, 1)
                    try:
                        await until(lambda: client.numbers().error == errno.EINVAL)
                        assert await block.verify(SEED, 5, 1) == (0, None)
                        assert client.numbers().faults == 0
                    finally:
                        ufd.unregister(mapped.base, mapped.length)
                    nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    ("base", "length", "offset"),
    [(1, 4096, 0), (0x1000, 0, 0), (0x1000, 100, 0), (0x1000, 4096, 8 * 4096), (0x1000, 9 * 4096, 0)],
)
async def test_broken_ranges(base: int, length: int, offset: int) -> None:
    async with machine({"ram0": (8 * 4096, 4096)}, arm=False) as m:
        with Userfaultfd.open() as ufd:
            client = m.service.add_client(ufd, "x")
        with pytest.raises(OSError):
            client.set_ranges([ClientRange(base, length, m.ram["ram0"], offset)])
        two = [ClientRange(0x1000, 8192, m.ram["ram0"], 0), ClientRange(0x2000, 4096, m.ram["ram0"], 0)]
        with pytest.raises(OSError):
            client.set_ranges(two)


async def test_the_source_is_lost() -> None:
    """The loader says so; waiting threads go on waiting, and another source can bring the rest."""
    with trio.fail_after(30):
        async with machine({"ram0": (32 * 4096, 4096)}) as m:
            m.source.withhold("ram0", 5, 3)
            async with toucher(m, "waiting", [1]) as child:
                child.sock.send(b"go")
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(lose, m)
                    with pytest.raises(ChannelLost, match="3[0-2]? host pages|host pages are missing"):
                        await m.service.load(m.sock.fileno())
                missing = m.service.missing()
                assert missing >= 3
                assert sum(n for _, n in m.ram["ram0"].holes()) == missing * 4096
                ours, theirs = socket.socketpair()
                m.source_ram["ram0"].set_bits(Bits.DIRTY)
                with ours, theirs, PageSource(m.source_ram, theirs.fileno()) as again:
                    again.release("ram0")
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(again.serve)
                        # What the first source owed is asked for again, and the rest when it is met.
                        m.service.set_return_path(ours.fileno())
                        nursery.start_soon(background_when_done, child, again)
                        numbers = await m.service.load(ours.fileno())
                        nursery.cancel_scope.cancel()
                assert numbers.placed == missing


async def background_when_done(child: Child, source: PageSource) -> None:
    """When the child has met all its pages, on demand alone, let what nobody met come too."""
    assert (await result_of(child.sock))["bad"] == 0
    source.set_rate(UNLIMITED)


async def lose(m: Machine) -> None:
    while m.source.numbers().withheld == 0:
        await m.source.changed()
    m.peer.shutdown(socket.SHUT_RDWR)


async def test_cancelling_ends_the_loop() -> None:
    with trio.fail_after(30), RamSet() as ram:
        ram.create("ram0", 4096)
        with FaultService(ram) as service:
            for _ in range(3):
                with trio.move_on_after(0.02) as scope:
                    await service.run()
                assert scope.cancelled_caught


async def ready_pages(page_size: int, pages: int) -> None:
    with trio.fail_after(60):
        async with machine({"ready": (pages * page_size, page_size)}) as m:
            block = m.ram["ready"]
            m.service.answer_from(block, m.source_ram["ready"].fd)
            async with toucher(m, "one", [1, 2, 3]) as one, toucher(m, "two", [4, 5]) as two:
                for child in (one, two):
                    child.sock.send(b"go")
                for child in (one, two):
                    assert await result_of(child.sock) == {"bad": 0}
            assert await block.verify(SEED) == (0, None)
            assert m.service.missing() == 0
            assert m.service.numbers().requests == 0
            assert m.service.numbers().waiting_now == 0


async def test_pages_that_lie_ready_are_placed_without_asking() -> None:
    await ready_pages(TARGET_PAGE, 200)


async def test_huge_pages_that_lie_ready_are_placed_without_asking(huge_pages: int) -> None:
    await ready_pages(huge_pages, 4)


async def test_a_file_that_is_shorter_than_the_block_is_refused() -> None:
    async with machine({"long": (4 * TARGET_PAGE, TARGET_PAGE)}) as m:
        fd = m.source_ram["long"].fd
        with pytest.raises(OSError, match="pages of long"):
            m.service.answer_from(m.ram["long"], fd, TARGET_PAGE)


@pytest.mark.parametrize("how", ["cancel", "close", "say"])
async def test_giving_up_makes_no_page(how: str) -> None:
    """Our own touch waits for a page that will never come: it ends, and the file keeps its holes."""
    with trio.fail_after(30), RamSet() as ram:
        block = ram.create("ram0", 16 * 4096)
        fd = os.dup(block.fd)
        os.pwrite(fd, b"came" * 1024, 0)
        block.set_bits(Bits.RECEIVED, 0, 1)
        holes = block.holes()
        lost = []

        async def touch(page: int) -> None:
            with pytest.raises(MemoryLost):
                await block.read(page * 4096, 4096)
            lost.append(page)

        service = FaultService(ram)
        service.arm()
        async with trio.open_nursery() as nursery:
            loop = trio.CancelScope()

            ended = trio.Event()

            async def run() -> None:
                with loop:
                    await service.run()
                ended.set()

            nursery.start_soon(run)
            for page in (1, 5, 15):
                nursery.start_soon(touch, page)
            await until(lambda: len(service.waiting()) == 3)
            if how == "say":
                service.give_up()
            loop.cancel()
            if how == "close":
                # Not sooner: a task whose C call has yet to return counts as blocked, too.
                await ended.wait()
                service.close()
        service.close()
        assert sorted(lost) == [1, 5, 15]
        assert ram.lost
        assert block.holes() == holes
        with pytest.raises(MemoryLost):
            await block.verify(1)
        assert block.holes() == holes
        os.close(fd)


@pytest.mark.parametrize("how", ["maps", "data", "space", "never"])
def test_giving_up_where_no_mapping_can_be_made(how: str) -> None:
    """Neither the process nor a page of the file pays for it: who cannot be let go waits on."""
    command = [sys.executable, "-m", "tests.kit.give_up_child", how]
    child = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert child.returncode == 0, child.stderr
    said = json.loads(child.stdout)
    assert all(said.values()), said
    assert said.keys() >= {"lost", "no page was made"}
    log = "memory that is given up cannot be replaced (Cannot allocate memory)"
    assert child.stderr.count(log) == (how in ("space", "never"))


async def test_nothing_is_given_up_when_all_has_come() -> None:
    with trio.fail_after(30):
        async with machine({"ram0": (16 * 4096, 4096)}, rate=UNLIMITED) as m:
            await m.service.load(m.sock.fileno())
            m.service.give_up()
            m.service.disarm()
            assert await m.ram["ram0"].verify(SEED) == (0, None)
            assert not m.ram.lost


async def test_closing_ends_the_loops() -> None:
    """As in the class's own example: the service is closed inside the nursery that runs its loop."""
    with RamSet() as ram:
        ram.create("pc.ram", 4 * TARGET_PAGE)
        ours, theirs = socket.socketpair()
        ended = []
        with ours, theirs, trio.fail_after(10):
            async with trio.open_nursery() as nursery:

                async def run(service: FaultService) -> None:
                    await service.run()
                    ended.append("run")

                async def load(service: FaultService) -> None:
                    with pytest.raises(ChannelLost):
                        await service.load(ours.fileno())
                    ended.append("load")

                with FaultService(ram) as service:
                    nursery.start_soon(run, service)
                    nursery.start_soon(load, service)
                    await trio.testing.wait_all_tasks_blocked()
        assert sorted(ended) == ["load", "run"]
        with pytest.raises(ValueError, match="closed"):
            service.numbers()


async def test_a_return_path_may_be_a_pipe() -> None:
    """A command's stdin, say: what it does not take at once goes when it does."""
    there, here = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    message = b"\0\2\0\4\0\0\0\7"
    count = 20_000  # more than a pipe holds
    try:
        with trio.fail_after(30), RamSet() as ram, FaultService(ram) as service:
            service.set_return_path(here)
            for _ in range(count):
                service.send(message)
            assert service.numbers().outbox_bytes > 0
            async with trio.open_nursery() as nursery:
                nursery.start_soon(service.run)
                got = b""
                while len(got) < count * len(message):
                    await trio.lowlevel.wait_readable(there)
                    got += os.read(there, 1 << 16)
                nursery.cancel_scope.cancel()
            assert got == message * count
            assert service.numbers().send_errno == 0
    finally:
        os.close(there)
        os.close(here)
