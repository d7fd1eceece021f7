"""``vhostpc backend``: a device of yours as a back-end program that keeps the conventions.

"Backend program conventions" of the vhost-user specification: ``--socket-path``, ``--fd``,
``--print-capabilities``, no daemon, SIGTERM ends it with 0, early failure with a message on stderr.
"""

from __future__ import annotations

import functools
import grp
import importlib
import importlib.util
import inspect
import json
import logging
import os
import signal
import socket
import stat
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import click
import trio

from vhostpc.backend import Device, Options, serve, serve_connection, serve_listener
from vhostpc.backend.options import feature_bits, protocol_feature_bits
from vhostpc.cli.common import CannotHere, Failure, common_options, start_logging
from vhostpc.errors import VhostpcError
from vhostpc.ufd import probe

log = logging.getLogger(__name__)


class Work(Protocol):
    """Something to run for as long as the program lives; says when it is ready."""

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


def find(target: str) -> Callable[..., Any]:
    """What ``MODULE:NAME`` or ``FILE.py:NAME`` means; the current folder is searched first."""
    module_name, colon, name = target.rpartition(":")
    if not colon or not module_name or not name:
        raise click.BadParameter(f"{target!r} is not MODULE:CLASS", param_hint="MODULE:CLASS")
    sys.path.insert(0, os.getcwd())
    try:
        module = (
            load_file(Path(module_name))
            if module_name.endswith(".py")
            else importlib.import_module(module_name)
        )
    except ModuleNotFoundError as e:
        # The module itself, or a folder above it, is missing: that is the user's spelling. One that it
        # imports is missing: that is said too, by its own name.
        raise click.BadParameter(f"no module named {e.name!r}", param_hint="MODULE:CLASS") from None
    found: Any = module
    for part in name.split("."):
        found = getattr(found, part, None)
    if not callable(found):
        raise click.BadParameter(f"{module_name} has no class {name}", param_hint="MODULE:CLASS")
    return found  # type: ignore[no-any-return]


def load_file(path: Path) -> Any:
    """Import a source file by its path; it may import what lies beside it, as a program may."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise click.BadParameter(f"{path} is not a Python file", param_hint="MODULE:CLASS")
    sys.path.insert(0, str(path.resolve().parent))
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def make(factory: Callable[..., Any], arguments: dict[str, str]) -> Device:
    """The device: ``factory`` called with the ``-o`` options as keyword arguments."""
    try:
        inspect.signature(factory).bind(**arguments)
    except TypeError as e:
        given = ", ".join(arguments) or "none"
        raise click.UsageError(f"{factory.__name__}: {e} (options given by -o: {given})") from None
    device = factory(**arguments)
    if not isinstance(device, Device):
        raise click.BadParameter(
            f"{factory.__name__} makes a {type(device).__name__}, which is no vhostpc.backend.Device",
            param_hint="MODULE:CLASS",
        )
    return device


def capabilities(factory: Any) -> dict[str, object]:
    """What ``--print-capabilities`` prints: the type, and features that a manager may ask for."""
    kind = factory if isinstance(factory, type) else make(factory, {})
    number = int(getattr(kind, "device_id", 0))
    if number not in TYPES:
        raise Failure(f"virtio device id {number} has no type in the schema of vhost-user back-end programs")
    return {"type": TYPES[number], "features": list(getattr(kind, "capabilities", ()))}


def pairs(_: click.Context, __: click.Parameter, given: Sequence[str]) -> dict[str, str]:
    """``-o KEY=VALUE`` options as keyword arguments."""
    found = {}
    for text in given:
        key, equals, value = text.partition("=")
        if not equals or not key.isidentifier():
            raise click.BadParameter(f"{text!r} is not KEY=VALUE")
        found[key] = value
    return found


def octal(_: click.Context, __: click.Parameter, text: str) -> int:
    """A file mode such as 660."""
    try:
        mode = int(text, 8)
    except ValueError:
        mode = -1
    if not 0 <= mode <= 0o777:
        raise click.BadParameter(f"{text!r} is not a file mode such as 660")
    return mode


def group_id(_: click.Context, __: click.Parameter, text: str | None) -> int | None:
    """A group's number, from its name or number."""
    if text is None or text.isdigit():
        return None if text is None else int(text)
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


