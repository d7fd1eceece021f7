"""Messages from the destination of a migration to its source: page requests above all.

A message is u16 type, u16 length, ``length`` bytes; integers are big-endian. Of the types this package uses
SHUT (1), PONG (2), REQ_PAGES_ID (3: u64 start, u32 length, cstr block), REQ_PAGES (4: the same without a name, in
the block of the request before), RECV_BITMAP (5: cstr block, and behind the message u64 size, the bitmap, an end
mark), RESUME_ACK (6) and SWITCHOVER_ACK (7). Source: QEMU, docs/devel/migration (return path).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

from vhostpc.enums import SpecEnum
from vhostpc.errors import LocalProtocolError, StreamError
from vhostpc.units import TARGET_PAGE

MAX_LENGTH = 512
MAX_BITMAP = 64 << 20
"""Default limit of a received bitmap, in bytes: that of a block of 2 TiB."""
BITMAP_END = bytes.fromhex("0123456789abcdef")
RESUMED = 1
_HEAD = struct.Struct(">HH")
_U32 = struct.Struct(">I")
_U64 = struct.Struct(">Q")
_REQUEST = struct.Struct(">QI")


class ReturnPathType(SpecEnum):
    SHUT = 1
    PONG = 2
    REQ_PAGES_ID = 3
    REQ_PAGES = 4
    RECV_BITMAP = 5
    RESUME_ACK = 6
    SWITCHOVER_ACK = 7


@dataclass(frozen=True, slots=True)
class Shut:
    """The destination is done; ``status`` 0 is success."""

    status: int

    def encode(self) -> bytes:
        return _HEAD.pack(ReturnPathType.SHUT, 4) + _U32.pack(self.status)


@dataclass(frozen=True, slots=True)
class Pong:
    """Answer to a PING."""

    value: int

    def encode(self) -> bytes:
        return _HEAD.pack(ReturnPathType.PONG, 4) + _U32.pack(self.value)


@dataclass(frozen=True, slots=True)
class PageRequest:
    """Requests ``length`` bytes from ``start`` of ``block``; both numbers in whole target pages."""

    block: str
    start: int
    length: int

    def encode(self) -> bytes:
        """Always the form that names its block: legal anywhere, also first after a reconnect."""
        name = self.block.encode("utf-8", "surrogateescape")
        if not 0 < len(name) < 256:
            raise LocalProtocolError(f"a block's name must have 1 to 255 bytes, not {len(name)}")
        body = _REQUEST.pack(self.start, self.length) + bytes([len(name)]) + name
        return _HEAD.pack(ReturnPathType.REQ_PAGES_ID, len(body)) + body


@dataclass(frozen=True, slots=True)
class ReceivedBitmap:
    """Recovery: the pages of ``block`` that have arrived. Bit i of byte i // 8, the lowest first, is target page i;
    whole words of 8 bytes."""

    block: str
    bits: bytes = field(repr=False)

    def encode(self) -> bytes:
        name = self.block.encode("utf-8", "surrogateescape")
        if not 0 < len(name) < 256 or len(self.bits) % 8:
            raise LocalProtocolError(f"a bitmap of {len(self.bits)} bytes of a block {self.block!r}")
        head = _HEAD.pack(ReturnPathType.RECV_BITMAP, 1 + len(name)) + bytes([len(name)]) + name
        return head + _U64.pack(len(self.bits)) + self.bits + BITMAP_END


@dataclass(frozen=True, slots=True)
class ResumeAck:
    """Recovery: the destination continues; ``value`` is 1."""

    value: int = RESUMED

    def encode(self) -> bytes:
        return _HEAD.pack(ReturnPathType.RESUME_ACK, 4) + _U32.pack(self.value)


@dataclass(frozen=True, slots=True)
class SwitchoverAck:
    """The destination is ready for the switch (QEMU 8.1, capability switchover-ack)."""

    def encode(self) -> bytes:
        return _HEAD.pack(ReturnPathType.SWITCHOVER_ACK, 0)


ReturnPathMessage = Shut | Pong | PageRequest | ReceivedBitmap | ResumeAck | SwitchoverAck


class ReturnPathDecoder:
    """Decodes a return path that arrives in pieces. Raises :class:`~vhostpc.errors.StreamError`.

    ``max_bitmap``: bytes of the longest received bitmap that is accepted.
    """

    def __init__(self, max_bitmap: int = MAX_BITMAP) -> None:
        self._max_bitmap = max_bitmap
        self._fed = 0
        self._buffer = bytearray()
        self._block: str | None = None

    @property
    def offset(self) -> int:
        """Byte of the return path up to which messages were completed: behind the one that was yielded last."""
        return self._fed - len(self._buffer)

    @property
    def lacks(self) -> int:
        """The next message needs at least this many more bytes: reading no more never takes bytes of a later one."""
        have = len(self._buffer)
        if have < _HEAD.size:
            return _HEAD.size - have
        kind, length = _HEAD.unpack_from(self._buffer)
        whole = _HEAD.size + length
        if kind == ReturnPathType.RECV_BITMAP:
            begin, whole = whole + _U64.size, whole + _U64.size
            if have >= begin:
                whole += _U64.unpack_from(self._buffer, begin - _U64.size)[0] + len(BITMAP_END)
        return int(whole) - have

    def feed(self, data: bytes) -> Iterator[ReturnPathMessage]:
        """Take bytes; yields completed messages."""
        self._fed += len(data)
        self._buffer += data
        while len(self._buffer) >= _HEAD.size:
            kind, length = _HEAD.unpack_from(self._buffer)
            if length > MAX_LENGTH:
                raise StreamError(f"return path: message type {kind} of {length} bytes, at most {MAX_LENGTH}")
            if len(self._buffer) < _HEAD.size + length:
                return
            body = bytes(self._buffer[_HEAD.size : _HEAD.size + length])
            if kind == ReturnPathType.RECV_BITMAP:
                bitmap = self._bitmap(body)
                if bitmap is None:
                    return
                yield bitmap
                continue
            del self._buffer[: _HEAD.size + length]
            yield self._message(kind, body)

    def _bitmap(self, body: bytes) -> ReceivedBitmap | None:
        """The message at the beginning of the buffer, with the data that follow it; None until it is whole."""
        if len(body) < 2 or len(body) != 1 + body[0]:
            raise StreamError(f"return path: message type 5 of {len(body)} bytes is unknown")
        begin = _HEAD.size + len(body) + _U64.size
        if len(self._buffer) < begin:
            return None
        (size,) = _U64.unpack_from(self._buffer, begin - _U64.size)
        if size % 8 or size > self._max_bitmap:
            raise StreamError(
                f"return path: a bitmap of {size} bytes, at most {self._max_bitmap} are accepted"
            )
        end = begin + size + len(BITMAP_END)
        if len(self._buffer) < end:
            return None
        if self._buffer[end - len(BITMAP_END) : end] != BITMAP_END:
            raise StreamError("return path: a bitmap without its end mark")
        bits = bytes(self._buffer[begin : begin + size])
        del self._buffer[:end]
        return ReceivedBitmap(body[1:].decode("utf-8", "surrogateescape"), bits)

    def _message(self, kind: int, body: bytes) -> ReturnPathMessage:
        if kind in (ReturnPathType.SHUT, ReturnPathType.PONG) and len(body) == 4:
            value = _U32.unpack(body)[0]
            return Shut(value) if kind == ReturnPathType.SHUT else Pong(value)
        if kind == ReturnPathType.RESUME_ACK and len(body) == 4:
            return ResumeAck(_U32.unpack(body)[0])
        if kind == ReturnPathType.SWITCHOVER_ACK and not body:
            return SwitchoverAck()
        if (
            kind == ReturnPathType.REQ_PAGES_ID
            and len(body) >= 14
            and len(body) == 13 + body[12]
            and body[12]
        ):
            self._block = body[13:].decode("utf-8", "surrogateescape")
        elif kind != ReturnPathType.REQ_PAGES or len(body) != 12:
            raise StreamError(f"return path: message type {kind} of {len(body)} bytes is unknown")
        if self._block is None:
            raise StreamError("return path: a request without a block's name, and none was named before")
        start, length = _REQUEST.unpack_from(body)
        if start % TARGET_PAGE or length % TARGET_PAGE:
            raise StreamError(f"return path: request for {length:#x} bytes at {start:#x} is not whole pages")
        return PageRequest(self._block, start, length)
