"""Device sections without a description: where each ends, found by the footers.

The length of a section's body is not in the stream. Its end is a footer with its own id after which another element
begins, and bytes of a body may look like that: a guest may have written them there. QEMU knows its devices and is not
fooled, so such bytes are no reason to refuse a stream. All ways to read the whole are followed, and the one with the
fewest commands is chosen: bytes in a body can add a command but hide none, because no footer follows the last command.
Among those it is the one with the longest sections, because an id occurs once in QEMU's stream. When they are sent on,
all ways give the same bytes.
"""

from __future__ import annotations

import bisect
import heapq
import itertools
import re
from dataclasses import dataclass
from enum import Enum, auto

from vhostpc.wire.migration.elements import (
    BadStream,
    Busy,
    Command,
    CommandType,
    DeviceSection,
    EnableColo,
    EndOfStream,
    Package,
    PostcopyAdvise,
    PostcopyListen,
    PostcopyRun,
    RamDiscard,
    Slices,
    at_once,
    parse_command,
    text_of,
)

MAX_WAYS = 200_000
"""Most possible ends of sections before a stream is refused. No device produces so many, only a guest can."""
# A footer, and the first byte of a full section, a command, the end of the stream; or the end of the bytes. They may
# overlap, and are searched for one by one: a search for the first byte is faster than one for a look ahead.
_FOOTER = re.compile(rb"\x7e(.{4})(?:\x04|\x08\x00|\x00\Z|\Z)", re.DOTALL)
_FOOTER_LOOSE = re.compile(rb"\x7e(.{4})(?:\x04|\x08\x00|\x00|\Z)", re.DOTALL)
_LONGEST = 7  # bytes of one with what follows
_WINDOW = 256 << 10
"""Bytes that are searched in one slice."""
_PIECE = 2000
"""Elements, or places, that are examined in one slice."""
_PRINTABLE = range(0x20, 0x7F)

Inside = Command | DeviceSection | EndOfStream


class Upto(Enum):
    """How far the elements may reach."""

    END = auto()
    """All bytes are elements."""
    RUN = auto()
    """All bytes are elements, or those behind a POSTCOPY_RUN are not."""
    EOF = auto()
    """All bytes are elements, or those behind an end of the stream are not."""


@dataclass(frozen=True, slots=True)
class Found:
    """``end``: the byte of the stream after the elements. ``doubt``: one before which they have a second reading."""

    elements: list[Inside]
    end: int
    doubt: int | None


@dataclass(frozen=True, slots=True)
class Head:
    """The head of a full section; ``at`` and ``body`` are indices of the bytes it was read from."""

    at: int
    section_id: int
    idstr: str
    instance: int
    version: int
    body: int

    def section(self, body: bytes, offset: int) -> DeviceSection:
        return DeviceSection(
            self.section_id, self.idstr, self.instance, self.version, bytes(body), offset=offset + self.at
        )


def section_head(data: bytes | bytearray, at: int, offset: int) -> Head:
    """The head at index ``at``; ``offset`` is that of ``data`` in the stream. Raises BadStream."""
    if at >= len(data):
        raise BadStream(offset + at, "the stream ends where a section belongs")
    if data[at] != 0x04:
        raise BadStream(offset + at, f"{data[at]:#04x}, where a full section or the end belongs")
    if len(data) < at + 6 or len(data) < at + 14 + data[at + 5]:
        raise BadStream(offset + len(data), "the stream ends inside the head of a section")
    length = data[at + 5]
    name = data[at + 6 : at + 6 + length]
    if not length or any(byte not in _PRINTABLE for byte in name):
        raise BadStream(offset + at + 5, "a section whose name is empty or not printable")
    body = at + 14 + length
    return Head(
        at,
        int.from_bytes(data[at + 1 : at + 5], "big"),
        text_of(bytes(name)),
        int.from_bytes(data[body - 8 : body - 4], "big"),
        int.from_bytes(data[body - 4 : body], "big"),
        body,
    )


