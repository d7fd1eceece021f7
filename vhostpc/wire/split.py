"""Device sections without a description: where each ends, found by the footers.

A section's body has no length. Its end is a footer with its own id behind which another element begins, and the
bytes of a body may look like one. So all ways to read the whole are followed, and just one may reach its end.
"""

from __future__ import annotations

import bisect
import heapq
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass

from vhostpc.wire.elements import (
    BadStream,
    Command,
    CommandType,
    DeviceSection,
    EndOfStream,
    Package,
    PostcopyListen,
    PostcopyRun,
    parse_command,
    text_of,
)

MAX_WAYS = 50_000
"""Possible ends of sections that are looked at before a stream is refused."""
# A footer, and the first byte of a full section, a command, the end of the stream; or the end of the bytes.
_FOOTER = re.compile(rb"(?=\x7e(.{4})(?:\x04|\x08\x00|\x00\Z|\Z))", re.DOTALL)
_PRINTABLE = range(0x20, 0x7F)

Inside = Command | DeviceSection | EndOfStream


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


def section_head(data: bytes, at: int, offset: int) -> Head:
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


def _footers(data: bytes, offset: int) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for count, match in enumerate(_FOOTER.finditer(data)):
        if count >= MAX_WAYS:
            raise BadStream(offset + match.start(), "too many places where a section could end")
        found.setdefault(int.from_bytes(match[1], "big"), []).append(match.start())
    return found


def _ends(data: bytes, at: int, offset: int, ends: dict[int, list[int]]) -> Iterator[int]:
    """Where the element at ``at`` may end."""
    if data[at] == 0x08:
        if len(data) < at + 5 or len(data) < at + 5 + int.from_bytes(data[at + 3 : at + 5], "big"):
            raise BadStream(offset + len(data), "the stream ends inside a command")
        _command(data, at, offset)
        yield at + 5 + int.from_bytes(data[at + 3 : at + 5], "big")
        return
    if data[at] == 0 and at + 1 == len(data):
        yield at + 1
        return
    head = section_head(data, at, offset)
    places = ends.get(head.section_id, [])
    first = bisect.bisect_left(places, head.body)
    if first == len(places):
        raise BadStream(
            offset + at,
            f"section {head.idstr!r} (id {head.section_id}) has no footer behind which anything known follows",
        )
    for i in range(first, len(places)):
        yield places[i] + 5


def _command(data: bytes, at: int, offset: int) -> Command:
    kind, size = int.from_bytes(data[at + 1 : at + 3], "big"), int.from_bytes(data[at + 3 : at + 5], "big")
    if kind == CommandType.PACKAGED:
        raise BadStream(offset + at, "a package where none may stand")
    return parse_command(kind, bytes(data[at + 5 : at + 5 + size]), offset + at)


def _event(data: bytes, at: int, end: int, offset: int) -> Inside:
    if data[at] == 0x08:
        return _command(data, at, offset)
    if data[at] == 0:
        return EndOfStream(offset=offset + at)
    head = section_head(data, at, offset)
    return head.section(data[head.body : end - 5], offset)


def split(data: bytes, offset: int) -> list[Inside]:
    """The elements of ``data``, which begins at byte ``offset`` of the stream.

    Raises :class:`BadStream`, also when it can be read in two ways: at the byte that was reached last.
    """
    ends = _footers(data, offset)
    came: dict[int, tuple[int, int]] = {0: (1, -1)}  # index: (number of ways, at most 2; where from)
    queue = [0]
    furthest = BadStream(offset, "nothing")
    looked = 0
    while queue:
        at = heapq.heappop(queue)
        if at == len(data):
            continue
        try:
            for after in _ends(data, at, offset, ends):
                looked += 1
                if looked > MAX_WAYS:
                    raise BadStream(offset + at, "too many places where a section could end")
                if after not in came:
                    heapq.heappush(queue, after)
                    came[after] = (came[at][0], at)
                else:
                    came[after] = (2, at)
        except BadStream as wrong:
            if looked > MAX_WAYS:
                raise
            if wrong.offset >= furthest.offset:
                furthest = wrong
    if len(data) not in came:
        raise furthest
    way = [len(data)]
    while way[-1] > 0:
        ways, before = came[way[-1]]
        if ways > 1 and came[before][0] == 1:
            raise BadStream(
                offset + way[-1], "the sections before this byte can be read in more than one way"
            )
        way.append(before)
    way.reverse()
    return [_event(data, at, after, offset) for at, after in itertools.pairwise(way)]


def read_package(package: Package) -> list[Inside]:
    """The elements of a package: LISTEN, device sections, commands, RUN. Raises :class:`BadStream`."""
    base = max(package.start, 0)
    found = split(package.blob, base)
    if not found or not isinstance(found[0], PostcopyListen):
        raise BadStream(base, "a package that does not begin with POSTCOPY_LISTEN")
    for event in found[1:]:
        if isinstance(event, PostcopyListen | EndOfStream):
            raise BadStream(event.offset, f"{type(event).__name__} inside a package")
    for event in found[:-1]:
        if isinstance(event, PostcopyRun):
            raise BadStream(event.offset, "a package that goes on behind POSTCOPY_RUN")
    if not isinstance(found[-1], PostcopyRun):
        raise BadStream(base + len(package.blob), "a package that ends without POSTCOPY_RUN")
    once(found)
    return found


def once(events: list[Inside]) -> None:
    """Each section and each id stands once. Raises :class:`BadStream`."""
    seen: set[tuple[str, int]] = set()
    ids: set[int] = set()
    for event in events:
        if isinstance(event, DeviceSection):
            if (event.idstr, event.instance) in seen:
                raise BadStream(
                    event.offset, f"section {event.idstr!r} instance {event.instance} comes again"
                )
            if event.section_id in ids:
                raise BadStream(event.offset, f"section id {event.section_id} comes again")
            seen.add((event.idstr, event.instance))
            ids.add(event.section_id)
