"""One direction of a connection, read with the package's own readers: elements, and where they begin and end.

A watcher is fed bytes and yields what they complete; it changes nothing and does no I/O. What it cannot read ends its
reading, not the connection.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from typing import Any

from vhostpc.errors import StreamError
from vhostpc.wire.buffer import Buffer
from vhostpc.wire.migration import elements as el
from vhostpc.wire.migration.ramrec import EndOfSection, RamPage
from vhostpc.wire.migration.ramscan import RamScanner
from vhostpc.wire.migration.return_path import (
    PageRequest,
    Pong,
    ReceivedBitmap,
    ResumeAck,
    ReturnPathDecoder,
    ReturnPathMessage,
    Shut,
    SwitchoverAck,
)
from vhostpc.wire.migration.split import split_package
from vhostpc.wire.migration.stream import RamMode, StreamReader

LIMIT = 256 << 20
"""Bytes of a package, or of device sections, that are read; larger ones pass unread."""
KINDS = {b"Q": "main", b"\x08": "recovery", b"\0": "preempt", b"\x11": "multifd", b"\x16": "tls"}
"""Of a connection, by the first byte that its maker sends: magic, command, page word, multifd's magic, TLS record."""
ROUND_END = 13
"""Bytes that end a part of RAM: a word and a footer."""
UNKNOWN_LENGTH = 1 << 62
"""Of a block whose list has not passed here."""
_NOTHING: dict[str, Any] = {}


@dataclass(frozen=True, slots=True)
class Seen:
    """An element from byte ``begin`` to before byte ``end`` of its direction.

    ``points``: what it is, by the table of points, with its value or number. ``inner``: the byte where its inside
    begins. ``name`` is empty for one that is no event.
    """

    name: str
    begin: int
    end: int
    points: tuple[tuple[str, int | str | None], ...] = ()
    details: dict[str, Any] = field(default_factory=dict)
    inner: int = -1


class Watch:
    """Reads nothing: for connections that nobody here can read."""

    blind = True
    tail = False
    """Whether it may have to read to the end of the connection before it knows where the next element ends."""
    parsed = 0
    """The byte up to which all is known."""
    each = False
    """Whether pages are wanted one by one; may be changed, and then holds from the next part of RAM on."""

    def feed(self, data: bytes) -> Iterator[Seen]:
        """Take bytes; yields elements, while :attr:`parsed` is the end of each."""
        yield from ()

    def eof(self) -> Iterator[Seen]:
        """The direction has ended."""
        yield from ()


class _Reading(Watch):
    blind = False

    def _unreadable(self, error: StreamError) -> Seen:
        self.blind = True
        at = error.offset if isinstance(error, el.BadStream) else self.parsed
        return Seen("unreadable", at, at, (), {"reason": str(error)})


