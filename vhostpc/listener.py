"""A unix socket to listen on: made narrow, in the place of one that nobody listens on any more; and who connects."""

from __future__ import annotations

import errno
import logging
import os
import socket
import stat
from contextlib import suppress
from pathlib import Path

import trio

from vhostpc.errors import VhostpcError

log = logging.getLogger(__name__)

#: What accepting may fail with that passes: sessions end, and give back what they have.
ACCEPT_LATER = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.ECONNABORTED})
#: Seconds until it is tried again.
ACCEPT_INTERVAL = 0.1


def bind(path: str | os.PathLike[str], *, mode: int = 0o600, group: int | None = None) -> socket.socket:
    """A listening unix socket at ``path`` with that mode and group; a stale socket file is replaced.

    Raises VhostpcError when something else is there, or another process listens.
    """
    path = Path(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with suppress(FileNotFoundError):
            if not stat.S_ISSOCK(os.lstat(path).st_mode):
                raise VhostpcError(f"{path} exists and is not a socket; it was left alone")
            probe = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            with probe:
                try:
                    probe.connect(str(path))
                except ConnectionRefusedError:
                    path.unlink()
                else:
                    raise VhostpcError(f"{path}: another process listens there")
        # Narrow from its first moment: the mode is widened afterwards if it is to be.
        old = os.umask(0o177)
        try:
            listener.bind(str(path))
        finally:
            os.umask(old)
        if group is not None:
            os.chown(path, -1, group)
        os.chmod(path, mode)
        listener.listen()
    except OSError as e:
        listener.close()
        raise VhostpcError(f"cannot listen on {path}: {e.strerror or e}") from None
    except BaseException:
        listener.close()
        raise
    return listener


async def accept(listener: trio.socket.SocketType) -> trio.socket.SocketType:
    """The next one who connects. Waits while this process or the machine can have no more descriptors or memory."""
    told = False
    while True:
        try:
            connection, _ = await listener.accept()
        except OSError as e:
            if e.errno not in ACCEPT_LATER:
                raise
            if not told:
                log.error("who connects has to wait: %s", e.strerror)
            told = True
            await trio.sleep(ACCEPT_INTERVAL)
        else:
            return connection
