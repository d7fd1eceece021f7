"""RAM records of the migration stream in plain Python: the model that the C loops are tested against.

Integers are big-endian. A record is a u64 word (flags in the low 12 bits, offset in the block above), the
block's name (u8 length, bytes) unless CONTINUE is set, and the payload: 4096 bytes for PAGE, one fill byte
for ZERO. The word 0x10 alone (EOS) ends a section. Postcopy has only these records; precopy also has differences
(:mod:`vhostpc.wire.migration.xbzrle`). Everything else is refused.
Source: QEMU's migration stream, RAM section version 4 (migration/ram.c describes the flags).
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from vhostpc.enums import NamedFlag, WordEnum
from vhostpc.errors import LocalProtocolError, StreamError
from vhostpc.units import TARGET_PAGE

SECTION_PART, SECTION_END, SECTION_FOOTER = 2, 3, 0x7E
"""First bytes of the frames around records."""
_WORD = struct.Struct(">Q")


class RamFlag(NamedFlag):
    """Low bits of a record's word."""

    FULL = 0x001
    ZERO = 0x002
    MEM_SIZE = 0x004
    PAGE = 0x008
    EOS = 0x010
    CONTINUE = 0x020
    XBZRLE = 0x040
    HOOK = 0x080
    COMPRESS_PAGE = 0x100
    MULTIFD_FLUSH = 0x200


class BadRecord(WordEnum):
    """The reasons to refuse a stream; the numbers are those of the C loader (``VPC_BAD_*``)."""

    FLAGS = 1
    NO_BLOCK = 2
    NAME = 3
    OFFSET = 4
    HOST_PAGE = 5
    TRUNCATED = 6
    FOOTER = 7
    DELTA = 8
    COMPRESSED = 9
    PART = 10


REASONS = {
    BadRecord.FLAGS: "flags that are neither a data page, a zero page nor the end of a section",
    BadRecord.NO_BLOCK: "a page that continues a block, but none was named before",
    BadRecord.NAME: "a block name that is empty or unknown",
    BadRecord.OFFSET: "an offset behind the end of its block",
    BadRecord.HOST_PAGE: "a host page whose parts are not consecutive",
    BadRecord.TRUNCATED: "the end of the stream inside a record or a host page",
    BadRecord.FOOTER: "no footer of the section behind its records",
    BadRecord.DELTA: "an XBZRLE page that is not a difference to its previous content",
    BadRecord.COMPRESSED: "a compressed page: switch the capability compress off at the source",
    BadRecord.PART: "a length that is not a multiple of the block's page size",
}


class BadRamStream(StreamError):
    """A stream that is malformed at byte ``offset`` (where the broken record begins)."""

    def __init__(self, why: BadRecord, offset: int) -> None:
        super().__init__(f"RAM records: {REASONS[why]}, at byte {offset}")
        self.why = why
        self.offset = offset


@dataclass(frozen=True, slots=True)
class RamPage:
    """One target page: ``data`` holds its 4096 bytes, or is None for a page filled with ``fill``."""

    block: str
    offset: int
    data: bytes | None
    fill: int = 0

    @property
    def content(self) -> bytes:
        return bytes([self.fill]) * TARGET_PAGE if self.data is None else self.data


@dataclass(frozen=True, slots=True)
class EndOfSection:
    """The word 0x10."""


RamEvent = RamPage | EndOfSection


