"""What a device still holds of a session that has ended: it raises, and reads and writes nothing."""

from __future__ import annotations

import inspect
import threading
import weakref
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from typing import Any

import pytest
import trio
import trio.testing

from tests.kit.absent_guest import AbsentGuest, prepare
from tests.kit.raw_front_end import GUEST_BASE, NEXT, WRITE, Guest, RawFrontEnd, connected
from tests.kit.until import until
from vhostpc._native import ffi, lib
from vhostpc.backend import Chain, Device, FrontEnd, Queue
from vhostpc.errors import MemoryLost, QueueEnded
from vhostpc.virtio.ring import Ring
from vhostpc.virtio.work import Work
from vhostpc.wire import vhost_user as vu
from vhostpc.wire.vhost_user import Request

TEXT = b"%02d: what the driver wrote"


@pytest.fixture
def guest() -> Iterator[Guest]:
    guest = Guest()
    guest.ring(0, 16)
    yield guest
    guest.close()


def offer(guest: Guest, count: int) -> None:
    """Chains of a readable and a writable descriptor."""
    ring = guest.rings[0]
    for i in range(count):
        text = TEXT % i
        ring.set_desc(2 * i, guest.put(0x80000 + 64 * i, text), len(text), NEXT, 2 * i + 1)
        ring.set_desc(2 * i + 1, GUEST_BASE + 0x90000 + 64 * i, 64, WRITE)
    ring.offer(*range(0, 2 * count, 2))


async def start(guest: Guest, front: RawFrontEnd) -> None:
    await front.negotiate()
    await guest.send_memory(front)
    await guest.rings[0].send_setup(front)


def public(kind: type) -> list[str]:
    return [name for name in dir(kind) if not name.startswith("_")]


USES: dict[str, tuple[Any, ...]] = {
    "write": (b"x",),
    "loaded": (ffi.new("struct vpc_popped *"),),
    "peek": (1,),
    "seek": (0,),
    "read_at": (0, 1),
    "write_at": (0, b"x"),
}


def first_step(method: Callable[..., Any], *arguments: Any) -> None:
    """What a method does before it waits for anything."""
    begun = method(*arguments)
    if inspect.iscoroutine(begun):
        begun.send(None)


def check_chain(chain: Chain, methods: dict[str, Callable[..., Any]]) -> None:
    """All of it raises, also methods that were looked up while it lived."""
    for name in set(public(Chain)) - {"completed", "end", "take"}:
        with pytest.raises(QueueEnded, match="ended|given back"):
            getattr(chain, name)
    for name, method in methods.items():
        if name not in (
            "end",
            "take",
            "answer",
            "loaded",
            "complete",
        ):  # the queue's own, and one that may come twice
            with pytest.raises((QueueEnded, ValueError)):
                first_step(method, *USES.get(name, ()))
    if methods and not chain.completed:
        with pytest.raises(QueueEnded):
            methods["complete"]()


def methods_of(chain: Chain) -> dict[str, Callable[..., Any]]:
    return {name: getattr(chain, name) for name in public(Chain) if callable(getattr(Chain, name))}


QUEUE_CALLS: dict[str, Callable[[Queue], Any]] = {
    "iterate": lambda queue: anext(aiter(queue)),
    "unordered": lambda queue: anext(queue.unordered()),
    "batches": lambda queue: anext(queue.batches()),
    "pump_out": lambda queue: queue.pump_out(0),
    "pump_in": lambda queue: queue.pump_in(0),
}
WORK_CALLS: dict[str, Callable[[Work], Any]] = {
    "next_chain": lambda work: work.next_chain(),
    "next_batch": lambda work: work.next_batch(),
    "run_pump": lambda work: work.run_pump(False, 0, None, 0, False, False, 1),
    "settle": lambda work: work.settle(),
    "finish": lambda work: work.finish(),
    "start": lambda work: work.start(-1),
    "set_memory": lambda work: work.set_memory(None),
}
RING_CALLS: dict[str, Callable[[Ring], Any]] = {
    "handle": lambda ring: ring.handle,
    "must_live": lambda ring: ring.must_live(),
    "until_resumed": lambda ring: ring.until_resumed(),
    "touch": lambda ring: ring.touch(lambda flags: lib.vpc_vq_enable_notify(ring.handle, flags)),
    "pause": lambda ring: ring.pause(),
    "start": lambda ring: ring.start(-1),
    "end": lambda ring: ring.end(),
    "base": lambda ring: ring.base,
    "error": lambda ring: ring.error,
    "set_memory": lambda ring: ring.set_memory(None),
    "set_addresses": lambda ring: ring.set_addresses(16, 0, 0, 0),
    "set_features": lambda ring: ring.set_features(0),
    "set_log": lambda ring: ring.set_log(None, False, 0),
    "set_base": lambda ring: ring.set_base(0),
    "set_inflight": lambda ring: ring.set_inflight(None),
    "set_call": lambda ring: ring.set_call(-1),
    "signal": lambda ring: ring.signal(),
}
#: They reach nothing of C's.
HARMLESS: dict[type, set[str]] = {
    Queue: {"index", "size", "features", "inflight", "in_order", "stopping", "closed", "pump_stats"},
    Work: {"close", "pump_stats", "has_come", "may_be_pushed", "forget_frames"},
    Ring: {
        *(
            "ahead",
            "close",
            "closed",
            "kick",
            "set_kick",
            "kick_told",
            "wait_for_kick",
            "look_again",
            "resume",
        ),
        *("begin_use", "end_use", "in_use", "call_in_flight", "leave", "set_interrupt"),
    },
}


