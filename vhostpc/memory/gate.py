"""The gate: the only way for a task to call C code that touches guest memory.

Pumps do not come this way: they live on a thread of their own (see ``virtio.work``).
"""

from __future__ import annotations

import errno
from collections.abc import Callable

import trio

from vhostpc._native import lib
from vhostpc._native.entries import Thread
from vhostpc._native.sleepers import Sleepers
from vhostpc.errors import MemoryLost
from vhostpc.memory.ahead import Ahead
from vhostpc.memory.mapping import Supply

_WAIT = "a touch of guest memory that has to wait for its page"


class Gate:
    """Decides where a touching call runs.

    =====  ================================  ==========================================================
    mode   when                              what happens
    =====  ================================  ==========================================================
    calm   no page can be missing            inline on the trio thread, then a checkpoint
    armed  postcopy                          inline with VPC_TRY, which gives up before it touches an
                                             absent page; then the same call on a borrowed thread
    slow   a backing that may read a disk    always on a borrowed thread
    lost   pages are gone, or the peer that  MemoryLost
           brings them
    =====  ================================  ==========================================================

    The threads are counted by a limiter of the session's own: with trio's default one, forty waiting touches
    would stall every unrelated thread call of the program.
    """

    def __init__(self, supply: Supply, threads: int) -> None:
        self.supply = supply
        #: Reports of pages that were asked for ahead.
        self.ahead = Ahead(supply)
        self.slow = False
        #: The calls that may be asleep, including those of pumps.
        self.sleepers = Sleepers()
        self._limiter = trio.CapacityLimiter(threads)

    async def call(
        self,
        touch: Callable[[int], int],
        *,
        waiting_room: trio.CapacityLimiter | None = None,
        try_first: bool = False,
        left: Callable[[], None],
    ) -> int:
        """Run ``touch(flags)``, a C call that returns >= 0 or -errno, and return that value.

        May wait for a page, without delaying the trio loop. A waiting call cannot be cancelled: it ends with the page,
        or with MemoryLost when :meth:`Supply.fail` is called. Where that could not release it and ``sleepers.leave``
        was called, it raises LeftAsleep; then everything that the call uses must stay. ``waiting_room``: threads other
        than the session's few, for a call that is known to wait, or (``try_first``) for one of many that may. Raises
        Shortage, with nothing touched.
        """
        if not self.slow and (waiting_room is None or try_first):
            await trio.lowlevel.checkpoint_if_cancelled()
            rc = touch(lib.VPC_TRY)
            if rc != -errno.EAGAIN:
                # Never cancelled after the call: its effects must not be forgotten.
                await trio.lowlevel.cancel_shielded_checkpoint()
                return self.checked(rc)
        if waiting_room is not None:
            rc = await self.sleepers.run(lambda: touch(0), waiting_room, Thread.LATE, _WAIT, left=left)
        else:
            rc = await self.sleepers.run(lambda: touch(0), self._limiter, Thread.HOP, _WAIT, left=left)
        return self.checked(rc)

    @staticmethod
    def checked(rc: int) -> int:
        """``rc``, or MemoryLost for -EOWNERDEAD."""
        if rc == -errno.EOWNERDEAD:
            raise MemoryLost("the front-end is gone and will send no more pages, or has taken pages away")
        return rc
