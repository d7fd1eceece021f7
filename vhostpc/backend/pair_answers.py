"""Answers to requests that were not sent: QEMU 10.0 and 11.1 wait for them at the start of each further queue pair.

QEMU sends a request about memory for a device's first pair only, and in postcopy reads the answer for each pair
(``vhost_user_set_mem_table_postcopy`` and ``send_add_regions`` of its hw/virtio/vhost-user.c). The second pair takes
the next answer that comes, which is another request's. So the answers of the first pair are sent once more, when the
next one has begun to start: its SET_FEATURES has come, and GET_STATUS where that is agreed; then QEMU sends nothing
until it has them. A front-end that asks for each pair (QEMU 7.2 with memory slots) would be harmed: only by option.
"""

from __future__ import annotations

from vhostpc.wire.vhost_user import MAX_MEM_SLOTS, Request


class PairAnswers:
    """``wanted``: whether anything is to be answered unasked."""

    def __init__(self, wanted: bool) -> None:
        self.wanted = wanted
        self._pairs = 0
        self._left = 0
        self._starting = False
        self._fresh: list[tuple[int, bytes]] = []
        self._last: list[tuple[int, bytes]] = []

    def advised(self) -> None:
        """POSTCOPY_ADVISE, which comes once for each pair."""
        self._pairs += 1

    def answered(self, request: int, payload: bytes) -> None:
        """The first pair was told our addresses."""
        if not self.wanted:
            return
        if request == Request.SET_MEM_TABLE:
            self._fresh.clear()  # of a table that was never acknowledged
        if len(self._fresh) < MAX_MEM_SLOTS:
            self._fresh.append((request, payload))

    def acknowledged(self) -> None:
        """The first pair has stored them; nothing is owed where there was nothing new."""
        self._last, self._fresh = self._fresh, []
        self._left = self._pairs - 1 if self._last else 0
        self._starting = False

    def owed(self, request: int, *, status: bool) -> list[tuple[int, bytes]]:
        """What to send behind the answer to this request. ``status``: GET_STATUS comes at the start of each pair."""
        if not self._left:
            return []
        self._starting |= request == Request.SET_FEATURES
        if not self._starting or request != (Request.GET_STATUS if status else Request.SET_FEATURES):
            return []
        self._starting = False
        self._left -= 1
        return self._last

    def end(self) -> None:
        """POSTCOPY_END, or a new beginning."""
        self._pairs = self._left = 0
        self._starting = False
        self._fresh, self._last = [], []