async def until_told(signals: AsyncIterator[int], scope: trio.CancelScope) -> None:
    """Cancel ``scope`` at the first signal; a second one of the kind ends the process as usual."""
    async for number in signals:
        signal.signal(number, signal.SIG_DFL)
        scope.cancel()
        return


async def run(work: Work, where: str) -> None:
    """Run ``work`` to its end, or until SIGTERM or SIGINT, which are a clean end."""
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async with trio.open_nursery() as nursery:

            async def serving(task_status: trio.TaskStatus[None]) -> None:
                await work(task_status=task_status)
                nursery.cancel_scope.cancel()

            nursery.start_soon(until_told, signals, nursery.cancel_scope)
            await nursery.start(serving)
            log.info("ready on %s", where)


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


@click.command()
@click.argument("target", metavar="MODULE:CLASS")
@click.option("--socket-path", metavar="PATH", help="Unix socket to make and listen on.")
@click.option(
    "--fd", type=click.IntRange(min=3), metavar="N", help="An open unix socket, listening or connected."
)
@click.option("--print-capabilities", is_flag=True, help="Print what the program can do as JSON, and end.")
@click.option("--connect", is_flag=True, help="Connect to --socket-path instead of listening on it.")
@click.option(
    "--socket-mode", default="600", show_default=True, callback=octal, help="Mode of the socket file."
)
@click.option("--socket-group", callback=group_id, help="Group of the socket file, by name or number.")
@click.option("--once", is_flag=True, help="End with the first front-end's session.")
@click.option(
    "-o",
    "--option",
    "arguments",
    multiple=True,
    metavar="KEY=VALUE",
    callback=pairs,
    help="Keyword argument (a text) for CLASS.",
)
@click.option(
    "--hide-feature",
    multiple=True,
    metavar="BIT",
    callback=masks(feature_bits),
    help="Do not offer this feature bit (name or number).",
)
@click.option(
    "--hide-protocol-feature",
    multiple=True,
    metavar="BIT",
    callback=masks(protocol_feature_bits),
    help="Do not offer this protocol feature bit.",
)
@click.option(
    "--require-postcopy", is_flag=True, help="End with 3 at once if postcopy can not be offered here."
)
@common_options
def backend(
    target: str,
    socket_path: str | None,
    fd: int | None,
    print_capabilities: bool,
    connect: bool,
    socket_mode: int,
    socket_group: int | None,
    once: bool,
    arguments: dict[str, str],
    hide_feature: int,
    hide_protocol_feature: int,
    require_postcopy: bool,
) -> int:
    """Serve the device MODULE:CLASS (or FILE.py:CLASS) to vhost-user front-ends.

    CLASS is a vhostpc.backend.Device, or a function that makes one. SIGTERM and SIGINT end the program with
    code 0 and remove its socket.
    """
    factory = find(target)
    if print_capabilities:
        click.echo(json.dumps(capabilities(factory)))
        return 0
    if (socket_path is None) == (fd is None):
        raise click.UsageError("give one of --socket-path and --fd")
    if connect and fd is not None:
        raise click.UsageError("--connect goes with --socket-path")
    start_logging()
    device = make(factory, arguments)
    if require_postcopy and not (found := probe()).ok:
        raise CannotHere(found.problem)
    options = Options(hide_features=hide_feature, hide_protocol_features=hide_protocol_feature, once=once)
    if fd is not None:
        trio.run(run, functools.partial(serve_fd, device, fd, options), f"descriptor {fd}")
    else:
        assert socket_path is not None
        work = functools.partial(
            serve, device, socket_path, options, connect=connect, mode=socket_mode, group=socket_group
        )
        trio.run(run, work, socket_path)
    return 0