@pytest.mark.parametrize(
    ("kind", "calls"), [(Queue, QUEUE_CALLS), (Work, WORK_CALLS), (Ring, RING_CALLS)], ids=lambda p: ""
)
def test_every_method_of_a_queue_is_tried(kind: type, calls: dict[str, Any]) -> None:
    assert set(public(kind)) == (set(calls) - {"iterate"}) | HARMLESS[kind]


async def use(found: object) -> None:
    if isinstance(found, Awaitable):
        await found


async def check_queue(queue: Queue) -> None:
    work, ring = queue._work, queue._work.ring
    work.close()  # again: harmless
    ring.look_again()
    assert work.ledger.returnable
    tried = [partial(call, queue) for call in QUEUE_CALLS.values()]
    tried += [partial(call, work) for call in WORK_CALLS.values()]
    tried += [partial(call, ring) for call in RING_CALLS.values()]
    for call in tried:
        with pytest.raises(QueueEnded, match="has ended"):
            await use(call())


class Holder(Device):
    """Keeps all chains, and its queue."""

    def __init__(self, take: str = "one by one") -> None:
        self.take = take
        self.held: list[Chain] = []
        self.answered_last: list[Chain] = []
        self.methods: list[dict[str, Callable[..., Any]]] = []
        self.queue: Queue

    async def handle_queue(self, queue: Queue) -> None:
        self.queue = queue
        if self.take == "batches":
            async for batch in queue.batches():
                for chain in batch:
                    self.hold(chain)
        else:
            async for chain in queue if self.take == "one by one" else queue.unordered():
                self.hold(chain)

    async def handle_session(self, front_end: FrontEnd) -> None:
        try:
            await trio.sleep_forever()
        finally:
            for chain in self.answered_last:
                chain.complete()

    def hold(self, chain: Chain) -> None:
        chain.keep()
        self.held.append(chain)
        self.methods.append(methods_of(chain))


@pytest.mark.parametrize("take", ["one by one", "unordered", "batches"])
async def test_an_older_chain_is_kept_and_a_younger_answered(guest: Guest, take: str) -> None:
    """Such a one cannot be given back: it was freed with its queue, and read all the same."""
    device = Holder(take)
    async with connected(device) as front:
        await start(guest, front)
        offer(guest, 5)
        await until(lambda: len(device.held) == 5)
        assert [chain.read() for chain in device.held] == [TEXT % i for i in range(5)]
        device.held[1].complete()
        await guest.rings[0].until_used(1)
        device.held[2].write(b"answered, and not pushed any more")
        device.answered_last.append(device.held[2])
    for chain, methods in zip(device.held, device.methods, strict=True):
        if chain is not device.held[1]:
            check_chain(chain, methods)
    assert device.held[2].completed
    # That one was pushed while there was a session.
    assert device.held[1].completed
    with pytest.raises(ValueError, match="completed"):
        device.held[1].read()
    await check_queue(device.queue)


async def test_a_ring_that_stops_gives_back_what_is_held(guest: Guest) -> None:
    """The driver's again: it will come again, so what is done with it here is done twice."""
    device = Holder()
    async with connected(device) as front:
        await start(guest, front)
        offer(guest, 3)
        await until(lambda: len(device.held) == 3)
        device.held[0].complete()
        base = await front.ask(Request.GET_VRING_BASE, vu.VringState(0, 0).pack())
        assert vu.VringState.unpack(base.payload).num == 1
        for chain, methods in zip(device.held[1:], device.methods[1:], strict=True):
            check_chain(chain, methods)


