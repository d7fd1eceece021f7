"""Orders in which a source of pages may send those that nobody has asked for, in plain Python."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from tests.kit.scan_order import ScanOrder
from vhostpc.units import TARGET_PAGE


class Order(Protocol):
    def asked(self, page: int, sent: bool) -> None:
        """A page was asked for. ``sent``: it goes now; otherwise it went before."""

    def next(self) -> int:
        """The next page of the background, -1 if there is none."""


Make = Callable[[bytearray], Order]
"""Of a byte for each page, 1 while it is to be sent; the player clears it."""


class Linear:
    """From the first page to the last, whatever is asked for, as QEMU 10.0 with preempt."""

    def __init__(self, left: bytearray) -> None:
        self.left = left
        self.at = 0

    def asked(self, page: int, sent: bool) -> None:
        pass

    def next(self) -> int:
        found = self.left.find(1, self.at)
        if found < 0:
            found = self.left.find(1, 0)
        if found >= 0:
            self.at = found + 1
        return found


class Behind(Linear):
    """On from the page that was asked for last, as QEMU without preempt."""

    def asked(self, page: int, sent: bool) -> None:
        if sent:
            self.at = page + 1


class Near:
    """That of our source."""

    def __init__(self, left: bytearray) -> None:
        self.model = ScanOrder([left], [TARGET_PAGE])

    def asked(self, page: int, sent: bool) -> None:
        if sent:
            self.model.asked(0, page)

    def next(self) -> int:
        found = self.model.next()
        return -1 if found is None else found[1]


class NearAndOn(Near):
    """As Near, but a request for the first page behind a run that has not gone doubles the run that goes before all, up
    to ``most`` pages; any other ends it."""

    def __init__(self, left: bytearray, most: int = 256) -> None:
        super().__init__(left)
        self.left = left
        self.most = most
        self.at = self.end = self.width = 0

    def asked(self, page: int, sent: bool) -> None:
        super().asked(page, sent)
        goes_on = self.at <= page <= self.at + 4 * self.most and self.left.find(1, self.at, page) < 0
        self.width = min(self.most, max(4, 2 * self.width)) if goes_on else 0
        self.at, self.end = page + 1, page + 1 + self.width

    def next(self) -> int:
        if self.at < self.end:
            found = self.left.find(1, self.at, self.end)
            self.at = found + 1 if found >= 0 else self.end
            if found >= 0:
                return found
        return super().next()


class Bubbles(Linear):
    """Around the last ``pivots`` pages that were asked for, in turn, ``forward`` pages upwards for each one downwards
    (Hines and Gopalan, VEE 2009: bubbling, with several pivots)."""

    def __init__(self, left: bytearray, pivots: int, forward: int = 1) -> None:
        super().__init__(left)
        self.pivots = pivots
        self.bubbles: list[list[int]] = []  # the next page downwards, upwards, how many there were
        self.turn = 0
        self.forward = forward

    def asked(self, page: int, sent: bool) -> None:
        if sent:
            self.bubbles.insert(0, [page - 1, page + 1, 0])
            del self.bubbles[self.pivots :]
            self.turn = 0

    def _grow(self, bubble: list[int]) -> int:
        upwards = bubble[2] % (self.forward + 1) < self.forward
        bubble[2] += 1
        for up in (upwards, not upwards):
            if up and bubble[1] < len(self.left):
                found = self.left.find(1, bubble[1])
                bubble[1] = found + 1 if found >= 0 else len(self.left)
            elif not up and bubble[0] >= 0:
                found = self.left.rfind(1, 0, bubble[0] + 1)
                bubble[0] = found - 1
            else:
                continue
            if found >= 0:
                return found
        return -1

    def next(self) -> int:
        for _ in self.bubbles:
            self.turn = (self.turn + 1) % len(self.bubbles)
            found = self._grow(self.bubbles[self.turn - 1])
            if found >= 0:
                return found
        return super().next()


class Turns:
    """Behind each of the last ``count`` requests, ``run`` pages in turn; the newest begins."""

    def __init__(self, left: bytearray, count: int, run: int = 1) -> None:
        self.left = left
        self.count = count
        self.run = run
        self.at = [0]
        self.done = 0

    def asked(self, page: int, sent: bool) -> None:
        if sent:
            self.at.insert(0, page + 1)
            del self.at[self.count :]
            self.done = 0

    def next(self) -> int:
        turn = self.done // self.run % len(self.at)
        found = self.left.find(1, self.at[turn])
        if found < 0:
            found = self.left.find(1, 0)
        if found >= 0:
            self.at[turn] = found + 1
        self.done += 1
        return found


class Streams:
    """``count`` streams. A request near where one stands continues it, and doubles how far it may run ahead (success);
    any other begins one, in the place of that which was continued longest ago. One that has run as far as it may waits
    (failure). They take turns; where all wait, on as ``Behind``."""

    FIRST, MOST, REACH = 8, 512, 64

    def __init__(self, left: bytearray, count: int) -> None:
        self.left = left
        self.count = count
        self.rest = Behind(left)
        self.streams: list[list[int]] = []  # where it stands, how far it may run, how much of that is left
        self.turn = 0

    def asked(self, page: int, sent: bool) -> None:
        self.rest.asked(page, sent)
        self.turn = 0
        for i, (at, window, _) in enumerate(self.streams):
            if abs(page - at) <= self.REACH:
                window = min(self.MOST, 2 * window)
                del self.streams[i]
                self.streams.insert(0, [max(at, page + 1), window, window])
                return
        if sent:
            self.streams.insert(0, [page + 1, self.FIRST, self.FIRST])
            del self.streams[self.count :]

    def next(self) -> int:
        for _ in self.streams:
            stream = self.streams[self.turn % len(self.streams)]
            self.turn += 1
            if stream[2]:
                found = self.left.find(1, stream[0], stream[0] + 4 * stream[2])
                stream[2] = stream[2] - 1 if found >= 0 else 0
                if found >= 0:
                    stream[0] = found + 1
                    return found
        return self.rest.next()


class Group:
    """The rest of the aligned group of ``size`` pages around each request, the newest first; then on as ``Behind``."""

    def __init__(self, left: bytearray, size: int) -> None:
        self.left = left
        self.size = size
        self.rest = Behind(left)
        self.pages: list[int] = []

    def asked(self, page: int, sent: bool) -> None:
        self.rest.asked(page, sent)
        if sent:
            self.pages = [*self.pages, page][-64:]

    def next(self) -> int:
        while self.pages:
            page = self.pages[-1]
            first = page // self.size * self.size
            found = self.left.find(1, page, first + self.size)
            if found < 0:
                found = self.left.find(1, first, page)
            if found >= 0:
                return found
            self.pages.pop()
        return self.rest.next()


class Ahead(Linear):
    """``count`` pages behind each request, the newest first, as a file's readahead; then on as ``Linear``."""

    def __init__(self, left: bytearray, count: int) -> None:
        super().__init__(left)
        self.count = count
        self.pages: list[int] = []

    def asked(self, page: int, sent: bool) -> None:
        if sent:
            self.pages = [*self.pages, page][-64:]

    def next(self) -> int:
        while self.pages:
            found = self.left.find(1, self.pages[-1], self.pages[-1] + 1 + self.count)
            if found >= 0:
                return found
            self.pages.pop()
        return super().next()


class Stride(Behind):
    """As ``Behind``; but where the last three requests were equally far apart, first 16 more at that distance."""

    RUN = 16

    def __init__(self, left: bytearray) -> None:
        super().__init__(left)
        self.last: list[int] = []
        self.ahead: list[int] = []

    def asked(self, page: int, sent: bool) -> None:
        super().asked(page, sent)
        self.last = [*self.last[-2:], page]
        if len(self.last) == 3:
            stride = page - self.last[1]
            if stride == self.last[1] - self.last[0] and abs(stride) > 1:
                self.ahead = [page + step * stride for step in range(self.RUN, 0, -1)]

    def next(self) -> int:
        while self.ahead:
            page = self.ahead.pop()
            if 0 <= page < len(self.left) and self.left[page]:
                return page
        return super().next()


class Foreseen(Linear):
    """As the pages will be touched: what no order can know."""

    def __init__(self, left: bytearray, future: Sequence[int]) -> None:
        super().__init__(left)
        self.future = list(dict.fromkeys(future))[::-1]

    def next(self) -> int:
        while self.future:
            page = self.future.pop()
            if self.left[page]:
                return page
        return super().next()
