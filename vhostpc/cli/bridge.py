"""``vhostpc bridge``: a virtio network card whose frames are UDP datagrams, or those of a tap device.

It accepts the same single-letter options as QEMU's vhost-user-bridge. The device is ``vhostpc.backend.net.Bridge``.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import socket
from collections.abc import Iterator

import click

from vhostpc.backend.net import Bridge
from vhostpc.backend.tap import attach_queue, open_tap, until_deleted
from vhostpc.cli.program import Program, capabilities, program_options
from vhostpc.errors import VhostpcError

UDP_GRO = 104  # linux/udp.h: datagrams of one flow come joined, which the pump takes apart
SO_RCVBUFFORCE = 33  # asm-generic/socket.h: needs CAP_NET_ADMIN
LARGE_BUFFER = 8 << 20  # a default one holds less than the datagrams of one scheduler slice
Address = tuple[str, int]


def address(_: click.Context, __: click.Parameter, text: str) -> Address:
    """HOST:PORT of a UDP address; an IPv6 address may stand in brackets."""
    host, _colon, port = text.rpartition(":")
    try:
        number = int(port)
        if not 0 <= number < 1 << 16:
            raise ValueError
        host = host.removeprefix("[").removesuffix("]") or "127.0.0.1"
        found = socket.getaddrinfo(host, number, type=socket.SOCK_DGRAM)[0][4]
    except (ValueError, UnicodeError):
        raise click.BadParameter(f"{text!r} is not HOST:PORT") from None
    except socket.gaierror as e:
        raise click.BadParameter(f"{text!r}: {e.strerror}") from None
    return str(found[0]), number


def udp(local: Address) -> socket.socket:
    """A UDP socket at ``local`` with room for bursts. Raises VhostpcError."""
    sock = socket.socket(socket.AF_INET6 if ":" in local[0] else socket.AF_INET, socket.SOCK_DGRAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, LARGE_BUFFER)
    except PermissionError:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, LARGE_BUFFER)
    with contextlib.suppress(OSError):  # an old kernel: one datagram at a time then
        sock.setsockopt(socket.IPPROTO_UDP, UDP_GRO, 1)
    sock.setblocking(False)
    try:
        sock.bind(local)
    except OSError as e:
        sock.close()
        raise VhostpcError(f"cannot bind UDP {local[0]}:{local[1]}: {e.strerror}") from None
    return sock


def report(device: Bridge) -> None:
    """The counters, on stderr."""
    for way, n in device.counters().items():
        word = {"out": "out of the guest", "in": "into the guest"}[way]
        click.echo(
            f"{word}: {n.frames} frames, {n.bytes} bytes, {n.dropped} dropped, {n.discarded} discarded,"
            f" {n.batches} batches, {n.syscalls} system calls, {n.calls} interrupts",
            err=True,
        )
    if len(device.queue_counters()) > 2:
        for index, n in enumerate(device.queue_counters()):
            click.echo(f"queue {index}: {n.frames} frames, {n.bytes} bytes", err=True)


@contextlib.contextmanager
def on_tap(name: str, pairs: int, make: bool) -> Iterator[tuple[Bridge, int]]:
    """A bridge to a tap device, one queue for each pair; and its first queue."""
    with contextlib.ExitStack() as opened:
        queues = []
        for _ in range(pairs):
            queues.append(open_tap(name, multi_queue=pairs > 1, make=make))
            opened.callback(os.close, queues[-1])
        yield Bridge(queues, pairs=pairs, attach=attach_queue), queues[0]


@click.command()
@click.option(
    "-l",
    "--local",
    default="127.0.0.1:4444",
    show_default=True,
    metavar="HOST:PORT",
    callback=address,
    help="UDP address to receive on.",
)
@click.option(
    "-r",
    "--remote",
    default="127.0.0.1:5555",
    show_default=True,
    metavar="HOST:PORT",
    callback=address,
    help="UDP address to send to.",
)
@click.option("--tap", metavar="NAME", help="Connect the guest to this tap device instead of UDP.")
@click.option(
    "--make-tap", is_flag=True, help="Create the tap device if there is none; it is removed with the bridge."
)
@click.option(
    "--pairs",
    type=click.IntRange(1, 8),
    default=1,
    show_default=True,
    help="Queue pairs; with several, a tap device needs multi_queue.",
)
@click.option(
    "-H", "host_notifier", is_flag=True, help="Host notifiers: refused, because kicks use an eventfd."
)
@program_options(path="vubr.sock")
def bridge(
    local: Address,
    remote: Address,
    tap: str | None,
    make_tap: bool,
    pairs: int,
    host_notifier: bool,
    program: Program,
) -> int:
    """Connect a virtio network card to UDP, or to a tap device.

    Every frame of the guest goes to the remote address as one datagram; every datagram that arrives at the local
    address becomes one frame for the guest.

    SIGTERM, SIGINT and SIGHUP end the program with code 0 and remove its socket. It prints its counters at the end,
    and on SIGUSR1.
    """
    if program.print_capabilities:
        click.echo(capabilities(Bridge))
        return 0
    if host_notifier:
        raise click.UsageError("-H (host notifiers) is not supported: kicks use an eventfd")
    if make_tap and tap is None:
        raise click.UsageError("--make-tap needs --tap")
    if tap is None and (":" in local[0]) != (":" in remote[0]):
        raise click.UsageError("one of --local and --remote is an IPv6 address, the other one is not")
    program.begin()
    with contextlib.ExitStack() as opened:
        watch = None
        if tap is not None:
            device, first = opened.enter_context(on_tap(tap, pairs, make_tap))
            watch = functools.partial(until_deleted, first, tap)
        else:
            link = opened.enter_context(udp(local))
            device = Bridge([link.fileno()], to=remote, pairs=pairs)
        counters = functools.partial(report, device)
        program.serve(device, heard={signal.SIGUSR1: counters}, beside=watch)
        counters()
    return 0
