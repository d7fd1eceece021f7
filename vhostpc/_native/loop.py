"""Run a long C loop on a borrowed thread, owned by the caller's cancel scope."""

from __future__ import annotations

from collections.abc import Callable

import trio

from vhostpc._native.entries import Thread


async def run_loop(
    call: Callable[[], int], poke: Callable[[], None], limiter: trio.CapacityLimiter, name: Thread
) -> int:
    """Run ``call`` (one C call that releases the GIL for its whole life) and return its value.

    When the caller is cancelled, ``poke`` is called on the trio thread: it must make the loop return
    soon (write its stop eventfd). The cancellation goes on only after the loop has returned, so memory
    that the loop uses may be freed right after. ``limiter`` must be the caller's own: trio's default
    would let forty waiting loops stall every unrelated thread call of the program. ``name``: the thread's, while
    it runs the loop.
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
        # Let the watcher reach its sleep: a cancel from here on is seen by it.
        with trio.CancelScope(shield=True):
            await trio.lowlevel.checkpoint()
            result = await trio.to_thread.run_sync(call, limiter=limiter, thread_name=name)
        finished = True
        nursery.cancel_scope.cancel()
    return result