def _command(data: bytes, at: int, offset: int) -> tuple[Command, int]:
    """The command at index ``at``, and the index after it."""
    if len(data) < at + 5:
        raise BadStream(offset + len(data), "the stream ends inside a command")
    kind, size = int.from_bytes(data[at + 1 : at + 3], "big"), int.from_bytes(data[at + 3 : at + 5], "big")
    after = at + 5 + size
    if len(data) < after:
        raise BadStream(offset + len(data), "the stream ends inside a command")
    if kind == CommandType.PACKAGED:
        raise BadStream(offset + at, "a package where none is allowed")
    return parse_command(kind, bytes(data[at + 5 : after]), offset + at), after


class _Ways:
    """All ways through ``data``, from its first byte on; an index is reached in the best way when its turn comes."""

    def __init__(self, data: bytes, offset: int, upto: Upto) -> None:
        self.data, self.offset, self.upto = data, offset, upto
        self.came: dict[int, tuple[int, int]] = {0: (0, -1)}
        """By index: the fewest commands on a way to it, and the previous index of that way."""
        self.twice: set[int] = set()
        """Indices that were reached from more than one place."""
        self.stop: tuple[int, int] | None = None
        """The last possible end: the index after it, and that of its last element."""
        self.furthest = BadStream(offset, "nothing")
        self._queue = [0]
        self._looked = 0
        self._footers: dict[int, list[int]] = {}
        # By section id: fewest commands before one that was opened, and the first body of one that yielded nothing new.
        self._opened: dict[int, int] = {}
        self._again: dict[int, int] = {}

    def _find_footers(self) -> Slices[None]:
        data, size = self.data, len(self.data)
        pattern = _FOOTER_LOOSE if self.upto is Upto.EOF else _FOOTER
        count = 0
        for window in range(0, size, _WINDOW):
            # The pattern's end of the bytes is theirs in the last window only: the others end further on.
            at, end = window, window + _WINDOW
            last = end + _LONGEST >= size
            while (match := pattern.search(data, at, size if last else end + _LONGEST)) is not None:
                at = match.start() + 1
                if match.start() >= end and not last:
                    break
                count += 1
                if count > MAX_WAYS:
                    raise BadStream(self.offset + match.start(), "too many places where a section could end")
                self._footers.setdefault(int.from_bytes(match[1], "big"), []).append(match.start())
                if not count % _PIECE:
                    yield Busy.BUSY
            if last:
                return
            yield Busy.BUSY

    def follow(self) -> Slices[None]:
        """Raises BadStream for too many ways only."""
        yield from self._find_footers()
        count = looked = 0
        while self._queue:
            at = heapq.heappop(self._queue)
            if at == len(self.data):
                continue
            try:
                self._element(at)
            except BadStream as wrong:
                if self._looked > MAX_WAYS:
                    raise
                if wrong.offset >= self.furthest.offset:
                    self.furthest = wrong
            count += 1
            if not count % _PIECE or self._looked - looked > _PIECE:
                looked = self._looked
                yield Busy.BUSY

    def _element(self, at: int) -> None:
        data, cost = self.data, self.came[at][0]
        if data[at] == 0x08:
            command, after = _command(data, at, self.offset)
            if isinstance(command, PostcopyRun) and self.upto is Upto.RUN:
                self.stop = after, at
            self._reach(after, cost + 1, at)
        elif data[at] == 0 and at + 1 == len(data):
            self._reach(at + 1, cost, at)
        elif data[at] == 0 and self.upto is Upto.EOF:
            self.stop = at + 1, at
        else:
            self._section(at, cost)

    def _section(self, at: int, cost: int) -> None:
        head = section_head(self.data, at, self.offset)
        places = self._footers.get(head.section_id, [])
        first = bisect.bisect_left(places, head.body)
        if first == len(places):
            raise BadStream(
                self.offset + at,
                f"section {head.idstr!r} (id {head.section_id}) has no footer that a known element follows",
            )
        if self._opened.get(head.section_id, cost + 1) <= cost:  # an earlier one yielded all its ends
            self._again.setdefault(head.section_id, head.body)
            return
        self._opened[head.section_id] = cost
        for place in itertools.islice(places, first, None):
            self._looked += 1
            if self._looked > MAX_WAYS:
                raise BadStream(self.offset + at, "too many places where a section could end")
            self._reach(place + 5, cost, at)

    def _reach(self, index: int, cost: int, before: int) -> None:
        known = self.came.get(index)
        if known is not None:
            self.twice.add(index)
        else:
            heapq.heappush(self._queue, index)
        if known is None or cost < known[0]:
            self.came[index] = (cost, before)

    def way(self, end: int, last: int) -> Slices[tuple[list[Inside], int | None]]:
        """The elements up to index ``end``, whose last one is at ``last``, and where they could be read otherwise."""
        places = [end, last]
        while places[-1] > 0:
            places.append(self.came[places[-1]][1])
        places.reverse()
        elements: list[Inside] = []
        doubt: int | None = None
        for at, after in itertools.pairwise(places):
            element = self._event(at, after)
            elements.append(element)
            again = isinstance(element, DeviceSection) and after - 5 >= self._again.get(
                element.section_id, after
            )
            if doubt is None and (again or after in self.twice):
                doubt = self.offset + after
            if not len(elements) % _PIECE:
                yield Busy.BUSY
        return elements, doubt

    def _event(self, at: int, after: int) -> Inside:
        if self.data[at] == 0x08:
            return _command(self.data, at, self.offset)[0]
        if self.data[at] == 0:
            return EndOfStream(offset=self.offset + at)
        head = section_head(self.data, at, self.offset)
        return head.section(self.data[head.body : after - 5], self.offset)