class StreamWatch(_Reading):
    """The forward direction of a main connection, or with ``recovery`` of one that goes on from ``before``.

    A recovery of a stream that nobody here has seen is read, too: it asks for the bitmap of each block before it sends
    pages, so their names are known by then.
    """

    def __init__(self, *, recovery: bool = False, before: StreamReader | None = None) -> None:
        unknown = recovery and before is None
        self.reader = StreamReader(limit=LIMIT, continues=(before or StreamReader()) if recovery else None)
        self._head: bytearray | None = bytearray() if unknown else None
        """Commands of an unknown stream, and what was not read of it yet."""
        self._asked: list[el.BlockInfo] = []
        self._postcopy = recovery
        self._count: Counter[str] = Counter()
        self._round: Counter[str] | None = None
        """Pages of a part of RAM, up to its end; then :attr:`_pages`, up to its footer."""
        self._pages: Counter[str] | None = None
        self._known = 0
        self._last = False

    @property
    def parsed(self) -> int:  # type: ignore[override]
        # The reader takes an element piece by piece, but a RAM record as a whole.
        return self._known if self._round is None else self.reader.offset

    def feed(self, data: bytes) -> Iterator[Seen]:
        """See :class:`Watch`. A description that contradicts its sections is told of and no more."""
        if self.blind or self.reader.ended:
            return
        self.reader.ram = RamMode.EACH if self.each else RamMode.RUNS
        try:
            if self._head is not None:
                data = yield from self._commands(self._head, data)
            for event in self.reader.feed(data):
                yield from self._take(event)
        except StreamError as error:
            yield self._unreadable(error)

    def eof(self) -> Iterator[Seen]:
        if self.blind or self.reader.ended:
            return
        try:
            for event in self.reader.eof():
                yield from self._take(event)
        except StreamError as error:
            self.blind = True
            yield Seen("truncated", self.reader.offset, self.reader.offset, (), {"reason": str(error)})

    def _commands(self, head: bytearray, data: bytes) -> Generator[Seen, None, bytes]:
        """The commands before the first page of an unknown stream; returns what the reader has to read."""
        head += data
        while True:
            rest = head[self.reader.offset :]
            size = 5 + int.from_bytes(rest[3:5], "big")
            if len(rest) < 5 and rest[:1] != b"\0":
                return b""
            if rest[0] != el.Element.COMMAND:
                break
            if len(rest) < size:
                return b""
            for event in self.reader.feed(bytes(rest[:size])):
                if isinstance(event, el.BitmapRequest):
                    self._asked.append(el.BlockInfo(event.block, UNKNOWN_LENGTH))
                yield from self._take(event)
        if rest[0] in (el.Element.SECTION_PART, el.Element.SECTION_END):
            known = StreamReader()
            known.blocks, known.ram_section = tuple(self._asked), int.from_bytes(rest[1:5], "big")
            commands = bytes(head[: self.reader.offset])
            self.reader = StreamReader(self.reader.ram, limit=LIMIT, continues=known)
            for _ in self.reader.feed(commands):  # they were told of
                pass
        self._head = None
        return bytes(rest)

    def _number(self, name: str) -> tuple[str, int]:
        self._count[name] += 1
        return name, self._count[name]

    def _take(self, event: el.StreamEvent) -> Iterator[Seen]:
        yield from self._elements(event)
        if not isinstance(event, EndOfSection):  # its footer belongs to it
            self._known = event.offset + 1 if isinstance(event, el.EndOfStream) else self.reader.offset

    def _elements(self, event: el.StreamEvent) -> Iterator[Seen]:
        end = self.reader.offset
        match event:
            case el.RamRun():
                assert self._round is not None
                self._round["filled" if event.fill else event.kind.value] += event.pages
                names = ["page", "postcopy-page"] if self._postcopy else ["page"]
                for name in names:
                    self._count[name] += event.pages
                if self.reader.ram is RamMode.EACH:
                    yield Seen("", event.offset, end, tuple((name, self._count[name]) for name in names))
            case el.SectionPart() | el.SectionEnd():
                self._round = Counter()
                self._last = isinstance(event, el.SectionEnd)
            case EndOfSection():
                self._pages, self._round, self._known = self._round, None, end - 8
            case el.Footer() if self._pages is not None:
                pages, self._pages = self._pages, None
                self.tail = self._last and not self._postcopy
                number = self._number("round")
                details = {"number": number[1], "pages": dict(pages), "last": self._last}
                yield Seen("round", end - ROUND_END, end, (number,), details)
            case RamPage() | el.RamFlush() | el.RamData() | el.Footer():
                pass
            case el.Package():
                yield from self._package(event, end)
            case el.DeviceSection():
                yield _section(event, package=False)
            case el.EndOfStream():
                self.tail = False
                yield Seen("eof", event.offset, event.offset + 1, (("eof", None),))
            case el.VmDescription():
                more = {"disagrees": str(event.disagrees)} if event.disagrees else _NOTHING
                yield Seen("description", event.offset, end, (), {"size": len(event.text), **more})
            case _:
                name, value, details = _told(event)
                if name in ("discard", "recv-bitmap"):
                    value = self._number(name)[1]
                yield Seen(name, event.offset, end, ((name, value),), details)

    def _package(self, event: el.Package, end: int) -> Iterator[Seen]:
        self._postcopy = True
        yield Seen("package", event.offset, end, (("package", None),), {"size": len(event.blob)}, event.start)
        try:
            found = split_package(event).elements
        except StreamError as error:
            yield Seen("unreadable", event.start, event.start, (), {"reason": str(error)})
            return
        for inner in found:
            if isinstance(inner, el.DeviceSection):
                yield _section(inner, package=True)
            else:
                name, value, details = _told(inner)
                stop = inner.offset + len(inner.encode())
                yield Seen(name, inner.offset, stop, ((name, value),), {**details, "package": True})


def _section(event: el.DeviceSection, *, package: bool) -> Seen:
    details = {
        "section": event.idstr,
        "instance": event.instance,
        "version": event.version,
        "size": len(event.body),
        "package": package,
    }
    names = [event.idstr, *([event.idstr.rpartition("/")[2]] if "/" in event.idstr else [])]
    points = tuple(("section", name) for name in names) if package else ()
    return Seen("section", event.offset, event.offset + len(event.encode()), points, details)