class RamEncoder:
    """Encodes pages; remembers the block, so that a name is written only when it changes."""

    def __init__(self) -> None:
        self._block: str | None = None

    def page(self, block: str, offset: int, data: bytes) -> bytes:
        """A PAGE record, or a ZERO record when all 4096 bytes are zero."""
        if len(data) != TARGET_PAGE:
            raise LocalProtocolError(f"a target page must have {TARGET_PAGE} bytes, not {len(data)}")
        if not any(data):
            return self._head(block, offset, RamFlag.ZERO) + b"\0"
        return self._head(block, offset, RamFlag.PAGE) + data

    def zero(self, block: str, offset: int, fill: int = 0) -> bytes:
        """A ZERO record: 4096 bytes of ``fill``."""
        return self._head(block, offset, RamFlag.ZERO) + bytes([fill])

    def forget(self) -> None:
        """Name the block of the next page again: after the switch to postcopy, and on a new connection."""
        self._block = None

    def end(self) -> bytes:
        """The end of a section; the block stays remembered, as both ends of the channel do."""
        return _WORD.pack(RamFlag.EOS)

    def _head(self, block: str, offset: int, flag: RamFlag) -> bytes:
        if offset % TARGET_PAGE or offset < 0:
            raise LocalProtocolError(f"offset {offset:#x} is not that of a target page")
        if block == self._block:
            return _WORD.pack(offset | flag | RamFlag.CONTINUE)
        name = block.encode("utf-8", "surrogateescape")
        if not 0 < len(name) < 256:
            raise LocalProtocolError(f"a block's name must have 1 to 255 bytes, not {len(name)}")
        self._block = block
        return _WORD.pack(offset | flag) + bytes([len(name)]) + name


class RamDecoder:
    """Decodes a stream that arrives in pieces. ``lengths`` are the blocks' lengths in bytes by name.

    Checks go in the order of the bytes, so the verdict does not depend on how the stream was cut.
    """

    def __init__(self, lengths: Mapping[str, int]) -> None:
        self._lengths = dict(lengths)
        self._buffer = bytearray()
        self._block: str | None = None
        self.consumed = 0
        """Bytes of whole records."""

    def feed(self, data: bytes) -> Iterator[RamEvent]:
        """Take bytes; yields completed records. Raises :class:`BadRamStream`."""
        self.put(data)
        while (event := self.next()) is not None:
            yield event

    def put(self, data: bytes) -> None:
        """Take bytes, for :meth:`next`."""
        self._buffer += data

    @property
    def unread(self) -> bytes:
        """The bytes that were taken and are not a whole record yet, or whose records were not requested."""
        return bytes(self._buffer)

    def skip(self, count: int) -> None:
        """Skip ``count`` bytes that have arrived and do not belong to a record."""
        self._take(count)

    def eof(self) -> None:
        """The stream ended. Raises :class:`BadRamStream` inside a record."""
        if self._buffer:
            raise BadRamStream(BadRecord.TRUNCATED, self.consumed)

    def next(self) -> RamEvent | None:
        """The next completed record; None if it needs more bytes. Raises :class:`BadRamStream`."""
        buffer = self._buffer
        if len(buffer) < 8:
            return None
        word = _WORD.unpack_from(buffer)[0]
        if word == RamFlag.EOS:
            self._take(8)
            return EndOfSection()
        flags, offset = word & (TARGET_PAGE - 1), word & ~(TARGET_PAGE - 1)
        kind = flags & ~int(RamFlag.CONTINUE)  # the complement of a flag knows only named bits
        if kind not in (RamFlag.ZERO, RamFlag.PAGE):
            raise BadRamStream(BadRecord.FLAGS, self.consumed)
        need = 8
        block = self._block
        if flags & RamFlag.CONTINUE:
            if block is None:
                raise BadRamStream(BadRecord.NO_BLOCK, self.consumed)
        else:
            if len(buffer) < 9:
                return None
            need = 9 + buffer[8]
            if buffer[8] and len(buffer) < need:
                return None
            block = bytes(buffer[9:need]).decode("utf-8", "surrogateescape")
            if block not in self._lengths:
                raise BadRamStream(BadRecord.NAME, self.consumed)
        if offset >= self._lengths[block]:
            raise BadRamStream(BadRecord.OFFSET, self.consumed)
        payload = TARGET_PAGE if kind == RamFlag.PAGE else 1
        if len(buffer) < need + payload:
            return None
        body = bytes(buffer[need : need + payload])
        self._block = block
        self._take(need + payload)
        if kind == RamFlag.PAGE:
            return RamPage(block, offset, body)
        return RamPage(block, offset, None, body[0])

    def _take(self, count: int) -> None:
        del self._buffer[:count]
        self.consumed += count


