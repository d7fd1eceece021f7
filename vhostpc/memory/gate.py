"""The door: the only way from a task to a C call that touches guest memory for it.

Pumps do not come this way: they live on a thread of their own (see ``virtio.queue``).
"""

from __future__ import annotations

import errno
from collections.abc import Callable

import trio

from vhostpc._native import lib
from vhostpc._native.entries import Thread
from vhostpc.errors import MemoryLost
from vhostpc.memory.mapping import Supply


class Gate:
    """Decides where a touching call runs.

    =====  ================================  ==========================================================
    mode   when                              what happens
    =====  ================================  ==========================================================
    calm   no page can be missing            inline on the trio thread, then a checkpoint
    armed  postcopy                          inline with VPC_TRY, which gives up before it touches an
                                             absent page; then the same call on a borrowed thread
    slow   a backing that may read a disk    always on a borrowed thread
    lost   the supplier of pages is gone     MemoryLost
    =====  ================================  ==========================================================

    The threads are counted by a limiter of the session's own: with trio's default one, forty waiting touches
    would stall every unrelated thread call of the program.
    """

    def __init__(self, supply: Supply, threads: int) -> None:
        self.supply = supply
        self.slow = False
        self._limiter = trio.CapacityLimiter(threads)

    async def call(
        self, touch: Callable[[int], int], *, waiting_room: trio.CapacityLimiter | None = None
    ) -> int:
        """Run ``touch(flags)``, a C call that returns >= 0 or -errno, and return that value.

        May wait for a page, without holding up the trio loop; a waiting call can not be cancelled, it ends
        with the page, or with MemoryLost when :meth:`Supply.fail` is called. ``waiting_room``: for a call that
        is known to wait, threads other than the session's few.
        """
        if waiting_room is not None:
            return self.checked(
                await trio.to_thread.run_sync(touch, 0, limiter=waiting_room, thread_name=Thread.LATE)
            )
        if not self.slow:
            await trio.lowlevel.checkpoint_if_cancelled()
            rc = touch(lib.VPC_TRY)
            if rc != -errno.EAGAIN:
                # Never cancelled after the call: what it did must not be forgotten.
                await trio.lowlevel.cancel_shielded_checkpoint()
                return self.checked(rc)
        return self.checked(
            await trio.to_thread.run_sync(touch, 0, limiter=self._limiter, thread_name=Thread.HOP)
        )

    @staticmethod
    def checked(rc: int) -> int:
        """``rc``, or MemoryLost for -EOWNERDEAD."""
        if rc == -errno.EOWNERDEAD:
            raise MemoryLost("the front-end is gone and will bring no more pages")
        return rc
