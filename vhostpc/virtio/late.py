"""Chains that each wait for their own pages, beside their ring's other work."""

from __future__ import annotations

import errno
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import trio

from vhostpc._native import check, ffi, lib
from vhostpc.errors import MemoryLost, QueueEnded
from vhostpc.memory.ahead import Ahead
from vhostpc.virtio.chain import Chain

#: Chains and pieces of one ring that wait at the same time on a thread each, where no page can be asked for ahead.
WAITING_CHAINS = 64
#: Chains of one ring that are taken before their pages are there; a large ring may hold many more.
MOST_LATE = 1024
#: Chains and bytes of private memory that one look takes at most (one chain is always taken).
LOOK_CHAINS = 64
LOOK_BYTES = 256 * 1024


class Spawn(Protocol):
    """Starts a task whose end the session waits for."""

    def __call__(self, task: Callable[..., Any], *args: Any) -> None: ...


class WaitingRing(Protocol):
    """The interface of a ring that its late chains use."""

    stopping: bool

    @property
    def handle(self) -> Any: ...
    @property
    def closed(self) -> bool: ...
    @property
    def ahead(self) -> Ahead: ...

    async def touch(
        self, call: Callable[[int], int], *, waiting_room: trio.CapacityLimiter | None = None
    ) -> int: ...
    def in_use(self) -> AbstractContextManager[None]: ...
    def look_again(self) -> None: ...


class Waited(Protocol):
    """Receives the chains that need not wait any longer."""

    def has_come(self, chain: Chain) -> None: ...
    def may_be_pushed(self, chain: Chain) -> None: ...


class _Places:
    """The chains that one look in C is about: an array of ``struct vpc_late``, which grows."""

    def __init__(self) -> None:
        self.chains: dict[int, Chain] = {}  # by place, the oldest first
        self._free: list[int] = []
        self.size = 0  # places used so far
        self.added = 0
        self.array = ffi.new("struct vpc_late[]", 64)
        self.done = ffi.new("uint32_t[]", LOOK_CHAINS)
        self.in_flight = ffi.new("uint32_t *")

    def add(self, chain: Chain, answer: bool) -> None:
        if not self._free:
            self._free.append(self.size)
            self.size += 1
            if self.size > len(self.array):
                larger = ffi.new("struct vpc_late[]", 2 * len(self.array))
                ffi.memmove(larger, self.array, ffi.sizeof(self.array))
                self.array = larger
        self.added += 1
        place = self._free.pop()
        at = self.array[place]
        at.chain, at.answer, at.skip, at.len = chain.handle, answer, chain.begun, chain.appended
        self.chains[place] = chain

    def remove(self, place: int) -> tuple[Chain, Any]:
        """The chain that was there, and its ``struct vpc_late``, which is valid until something is added."""
        at = self.array[place]
        at.chain = ffi.NULL
        self._free.append(place)
        return self.chains.pop(place), at


