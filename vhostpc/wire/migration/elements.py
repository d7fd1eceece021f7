"""The elements of QEMU's migration stream as values; each encodes itself.

Integers are big-endian. A name is u8 length and that many bytes, never empty. ``offset`` is the byte of the
stream where the element begins (-1 for one that was not read from a stream); it does not count in comparisons.
Source: QEMU, docs/devel/migration (the stream format) and recordings of its versions 7.2 and 10.0.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import TypeVar

from vhostpc.enums import SpecEnum
from vhostpc.errors import LocalProtocolError, StreamError
from vhostpc.units import TARGET_PAGE
from vhostpc.wire.migration.ramrec import EndOfSection, RamFlag, RamPage

MAGIC = b"QEVM"
VERSION = 3
RAM_VERSION = 4

U16, U32, U64 = struct.Struct(">H"), struct.Struct(">I"), struct.Struct(">Q")
_COMMAND = struct.Struct(">BHH")
_SECTION = struct.Struct(">BI")
_PAIR = struct.Struct(">QQ")


class Element(SpecEnum):
    """The first byte of an element."""

    EOF = 0
    SECTION_START = 1
    SECTION_PART = 2
    SECTION_END = 3
    SECTION_FULL = 4
    SUBSECTION = 5
    VMDESCRIPTION = 6
    CONFIGURATION = 7
    COMMAND = 8
    FOOTER = 0x7E


class CommandType(SpecEnum):
    """QEMU's MIG_CMD."""

    OPEN_RETURN_PATH = 1
    PING = 2
    POSTCOPY_ADVISE = 3
    POSTCOPY_LISTEN = 4
    POSTCOPY_RUN = 5
    POSTCOPY_RAM_DISCARD = 6
    PACKAGED = 7
    ENABLE_COLO = 8
    POSTCOPY_RESUME = 9
    RECV_BITMAP = 10
    SWITCHOVER_START = 11


class BadStream(StreamError):
    """A migration stream that is wrong at byte ``offset``; ``reason`` says how."""

    def __init__(self, offset: int, reason: str) -> None:
        super().__init__(f"migration stream, byte {offset} ({offset:#x}): {reason}")
        self.offset = offset
        self.reason = reason


def text_of(raw: bytes) -> str:
    """A name from the wire; bytes that are not UTF-8 survive the round trip."""
    return raw.decode("utf-8", "surrogateescape")


def name_bytes(name: str) -> bytes:
    """u8 length and the bytes. Raises LocalProtocolError."""
    raw = name.encode("utf-8", "surrogateescape")
    if not 0 < len(raw) < 256:
        raise LocalProtocolError(f"a name must have 1 to 255 bytes, not {len(raw)}")
    return bytes([len(raw)]) + raw


def _command(kind: CommandType, payload: bytes = b"") -> bytes:
    if len(payload) > 0xFFFF:
        raise LocalProtocolError(f"{kind.name} with {len(payload)} bytes, at most 65535")
    return _COMMAND.pack(Element.COMMAND, kind, len(payload)) + payload


@dataclass(frozen=True, slots=True)
class At:
    """The start of an element."""

    offset: int = field(default=-1, compare=False, kw_only=True)


@dataclass(frozen=True, slots=True)
class Header(At):
    """Magic and version: the first bytes of the first connection."""

    def encode(self) -> bytes:
        return MAGIC + U32.pack(VERSION)


@dataclass(frozen=True, slots=True)
class Configuration(At):
    """The machine type, and the settings that both sides must share; None where the source did not send them."""

    machine: str
    target_page_bits: int | None = None
    capabilities: tuple[str, ...] | None = None
    uuid: bytes | None = None

    def encode(self) -> bytes:
        machine = self.machine.encode("utf-8", "surrogateescape")
        out = bytes([Element.CONFIGURATION]) + U32.pack(len(machine)) + machine
        if self.target_page_bits is not None:
            out += self._sub("configuration/target-page-bits", U32.pack(self.target_page_bits))
        if self.capabilities is not None:
            names = b"".join(name_bytes(name) for name in self.capabilities)
            out += self._sub("configuration/capabilities", U32.pack(len(self.capabilities)) + names)
        if self.uuid is not None:
            out += self._sub("configuration/uuid", self.uuid)
        return out

    @staticmethod
    def _sub(name: str, body: bytes) -> bytes:
        return bytes([Element.SUBSECTION]) + name_bytes(name) + U32.pack(1) + body


