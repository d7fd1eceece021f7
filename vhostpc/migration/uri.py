"""Addresses of a migration: ``tcp:``, ``unix:``, ``fd:``, ``exec:``, ``file:``, with QEMU's refusals.

Source: QEMU's manual (migrate) and QMP reference (MigrationAddress); sentences as recorded from 7.2, 10.0 and 11.1.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

from vhostpc.dialect import DEFAULT, DIALECTS, Dialect
from vhostpc.errors import MigrationRefused


@dataclass(frozen=True)
class Tcp:
    """``port`` is a string: a number or a service's name. ``ipv4``, ``ipv6``: None if not given. ``numeric``: the host
    is no name."""

    host: str
    port: str
    ipv4: bool | None = None
    ipv6: bool | None = None
    to: int | None = None
    keep_alive: bool = False
    mptcp: bool = False
    numeric: bool = False
    keep_alive_count: int = 0
    """Of keep-alive: probes, seconds before the first, and seconds between them; 0 is the system's."""
    keep_alive_idle: int = 0
    keep_alive_interval: int = 0


@dataclass(frozen=True)
class Unix:
    """``abstract``: a name of no file; not ``tight``: filled up with zeros to the length of the longest."""

    path: str
    abstract: bool = False
    tight: bool = True


@dataclass(frozen=True)
class Fd:
    """A descriptor that a monitor was given (its name), or that this process was started with (its number).

    ``fd`` is set by the monitor; the receiver of the address owns it.
    """

    name: str
    fd: int = -1


@dataclass(frozen=True)
class Exec:
    """A command: its words. From a URI it is a shell's."""

    args: tuple[str, ...]


@dataclass(frozen=True)
class File:
    """``offset`` in bytes. Precopy only."""

    path: str
    offset: int = 0


Address = Tcp | Unix | Fd | Exec | File

_TCP = re.compile(
    r"(?P<v6>\[(?P<host6>[^\]]*)\])?(?(v6)|(?!\[)(?P<host>[^:]*)):(?P<port>[^,]+)(?P<rest>,.*)?", re.DOTALL
)
_FLAGS = ("ipv4", "ipv6", "keep-alive", "mptcp")
MOST_DIGITS = 64
"""Of a number that may still fit; QEMU takes leading zeros."""
_SIZES = {"": 1, "b": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40, "p": 1 << 50, "e": 1 << 60}


def parse_address(uri: str, dialect: Dialect = DIALECTS[DEFAULT], *, incoming: bool = False) -> Address:
    """The address that a URI names; ``incoming``: to listen at. Raises MigrationRefused."""
    scheme, colon, rest = uri.partition(":")
    if colon and scheme == "tcp":
        return _tcp(rest, dialect)
    if colon and scheme == "unix":
        if not rest:
            raise MigrationRefused("invalid Unix socket address")
        return Unix(rest.partition(",")[0])
    if colon and scheme == "fd":
        if not rest and not dialect.empty_fd_name:
            raise MigrationRefused("invalid file descriptor address")
        return Fd(rest)
    if colon and scheme == "exec":
        return Exec(("/bin/sh", "-c", rest))
    if colon and scheme == "file" and dialect.file_addresses:
        return _file(rest)
    if colon and scheme == "vsock" and ":" not in rest:
        raise MigrationRefused(f"error parsing address '{rest}'")
    words = "unknown migration protocol: {uri}" if incoming else dialect.unknown_address
    raise MigrationRefused(words.format(uri=uri))


def _tcp(text: str, dialect: Dialect) -> Tcp:
    found = _TCP.fullmatch(text)
    if found is None:
        sort = "IPv6 address" if text.startswith("[") else "address"
        raise MigrationRefused(f"error parsing {sort} '{text}'")
    if dialect.inet_options:
        return _with_options(
            Tcp(found["host6"] or found["host"] or "", found["port"]), found["rest"], dialect
        )
    flags: dict[str, bool] = {}
    to = None
    for option in (found["rest"] or "").split(","):
        name, _, value = option.partition("=")
        if name == "to":
            if not re.fullmatch(r"[0-9]{1,5}", value):
                raise MigrationRefused("error parsing to= argument")
            to = int(value)
        elif flag := next((flag for flag in _FLAGS if option.startswith(flag)), None):
            value = option.removeprefix(flag)
            if value not in ("", "=on", "=off"):
                raise MigrationRefused(f"error parsing '{flag}' flag '{value}'")
            flags[flag.replace("-", "_")] = value != "=off"
    return Tcp(found["host6"] or found["host"] or "", found["port"], to=to, **flags)


def _with_options(address: Tcp, text: str | None, dialect: Dialect) -> Tcp:
    """The address with the flags and numbers that follow it, which are checked by name."""
    found: dict[str, Any] = {}
    for option in filter(None, (text or "").split(",")):
        name, equals, value = option.partition("=")
        if name not in dialect.inet_options:
            raise MigrationRefused(f"Invalid parameter '{name}'")
        field = name.replace("-", "_")
        if name == "to" or name in dialect.keep_alive:
            if not re.fullmatch(r"-?[0-9]{1,19}", value):
                raise MigrationRefused(f"Parameter '{name}' expects a number")
            found[field] = int(value) & (1 << 32) - 1
        elif equals and value not in ("on", "off"):
            raise MigrationRefused(f"Parameter '{name}' expects 'on' or 'off'")
        else:
            found[field] = value != "off"
    return replace(address, **found)


def _file(text: str) -> File:
    path, _, offset = text.partition(",offset=")
    if not _:
        return File(path)
    found = re.fullmatch(r"\s*(\+?)(0x[0-9a-fA-F]+|[0-9]+)([bkmgtpe]?)", offset, re.IGNORECASE)
    if found is None or len(found[2]) > MOST_DIGITS:
        negative = found or re.fullmatch(r"\s*-[0-9]+[bkmgtpe]?", offset, re.IGNORECASE)
        why = "Numerical result out of range" if negative else "Invalid argument"
        raise MigrationRefused(f"file URI has bad offset {offset}: {why}")
    number = int(found[2], 0) if found[2].lower().startswith("0x") else int(found[2])
    number *= _SIZES[found[3].lower()]
    if number >= 1 << 64:
        raise MigrationRefused(f"file URI has bad offset {offset}: Numerical result out of range")
    return File(path, number)


def from_channels(channels: list[dict[str, Any]]) -> Address:
    """The address in a ``channels`` argument that the schema has accepted. Raises MigrationRefused."""
    if len(channels) > 1:
        raise MigrationRefused("Channel list has more than one entries")
    channel = channels[0]
    if channel["channel-type"] != "main":
        raise MigrationRefused("Channel list has no main entry")
    addr = channel["addr"]
    kind = addr["type"] if addr["transport"] == "socket" else addr["transport"]
    if kind == "inet":
        return Tcp(
            addr["host"],
            addr["port"],
            addr.get("ipv4"),
            addr.get("ipv6"),
            addr.get("to"),
            addr.get("keep-alive", False),
            addr.get("mptcp", False),
            addr.get("numeric", False),
            addr.get("keep-alive-count", 0),
            addr.get("keep-alive-idle", 0),
            addr.get("keep-alive-interval", 0),
        )
    if kind == "unix":
        return Unix(addr["path"], addr.get("abstract", False), addr.get("tight", True))
    if kind == "fd":
        return Fd(addr["str"])
    if kind == "exec":
        return Exec(tuple(addr["args"]))
    if kind == "file":
        return File(addr["filename"], addr["offset"])
    raise MigrationRefused(f"unknown migration protocol: {kind}")
