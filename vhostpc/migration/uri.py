"""Addresses of a migration: ``tcp:``, ``unix:``, ``fd:``, ``exec:``, ``file:``, with QEMU's refusals.

Source: QEMU's manual (migrate) and QMP reference (MigrationAddress); sentences as recorded from 7.2 and 10.0.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from vhostpc.errors import MigrationRefused
from vhostpc.migration.options import Compat


@dataclass(frozen=True)
class Tcp:
    """``port`` is text: a number or a service's name. ``ipv4``, ``ipv6``: None if not said. ``numeric``: the host is
    no name. ``keep_alive`` is for whoever connects."""

    host: str
    port: str
    ipv4: bool | None = None
    ipv6: bool | None = None
    to: int | None = None
    keep_alive: bool = False
    mptcp: bool = False
    numeric: bool = False


@dataclass(frozen=True)
class Unix:
    """``abstract``: a name of no file; not ``tight``: filled up with zeros to the length of the longest."""

    path: str
    abstract: bool = False
    tight: bool = True


@dataclass(frozen=True)
class Fd:
    """A descriptor that a monitor was given (its name), or that this process was started with (its number).

    ``fd`` is set by the monitor; whoever gets the address owns it.
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
MOST_DIGITS = 64
"""Of a number that may still fit; QEMU takes leading zeros."""
_SIZES = {"": 1, "b": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40, "p": 1 << 50, "e": 1 << 60}


def parse(uri: str, compat: Compat, *, incoming: bool = False) -> Address:
    """The address that a URI names; ``incoming``: to listen at. Raises MigrationRefused."""
    scheme, colon, rest = uri.partition(":")
    if colon and scheme == "tcp":
        return _tcp(rest)
    if colon and scheme == "unix":
        if not rest:
            raise MigrationRefused("invalid Unix socket address")
        return Unix(rest.partition(",")[0])
    if colon and scheme == "fd":
        if not rest and compat == "10.0":
            raise MigrationRefused("invalid file descriptor address")
        return Fd(rest)
    if colon and scheme == "exec":
        return Exec(("/bin/sh", "-c", rest))
    if colon and scheme == "file" and compat != "7.2":
        return _file(rest)
    if colon and scheme == "vsock" and ":" not in rest:
        raise MigrationRefused(f"error parsing address '{rest}'")
    raise MigrationRefused(
        "Parameter 'uri' expects a valid migration protocol"
        if compat == "7.2" and not incoming
        else f"unknown migration protocol: {uri}"
    )


def _tcp(text: str) -> Tcp:
    found = _TCP.fullmatch(text)
    if found is None:
        sort = "IPv6 address" if text.startswith("[") else "address"
        raise MigrationRefused(f"error parsing {sort} '{text}'")
    flags: dict[str, bool] = {}
    to = None
    for option in (found["rest"] or "").split(","):
        name, _, value = option.partition("=")
        if name == "to":
            if not re.fullmatch(r"[0-9]{1,5}", value):
                raise MigrationRefused("error parsing to= argument")
            to = int(value)
        elif name in ("ipv4", "ipv6", "keep-alive", "mptcp"):
            if value not in ("", "on", "off"):
                raise MigrationRefused(f"error parsing '{name}' flag '={value}'")
            flags[name.replace("-", "_")] = value != "off"
    return Tcp(found["host6"] or found["host"] or "", found["port"], to=to, **flags)


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
    """The address in a ``channels`` argument that the schema has let pass. Raises MigrationRefused."""
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
