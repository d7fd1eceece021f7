"""A unix socket to listen on: made narrow, in the place of one that nobody listens on any more."""

from __future__ import annotations

import os
import socket
import stat
from contextlib import suppress
from pathlib import Path

from vhostpc.errors import VhostpcError


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
