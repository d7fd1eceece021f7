"""Device sections of the main stream: those that come before the pages, one by one, and those at its end, together.

At the end a description gives their lengths, but QEMU drops it unread: whatever it contains, or if it is missing, the
sections are found without it. A guest can write bytes into a device's state that look like the end of the stream. So an
end that more bytes follow is accepted only if there is no later one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from vhostpc.errors import StreamError
from vhostpc.wire.buffer import Buffer
from vhostpc.wire.migration import vmdesc
from vhostpc.wire.migration.elements import (
    BadStream,
    BitmapRequest,
    CommandType,
    DeviceSection,
    Element,
    EndOfStream,
    OpenReturnPath,
    Ping,
    PostcopyResume,
    Slices,
    Steps,
    SwitchoverStart,
    VmDescription,
)
from vhostpc.wire.migration.split import Found, Upto, section_head, split_in_slices

MAX_ENDS = 100
"""Most places that look like the end of all device sections and are followed. More cannot occur by chance."""
# A footer, the end of the stream, a description.
_END = re.compile(rb"(?=\x7e.{4}\x00\x06(.{4}))", re.DOTALL)
_FRAME = 11  # bytes of these
_EXPECTED = (
    DeviceSection,
    EndOfStream,
    BitmapRequest,
    OpenReturnPath,
    Ping,
    PostcopyResume,
    SwitchoverStart,
)


def early_section(buffer: Buffer, ram: int | None, limit: int) -> Steps[DeviceSection]:
    """One whole section, from its first byte on; it ends at the first footer behind which an element begins.

    ``ram``: the number of RAM's section, if that has started. Raises BadStream without an end in ``limit`` bytes.
    """
    begin = buffer.offset
    while len(buffer) < 6 or len(buffer) < 14 + buffer.data[buffer.at + 5]:
        yield None
    head = section_head(buffer.data, buffer.at, begin - buffer.at)
    mark = b"\x7e" + head.section_id.to_bytes(4, "big")
    looked = head.body - buffer.at
    while True:
        found = buffer.data.find(mark, buffer.at + looked)
        if found >= 0:
            follows = _begins(buffer.data, found + 5, ram)
            if follows:
                body = bytes(buffer.data[head.body - head.at + buffer.at : found])
                buffer.at = found + 5
                return DeviceSection(
                    head.section_id, head.idstr, head.instance, head.version, body, early=True, offset=begin
                )
            looked = found - buffer.at + (follows is not None)
            if follows is not None:
                continue
        else:
            looked = max(looked, len(buffer) - len(mark) + 1)
        if len(buffer) > limit:
            raise BadStream(begin, f"section {head.idstr!r} has no footer within {limit} bytes")
        yield None


def _begins(data: bytearray, at: int, ram: int | None) -> bool | None:
    """Whether an element may begin at index ``at``; None: more bytes are needed to tell."""
    if len(data) < at + 6:
        return None
    kind, number = data[at], int.from_bytes(data[at + 1 : at + 5], "big")
    if kind in (Element.SECTION_PART, Element.SECTION_END):
        return number == ram
    if kind == Element.COMMAND:
        return number >> 16 in set(CommandType)
    if kind in (Element.SECTION_START, Element.SECTION_FULL):
        size = data[at + 5]
        if len(data) < at + 6 + size:
            return None
        return bool(size) and all(0x20 <= byte < 0x7F for byte in data[at + 6 : at + 6 + size])
    return kind == Element.EOF and data[at + 1] == Element.VMDESCRIPTION


@dataclass(frozen=True, slots=True)
class _End:
    """A possible end: ``sections`` bytes of sections with their last footer, and a text of ``size`` bytes."""

    sections: int
    size: int

    @property
    def text(self) -> int:
        return self.sections + _FRAME - 5

    @property
    def end(self) -> int:
        return self.text + self.size


@dataclass(frozen=True, slots=True)
class _Fit:
    """An end that may be the true one. ``disagrees``: the contradiction between its text and the bytes."""

    at: _End
    found: Found
    disagrees: BadStream | None

    @property
    def rank(self) -> tuple[bool, int]:
        return self.disagrees is None, self.at.sections


class LastSections:
    """The rest of a precopy, from its first device section on. ``early``: the sections before the pages."""

    def __init__(self, buffer: Buffer, limit: int, early: Sequence[DeviceSection]) -> None:
        self.closed = False
        """Whether the input has ended."""
        self.doubt: int | None = None
        """A byte before which the sections have a second reading."""
        self.inside = "the device sections"
        self._buffer = buffer
        self._begin = buffer.offset
        self._limit = limit
        self._early = early
        self._looked = 0
        self._ends: list[_End] = []
        self._fit: _Fit | None = None
        self._wrong: BadStream | None = None

    @property
    def may_end(self) -> bool:
        """The end was found; later bytes may not belong to the stream."""
        return self._fit is not None

    def read(self) -> Steps[bool]:
        """Whether the end was found before the stream was closed. Raises BadStream."""
        buffer = self._buffer
        while True:
            over = len(buffer) > 2 * self._limit
            yield from self._look()
            if self._fit is not None and (self.closed or over or self._fit.at.end == len(buffer)):
                yield from self._described(self._fit)
                return True
            if self.closed:
                return (yield from self._undescribed())
            if over:
                raise BadStream(self._begin, f"more than {self._limit} bytes of device sections")
            yield None

    def _look(self) -> Slices[None]:
        """Follow the possible ends, as far as their texts have arrived."""
        buffer = self._buffer
        for match in _END.finditer(buffer.data, buffer.at + self._looked):
            self._looked = match.start() + 1 - buffer.at
            size = int.from_bytes(match[1], "big")
            if size <= self._limit and len(self._ends) < MAX_ENDS:
                self._ends.append(_End(match.start() + 5 - buffer.at, size))
        self._looked = max(self._looked, len(buffer) - _FRAME + 1)
        waiting: list[_End] = []
        for end in self._ends:
            if end.end > len(buffer):
                waiting.append(end)
                continue
            fit = yield from self._try(end)
            if fit is not None and (self._fit is None or fit.rank > self._fit.rank):
                self._fit = fit
        self._ends = waiting

    def _try(self, end: _End) -> Slices[_Fit | None]:
        start = self._buffer.at
        data = bytes(self._buffer.data[start : start + end.sections])
        text = bytes(self._buffer.data[start + end.text : start + end.end])
        last = end.end == len(self._buffer)
        if not last and not (text.startswith(b"{") and text.endswith(b"}")):
            return None
        try:
            try:
                devices = vmdesc.parse(text)
            except StreamError as error:
                raise BadStream(self._begin + end.sections + 1, str(error)) from None
            described = vmdesc.without(devices, self._early)
            sections = yield from vmdesc.split_in_slices(described, data, self._begin)
            return _Fit(end, Found([*sections], self._begin + end.sections, None), None)
        except BadStream as disagrees:
            self._wrong = disagrees
            if not last:
                return None
            try:
                return _Fit(end, (yield from split_in_slices(data, self._begin)), disagrees)
            except BadStream:
                return None

    def _described(self, fit: _Fit) -> Steps[None]:
        yield from _expected(fit.found)
        self.doubt = fit.found.doubt
        yield EndOfStream(offset=fit.found.end)
        start = self._buffer.at
        text = bytes(self._buffer.data[start + fit.at.text : start + fit.at.end])
        self._buffer.at += fit.at.end
        yield VmDescription(text, fit.disagrees, offset=fit.found.end + 1)

    def _undescribed(self) -> Steps[bool]:
        """Without a description: sections, the end, perhaps bytes that do not belong to the stream."""
        data = bytes(self._buffer.data[self._buffer.at :])
        try:
            try:
                found = yield from split_in_slices(data, self._begin)
            except BadStream as wrong:
                try:
                    found = yield from split_in_slices(data, self._begin, Upto.EOF)
                except BadStream:
                    raise wrong from None
        except BadStream as wrong:
            raise self._wrong or wrong from None
        if not isinstance(found.elements[-1], EndOfStream):
            raise BadStream(found.end, "the stream ends behind a section, without its end mark")
        rest = data[found.end - self._begin :]
        if rest[:1] == b"\x06" and len(rest) < 5 + int.from_bytes(rest[1:5].ljust(4, b"\xff"), "big"):
            self.inside = "the description"  # its sender has not sent all, and may not have ended
            return False
        yield from _expected(found)
        self.doubt = found.doubt
        self._buffer.at += len(data) - len(rest)
        return True


def _expected(found: Found) -> Steps[None]:
    for element in found.elements:
        if not isinstance(element, _EXPECTED):
            raise BadStream(element.offset, f"{type(element).__name__} among the device sections")
        yield element
