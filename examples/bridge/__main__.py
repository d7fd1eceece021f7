"""A virtio-net device whose frames are UDP datagrams, or a tap's frames: vhost-user-bridge in Python.

    python examples/bridge --socket-path /tmp/vubr.sock -l 127.0.0.1:4444 -r 127.0.0.1:5555

Every frame of the guest goes to the remote address as one datagram; every datagram that comes to the local
address becomes one frame for the guest. With --tap NAME the frames are those of a tap device. The device
class is ``vhostpc.backend.net.Bridge``; this file is the program around it.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import socket
import sys

import click
import trio

from vhostpc.backend import Options, serve, serve_connection, serve_listener
from vhostpc.backend.net import Bridge
from vhostpc.backend.options import feature_bits, protocol_feature_bits
from vhostpc.backend.tap import attach_queue, open_tap
from vhostpc.errors import VhostpcError

UDP_GRO = 104  # linux/udp.h: datagrams of one flow come joined, which the pump takes apart
LARGE_BUFFER = 8 << 20  # a default one holds less than the datagrams of one scheduler slice


def address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    try:
        return socket.getaddrinfo(host or "127.0.0.1", int(port), type=socket.SOCK_DGRAM)[0][4][:2]
    except (ValueError, socket.gaierror):
        raise click.BadParameter(f"{text!r} is not HOST:PORT") from None


def udp(local: tuple[str, int]) -> socket.socket:
    sock = socket.socket(socket.AF_INET6 if ":" in local[0] else socket.AF_INET, socket.SOCK_DGRAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, 33, LARGE_BUFFER)  # SO_RCVBUFFORCE: needs CAP_NET_ADMIN
    except PermissionError:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, LARGE_BUFFER)
    with contextlib.suppress(OSError):  # an old kernel: one datagram at a time then
        sock.setsockopt(socket.IPPROTO_UDP, UDP_GRO, 1)
    sock.setblocking(False)
    try:
        sock.bind(local)
    except OSError as e:
        raise VhostpcError(f"cannot bind UDP {local[0]}:{local[1]}: {e.strerror}") from None
    return sock


def sentences(error: BaseException) -> str:
    """What went wrong, without the nurseries that it went through."""
    if isinstance(error, BaseExceptionGroup):
        return "; ".join(sentences(e) for e in error.exceptions)
    return str(error)


def report(device: Bridge) -> None:
    for way, n in device.counters().items():
        word = {"out": "out of the guest", "in": "into the guest"}[way]
        print(
            f"{word}: {n.frames} frames, {n.bytes} bytes, {n.dropped} dropped, {n.discarded} discarded,"
            f" {n.batches} batches, {n.syscalls} system calls, {n.calls} interrupts",
            file=sys.stderr,
            flush=True,
        )
    if device.num_queues > 2:
        for index, n in enumerate(device.queue_counters()):
            print(f"queue {index}: {n.frames} frames, {n.bytes} bytes", file=sys.stderr, flush=True)


async def run(device: Bridge, path: str, fd: int | None, connect: bool, options: Options) -> None:
    """Serve until SIGTERM or SIGINT; counters on SIGUSR1."""
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # one that comes with the end must not be the end
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGUSR1) as signals:
        async with trio.open_nursery() as nursery:

            async def watch() -> None:
                async for number in signals:
                    if number != signal.SIGUSR1:
                        nursery.cancel_scope.cancel()
                    report(device)

            nursery.start_soon(watch)
            if fd is None:
                await serve(device, path, options, connect=connect)
            else:
                try:
                    sock = socket.socket(fileno=fd)
                except OSError as e:
                    raise VhostpcError(f"descriptor {fd}: {e.strerror}") from None
                if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                    await serve_listener(device, sock, options)
                else:
                    await serve_connection(device, trio.socket.from_stdlib_socket(sock), options)
            report(device)
            nursery.cancel_scope.cancel()


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("-u", "--socket-path", default="vubr.sock", help="unix socket of the front-end")
@click.option("-c", "--connect", is_flag=True, help="connect to it instead of listening")
@click.option("--fd", type=int, help="an open socket instead of a path, listening or connected")
@click.option("-l", "--local", default="127.0.0.1:4444", help="UDP address to receive on, HOST:PORT")
@click.option("-r", "--remote", default="127.0.0.1:5555", help="UDP address to send to, HOST:PORT")
@click.option("--tap", help="join the guest to this tap device instead of UDP")
@click.option("--pairs", type=click.IntRange(1, 8), default=1, help="queue pairs (1 to 8)")
@click.option("--once", is_flag=True, help="end with the first front-end")
@click.option("--hide-feature", multiple=True, help="do not offer this feature bit (name or number)")
@click.option("--hide-protocol-feature", multiple=True, help="do not offer this protocol feature bit")
@click.option("-H", "host_notifier", is_flag=True, hidden=True)
@click.option("--log-level", default="INFO", show_default=True)
@click.option("--debug", is_flag=True, help="tracebacks and every message")
def main(
    socket_path: str,
    connect: bool,
    fd: int | None,
    local: str,
    remote: str,
    tap: str | None,
    pairs: int,
    once: bool,
    hide_feature: tuple[str, ...],
    hide_protocol_feature: tuple[str, ...],
    host_notifier: bool,
    log_level: str,
    debug: bool,
) -> None:
    """Bridge a virtio-net device to UDP datagrams or to a tap device."""
    if host_notifier:
        raise click.UsageError("-H (host notifiers) is not supported: kicks come by eventfd")
    logging.basicConfig(level="DEBUG" if debug else log_level.upper(), format="%(levelname)s %(message)s")
    failed = ""
    try:
        options = Options(
            hide_features=feature_bits(hide_feature),
            hide_protocol_features=protocol_feature_bits(hide_protocol_feature),
            once=once,
        )
        if tap is not None:
            queues = [open_tap(tap, multi_queue=pairs > 1) for _ in range(pairs)]
            device = Bridge(queues, pairs=pairs, attach=attach_queue)
        else:
            link = udp(address(local))
            device = Bridge([link.fileno()], to=address(remote), pairs=pairs)
        trio.run(run, device, socket_path, fd, connect, options)
    except* VhostpcError as group:
        if debug:
            raise
        failed = sentences(group)
    # Not in the block above: Debian 12's Python 3.11.2 wraps what is raised there into one more group.
    if failed:
        sys.exit(f"bridge: {failed}")


if __name__ == "__main__":
    main()
