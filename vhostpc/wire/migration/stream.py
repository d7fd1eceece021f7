"""QEMU's migration stream, forward direction: bytes that arrive in pieces become the values of ``elements``.

No I/O, and bounded: at most one element, a package or the device sections at the end are kept. Two ways
to use it::

    for event in reader.feed(data): ...          # everything here; RAM as runs, or page by page

    reader = StreamReader(RamMode.PAUSE)
    for event in reader.feed(data):
        if isinstance(event, RamData):           # the last event of this round
            unread = reader.hand_over()          # for the loader, before what it reads itself
    # The loader reads records to the end of the section (the word 0x10 included) ...
    reader.resume(consumed, rest)                # how much it took, and bytes that it read too far
    for event in reader.feed(b""): ...           # the footer, and so on

Device sections carry no length. In precopy they come last, before the description that gives their lengths, so they are
returned together, when the description is complete (or at :meth:`StreamReader.eof`, if there is none). Those in a
package are returned by :func:`~vhostpc.wire.migration.split.read_package`. A guest that can write a device's state
could have forged an earlier end: where more bytes follow an end, :attr:`StreamReader.may_end` says so, and
:meth:`StreamReader.eof` accepts it.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator

from vhostpc.errors import LocalProtocolError
from vhostpc.wire.buffer import Buffer
from vhostpc.wire.migration.devices import LastSections, early_section
from vhostpc.wire.migration.elements import (
    MAGIC,
    MAX_PACKAGE,
    RAM_VERSION,
    U32,
    VERSION,
    BadStream,
    BlockInfo,
    Busy,
    CommandType,
    Configuration,
    DeviceSection,
    Element,
    EndOfStream,
    Footer,
    Header,
    OpenReturnPath,
    Package,
    Ping,
    PostcopyAdvise,
    PostcopyListen,
    PostcopyRun,
    RamData,
    RamDiscard,
    SectionEnd,
    SectionPart,
    SectionStart,
    Steps,
    StreamEvent,
    VmDescription,
    parse_command,
    text_of,
)
from vhostpc.wire.migration.ramscan import RamScanner, block_list

MAX_DEVICES = MAX_PACKAGE
"""Default limit of device sections, in a package or at the end, in bytes: all that QEMU accepts."""
MAX_MACHINE = 256
_MAX_CAPABILITIES = 64


class RamMode(enum.Enum):
    """The form in which RAM records are returned."""

    RUNS = "runs"
    """:class:`~vhostpc.wire.migration.elements.RamRun`, without the content."""
    EACH = "each"
    """The same, each page as a run of its own: :attr:`StreamReader.offset` is then the byte behind it."""
    PAGES = "pages"
    """:class:`~vhostpc.wire.migration.ramrec.RamPage`, each with its content."""
    PAUSE = "pause"
    """:class:`~vhostpc.wire.migration.elements.RamData`; another reader takes them over."""


def _only_events(found: Iterator[StreamEvent | Busy]) -> Iterator[StreamEvent]:
    return (event for event in found if not isinstance(event, Busy))


class StreamReader:
    """Reads one main connection. All errors are :class:`~vhostpc.wire.migration.elements.BadStream`, and final.

    ``limit``: bytes of device sections or of a package. ``continues``: the reader of the connection that was
    lost in postcopy; then this is the one of its recovery, which has no header and knows blocks and section.
    """

    def __init__(
        self,
        ram: RamMode = RamMode.RUNS,
        *,
        limit: int = MAX_DEVICES,
        continues: StreamReader | None = None,
    ) -> None:
        self.blocks: tuple[BlockInfo, ...] = ()
        """The RAM blocks, once they were listed."""
        self.ram_section: int | None = None
        self.advised: PostcopyAdvise | None = None
        self.postcopy = False
        """The package has arrived: the rest is pages, each once."""
        self.ended = False
        """The whole stream was read, its description too if it has one."""
        self.paused = False
        self.ram = ram
        """May be changed: it holds from the next section on."""
        self._limit = limit
        self._buffer = Buffer()
        self._scanner = RamScanner()
        self._handed = self._footer_taken = False
        self._closed = False
        self._fresh = continues is None
        self._return_path = False
        self._capabilities: tuple[str, ...] = ()
        self._ram_ended = False
        self._early: list[DeviceSection] = []
        self._last: LastSections | None = None
        self._inside = "the header"
        self._error: BadStream | None = None
        if continues is not None:
            self.blocks, self.ram_section = continues.blocks, continues.ram_section
            self.postcopy = self._return_path = True
            self._scanner = RamScanner(self.blocks)
        self._steps = self._parse()

    @property
    def offset(self) -> int:
        """Byte of the stream up to which everything was read."""
        return self._buffer.offset

    @property
    def unread(self) -> int:
        """Bytes that were fed and not read; after the end: bytes that do not belong to the stream."""
        return len(self._buffer)

    @property
    def may_end(self) -> bool:
        """The whole stream has arrived, if the unread bytes do not belong to it: then :meth:`eof` ends it."""
        return self._last is not None and self._last.may_end

    @property
    def doubt(self) -> int | None:
        """After the end: a byte before which the device sections have a second reading."""
        return None if self._last is None else self._last.doubt

    def feed(self, data: bytes) -> Iterator[StreamEvent]:
        """Take bytes; yields completed elements. Raises BadStream when iterated."""
        return _only_events(self.feed_in_slices(data))

    def feed_in_slices(self, data: bytes) -> Iterator[StreamEvent | Busy]:
        """As :meth:`feed`, with BUSY between pieces of long work."""
        if self._handed:
            raise LocalProtocolError("another reader has the stream: call resume() first")
        self._buffer.feed(data)
        return self._events()

    def eof(self) -> Iterator[StreamEvent]:
        """The connection ended; yields elements that this completes. Raises BadStream inside an element."""
        return _only_events(self.eof_in_slices())

    def eof_in_slices(self) -> Iterator[StreamEvent | Busy]:
        """As :meth:`eof`, with BUSY between pieces of long work."""
        self._closed = True
        if self._last is not None:
            self._last.closed = True
        yield from self._events()
        if not self.ended:
            at = self._buffer.offset + len(self._buffer)
            where = f"inside {self._inside}" if self._inside else "where its next element belongs"
            raise self._fail(BadStream(at, f"the stream ends {where}"))

    def hand_over(self) -> bytes:
        """At :class:`RamData`: the bytes that were fed and not read, which now belong to the loader."""
        if not self.paused:
            raise LocalProtocolError("the stream is not at RAM data")
        self._handed = True
        return self._buffer.swap(b"", self._buffer.offset)

    def resume(self, consumed: int, rest: bytes = b"", *, footer: bool = False, ended: bool = False) -> None:
        """Continue ``consumed`` bytes after the first RAM record; ``rest`` was read too far and is the reader's.

        ``footer``: the consumed bytes end with a footer (and may contain further parts of RAM; ``ended``: also the
        last one), otherwise with the end of the section.
        """
        if not self._handed:
            raise LocalProtocolError("the stream was not handed over")
        self._buffer.swap(rest, self._buffer.offset + consumed)
        self._footer_taken = footer
        self._ram_ended = self._ram_ended or ended
        self._handed = self.paused = False

    def _fail(self, error: BadStream) -> BadStream:
        self._error = error
        return error

    def _events(self) -> Iterator[StreamEvent | Busy]:
        if self._error is not None:
            raise self._error
        try:
            for event in self._steps:
                if event is None:
                    return
                yield event
        except BadStream as error:
            self._error = error
            raise

    # --- pieces

    def _take(self, count: int) -> Steps[bytes]:
        buffer = self._buffer
        while len(buffer) < count:
            yield None
        return buffer.take(count)

    def _u32(self) -> Steps[int]:
        return int.from_bytes((yield from self._take(4)), "big")

    def _name(self, what: str) -> Steps[str]:
        at = self._buffer.offset
        size = (yield from self._take(1))[0]
        raw = yield from self._take(size)
        if not raw or not all(0x20 <= byte < 0x7F for byte in raw):
            raise BadStream(at, f"{what} whose name is empty or not printable")
        return text_of(raw)

    # --- the grammar

    def _parse(self) -> Steps[None]:
        if self._fresh:
            yield from self._header()
            yield from self._configuration()
        while True:
            at = self._buffer.offset
            self._inside = ""
            kind = (yield from self._take(1))[0]
            if kind == Element.EOF:
                yield from self._end(at)
                return
            if kind == Element.COMMAND:
                yield from self._command(at)
            elif kind == Element.SECTION_START:
                yield from self._start(at)
            elif kind in (Element.SECTION_PART, Element.SECTION_END):
                yield from self._part(at, kind == Element.SECTION_END)
            elif kind == Element.SECTION_FULL:
                if self.postcopy:
                    raise BadStream(at, "a device section behind the package")
                if (yield from self._full_section(at)):
                    return
            else:
                names = {
                    Element.CONFIGURATION: "a second configuration",
                    Element.FOOTER: "a footer without its section",
                    Element.VMDESCRIPTION: "a description before the end of the stream",
                    Element.SUBSECTION: "a subsection outside any section",
                }
                what = {int(k): v for k, v in names.items()}.get(kind)
                raise BadStream(at, what or f"{kind:#04x}, which begins no element of the stream")

    def _header(self) -> Steps[None]:
        if (yield from self._take(4)) != MAGIC:
            raise BadStream(0, "not a migration stream: it does not begin with QEVM")
        version = yield from self._u32()
        if version != VERSION:
            raise BadStream(4, f"a migration stream of version {version}, not {VERSION}")
        yield Header(offset=0)

    def _configuration(self) -> Steps[None]:
        at = self._buffer.offset
        self._inside = "the configuration"
        kind = (yield from self._take(1))[0]
        if kind == Element.SECTION_START:
            raise BadStream(
                at,
                "no configuration behind the header: a machine type of QEMU 2.3 or before, which is not accepted",
            )
        if kind != Element.CONFIGURATION:
            raise BadStream(at, "no configuration behind the header")
        size = yield from self._u32()
        if not 0 < size <= MAX_MACHINE:
            raise BadStream(at + 1, f"a machine type of {size} bytes, from 1 to {MAX_MACHINE} are accepted")
        machine = text_of((yield from self._take(size)))
        bits: int | None = None
        capabilities: tuple[str, ...] | None = None
        uuid: bytes | None = None
        seen: set[str] = set()
        while True:
            while not len(self._buffer):
                yield None
            where = self._buffer.offset
            if self._buffer.data[self._buffer.at] != Element.SUBSECTION:
                break
            self._buffer.at += 1
            name = yield from self._name("a part of the configuration")
            version = yield from self._u32()
            if name in seen or version != 1:
                again = "again" if name in seen else f"in version {version}"
                raise BadStream(where, f"configuration {name!r} {again}")
            seen.add(name)
            if name == "configuration/target-page-bits":
                bits = yield from self._u32()
            elif name == "configuration/uuid":
                uuid = yield from self._take(16)
            elif name == "configuration/capabilities":
                count = yield from self._u32()
                if count > _MAX_CAPABILITIES:
                    raise BadStream(where, f"{count} capabilities, at most {_MAX_CAPABILITIES}")
                names: list[str] = []
                for _ in range(count):
                    names.append((yield from self._name("a capability")))
                capabilities = tuple(names)
            else:
                raise BadStream(where, f"configuration {name!r}, which is unknown")
        self._capabilities = capabilities or ()
        yield Configuration(machine, bits, capabilities, uuid, offset=at)

    def _command(self, at: int) -> Steps[None]:
        self._inside = f"the command at byte {at}"
        head = yield from self._take(4)
        kind, size = int.from_bytes(head[:2], "big"), int.from_bytes(head[2:], "big")
        if kind not in set(CommandType):
            raise BadStream(at, f"command {kind} is unknown")
        if kind == CommandType.PACKAGED:
            yield from self._package(at, size)
            return
        event = parse_command(kind, (yield from self._take(size)), at)
        wrong = None
        if isinstance(event, OpenReturnPath):
            self._return_path = True
        elif isinstance(event, Ping) and not self._return_path:
            wrong = "a PING before OPEN_RETURN_PATH"
        elif isinstance(event, PostcopyAdvise):
            if self.advised is not None or self.blocks:
                wrong = "POSTCOPY_ADVISE " + (
                    "again" if self.advised is not None else "behind the start of RAM"
                )
            self.advised = event
        elif isinstance(event, PostcopyListen | PostcopyRun):
            wrong = f"{CommandType(kind).name} outside a package"
        elif isinstance(event, RamDiscard):
            wrong = self._wrong_discard(event)
        if wrong is not None:
            raise BadStream(at, wrong)
        yield event

    @property
    def _may_switch(self) -> bool:
        """RAM may arrive by postcopy: it was advised, and not for dirty bitmaps alone."""
        return self.advised is not None and self.advised.page_sizes is not None

    def _wrong_discard(self, event: RamDiscard) -> str | None:
        if not self._may_switch or self.postcopy:
            return "POSTCOPY_RAM_DISCARD " + ("behind the package" if self.postcopy else "without ADVISE")
        length = self._scanner.lengths.get(event.block)
        if length is None:
            return f"discard in RAM block {event.block!r}, which was not listed"
        for start, count in event.ranges:
            if start + count > length:
                return f"discard of {count:#x} bytes at {start:#x} of {event.block!r}, which has {length:#x}"
        return None

    def _package(self, at: int, size: int) -> Steps[None]:
        if size != 4:
            raise BadStream(at, f"command PACKAGED with {size} bytes, which is the wrong length")
        if not self._may_switch or self.postcopy or not self.blocks:
            raise BadStream(at, "a second package" if self.postcopy else "a package without ADVISE and RAM")
        length = yield from self._u32()
        if length > self._limit:
            raise BadStream(at, f"a package of {length} bytes, at most {self._limit} are accepted")
        start = self._buffer.offset
        self._inside = f"the package at byte {at}"
        blob = yield from self._take(length)
        self.postcopy = True
        yield Package(blob, offset=at, start=start)

    def _start(self, at: int) -> Steps[None]:
        self._inside = f"the section at byte {at}"
        section_id = yield from self._u32()
        name = yield from self._name("a section")
        instance = yield from self._u32()
        version = yield from self._u32()
        if name != "ram":
            raise BadStream(at, f"section {name!r} comes in parts and is not RAM: its form is unknown")
        if self.ram_section is not None:
            raise BadStream(at, "RAM starts a second time")
        if instance or version != RAM_VERSION:
            raise BadStream(at, f"RAM of instance {instance} and version {version}, not 0 and {RAM_VERSION}")
        self.ram_section = section_id
        yield SectionStart(section_id, name, instance, version, offset=at)
        if "mapped-ram" in self._capabilities:
            raise BadStream(at, "RAM in the mapped-ram format: its pages lie at fixed places in the file")
        self._inside = "the list of RAM blocks"
        sizes = None if self.advised is None else self.advised.page_sizes
        listed = yield from block_list(self._buffer, sizes, "x-ignore-shared" in self._capabilities)
        self.blocks = listed.blocks
        self._scanner = RamScanner(self.blocks)
        yield listed
        yield from self._footer(section_id)

    def _part(self, at: int, last: bool) -> Steps[None]:
        self._inside = f"the RAM section at byte {at}"
        section_id = yield from self._u32()
        if section_id != self.ram_section:
            raise BadStream(at, f"a part of section {section_id}, which never started")
        self._ram_ended = self._ram_ended or last  # QEMU reads parts after the last one, too
        yield (SectionEnd if last else SectionPart)(section_id, offset=at)
        if self.ram is RamMode.PAUSE:
            self.paused, self._footer_taken = True, False
            yield RamData(section_id, offset=self._buffer.offset)
            while self.paused:
                yield None
            if self._footer_taken:
                return
        else:
            yield (
                yield from self._scanner.records(
                    self._buffer, self.ram is RamMode.PAGES, self.postcopy, self.ram is RamMode.EACH
                )
            )
        yield from self._footer(section_id)

    def _footer(self, section_id: int) -> Steps[None]:
        at = self._buffer.offset
        found = yield from self._take(5)
        if found[0] != Element.FOOTER:
            raise BadStream(at, f"{found[0]:#04x}, where the footer of section {section_id} belongs")
        if found[1:] != U32.pack(section_id):
            raise BadStream(
                at, f"the footer of section {int.from_bytes(found[1:], 'big')}, not of {section_id}"
            )
        yield Footer(section_id, offset=at)

    def _end(self, at: int) -> Steps[None]:
        yield EndOfStream(offset=at)
        if self.postcopy:
            self.ended = True
            return
        while not len(self._buffer):
            if self._closed:
                self.ended = True
                return
            yield None
        if self._buffer.data[self._buffer.at] == Element.VMDESCRIPTION:
            self._inside = "the description"
            where = self._buffer.offset
            self._buffer.at += 1
            size = yield from self._u32()
            if size > self._limit:
                raise BadStream(where, f"a description of {size} bytes, at most {self._limit} are accepted")
            yield VmDescription((yield from self._take(size)), offset=where)
        self.ended = True

    # --- device sections

    def _full_section(self, at: int) -> Steps[bool]:
        """Whether it was the first of the remaining ones."""
        self._buffer.at -= 1
        if not self._ram_ended:  # virtio-mem's, since QEMU 8.0: before the pages
            self._inside = f"the section at byte {at}"
            section = yield from early_section(self._buffer, self.ram_section, self._limit)
            self._early.append(section)
            yield section
            return False
        self._last = LastSections(self._buffer, self._limit, self._early)
        self._last.closed = self._closed
        self.ended = yield from self._last.read()
        self._inside = self._last.inside
        return True
