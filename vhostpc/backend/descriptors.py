"""The kinds of descriptors allowed for a ring's events, and the handling of a socket that is only written."""

from __future__ import annotations

import os
import socket
import stat
from contextlib import suppress

from vhostpc.errors import RemoteProtocolError
from vhostpc.virtio.event import EventKind, event_kind

_PIECE = 64 << 10
_EMPTY = 4096
"""More empty messages than a socket holds (net.unix.max_dgram_qlen)."""


def event_descriptor(fd: int, name: str) -> EventKind:
    """Raises RemoteProtocolError, with the request's ``name``, for a descriptor that cannot carry events."""
    kind = event_kind(fd)
    if kind is EventKind.NONE:
        raise RemoteProtocolError(f"{name}: the descriptor is not an eventfd, pipe or unix socket")
    return kind


def only_written(fd: int, kind: EventKind) -> None:
    """Discard the data in a socket that nobody here reads, and stop further data.

    A descriptor in there would stay open as long as the socket: the front-end's own end of its connection, say.
    """
    if kind is not EventKind.STREAM or not stat.S_ISSOCK(os.fstat(fd).st_mode):
        return
    sock = socket.socket(fileno=fd)
    try:
        with suppress(OSError):  # not connected: it carries nothing
            sock.shutdown(socket.SHUT_RD)
            # An empty message reads like the end of the connection, and others may wait behind it.
            empty = 0
            while empty < (1 if sock.type == socket.SOCK_STREAM else _EMPTY):
                empty += not sock.recv(_PIECE, socket.MSG_DONTWAIT)
    finally:
        sock.detach()
