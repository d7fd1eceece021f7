"""The parts common to all back-end programs: their socket, the signals that end them, the line that says "ready".

"Backend program conventions" of the vhost-user specification: ``--socket-path``, ``--fd``,
``--print-capabilities``, no daemon, SIGTERM ends it with 0, early failure with a message on stderr.
"""

from __future__ import annotations

import functools
import grp
import json
import os
import signal
import socket
import stat
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import click
import trio

from vhostpc.backend import Device, Options, serve, serve_connection, serve_listener
from vhostpc.backend.serve_options import feature_bits, protocol_feature_bits
from vhostpc.cli.common import (
    CannotHere,
    Failure,
    common_options,
    ending_signals,
    need_descriptors,
    start_logging,
)
from vhostpc.errors import VhostpcError
from vhostpc.logs import rationed_logger
from vhostpc.ufd import probe

log = rationed_logger(__name__)

MODE = 0o600
#: -1 of a gid_t: for chown(2), "leave the group as it is".
NO_GROUP = 0xFFFFFFFF


class Work(Protocol):
    """A task that runs as long as the program; it reports when it is ready."""

    async def __call__(self, *, task_status: trio.TaskStatus[None]) -> None: ...


# virtio 1.2, section 5, by the names that the schema of docs/interop/vhost-user.json allows.
TYPES = {
    1: "net",
    2: "block",
    3: "console",
    4: "rng",
    5: "balloon",
    7: "rpmsg",
    8: "scsi",
    9: "9p",
    11: "rproc-serial",
    12: "caif",
    16: "gpu",
    18: "input",
    19: "vsock",
    20: "crypto",
    26: "fs",
}


def capabilities(kind: Device | type[Device]) -> str:
    """The output of ``--print-capabilities``: the type, and features that a manager may ask for."""
    number = getattr(kind, "device_id", 0)
    if number not in TYPES:
        raise Failure(
            f"virtio device id {number!r} has no type in the schema of vhost-user back-end programs"
        )
    return json.dumps({"type": TYPES[number], "features": list(getattr(kind, "capabilities", ()))})


