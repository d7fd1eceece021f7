"""``vhostpc inspect``: describes a migration stream, and names its first wrong byte."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import click

from vhostpc.cli.common import DONE, FAILED, Failure, common_options, complete_file, ended_in_order
from vhostpc.cli.inspect_report import Json, Report, Tell, Words
from vhostpc.errors import VhostpcError
from vhostpc.listener import listening
from vhostpc.wire.migration.elements import BadStream
from vhostpc.wire.migration.stream import MAX_DEVICES, StreamReader

CHUNK = 1 << 20


@contextlib.contextmanager
def _tcp(address: tuple[str, int]) -> Iterator[socket.socket]:
    family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
            listener.listen(1)
        except (OSError, UnicodeError) as error:  # UnicodeError: no host can have that name
            why = error.strerror if isinstance(error, OSError) else error
            raise VhostpcError(f"cannot listen on tcp:{address[0]}:{address[1]}: {why}") from None
        yield listener


@contextlib.contextmanager
def _first(listening: AbstractContextManager[socket.socket]) -> Iterator[Callable[[int], bytes]]:
    with ended_in_order(), listening as listener:
        where = listener.getsockname()
        words = f"unix:{where}" if isinstance(where, str) else f"tcp:{where[0]}:{where[1]}"
        click.echo(f"waiting for a source at {words}", err=True)
        connection, _ = listener.accept()
    with connection:
        yield connection.recv


@contextlib.contextmanager
def opened(source: str) -> Iterator[Callable[[int], bytes]]:
    """A function that reads at most so many bytes of FILE, ``-``, ``unix:PATH`` or ``tcp:HOST:PORT``."""
    kind, _, rest = source.partition(":")
    if source == "-":
        yield lambda count: os.read(sys.stdin.fileno(), count)
    elif kind == "unix" and rest:
        with _first(listening(rest)) as read:
            yield read
    elif kind == "tcp" and rest:
        host, _, port = rest.rpartition(":")
        if not port.isdigit() or int(port) > 65535:
            raise click.BadParameter(f"{source}: tcp:HOST:PORT needs a port from 0 to 65535")
        host = host.removeprefix("[").removesuffix("]")
        with _first(_tcp((host, int(port)))) as read:
            yield read
    else:
        with open(source, "rb", buffering=0) as file:
            yield file.read


def inspect_stream(read: Callable[[int], bytes], tell: Tell, limit: int = MAX_DEVICES) -> Report:
    """Read to the end of the stream, of the bytes, or to the first wrong byte; report each element."""
    report = Report(tell)
    reader = StreamReader(limit=limit)
    try:
        while not reader.ended:
            data = read(CHUNK)
            for event in reader.feed(data) if data else reader.eof():
                report.take(event)
    except BadStream as wrong:
        report.wrong = wrong
    else:
        report.trailing = reader.unread
        report.doubts += [] if reader.doubt is None else [reader.doubt]
        while data := read(CHUNK) if report.trailing else b"":
            report.trailing += len(data)
    report.flush()
    return report


@click.command()
@click.argument("source", metavar="FILE|-|unix:PATH|tcp:HOST:PORT", shell_complete=complete_file)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, for programs.")
@common_options
def inspect(source: str, as_json: bool) -> int:
    """Describe a migration stream of QEMU: machine, sections, RAM pages, commands, package, description.

    With unix: and tcp: it listens for one source, as a destination would, and never answers. Exit code 1 if
    a byte of the stream is wrong; the first one is named.
    """
    told: Json | Words = Json(sys.stdout) if as_json else Words(sys.stdout)
    with opened(source) as read:
        report = inspect_stream(read, told.tell)
    told.end(report)
    sys.stdout.flush()
    if report.wrong is None:
        return DONE
    if isinstance(told, Words) and sys.stdout.isatty():
        return FAILED  # the reader has just been told
    raise Failure(str(report.wrong))
