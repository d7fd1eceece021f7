"""Listen or connect, and run one session per front-end."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable

import trio

from vhostpc.backend.device import Device, check_device
from vhostpc.backend.postcopy_state import refusal
from vhostpc.backend.serve_options import Options
from vhostpc.backend.session import Session, one_sentence
from vhostpc.errors import VhostpcError
from vhostpc.listener import accept, listening
from vhostpc.listener import connect as connected
from vhostpc.logs import rationed_logger

log = rationed_logger(__name__)

DeviceSource = Device | Callable[[], Device]


async def serve(
    device: DeviceSource,
    path: str | os.PathLike[str],
    options: Options = Options(),  # noqa: B008  (frozen)
    *,
    connect: bool = False,
    mode: int = 0o600,
    group: int | None = None,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve ``device`` on the unix socket ``path``, one session per front-end, until cancelled.

    ``device``: an instance for all sessions, or a callable that makes one for each. ``connect``: connect to a
    front-end that listens, serve it, return. ``mode`` and ``group``: of the socket file. A stale socket file is
    replaced, anything else is left alone; our own is removed at the end. With ``options.once`` it returns after
    the first session.

    Raises VhostpcError when the path cannot be used, or for a device that cannot serve a queue.
    """
    if isinstance(device, Device):
        check_device(device)
    if connect:
        try:
            sock = await connected(path)
        except OSError as e:
            raise VhostpcError(f"cannot connect to {path}: {e.strerror}") from None
        task_status.started()
        await serve_connection(device, sock, options)
        return
    with listening(path, mode=mode, group=group) as listener:
        await serve_listener(device, listener, options, task_status=task_status)


async def serve_listener(
    device: DeviceSource,
    listener: socket.socket,
    options: Options = Options(),  # noqa: B008
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve every front-end that connects to a listening unix socket, which is closed at the end."""
    sock = trio.socket.from_stdlib_socket(listener)
    pagefault = _pagefault()
    try:
        async with trio.open_nursery() as nursery:
            task_status.started()
            number = 0
            while True:
                connection = await accept(sock)
                number += 1
                if options.once:
                    await _serve_one(device, connection, options, f"front-end {number}", pagefault)
                    return
                nursery.start_soon(_serve_one, device, connection, options, f"front-end {number}", pagefault)
    finally:
        sock.close()


async def serve_connection(
    device: DeviceSource,
    connection: trio.socket.SocketType,
    options: Options = Options(),  # noqa: B008
) -> None:
    """Serve the front-end at the other end of a connected unix socket, which is closed at the end."""
    await _serve_one(device, connection, options, "front-end", _pagefault())


def _made(source: DeviceSource) -> Device:
    """The device for a session. Raises VhostpcError for one that cannot serve."""
    device = source if isinstance(source, Device) else source()
    check_device(device)
    return device


def _pagefault() -> bool:
    why = refusal()
    if why is not None:
        log.warning("postcopy is not offered: %s", why)
    return why is None


async def _serve_one(
    source: DeviceSource,
    connection: trio.socket.SocketType,
    options: Options,
    name: str,
    pagefault: bool,
) -> None:
    """One session. Its errors end it, and nothing else."""
    log.info("%s: connected", name)
    try:
        device = _made(source)
        await Session(device, connection, options, pagefault=pagefault, name=name).run()
    except Exception as e:  # the server outlives any session
        sentence = one_sentence(e)
        if sentence is None:
            log.exception("%s: the device or the framework failed; session ended", name)
        else:
            log.error("%s: session ended: %s", name, sentence)
            log.debug("%s: traceback", name, exc_info=True)
    else:
        log.info("%s: disconnected", name)
    finally:
        connection.close()
