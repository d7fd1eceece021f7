"""QMP, the machine monitor: incoming JSON values and outgoing messages. No I/O.

Read as QEMU reads: values follow one another, with or without newlines between them; strings may have single quotes;
after a part that is not JSON, reading goes on at the next bracket, comma, colon or control character. The memory that a
client can occupy is bounded: :data:`MAX_BYTES` of one value, :data:`MAX_NESTING` brackets (QEMU's bounds are 64 MiB and
1024). Source: QEMU, docs/interop/qmp-spec; sentences as recorded from QEMU 7.2 and 10.0.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from vhostpc.errors import VhostpcError

MAX_BYTES = 1 << 20
MAX_NESTING = 512

GENERIC = "GenericError"
NOT_FOUND = "CommandNotFound"

_SPACE = re.compile(rb"[ \t\r\n]*+")
_BODY = {
    0x22: re.compile(rb"(?:[\x20\x21\x23-\x5b\x5d-\xfd]++|\\[\x20-\xfd])*+"),
    0x27: re.compile(rb"(?:[\x20-\x26\x28-\x5b\x5d-\xfd]++|\\[\x20-\xfd])*+"),
}
_KEYWORD = re.compile(rb"[a-z]++")
_NUMBER = re.compile(rb"-?(?:0|[1-9][0-9]*+)(?:\.[0-9]++)?(?:[eE][-+]?[0-9]++)?")
# The longest beginning of a number, whole or not.
_DIGITS = re.compile(rb"-?(?:(?:0|[1-9][0-9]*+)(?:\.[0-9]*+)?(?:(?<=[0-9])[eE][-+]?[0-9]*+)?)?")
_RESTART = re.compile(rb"[\x00-\x1f\xfe\xff{}\[\],:]")
_ESCAPE = re.compile(r"\\(u[0-9a-fA-F]{4}|.)", re.DOTALL)
_SIMPLE = {'"': '"', "'": "'", "\\": "\\", "/": "/", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}
_CONSTANTS: dict[bytes, Any] = {b"true": True, b"false": False, b"null": None}
_CLOSERS = {0x7B: 0x7D, 0x5B: 0x5D}


class QmpError(VhostpcError):
    """A refusal as the client sees it: ``error_class`` and the sentence."""

    def __init__(self, text: str, error_class: str = GENERIC) -> None:
        super().__init__(text)
        self.error_class = error_class


@dataclass(frozen=True, slots=True)
class Value:
    """A whole JSON value, of so many bytes."""

    value: Any
    size: int = field(default=0, compare=False)


@dataclass(frozen=True, slots=True)
class Broken:
    """A part that is not JSON; reading has gone on after it."""

    reason: str
    size = 0

    def error(self) -> QmpError:
        return QmpError(self.reason)


@dataclass(frozen=True, slots=True)
class _Mark:
    """A token that is a mark of punctuation."""

    code: int


# One of each: a message may have half a million.
_MARKS = {code: _Mark(code) for code in b"{}[],:"}
_Token = Any  # a _Mark, or a value in a _Literal


@dataclass(frozen=True, slots=True)
class _Literal:
    text: bytes


class Reader:
    """Takes bytes as they arrive, returns values and errors in order.

    A token is turned into a value only when its message is whole, so the error that is reported is the first one
    that reading the message from its beginning meets, as with QEMU.
    """

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._string_at = 0  # how far an unfinished string has been examined
        self._tokens: list[_Token] = []
        self._kept = 0  # bytes of the tokens kept
        self._braces = 0
        self._brackets = 0
        self._recovering = False

    @property
    def pending(self) -> int:
        """Bytes of a value that is not yet whole."""
        return len(self._buffer) + self._kept

    def feed(self, data: bytes) -> Iterator[Value | Broken]:
        """Take bytes; yields completed values."""
        self._buffer += data
        at = 0
        try:
            while at < len(self._buffer):
                if self._recovering:
                    found = _RESTART.search(self._buffer, at)
                    if found is None:
                        at = len(self._buffer)
                        break
                    at = found.start()
                    self._recovering = False
                at = _SPACE.match(self._buffer, at).end()  # type: ignore[union-attr]
                if at == len(self._buffer):
                    break
                end, token = self._next(at)
                if token is None:
                    if self._kept + len(self._buffer) - at > MAX_BYTES:
                        at = len(self._buffer)
                        self._recovering = True
                        yield self._broken("JSON token size limit exceeded")
                    break
                text = bytes(self._buffer[at:end])
                at = end
                yield from self._take(token, text)
        finally:
            del self._buffer[:at]

    def _next(self, at: int) -> tuple[int, _Token]:
        """The token at ``at`` and its end; no token if it is incomplete; the token False if it is not a token."""
        first = self._buffer[at]
        if first in _MARKS:
            return at + 1, _MARKS[first]
        if first in _BODY:
            seen = _BODY[first].match(self._buffer, max(at + 1, at + self._string_at))
            assert seen
            end = seen.end()
            escaped = end < len(self._buffer) and self._buffer[end] == 0x5C
            if end + escaped >= len(self._buffer):
                self._string_at = end - at
                return at, None
            self._string_at = 0
            if self._buffer[end] == first:
                return end + 1, _Literal(bytes(self._buffer[at : end + 1]))
            return end + 1 + escaped, False
        found = _KEYWORD.match(self._buffer, at)
        if found is not None:
            if found.end() == len(self._buffer):
                return at, None
            return found.end(), _Literal(found[0])
        if first in b"-0123456789":
            digits = _DIGITS.match(self._buffer, at)
            assert digits
            end = digits.end()
            if end == len(self._buffer):
                return at, None
            leading_zero = digits[0] in (b"0", b"-0") and self._buffer[end] in b"0123456789"
            if leading_zero or not _NUMBER.fullmatch(digits[0]):
                return end + 1, False
            return end, _Literal(digits[0])
        return at + 1, False

    def _take(self, token: _Token, text: bytes) -> Iterator[Value | Broken]:
        if token is False:
            self._recovering = True
            yield self._broken(f"JSON parse error, stray '{text.decode('utf-8', 'replace')}'")
            return
        self._tokens.append(token)
        self._kept += len(text) + 1
        if isinstance(token, _Mark):
            self._braces += {0x7B: 1, 0x7D: -1}.get(token.code, 0)
            self._brackets += {0x5B: 1, 0x5D: -1}.get(token.code, 0)
        if self._braces + self._brackets > MAX_NESTING:
            yield self._broken("JSON nesting depth limit exceeded")
        elif self._kept > MAX_BYTES:
            yield self._broken("JSON token size limit exceeded")
        elif self._braces < 0 or self._brackets < 0 or self._braces == self._brackets == 0:
            tokens, size = self._tokens, self._kept
            self._reset()
            try:
                yield Value(_parse(tokens), size)
            except QmpError as exc:
                yield Broken(f"JSON parse error, {exc}")

    def _broken(self, reason: str) -> Broken:
        self._reset()
        return Broken(reason)

    def _reset(self) -> None:
        self._tokens = []
        self._kept = self._braces = self._brackets = self._string_at = 0


def _parse(tokens: list[_Token]) -> Any:
    """The value of a message's tokens. Without recursion: nesting is the client's choice."""
    no_key = object()
    end = _Mark(0)
    stack: list[tuple[Any, Any]] = []  # containers and the key that waits for its value
    at = 0

    def token() -> _Token:
        nonlocal at
        at += 1
        return tokens[at - 1] if at <= len(tokens) else end

    while True:
        one = token()
        if isinstance(one, _Literal):
            value = _literal(one.text)
        elif one.code in _CLOSERS:
            value = {} if one.code == 0x7B else []
            if at >= len(tokens) or tokens[at] != _Mark(_CLOSERS[one.code]):
                stack.append((value, no_key))
                continue
            at += 1
        else:
            raise QmpError("expecting value")
        while True:
            if not stack:
                return value
            container, key = stack.pop()
            if isinstance(container, list):
                container.append(value)
                mark, closer, sort = token(), 0x5D, "list"
            elif key is no_key:
                if not isinstance(value, str):
                    raise QmpError("key is not a string in object")
                if token() != _Mark(0x3A):
                    raise QmpError("missing : in object pair")
                stack.append((container, value))
                break
            else:
                if key in container:
                    raise QmpError("duplicate key")
                container[key] = value
                mark, closer, sort = token(), 0x7D, "dict"
            if mark == _Mark(0x2C):
                stack.append((container, no_key))
                break
            if mark != _Mark(closer):
                raise QmpError(f"expected separator in {sort}")
            value = container


def _literal(text: bytes) -> Any:
    if text[0] in _BODY:
        return _string(text[1:-1])
    if text.isalpha():
        if text not in _CONSTANTS:
            raise QmpError(f"invalid keyword '{text.decode()}'")
        return _CONSTANTS[text]
    # What fits in neither 64-bit type is a float, as for QEMU.
    if len(text) <= 20 and text.lstrip(b"-").isdigit():
        number = int(text)
        if -(1 << 63) <= number < 1 << 64:
            return number
    return float(text)


def _string(body: bytes) -> str:
    try:
        text = body.replace(b"\xc0\x80", b"\0").decode()
    except UnicodeDecodeError:
        raise QmpError("invalid UTF-8 sequence in string") from None

    def unescape(found: re.Match[str]) -> str:
        what = found[1]
        if len(what) == 5:
            return chr(int(what[1:], 16))
        if what not in _SIMPLE:
            raise QmpError("invalid escape sequence in string")
        return _SIMPLE[what]

    if "\\" in text:
        text = _ESCAPE.sub(unescape, text)
        # Surrogates come in pairs; a single one encodes nothing.
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")
        lone = next((c for c in text if "\ud800" <= c <= "\udfff"), None)
        if lone is not None:
            raise QmpError(f"\\u{ord(lone):04x} is not a valid Unicode character")
    return text


# Requests


@dataclass(frozen=True, slots=True)
class Request:
    """A command: its name, its arguments, whether it is out of band."""

    name: str
    arguments: dict[str, Any]
    out_of_band: bool = False


def request(value: Any, *, oob: bool) -> Request:
    """The command that a JSON value is; ``oob``: whether out-of-band commands are agreed. Raises QmpError."""
    if not isinstance(value, dict):
        raise QmpError("QMP input must be a JSON object")
    names = ("execute", "exec-oob") if oob else ("execute",)
    found = [name for name in names if name in value]
    for name, member in value.items():
        if name in names:
            if not isinstance(member, str):
                raise QmpError(f"QMP input member '{name}' must be a string")
            if len(found) == 2:
                raise QmpError("QMP input member 'execute' clashes with 'exec-oob'")
        elif name == "arguments":
            if not isinstance(member, dict):
                raise QmpError("QMP input member 'arguments' must be an object")
        elif name != "id":
            raise QmpError(f"QMP input member '{name}' is unexpected")
    if not found:
        raise QmpError("QMP input lacks member 'execute'")
    return Request(value[found[0]], value.get("arguments", {}), found[0] == "exec-oob")


# Messages to the client


def encode(message: dict[str, Any]) -> bytes:
    """A message as its line. JSON in ASCII, so nothing in it can end the line."""
    return json.dumps(message).encode() + b"\r\n"


def greeting(version: dict[str, Any]) -> dict[str, Any]:
    """The server's greeting; ``version`` as ``query-version`` returns it."""
    return {"QMP": {"version": version, "capabilities": ["oob"]}}


def answer(result: Any, asked: Any = None) -> dict[str, Any]:
    """A command's result; ``asked`` is the message it answers, whose ``id`` is returned."""
    return _with_id({"return": result}, asked)


def refusal(error: QmpError, asked: Any = None) -> dict[str, Any]:
    """A command's failure."""
    return _with_id({"error": {"class": error.error_class, "desc": str(error)}}, asked)


def event(name: str, data: dict[str, Any] | None, microseconds: int) -> dict[str, Any]:
    """An event; ``microseconds`` since the epoch."""
    seconds, rest = divmod(microseconds, 1_000_000)
    message: dict[str, Any] = {"timestamp": {"seconds": seconds, "microseconds": rest}, "event": name}
    if data is not None:
        message["data"] = data
    return message


def _with_id(message: dict[str, Any], asked: Any) -> dict[str, Any]:
    if isinstance(asked, dict) and "id" in asked:
        message["id"] = asked["id"]
    return message