class Late:
    """The waiting chains of one ring: for their content, or for the pages of their answers.

    All their pages are asked for together (``memory/ahead.c``), and one task looks at all the chains whenever some have
    come. Where no page can be asked for ahead, each chain waits on a thread of its own.
    """

    def __init__(self, ring: WaitingRing, work: Waited, spawn: Spawn) -> None:
        self._ring = ring
        self._work = work
        self._spawn = spawn
        #: Threads for chains, and for pieces of them.
        self.room = trio.CapacityLimiter(WAITING_CHAINS)
        self._places: _Places | None = None  # since the first one
        self._looking: trio.CancelScope | None = None  # the scope of the task that looks at them
        self._count = 0
        self._none = trio.Event()

    @property
    def full(self) -> bool:
        """No more may be taken until one is done, which ``look_again`` reports."""
        return self._count >= MOST_LATE

    def await_chain(self, chain: Chain) -> None:
        """``has_come`` when its pages are here; it stays late if the ring stops first."""
        self._await(chain, answer=False)

    def await_buffers(self, chain: Chain) -> None:
        """``may_be_pushed`` when the pages of its answer are here, or when the ring stops."""
        self._await(chain, answer=True)

    def _await(self, chain: Chain, answer: bool) -> None:
        self._count += 1
        if self._places is None:
            self._places = _Places()
        self._places.add(chain, answer)
        if self._looking is None:
            self._looking = trio.CancelScope()
            self._spawn(self._look_at_all, self._places, self._looking)

    def buffers_are_here(self, chain: Chain) -> bool:
        ring = self._ring.handle
        return (
            lib.vpc_chain_touch(ring, chain.handle, chain.begun, chain.appended, lib.VPC_TRY) != -errno.EAGAIN
        )

    async def until_none(self) -> None:
        """The ring is stopping, or its device has ended: nobody waits any longer, except for a page on a thread."""
        while self._count:
            if self._looking is not None:
                self._looking.cancel()
            self._none = trio.Event()
            await self._none.wait()

    async def load(self, chain: Chain, flags: int = 0) -> int:
        """0 when the chain's pages are present; -ECANCELED when the queue was stopped; -EBADMSG: broken ring."""
        popped = ffi.new("struct vpc_popped *")
        with self._ring.in_use():
            rc = await self._ring.touch(
                lambda _: lib.vpc_chain_load(self._ring.handle, chain.handle, popped, flags),
                waiting_room=self.room,
            )
            if rc not in (-errno.ECANCELED, -errno.EBADMSG):
                check(rc, "chain")
                if not self._ring.closed:
                    chain.loaded(popped)
        return rc

    # --- together

    async def _look_at_all(self, places: _Places, scope: trio.CancelScope) -> None:
        try:
            with scope:
                while places.chains and not self._ring.stopping:
                    turn, added = self._ring.ahead.turn, places.added
                    rc = await self._look(places)
                    if rc == -errno.EBADMSG:
                        break  # the next pop meets a broken ring again
                    if rc == -errno.ECANCELED:
                        continue  # a pause
                    check(rc, "late chains")
                    if rc or not places.chains or added != places.added:
                        continue
                    if places.in_flight[0]:
                        await self._ring.ahead.after(turn)
                    else:
                        self._wait_on_a_thread(places)
        except (MemoryLost, QueueEnded):
            pass  # the ring's next call says so
        finally:
            self._looking = None
            for place in list(places.chains):
                self._come(*places.remove(place), whole=False)
            self._ring.look_again()

    async def _look(self, places: _Places) -> int:
        """Hand over the chains that have come, and return how many; or -errno."""

        def look(flags: int) -> int:
            return lib.vpc_late_look(
                self._ring.handle,
                places.array,
                places.size,
                places.done,
                LOOK_CHAINS,
                LOOK_BYTES,
                places.in_flight,
                flags,
            )

        with self._ring.in_use():
            rc = await self._ring.touch(look)
            for i in range(rc):
                self._come(*places.remove(places.done[i]), whole=True)
        if rc > 0:
            self._ring.look_again()
        return rc

    def _come(self, chain: Chain, at: Any, *, whole: bool) -> None:
        """It waits no longer. ``whole``: because its pages are here."""
        if at.answer:
            self._work.may_be_pushed(chain)
        elif whole and not self._ring.closed:
            chain.loaded(at.popped)
            self._work.has_come(chain)
        self._done()

    def _done(self) -> None:
        self._count -= 1
        if not self._count:
            self._none.set()

    # --- one by one

    def _wait_on_a_thread(self, places: _Places) -> None:
        """No page of any of them could be asked for: so the oldest waits for its own, on a thread."""
        chain, at = places.remove(next(iter(places.chains)))
        self._spawn(self._run, self._touch_buffers if at.answer else self._load, chain)

    async def _run(self, task: Callable[[Chain], Any], chain: Chain) -> None:
        try:
            await task(chain)
        except (MemoryLost, QueueEnded):
            pass  # the ring's next call says so
        finally:
            self._done()
            self._ring.look_again()

    async def _load(self, chain: Chain) -> None:
        while not self._ring.stopping:
            rc = await self.load(chain)
            if rc == 0:
                self._work.has_come(chain)
            if rc != -errno.ECANCELED:  # otherwise a pause; the next pop meets a broken ring again
                return

    async def _touch_buffers(self, chain: Chain) -> None:
        def touch(_: int) -> int:
            return lib.vpc_chain_touch(self._ring.handle, chain.handle, chain.begun, chain.appended, 0)

        try:
            while not self._ring.stopping and await self._ring.touch(touch, waiting_room=self.room) < 0:
                pass
        finally:
            self._work.may_be_pushed(chain)