# --- commands ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class OpenReturnPath(At):
    """From here on the destination may write on the same connection."""

    def encode(self) -> bytes:
        return _command(CommandType.OPEN_RETURN_PATH)


@dataclass(frozen=True, slots=True)
class Ping(At):
    """To be answered by a PONG with the same value, when everything before it is done."""

    value: int

    def encode(self) -> bytes:
        return _command(CommandType.PING, U32.pack(self.value))


@dataclass(frozen=True, slots=True)
class PostcopyAdvise(At):
    """Postcopy may follow. ``page_sizes``: all host page sizes of RAM, OR-ed; both None: not of RAM."""

    page_sizes: int | None = None
    target_page: int | None = None

    def encode(self) -> bytes:
        if self.page_sizes is None or self.target_page is None:
            return _command(CommandType.POSTCOPY_ADVISE)
        return _command(CommandType.POSTCOPY_ADVISE, _PAIR.pack(self.page_sizes, self.target_page))


@dataclass(frozen=True, slots=True)
class PostcopyListen(At):
    """Be ready for faults: the first element of the package."""

    def encode(self) -> bytes:
        return _command(CommandType.POSTCOPY_LISTEN)


@dataclass(frozen=True, slots=True)
class PostcopyRun(At):
    """Start the guest: the last element of the package."""

    def encode(self) -> bytes:
        return _command(CommandType.POSTCOPY_RUN)


@dataclass(frozen=True, slots=True)
class RamDiscard(At):
    """Forget ``ranges`` (start, length in bytes) of ``block``."""

    block: str
    ranges: tuple[tuple[int, int], ...]

    def encode(self) -> bytes:
        payload = b"\0" + name_bytes(self.block) + b"\0" + b"".join(_PAIR.pack(*r) for r in self.ranges)
        return _command(CommandType.POSTCOPY_RAM_DISCARD, payload)


LOADED = 3
"""The PING inside a package: its PONG says that all device state was loaded."""
MUST_HEAR = 0x42
"""Another PING, of QEMU 10.2 and later: without its PONG the source runs its machine again."""
MAX_PACKAGE = 0xFFFFFFFF
"""Bytes of a package, at most: the stream has its length in 32 bits, and QEMU has no other limit."""


@dataclass(frozen=True, slots=True)
class Package(At):
    """A stream within the stream; ``offset`` is that of the command, ``start`` that of the first byte inside."""

    blob: bytes
    start: int = field(default=-1, compare=False, kw_only=True)

    def encode(self) -> bytes:
        return _command(CommandType.PACKAGED, U32.pack(len(self.blob))) + self.blob


@dataclass(frozen=True, slots=True)
class EnableColo(At):
    def encode(self) -> bytes:
        return _command(CommandType.ENABLE_COLO)


@dataclass(frozen=True, slots=True)
class PostcopyResume(At):
    """Recovery: to be answered by RESUME_ACK."""

    def encode(self) -> bytes:
        return _command(CommandType.POSTCOPY_RESUME)


@dataclass(frozen=True, slots=True)
class BitmapRequest(At):
    """Recovery (RECV_BITMAP): asks which pages of ``block`` have arrived."""

    block: str

    def encode(self) -> bytes:
        return _command(CommandType.RECV_BITMAP, name_bytes(self.block))


@dataclass(frozen=True, slots=True)
class SwitchoverStart(At):
    """The guest is stopped; the rest of the stream is the last part (QEMU 10.0 with its newest machine types)."""

    def encode(self) -> bytes:
        return _command(CommandType.SWITCHOVER_START)


# --- sections ---------------------------------------------------------------------------------------