def _told(event: el.StreamEvent | el.Command) -> tuple[str, int | None, dict[str, Any]]:
    """The name of an element, its value, its details."""
    match event:
        case el.Header():
            return "head", None, _NOTHING
        case el.Configuration():
            more = {} if event.capabilities is None else {"capabilities": list(event.capabilities)}
            return "configuration", None, {"machine": event.machine, **more}
        case el.OpenReturnPath():
            return "open-return-path", None, _NOTHING
        case el.Ping():
            return "ping", event.value, {"value": event.value}
        case el.PostcopyAdvise():
            return "advise", None, {"page_sizes": event.page_sizes, "target_page": event.target_page}
        case el.RamDiscard():
            length = sum(count for _, count in event.ranges)
            return "discard", None, {"block": event.block, "ranges": len(event.ranges), "bytes": length}
        case el.BitmapRequest():
            return "recv-bitmap", None, {"block": event.block}
        case el.SectionStart():
            return "start", None, {"section": event.idstr, "id": event.section_id}
        case el.RamBlocks():
            blocks = {block.name: block.length for block in event.blocks}
            return "blocks", None, {"total": event.total, "blocks": blocks}
    names: dict[type, str] = {
        el.PostcopyListen: "listen",
        el.PostcopyRun: "run",
        el.PostcopyResume: "resume",
        el.SwitchoverStart: "switchover",
        el.EnableColo: "enable-colo",
    }
    return names.get(type(event), type(event).__name__.lower()), None, _NOTHING


class PreemptWatch(_Reading):
    """The second connection of postcopy-preempt: pages without frames, of the blocks of the main connection."""

    def __init__(self, blocks: tuple[el.BlockInfo, ...]) -> None:
        self._buffer = Buffer()
        self._pages = 0
        self._sum: Counter[str] = Counter()
        self._records = RamScanner(blocks).records(self._buffer, pages=False, postcopy=True, each=True)

    @property
    def parsed(self) -> int:  # type: ignore[override]
        return self._buffer.offset

    def feed(self, data: bytes) -> Iterator[Seen]:
        if self.blind:
            return
        self._buffer.feed(data)
        while True:
            try:
                event = next(self._records)
            except StopIteration:
                self.blind = True
                yield Seen("round", 0, self.parsed, (("round", 1),), self._details(last=True))
                return
            except StreamError as error:
                yield self._unreadable(error)
                return
            if event is None:
                return
            assert isinstance(event, el.RamRun)
            self._sum[event.kind.value] += event.pages
            self._pages += event.pages
            points = (("page", self._pages), ("postcopy-page", self._pages))
            yield Seen("", event.offset, self.parsed, points)

    def eof(self) -> Iterator[Seen]:
        if not self.blind:
            yield Seen("round", 0, self.parsed, (), self._details(last=True))

    def _details(self, *, last: bool) -> dict[str, Any]:
        return {"number": 1, "pages": dict(self._sum), "last": last}


class ReturnPathWatch(_Reading):
    """The return path of a main connection, or of a recovery."""

    def __init__(self) -> None:
        self._decoder = ReturnPathDecoder()
        self._count: Counter[str] = Counter()

    @property
    def parsed(self) -> int:  # type: ignore[override]
        return self._decoder.offset

    def feed(self, data: bytes) -> Iterator[Seen]:
        if self.blind:
            return
        begin = self.parsed
        try:
            for message in self._decoder.feed(data):
                end = self.parsed
                name, value, details = self._told(message)
                yield Seen(name, begin, end, ((name, value),), details)
                begin = end
        except StreamError as error:
            yield self._unreadable(error)

    def _told(self, message: ReturnPathMessage) -> tuple[str, int | None, dict[str, Any]]:
        match message:
            case PageRequest():
                self._count["request"] += 1
                number = self._count["request"]
                where = {"block": message.block, "start": message.start, "length": message.length}
                return "request", number, {"number": number, **where}
            case ReceivedBitmap():
                self._count["bitmap"] += 1
                number = self._count["bitmap"]
                pages = int.from_bytes(message.bits, "little").bit_count()
                return "bitmap", number, {"number": number, "block": message.block, "received": pages}
            case Pong():
                return "pong", message.value, {"value": message.value}
            case Shut():
                return "shut", None, {"status": message.status}
            case ResumeAck():
                return "resume-ack", None, {"value": message.value}
            case SwitchoverAck():
                return "switchover-ack", None, _NOTHING
