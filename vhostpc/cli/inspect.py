"""``vhostpc inspect``: tells a migration stream in words, and names the first byte of it that is wrong."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
from collections.abc import Callable, Iterator

import click

from vhostpc.cli.common import DONE, Failure, common_options
from vhostpc.cli.inspect_report import Report
from vhostpc.wire.elements import BadStream
from vhostpc.wire.stream import MAX_DEVICES, StreamReader

CHUNK = 1 << 20


@contextlib.contextmanager
def _listen(family: socket.AddressFamily, address: str | tuple[str, int]) -> Iterator[Callable[[int], bytes]]:
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        if family != socket.AF_UNIX:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        try:
            listener.listen(1)
            where = listener.getsockname()
            words = f"unix:{where}" if isinstance(where, str) else f"tcp:{where[0]}:{where[1]}"
            click.echo(f"waiting for a source at {words}", err=True)
            connection, _ = listener.accept()
        finally:
            if isinstance(address, str):
                os.unlink(address)
    with connection:
        yield connection.recv


@contextlib.contextmanager
def opened(source: str) -> Iterator[Callable[[int], bytes]]:
    """A function that reads at most so many bytes of FILE, ``-``, ``unix:PATH`` or ``tcp:HOST:PORT``."""
    kind, _, rest = source.partition(":")
    if source == "-":
        yield lambda count: os.read(sys.stdin.fileno(), count)
    elif kind == "unix" and rest:
        with _listen(socket.AF_UNIX, rest) as read:
            yield read
    elif kind == "tcp" and rest:
        host, _, port = rest.rpartition(":")
        if not port.isdigit() or int(port) > 65535:
            raise click.BadParameter(f"{source}: tcp:HOST:PORT wants a port from 0 to 65535")
        host = host.removeprefix("[").removesuffix("]")
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with _listen(family, (host, int(port))) as read:
            yield read
    else:
        with open(source, "rb", buffering=0) as file:
            yield file.read


def inspect_stream(read: Callable[[int], bytes], limit: int = MAX_DEVICES) -> Report:
    """Read to the end of the stream, of the bytes, or to the first byte that is wrong."""
    report = Report()
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
        while data := read(CHUNK) if report.trailing else b"":
            report.trailing += len(data)
    report.flush()
    return report


@click.command()
@click.argument("source", metavar="FILE|-|unix:PATH|tcp:HOST:PORT")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, for machines.")
@common_options
def inspect(source: str, as_json: bool) -> int:
    """Tell a migration stream of QEMU in words: machine, sections, RAM pages, commands, package, description.

    With unix: and tcp: it listens for one source, as a destination would, and never answers. Exit code 1 if
    a byte of the stream is wrong; the first one is named.
    """
    with opened(source) as read:
        report = inspect_stream(read)
    if as_json:
        click.echo(json.dumps(report.as_json(), indent=2))
    else:
        for line in report.lines():
            click.echo(line)
    if report.wrong is not None:
        raise Failure(str(report.wrong))
    return DONE
