"""Detecting a socket that is the other end of one of our own connections.

A process that is passed such a socket must not keep it: it would never see the end of the connection.
"""

from __future__ import annotations

import os
import socket
import stat
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Protocol

#: Names (unix(7)) of our ends of the open connections, and how many ends have each.
_names: Counter[str | bytes] = Counter()


class _HasDescriptor(Protocol):
    def fileno(self) -> int: ...


@contextmanager
def known(connection: _HasDescriptor) -> Iterator[None]:
    """While inside, :func:`leads_to_us` knows the other end of this connected unix socket.

    An end that has no name is given one: an abstract name that the kernel chooses (unix(7), "Autobind feature").
    """
    with socket.socket(fileno=os.dup(connection.fileno())) as ours:
        name = ours.getsockname()
        if not name:
            with suppress(OSError):  # not allowed: then its name is unknown
                ours.bind(b"")
            name = ours.getsockname()
    if name:
        _names[name] += 1
    try:
        yield
    finally:
        if name:
            _names[name] -= 1
            if not _names[name]:
                del _names[name]


def leads_to_us(fd: int) -> bool:
    """Whether this descriptor is a socket that is connected to one of ours."""
    if not _names or not stat.S_ISSOCK(os.fstat(fd).st_mode):
        return False
    try:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, fileno=fd)
    except OSError:  # it only names a place (O_PATH)
        return False
    try:
        return sock.getpeername() in _names
    except OSError:
        return False
    finally:
        sock.detach()