@dataclass(frozen=True)
class Program:
    """The values of the options common to all back-end programs. ``mode`` and ``group`` are None if not given."""

    path: str | None
    fd: int | None
    connect: bool
    mode: int | None
    group: int | None
    print_capabilities: bool
    require_postcopy: bool
    options: Options

    def begin(self) -> None:
        """Check, before the device exists, that the options are consistent and that this process can serve."""
        if (self.path is None) == (self.fd is None):
            raise click.UsageError("give one of --socket-path and --fd")
        if self.connect and self.fd is not None:
            raise click.UsageError("--connect needs --socket-path")
        if (self.connect or self.fd is not None) and (self.mode is not None or self.group is not None):
            raise click.UsageError("--socket-mode and --socket-group need a socket that is created here")
        start_logging()
        need_descriptors()
        if self.require_postcopy and not (found := probe()).ok:
            raise CannotHere(found.problem)

    def serve(
        self,
        device: Device,
        *,
        heard: Mapping[signal.Signals, Callable[[], None]] | None = None,
        beside: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        """Serve ``device`` until a signal ends the program, or the last front-end has disconnected.

        ``heard``: signals that do not end it, and what they call. ``beside``: runs for as long as it serves.
        """
        where = f"descriptor {self.fd}" if self.path is None else self.path
        work: Work = functools.partial(self._work, device)
        trio.run(run, work, where, heard or {}, beside)

    async def _work(self, device: Device, *, task_status: trio.TaskStatus[None]) -> None:
        if self.fd is not None:
            await serve_fd(device, self.fd, self.options, task_status=task_status)
            return
        assert self.path is not None
        await serve(
            device,
            self.path,
            self.options,
            connect=self.connect,
            mode=MODE if self.mode is None else self.mode,
            group=self.group,
            task_status=task_status,
        )


def program_options(*, path: str | None = None) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The options of a :class:`Program`, which the command receives as ``program``. ``path``: the default."""
    parts = [
        click.option(
            "-u",
            "--socket-path",
            type=click.Path(),
            metavar="PATH",
            help="Unix socket to create and listen on." + (f"  [default: {path}]" if path else ""),
        ),
        click.option(
            "--fd",
            type=click.IntRange(min=3),
            metavar="N",
            help="Open unix socket to use instead, listening or connected.",
        ),
        click.option(
            "-c", "--connect", is_flag=True, help="Connect to the socket instead of listening on it."
        ),
        click.option(
            "--socket-mode",
            "mode",
            metavar="MODE",
            callback=octal,
            help=f"Mode of the socket file.  [default: {MODE:o}]",
        ),
        click.option(
            "--socket-group",
            "group",
            metavar="GROUP",
            callback=group_id,
            help="Group of the socket file, by name or number.  [default: this process's]",
        ),
        click.option("--once", is_flag=True, help="Exit after the first front-end's session."),
        click.option(
            "--hide-feature",
            multiple=True,
            metavar="BIT",
            callback=masks(feature_bits),
            help="Do not offer this feature bit (name or number).",
        ),
        click.option(
            "--hide-protocol-feature",
            multiple=True,
            metavar="BIT",
            callback=masks(protocol_feature_bits),
            help="Do not offer this protocol feature bit.",
        ),
        click.option(
            "--require-postcopy",
            is_flag=True,
            help="Exit with 3 at once if postcopy cannot be offered here.",
        ),
        click.option(
            "--no-fault",
            is_flag=True,
            help="In postcopy wait for absent pages without touching them: for QEMU with postcopy-preempt.",
        ),
        click.option(
            "--answer-each-pair",
            is_flag=True,
            help="In postcopy answer for each queue pair, unasked: for QEMU 10.0 and 11.1 with several.",
        ),
        click.option(
            "--print-capabilities", is_flag=True, help="Print the program's capabilities as JSON, and exit."
        ),
        common_options,
    ]

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(command)
        def collected(
            *,
            socket_path: str | None,
            once: bool,
            hide_feature: int,
            hide_protocol_feature: int,
            no_fault: bool,
            answer_each_pair: bool,
            **more: Any,
        ) -> Any:
            own = {name: more.pop(name) for name in ("fd", "connect", "mode", "group")}
            own |= {name: more.pop(name) for name in ("print_capabilities", "require_postcopy")}
            if socket_path is None and own["fd"] is None:
                socket_path = path
            options = Options(
                hide_features=hide_feature,
                hide_protocol_features=hide_protocol_feature,
                once=once,
                no_fault=no_fault,
                answer_each_pair=answer_each_pair,
            )
            return command(program=Program(path=socket_path, options=options, **own), **more)

        for part in reversed(parts):
            collected = part(collected)
        return collected

    return decorate


def octal(_: click.Context, __: click.Parameter, text: str | None) -> int | None:
    """A file mode such as 660."""
    if text is None:
        return None
    try:
        mode = int(text, 8)
    except ValueError:
        mode = -1
    if not 0 <= mode <= 0o777:
        raise click.BadParameter(f"{text!r} is not a file mode such as 660")
    return mode


def group_id(_: click.Context, __: click.Parameter, text: str | None) -> int | None:
    """A group's number, from its name or number."""
    if text is None:
        return None
    if text.isascii() and text.isdigit() and int(text) < NO_GROUP:
        return int(text)
    try:
        return grp.getgrnam(text).gr_gid
    except KeyError:
        raise click.BadParameter(f"no group {text!r}") from None


def masks(parse: Callable[[Sequence[str]], int]) -> Callable[..., int]:
    """A click callback from a parser of bit names."""

    def callback(_: click.Context, __: click.Parameter, given: Sequence[str]) -> int:
        try:
            return parse(given)
        except VhostpcError as e:
            raise click.BadParameter(str(e)) from None

    return callback


def adopt(number: int) -> tuple[socket.socket, bool]:
    """The socket that a manager passed as a descriptor, and whether it listens.

    Programs differ in which of the two they expect by ``--fd``; the socket itself says (SO_ACCEPTCONN).
    """
    try:
        if not stat.S_ISSOCK(os.fstat(number).st_mode):
            raise Failure(f"--fd {number} is not a socket")
        sock = socket.socket(fileno=number)
    except OSError as e:
        raise Failure(f"--fd {number}: {e.strerror}") from None
    if sock.family != socket.AF_UNIX or sock.type != socket.SOCK_STREAM:
        sock.detach()
        raise Failure(f"--fd {number} is not a unix stream socket")
    os.set_inheritable(number, False)
    return sock, bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))


async def serve_fd(
    device: Device,
    number: int,
    options: Options,
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve the front-ends of a listening socket, or the one at the end of a connected socket."""
    sock, listens = adopt(number)
    if listens:
        await serve_listener(device, sock, options, task_status=task_status)
    else:
        task_status.started()
        await serve_connection(device, trio.socket.from_stdlib_socket(sock), options)


async def listen_to(
    signals: AsyncIterator[int], scope: trio.CancelScope, heard: Mapping[signal.Signals, Callable[[], None]]
) -> None:
    """Cancel ``scope`` at the first signal that ends programs; a second one of that kind ends the process as usual."""
    async for number in signals:
        if number in heard:
            heard[signal.Signals(number)]()
            continue
        signal.signal(number, signal.SIG_DFL)
        log.info("ended by %s", signal.Signals(number).name)
        scope.cancel()
        return


async def run(
    work: Work,
    where: str,
    heard: Mapping[signal.Signals, Callable[[], None]],
    beside: Callable[[], Awaitable[None]] | None = None,
) -> None:
    """Run ``work`` to its end, or until SIGTERM, SIGINT or SIGHUP, which are a clean end."""
    for number in heard:
        signal.signal(number, signal.SIG_IGN)  # a signal that arrives during the end must not cut it short
    with trio.open_signal_receiver(*ending_signals(), *heard) as signals:
        async with trio.open_nursery() as nursery:

            async def serving(task_status: trio.TaskStatus[None]) -> None:
                await work(task_status=task_status)
                nursery.cancel_scope.cancel()

            nursery.start_soon(listen_to, signals, nursery.cancel_scope, heard)
            if beside is not None:
                nursery.start_soon(beside)
            await nursery.start(serving)
            log.info("ready on %s", where)
