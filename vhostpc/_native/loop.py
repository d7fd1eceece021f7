"""Run a long C loop on a thread, owned by the caller's cancel scope."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import trio


class Caller(Protocol):
    """A thread that makes calls: a KeptThread, or one that may be left asleep."""

    async def call(self, call: Callable[[], int]) -> int: ...


async def run_loop(call: Callable[[], int], poke: Callable[[], None], thread: Caller) -> int:
    """Run ``call`` (one C call that releases the GIL for its whole life) on ``thread`` and return its value.

    When the caller is cancelled, ``poke`` is called on the trio thread: it must make the loop return
    soon (write its stop eventfd). The cancellation is delivered only after the loop has returned, so memory
    that the loop uses may be freed right after.
    """
    finished = False

    async def watch() -> None:
        try:
            await trio.sleep_forever()
        finally:
            if not finished:
                poke()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch)
        # Let the watcher reach its sleep: from here on it sees a cancellation.
        with trio.CancelScope(shield=True):
            await trio.lowlevel.checkpoint()
            result = await thread.call(call)
        finished = True
        nursery.cancel_scope.cancel()
    return result