def _section_head(kind: Element, section_id: int, idstr: str, instance: int, version: int) -> bytes:
    return _SECTION.pack(kind, section_id) + name_bytes(idstr) + U32.pack(instance) + U32.pack(version)


@dataclass(frozen=True, slots=True)
class SectionStart(At):
    """The first section of an object that is sent in parts; here only RAM is."""

    section_id: int
    idstr: str = "ram"
    instance: int = 0
    version: int = RAM_VERSION

    def encode(self) -> bytes:
        return _section_head(Element.SECTION_START, self.section_id, self.idstr, self.instance, self.version)


@dataclass(frozen=True, slots=True)
class SectionPart(At):
    section_id: int

    def encode(self) -> bytes:
        return _SECTION.pack(Element.SECTION_PART, self.section_id)


@dataclass(frozen=True, slots=True)
class SectionEnd(At):
    """The last part begins."""

    section_id: int

    def encode(self) -> bytes:
        return _SECTION.pack(Element.SECTION_END, self.section_id)


@dataclass(frozen=True, slots=True)
class Footer(At):
    """Ends every section."""

    section_id: int

    def encode(self) -> bytes:
        return _SECTION.pack(Element.FOOTER, self.section_id)


@dataclass(frozen=True, slots=True)
class BlockInfo:
    """A RAM block as the source lists it. ``page_size`` only where it is not the target's and postcopy was
    advised, ``guest_address`` only with the capability x-ignore-shared."""

    name: str
    length: int
    page_size: int | None = None
    guest_address: int | None = None

    def encode(self) -> bytes:
        out = name_bytes(self.name) + U64.pack(self.length)
        for more in (self.page_size, self.guest_address):
            out += b"" if more is None else U64.pack(more)
        return out


@dataclass(frozen=True, slots=True)
class RamBlocks(At):
    """The body of RAM's first section: the blocks. ``flush``: a multifd marker stands before the end."""

    blocks: tuple[BlockInfo, ...]
    flush: bool = False

    @property
    def total(self) -> int:
        """Bytes of all blocks."""
        return sum(block.length for block in self.blocks)

    def encode(self) -> bytes:
        body = b"".join(block.encode() for block in self.blocks)
        if self.flush:
            body += U64.pack(RamFlag.MULTIFD_FLUSH)
        return U64.pack(self.total | RamFlag.MEM_SIZE) + body + U64.pack(RamFlag.EOS)


@dataclass(frozen=True, slots=True)
class RamData(At):
    """RAM records begin here and the reader pauses: see :meth:`StreamReader.hand_over`."""

    section_id: int


class RunKind(enum.Enum):
    """The encoding of a page."""

    DATA = "data"
    ZERO = "zero"
    XBZRLE = "xbzrle"
    COMPRESSED = "compressed"


@dataclass(frozen=True, slots=True)
class RamRun(At):
    """``pages`` target pages from byte ``start`` of ``block`` that follow one another; ``fill`` of ZERO."""

    block: str
    start: int
    pages: int
    kind: RunKind
    fill: int = 0

    @property
    def length(self) -> int:
        return self.pages * TARGET_PAGE


@dataclass(frozen=True, slots=True)
class RamFlush(At):
    """Multifd: the channels meet here."""

    def encode(self) -> bytes:
        return U64.pack(RamFlag.MULTIFD_FLUSH)


@dataclass(frozen=True, slots=True)
class DeviceSection(At):
    """A device's whole state: header, ``body`` as it arrived, footer. ``early``: it came before the last pages."""

    section_id: int
    idstr: str
    instance: int
    version: int
    body: bytes = field(repr=False)
    early: bool = field(default=False, compare=False, kw_only=True)

    def encode(self) -> bytes:
        head = _section_head(Element.SECTION_FULL, self.section_id, self.idstr, self.instance, self.version)
        return head + self.body + Footer(self.section_id).encode()


@dataclass(frozen=True, slots=True)
class EndOfStream(At):
    def encode(self) -> bytes:
        return bytes([Element.EOF])