def split(data: bytes, offset: int, upto: Upto = Upto.END) -> Found:
    """The elements of ``data``, which begins at byte ``offset`` of the stream.

    Raises :class:`BadStream`, at the byte that was reached last.
    """
    return at_once(split_in_slices(data, offset, upto))


def split_in_slices(data: bytes, offset: int, upto: Upto = Upto.END) -> Slices[Found]:
    """As :func:`split`."""
    ways = _Ways(data, offset, upto)
    yield from ways.follow()
    if not data:
        return Found([], offset, None)
    if len(data) in ways.came:
        elements, doubt = yield from ways.way(len(data), ways.came[len(data)][1])
        # The bytes after POSTCOPY_RUN may themselves look like the end of a section that contains it.
        ran = upto is not Upto.RUN or any(isinstance(element, PostcopyRun) for element in elements)
        if ran or ways.stop is None:
            return Found(elements, offset + len(data), doubt)
    if ways.stop is None:
        raise ways.furthest
    elements, doubt = yield from ways.way(*ways.stop)
    return Found(elements, offset + ways.stop[0], doubt)


# Commands that a destination does not execute once the package has arrived. QEMU refuses them, too.
_MISPLACED = (PostcopyAdvise, RamDiscard, EnableColo)


def split_package(package: Package) -> Found:
    """The elements of a package up to POSTCOPY_RUN, after which QEMU reads nothing. Raises :class:`BadStream`."""
    return at_once(split_package_in_slices(package))


def split_package_in_slices(package: Package) -> Slices[Found]:
    """As :func:`split_package`."""
    base = max(package.start, 0)
    found = yield from split_in_slices(package.blob, base, Upto.RUN)
    listens = False
    for number, element in enumerate(found.elements, 1):
        if isinstance(element, PostcopyRun):
            if not listens:
                raise BadStream(element.offset, "POSTCOPY_RUN without POSTCOPY_LISTEN")
            end = element.offset + len(element.encode())
            return Found(found.elements[:number], end, found.doubt)
        if isinstance(element, PostcopyListen):
            if listens:
                raise BadStream(element.offset, "POSTCOPY_LISTEN again")
            listens = True
        elif isinstance(element, EndOfStream):
            raise BadStream(element.offset, "the end of the stream inside a package")
        elif isinstance(element, _MISPLACED):
            raise BadStream(element.offset, f"{type(element).__name__}, which is not allowed in a package")
    raise BadStream(base + len(package.blob), "a package that ends without POSTCOPY_RUN")


def read_package(package: Package) -> list[Inside]:
    """The elements of a package: LISTEN, device sections, commands, RUN. Raises :class:`BadStream`."""
    return split_package(package).elements
