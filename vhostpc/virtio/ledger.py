"""The books of a ring: which chains the device has, which are answered, which can be given back. Plain Python."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from itertools import takewhile
from typing import Generic, Protocol, TypeVar


class Entry(Protocol):
    """The properties of a chain that the books use."""

    @property
    def completed(self) -> bool:
        """The device has answered it."""
        ...

    @property
    def again(self) -> bool:
        """It was taken before a restart, and is to be served once more: it cannot be given back."""
        ...

    @property
    def late(self) -> bool:
        """Pages of it are absent, so the device cannot have it yet."""
        ...


C = TypeVar("C", bound=Entry)


class Ledger(Generic[C]):
    """The chains of one ring between pop and push. Nothing here waits or touches memory."""

    def __init__(self) -> None:
        #: Popped, not yet handed to the device.
        self.ready: deque[C] = deque()
        #: Completed, to be pushed.
        self.answers: list[C] = []
        #: Answers reach the driver in the order in which their chains were taken.
        self.in_order = False
        self._open: dict[int, C] = {}  # popped and not pushed, in order of popping
        self._sequence = 0

    def take(self, chain: C) -> None:
        """It was popped."""
        self._sequence += 1
        self._open[self._sequence] = chain

    @property
    def open(self) -> list[C]:
        """Popped and not pushed, in order of popping."""
        return list(self._open.values())

    def pushable(self) -> list[C]:
        """Completed chains, except those that wait for older ones."""
        if not self.in_order:
            return self.answers
        completed = set(map(id, self.answers))
        return list(takewhile(lambda chain: id(chain) in completed, self._open.values()))

    def pushed(self, chains: list[C]) -> None:
        """The driver has these answers."""
        done = set(map(id, chains))
        self.answers = [c for c in self.answers if id(c) not in done]
        self._open = {s: c for s, c in self._open.items() if id(c) not in done}

    @property
    def returnable(self) -> bool:
        """Whether all unanswered chains are younger than all answered ones: only then they can be given back."""
        seen_open = False
        for chain in self._open.values():
            if not chain.completed:
                if chain.again:
                    return False
                seen_open = True
            elif seen_open:
                return False
        return not (seen_open and self._gap())

    def _gap(self) -> bool:
        first = next(s for s, c in self._open.items() if not c.completed)
        return self._sequence - first + 1 != sum(1 for s in self._open if s >= first)

    def gaps(self) -> Iterator[C]:
        """Chains that the device has not received and that are older than an answered one, or to be served again.

        Such a chain cannot be given back: only the device can close the gap.
        """
        for sequence, chain in list(self._open.items()):
            if not (chain.late or chain in self.ready):
                continue
            unanswered = sum(1 for s, c in self._open.items() if s > sequence and not c.completed)
            if unanswered != self._sequence - sequence or chain.again:
                yield chain

    def hand_over(self, chain: C) -> None:
        """The device gets this one next."""
        if chain in self.ready:
            self.ready.remove(chain)
        self.ready.appendleft(chain)

    def leave_again(self) -> list[C]:
        """Remove chains to be served again that the device has not received: they stay in the inflight region."""
        left = {s: c for s, c in self._open.items() if c.again and (c.late or c in self.ready)}
        for sequence in left:
            del self._open[sequence]
        return list(left.values())

    def clear(self) -> list[C]:
        """Remove all; returns those that were open, in order of popping."""
        chains = self.open
        self._open.clear()
        self.answers = []
        self.ready.clear()
        return chains