@dataclass(frozen=True, slots=True)
class VmDescription(At):
    """JSON about the device sections, after the end. ``disagrees``: its contradiction to the bytes."""

    text: bytes = field(repr=False)
    disagrees: BadStream | None = field(default=None, compare=False)

    def encode(self) -> bytes:
        return bytes([Element.VMDESCRIPTION]) + U32.pack(len(self.text)) + self.text


Command = (
    OpenReturnPath
    | Ping
    | PostcopyAdvise
    | PostcopyListen
    | PostcopyRun
    | RamDiscard
    | Package
    | EnableColo
    | PostcopyResume
    | BitmapRequest
    | SwitchoverStart
)
RamEvent = RamBlocks | RamData | RamRun | RamFlush | RamPage | EndOfSection
StreamEvent = (
    Header
    | Configuration
    | Command
    | SectionStart
    | SectionPart
    | SectionEnd
    | Footer
    | RamEvent
    | DeviceSection
    | EndOfStream
    | VmDescription
)


class Busy(enum.Enum):
    """No result yet, although bytes are available: the next call continues."""

    BUSY = enum.auto()


T = TypeVar("T")
Steps = Generator[StreamEvent | Busy | None, None, T]
"""Reading of bytes that arrive in pieces: None asks for more."""
Slices = Generator[Busy, None, T]
"""Work on bytes that have arrived, cut into pieces of some milliseconds."""


def at_once(work: Slices[T]) -> T:
    """The result of work that is not interrupted."""
    while True:
        try:
            next(work)
        except StopIteration as end:
            found: T = end.value
            return found


def parse_command(kind: int, payload: bytes, at: int) -> Command:
    """A command but PACKAGED from its number and payload. Raises BadStream."""
    try:
        command = CommandType(kind)
    except ValueError:
        raise BadStream(at, f"command {kind} is unknown") from None
    plain: dict[CommandType, type[Command]] = {
        CommandType.OPEN_RETURN_PATH: OpenReturnPath,
        CommandType.POSTCOPY_LISTEN: PostcopyListen,
        CommandType.POSTCOPY_RUN: PostcopyRun,
        CommandType.ENABLE_COLO: EnableColo,
        CommandType.POSTCOPY_RESUME: PostcopyResume,
        CommandType.SWITCHOVER_START: SwitchoverStart,
    }
    size = len(payload)
    if command in plain and size == 0:
        return plain[command](offset=at)  # type: ignore[call-arg]
    if command == CommandType.PING and size == 4:
        return Ping(U32.unpack(payload)[0], offset=at)
    if command == CommandType.POSTCOPY_ADVISE and size in (0, 16):
        return PostcopyAdvise(*(_PAIR.unpack(payload) if size else ()), offset=at)
    if command == CommandType.RECV_BITMAP and size >= 2 and size == 1 + payload[0]:
        return BitmapRequest(text_of(payload[1:]), offset=at)
    if command == CommandType.POSTCOPY_RAM_DISCARD:
        return _discard(payload, at)
    raise BadStream(at, f"command {command.name} with {size} bytes, which is the wrong length")


def _discard(payload: bytes, at: int) -> RamDiscard:
    size = len(payload)
    if size < 2 or payload[0] != 0:
        raise BadStream(at, "command POSTCOPY_RAM_DISCARD in an unknown version")
    length = payload[1]
    ranges = 3 + length
    if length == 0 or size < ranges or payload[ranges - 1] != 0:
        raise BadStream(at, "command POSTCOPY_RAM_DISCARD without the name of a block")
    if size == ranges or (size - ranges) % 16:
        raise BadStream(at, f"command POSTCOPY_RAM_DISCARD with {size - ranges} bytes of ranges of 16 each")
    pairs = tuple(_PAIR.unpack_from(payload, i) for i in range(ranges, size, 16))
    for start, count in pairs:
        if start % TARGET_PAGE or count % TARGET_PAGE or count == 0:
            raise BadStream(at, f"discard of {count:#x} bytes at {start:#x}, which are not whole pages")
    return RamDiscard(text_of(payload[2 : ranges - 1]), pairs, offset=at)