class _Place(enum.Enum):
    """The loader's next item."""

    RECORDS = enum.auto()
    FOOTER = enum.auto()
    NEXT = enum.auto()
    """A header, or bytes that are not of this section."""


class RamModel:
    """The loader's model: host pages are placed whole, once, never overwritten.

    ``blocks`` are name -> (length, host page size) in bytes; ``place`` is called with block, offset and the
    bytes of a host page. ``section``: the frames of this RAM section are read too (its footers, and the headers of
    further parts), beginning after a header; ``last``: of the END. ``calm``: each target page is placed by itself,
    each time it arrives. Slow and simple.
    """

    def __init__(
        self,
        blocks: Mapping[str, tuple[int, int]],
        place: Callable[[str, int, bytes], None],
        *,
        section: int | None = None,
        last: bool = False,
        calm: bool = False,
    ) -> None:
        self._decoder = RamDecoder({name: length for name, (length, _) in blocks.items()})
        self._sizes = {name: TARGET_PAGE if calm else size for name, (_, size) in blocks.items()}
        self._place = place
        self._calm = calm
        self._received: set[tuple[str, int]] = set()
        self._part = bytearray()
        self._part_of: tuple[str, int] = ("", 0)
        self._section = section
        self._last = last
        self._at = _Place.RECORDS
        self.sections = 0
        """Ends of sections that were read."""
        self.ended = False
        """The whole stream was read; later bytes are left unread."""

    @property
    def received(self) -> frozenset[tuple[str, int]]:
        """(block, offset) of the host pages that were placed."""
        return frozenset(self._received)

    @property
    def consumed(self) -> int:
        """Bytes read."""
        return self._decoder.consumed

    @property
    def complete(self) -> bool:
        """The END's footer was read."""
        return self.ended and self._last and self._at is _Place.NEXT

    def feed(self, data: bytes) -> None:
        """Take bytes. Raises :class:`BadRamStream`."""
        self._decoder.put(data)
        while not self.ended and self._step():
            pass

    def _step(self) -> bool:
        """One record or frame; False needs more bytes."""
        if self._at is not _Place.RECORDS:
            return self._frame()
        at = self._decoder.consumed
        event = self._decoder.next()
        if event is None:
            return False
        if isinstance(event, RamPage):
            self._page(event, at)
            return True
        self.sections += 1
        self._at = _Place.FOOTER
        self.ended = self._section is None
        return True

    def _frame(self) -> bool:
        head = self._decoder.unread[:5]
        if self._at is _Place.NEXT and head and head[0] not in (SECTION_PART, SECTION_END):
            self.ended = True
            return True
        if len(head) < 5:
            return False
        ours = int.from_bytes(head[1:], "big") == self._section
        if self._at is _Place.FOOTER:
            if head[0] != SECTION_FOOTER or not ours:
                raise BadRamStream(BadRecord.FOOTER, self._decoder.consumed)
            self._decoder.skip(5)
            self._at = _Place.NEXT
            self.ended = self._last
        elif not ours:
            self.ended = True
        else:
            self._decoder.skip(5)
            self._last = head[0] == SECTION_END
            self._at = _Place.RECORDS
        return True

    def eof(self) -> None:
        """The stream ended. Raises :class:`BadRamStream` inside a record or a host page, or before a footer."""
        self._decoder.eof()
        if self._part or self._at is _Place.FOOTER:
            raise BadRamStream(BadRecord.TRUNCATED, self._decoder.consumed)

    def _page(self, page: RamPage, at: int) -> None:
        size = self._sizes[page.block]
        if not self._part:
            self._part_of = (page.block, page.offset)
            if page.offset % size:
                raise BadRamStream(BadRecord.HOST_PAGE, at)
        block, start = self._part_of
        if (page.block, page.offset) != (block, start + len(self._part)):
            raise BadRamStream(BadRecord.HOST_PAGE, at)
        self._part += page.content
        if len(self._part) < size:
            return
        if self._calm or (block, start) not in self._received:
            self._received.add((block, start))
            self._place(block, start, bytes(self._part))
        self._part.clear()
