"""Messages from the destination of a migration to its source: page requests above all.

A message is u16 type, u16 length, ``length`` bytes; integers are big-endian. Of the types this package uses
SHUT (1), PONG (2), REQ_PAGES_ID (3: u64 start, u32 length, cstr block) and REQ_PAGES (4: the same without a
name, in the block of the request before). Source: QEMU, docs/devel/migration (return path).
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from vhostpc.errors import LocalProtocolError, StreamError

MAX_LENGTH = 512
_HEAD = struct.Struct(">HH")
_U32 = struct.Struct(">I")
_REQUEST = struct.Struct(">QI")


class ReturnPathType(enum.IntEnum):
    SHUT = 1
    PONG = 2
    REQ_PAGES_ID = 3
    REQ_PAGES = 4


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
    """``length`` bytes from ``start`` of ``block`` are waited for; both numbers in whole target pages."""

    block: str
    start: int
    length: int

    def encode(self) -> bytes:
        """Always the form that names its block: legal anywhere, also first after a reconnect."""
        name = self.block.encode()
        if not 0 < len(name) < 256:
            raise LocalProtocolError(f"a block's name has 1 to 255 bytes, not {len(name)}")
        body = _REQUEST.pack(self.start, self.length) + bytes([len(name)]) + name
        return _HEAD.pack(ReturnPathType.REQ_PAGES_ID, len(body)) + body


ReturnPathMessage = Shut | Pong | PageRequest


class ReturnPathDecoder:
    """Decodes a return path that comes in pieces. Raises :class:`~vhostpc.errors.StreamError`."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._block: str | None = None

    def feed(self, data: bytes) -> Iterator[ReturnPathMessage]:
        """Take bytes; yields the messages that became whole."""
        self._buffer += data
        while len(self._buffer) >= _HEAD.size:
            kind, length = _HEAD.unpack_from(self._buffer)
            if length > MAX_LENGTH:
                raise StreamError(f"return path: message type {kind} of {length} bytes, at most {MAX_LENGTH}")
            if len(self._buffer) < _HEAD.size + length:
                return
            body = bytes(self._buffer[_HEAD.size : _HEAD.size + length])
            del self._buffer[: _HEAD.size + length]
            yield self._message(kind, body)

    def _message(self, kind: int, body: bytes) -> ReturnPathMessage:
        if kind in (ReturnPathType.SHUT, ReturnPathType.PONG) and len(body) == 4:
            value = _U32.unpack(body)[0]
            return Shut(value) if kind == ReturnPathType.SHUT else Pong(value)
        if (
            kind == ReturnPathType.REQ_PAGES_ID
            and len(body) >= 14
            and len(body) == 13 + body[12]
            and body[12]
        ):
            self._block = body[13:].decode("utf-8", "surrogateescape")
        elif kind != ReturnPathType.REQ_PAGES or len(body) != 12:
            raise StreamError(f"return path: message type {kind} of {len(body)} bytes is none we know")
        if self._block is None:
            raise StreamError("return path: a request that names no block before one was named")
        start, length = _REQUEST.unpack_from(body)
        if start % 4096 or length % 4096:
            raise StreamError(f"return path: request for {length:#x} bytes at {start:#x} is not whole pages")
        return PageRequest(self._block, start, length)
