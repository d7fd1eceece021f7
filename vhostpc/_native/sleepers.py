"""Borrowed threads that may be asleep in guest memory, and how a session goes on without them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import trio

from vhostpc._native.entries import Thread
from vhostpc._native.threads import KeptThread, borrow
from vhostpc.errors import LeftAsleep


class Sleepers:
    """One session's calls that may wait for a page: each returns with the page, or when its memory is given up.

    Where memory cannot be given up, because nothing can be mapped in its place, a task that waits for them would wait
    for ever. Then :meth:`leave` abandons the threads instead.
    """

    def __init__(self) -> None:
        self._scopes: set[trio.CancelScope] = set()

    async def run(
        self,
        call: Callable[[], int],
        limiter: trio.CapacityLimiter,
        name: Thread,
        what: str,
        *,
        left: Callable[[], None],
    ) -> int:
        """Run ``call`` on a borrowed thread and return its value; the arguments are those of ``borrow``.

        Once the thread has begun, only :meth:`leave` ends the wait: then ``left`` is called and LeftAsleep is raised.
        The thread goes on if its page arrives after all, so everything that the call uses must stay. Raises Shortage.
        """
        with self._leavable() as scope:
            shielding = cast(trio.CapacityLimiter, _Shielding(limiter, scope))
            return await borrow(call, shielding, name, what, abandon=True)
        raise _left_asleep(left)

    def on(self, thread: KeptThread, *, left: Callable[[], None]) -> Leavable:
        """The same for the calls of a thread that is kept."""
        return Leavable(self, thread, left)

    @contextmanager
    def _leavable(self) -> Iterator[trio.CancelScope]:
        with trio.CancelScope() as scope:
            self._scopes.add(scope)
            try:
                yield scope
            finally:
                self._scopes.discard(scope)

    def leave(self) -> int:
        """Wait for none of them any more. Returns how many there were."""
        for scope in self._scopes:
            scope.cancel()
        return len(self._scopes)


class Leavable:
    """A kept thread whose calls may be left asleep. Made by :meth:`Sleepers.on`."""

    def __init__(self, sleepers: Sleepers, thread: KeptThread, left: Callable[[], None]) -> None:
        self._sleepers = sleepers
        self._thread = thread
        self._left = left

    async def call(self, call: Callable[[], int]) -> int:
        """As :meth:`Sleepers.run`."""
        with self._sleepers._leavable() as scope:
            scope.shield = True
            return await self._thread.call(call, abandon=True)
        raise _left_asleep(self._left)


def _left_asleep(left: Callable[[], None]) -> LeftAsleep:
    left()
    return LeftAsleep("a thread of this session is left asleep: its memory could not be given up")


class _Shielding:
    """A limiter that shields a scope from when its thread begins: waiting for a turn can still be cancelled."""

    def __init__(self, limiter: trio.CapacityLimiter, scope: trio.CancelScope) -> None:
        self._limiter = limiter
        self._scope = scope

    async def acquire_on_behalf_of(self, borrower: Any) -> None:
        await self._limiter.acquire_on_behalf_of(borrower)
        self._scope.shield = True

    def release_on_behalf_of(self, borrower: Any) -> None:
        self._limiter.release_on_behalf_of(borrower)
