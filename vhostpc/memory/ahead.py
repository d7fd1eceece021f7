"""Waiting, on the trio thread, until pages that were asked for ahead have come."""

from __future__ import annotations

import trio

from vhostpc._native import lib
from vhostpc.memory.mapping import Supply


class Ahead:
    """Tells the tasks of one session that pages have come. C asks for them (``memory/ahead.c``), each on a thread that
    does nothing else; here no thread waits.
    """

    def __init__(self, supply: Supply) -> None:
        self._supply = supply
        self._lot = trio.lowlevel.ParkingLot()
        self._listening: trio.CancelScope | None = (
            None  # the scope of the one task that waits for the eventfd
        )
        #: Grows with each report. Read it, look for pages, and wait with :meth:`after` if they are not there.
        self.turn = 0

    async def after(self, turn: int) -> None:
        """Return when there has been a report after ``turn``."""
        while self.turn == turn:
            if self._listening is not None:
                await self._lot.park()
                continue
            try:
                with trio.CancelScope() as self._listening:
                    await self._report()
            finally:
                self._listening = None
                self._lot.unpark_all()  # another task may have to listen

    async def _report(self) -> None:
        fd = self._supply.ahead_fd
        if fd is None:
            await trio.sleep_forever()
        await trio.lowlevel.wait_readable(fd)
        lib.vpc_supply_ahead_heard(self._supply.handle)
        self.turn += 1

    def look_again(self) -> None:
        """Let all tasks look again: something else has changed."""
        self.turn += 1
        self._lot.unpark_all()
        if self._listening is not None:
            self._listening.cancel()

    async def until_ended(self) -> None:
        """Return when the supply has no thread any more: it is disarmed or lost."""
        while True:
            turn = self.turn
            if not self._supply.ahead().threads:
                return
            await self.after(turn)
