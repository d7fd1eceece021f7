"""Events of rings, on descriptors that the peer has too: nothing here waits, whatever the peer does to their flags
and counter."""

from __future__ import annotations

import enum
import fcntl
import os
import socket
import stat

from vhostpc._native import lib


class EventKind(enum.Enum):
    """The kinds of event descriptors."""

    EVENTFD = enum.auto()
    #: A pipe or a unix socket: 8 bytes for each event.
    STREAM = enum.auto()
    #: Anything else could be readable for ever, or make a write wait for a disk.
    NONE = enum.auto()


def event_kind(fd: int) -> EventKind:
    """The kind of event that this descriptor can carry: none, if it can be neither read nor written (O_PATH)."""
    if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_PATH:
        return EventKind.NONE
    if os.readlink(f"/proc/self/fd/{fd}") == "anon_inode:[eventfd]":
        return EventKind.EVENTFD
    mode = os.fstat(fd).st_mode
    if stat.S_ISSOCK(mode):
        sock = socket.socket(fileno=fd)
        sock.detach()
        return EventKind.STREAM if sock.family == socket.AF_UNIX else EventKind.NONE
    return EventKind.STREAM if stat.S_ISFIFO(mode) else EventKind.NONE


def signal_event(fd: int) -> None:
    """Add 1 to the counter of an eventfd, or write 8 bytes to a stream; a full one is as good. Raises nothing."""
    lib.vpc_event_signal(fd)


def clear_event(fd: int) -> bool:
    """Read the counter, or 8 bytes of a stream; whether there was something to read. Raises nothing."""
    return bool(lib.vpc_event_clear(fd))