class Elsewhere(Device):
    """Its work runs in a nursery of the program's, which outlives the session."""

    def __init__(self, nursery: trio.Nursery, work: Callable[[Queue], Awaitable[None]]) -> None:
        self.nursery = nursery
        self.work = work
        self.queue: Queue
        self.ended: BaseException | None = None

    async def handle_queue(self, queue: Queue) -> None:
        self.queue = queue
        self.nursery.start_soon(self.run, queue)
        await trio.sleep_forever()

    async def run(self, queue: Queue) -> None:
        try:
            await self.work(queue)
        except (QueueEnded, MemoryLost) as e:
            self.ended = e


async def iterate(queue: Queue) -> None:
    async for chain in queue:
        chain.write(chain.read()[:4])


async def pump(queue: Queue) -> None:
    with open("/dev/null", "wb", buffering=0) as null:  # noqa: ASYNC230
        await queue.pump_out(null.fileno())


@pytest.mark.parametrize("work", [iterate, pump])
async def test_a_task_that_works_the_queue_beyond_its_session(
    guest: Guest, work: Callable[[Queue], Awaitable[None]]
) -> None:
    async with trio.open_nursery() as nursery:
        device = Elsewhere(nursery, work)
        async with connected(device) as front:
            await start(guest, front)
            offer(guest, 3)
            await guest.rings[0].until_used(3)
        with trio.fail_after(10):
            while device.ended is None:
                await trio.testing.wait_all_tasks_blocked()
        await check_queue(device.queue)


@pytest.mark.ufd
@pytest.mark.parametrize("take", ["one by one", "unordered"])
async def test_a_page_is_waited_for_when_the_session_ends(take: str) -> None:
    """By a task of the program's; some of its chains have arrived, and others are still late."""

    async def work(queue: Queue) -> None:
        async for chain in queue if take == "one by one" else queue.unordered():
            chain.keep()

    guest = AbsentGuest()
    prepare(guest, 0, 4)
    try:
        async with trio.open_nursery() as nursery:
            device = Elsewhere(nursery, work)
            async with connected(device) as front:
                await front.negotiate()
                await guest.advise(front)
                assert await guest.listen(front) == 0
                await guest.share_table(front)
                await guest.rings[0].send_setup(front)
                waits = 0
                while waits != 0x40 + (2 if take == "unordered" else 0):  # a text; the next one's, late too
                    waits = await guest.next_fault()
                    if waits < 0x40:
                        guest.place(waits)
                late = device.queue._work.ledger.open
                assert len(late) == (4 if take == "unordered" else 0)
            await until(lambda: device.ended)
            for chain in late:
                check_chain(chain, {})
            await check_queue(device.queue)
    finally:
        guest.close()


async def test_nothing_is_freed_while_a_call_works_on_it(guest: Guest) -> None:
    """A pop on a thread: neither the queue, nor the memory, nor what it pops goes before it has returned."""
    entered, go = threading.Event(), threading.Event()

    async def work(queue: Queue) -> None:
        real = queue._work._pop

        def slow(flags: int) -> int:
            if flags & lib.VPC_TRY:
                return -11  # EAGAIN: a page is absent, borrow a thread
            entered.set()
            go.wait(20)
            return real(flags)

        queue._work._pop = slow  # type: ignore[method-assign]
        async for _ in queue:
            pass

    async with trio.open_nursery() as nursery:
        device = Elsewhere(nursery, work)
        async with connected(device) as front:
            await start(guest, front)
            await until(entered.is_set)
            raw = weakref.ref(device.queue._work.ring.handle)
        assert device.queue._work.ring._uses
        await check_queue(device.queue)
        go.set()
        await until(lambda: device.ended)
        assert isinstance(device.ended, QueueEnded)
        assert not device.queue._work.ring._uses
        assert raw() is None


async def test_what_a_call_pops_behind_the_end_is_freed(guest: Guest) -> None:
    """The call had begun before, and took chains: nobody gets them, and they are not forgotten."""
    popped, go = threading.Event(), threading.Event()
    chains: list[Chain] = []

    async def work(queue: Queue) -> None:
        real, note = queue._work._pop, queue._work._popped

        def slow(flags: int) -> int:
            if flags & lib.VPC_TRY:
                return -11
            count = real(flags)
            popped.set()
            go.wait(20)
            return count

        def noted(count: int) -> None:
            note(count)
            chains.extend(queue._work.ledger.open)

        queue._work._pop, queue._work._popped = slow, noted  # type: ignore[method-assign]
        async for _ in queue:
            raise AssertionError("a chain behind the end")

    async with trio.open_nursery() as nursery:
        device = Elsewhere(nursery, work)
        offer(guest, 3)
        async with connected(device) as front:
            await start(guest, front)
            await until(popped.is_set)
        go.set()
        await until(lambda: device.ended)
    assert len(chains) == 3
    for chain in chains:
        check_chain(chain, {})
        assert chain.take() == ffi.NULL
    assert not device.queue._work.ledger.open
