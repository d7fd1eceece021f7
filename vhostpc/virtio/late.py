"""Chains that each wait for their own pages, beside their ring's other work."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any, Protocol

import trio

from vhostpc._native import check, ffi, lib
from vhostpc.errors import MemoryLost, QueueEnded
from vhostpc.virtio.chain import Chain

#: Chains of one ring that wait at the same time, each on a thread.
WAITING_CHAINS = 64
#: Chains of one ring that are taken before their pages are there; a large ring may hold many more.
MOST_LATE = 1024


class Spawn(Protocol):
    """Starts a task whose end the session waits for."""

    def __call__(self, task: Callable[..., Any], *args: Any) -> None: ...


class WaitingRing(Protocol):
    """The interface of a ring that its late chains use."""

    stopping: bool

    @property
    def handle(self) -> Any: ...

    async def touch(
        self, call: Callable[[int], int], *, waiting_room: trio.CapacityLimiter | None = None
    ) -> int: ...
    def look_again(self) -> None: ...


class Waited(Protocol):
    """Receives the chains that need not wait any longer."""

    def has_come(self, chain: Chain) -> None: ...
    def may_be_pushed(self, chain: Chain) -> None: ...


class Late:
    """The waiting chains of one ring. Nothing here waits for a page except on a thread of the chain's own."""

    def __init__(self, ring: WaitingRing, work: Waited, spawn: Spawn) -> None:
        self._ring = ring
        self._work = work
        self._spawn = spawn
        #: Threads for chains, and for pieces of them.
        self.room = trio.CapacityLimiter(WAITING_CHAINS)
        self._count = 0
        self._none = trio.Event()

    @property
    def full(self) -> bool:
        """No more may be taken until one is done, which ``look_again`` reports."""
        return self._count >= MOST_LATE

    def await_chain(self, chain: Chain) -> None:
        """``has_come`` when its pages are here; it stays late if the ring stops first."""
        self._start(self._load, chain)

    def await_buffers(self, chain: Chain) -> None:
        """``may_be_pushed`` when the pages of its answer are here, or when the ring stops."""
        self._start(self._touch_buffers, chain)

    def buffers_are_here(self, chain: Chain) -> bool:
        ring = self._ring.handle
        return (
            lib.vpc_chain_touch(ring, chain.handle, chain.begun, chain.appended, lib.VPC_TRY) != -errno.EAGAIN
        )

    async def until_none(self) -> None:
        """Once the ring is stopping, each ends with the page that it waits for."""
        while self._count:
            self._none = trio.Event()
            await self._none.wait()

    async def load(self, chain: Chain, flags: int = 0) -> int:
        """0 when the chain's pages are present; -ECANCELED when the queue was stopped; -EBADMSG: broken ring."""
        popped = ffi.new("struct vpc_popped *")
        rc = await self._ring.touch(
            lambda _: lib.vpc_chain_load(self._ring.handle, chain.handle, popped, flags),
            waiting_room=self.room,
        )
        if rc not in (-errno.ECANCELED, -errno.EBADMSG):
            check(rc, "chain")
            chain.loaded(popped)
        return rc

    def _start(self, task: Callable[[Chain], Any], chain: Chain) -> None:
        self._count += 1
        self._spawn(self._run, task, chain)

    async def _run(self, task: Callable[[Chain], Any], chain: Chain) -> None:
        try:
            await task(chain)
        except (MemoryLost, QueueEnded):
            pass  # the ring's next call says so
        finally:
            self._count -= 1
            if not self._count:
                self._none.set()
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
