"""A unix socket as a stream of vhost-user frames with their descriptors; both ends use it."""

from __future__ import annotations

import array
import os
import select
import socket
from collections.abc import Iterable

import trio

from vhostpc.errors import LocalProtocolError, RemoteProtocolError
from vhostpc.wire.vhost_user import MAX_FDS, Frame, FrameReader

_CONTROL = socket.CMSG_SPACE(4 * (MAX_FDS + 1))


class MessageSocket:
    """Frames in and out of one connected socket. One reader and one writer at a time."""

    def __init__(self, sock: trio.socket.SocketType) -> None:
        self._sock = sock
        self._reader = FrameReader()

    async def receive(self) -> Frame | None:
        """The next frame, which owns its descriptors; None at the end of the connection.

        Never receives more than the current message: the descriptors of the next one could come with it.
        Raises RemoteProtocolError for anything that is no frame, also half a one.
        """
        reader = self._reader
        while True:
            try:
                data, control, flags, _ = await self._sock.recvmsg(
                    reader.want, _CONTROL, socket.MSG_CMSG_CLOEXEC
                )
            except (ConnectionResetError, BrokenPipeError):
                return None
            fds: list[int] = []
            for level, kind, value in control:
                if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                    numbers = array.array("i")
                    numbers.frombytes(value[: len(value) - len(value) % numbers.itemsize])
                    fds.extend(numbers)
            try:
                frame = reader.feed(data, fds)
            except LocalProtocolError as e:
                raise RemoteProtocolError(str(e)) from None
            if flags & socket.MSG_CTRUNC:
                raise RemoteProtocolError(
                    f"descriptors of a message did not fit: more than {MAX_FDS}, or this process has no more room"
                )
            if frame is not None:
                return frame
            if not data:
                if reader.started:
                    raise RemoteProtocolError("the connection ended in the middle of a message")
                return None

    async def hung_up(self) -> None:
        """Return when the peer has closed its end, also while bytes that it sent before are still unread."""
        # A set of its own, which becomes readable by nothing else: to trio unread bytes hide the end.
        with select.epoll() as end:
            end.register(self._sock.fileno(), select.EPOLLRDHUP)
            await trio.lowlevel.wait_readable(end.fileno())

    async def send(self, data: bytes, fds: Iterable[int] = ()) -> None:
        """Send one message; its descriptors ride on its first byte and stay the caller's.

        Raises OSError when the peer is gone.
        """
        numbers = array.array("i", fds)
        control = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, numbers.tobytes())] if numbers else []
        sent = await self._sock.sendmsg([data], control)
        while sent < len(data):
            sent += await self._sock.send(data[sent:])

    def close(self) -> None:
        """Close the socket and the descriptors of an unfinished message."""
        self._reader.close()
        self._sock.close()


def is_eventfd(fd: int) -> bool:
    """Is this an eventfd? Anything else could block us, or be readable for ever."""
    return os.readlink(f"/proc/self/fd/{fd}") == "anon_inode:[eventfd]"


def signal_event(fd: int) -> None:
    """Add 1 to an eventfd without ever waiting: a peer's may be blocking, and its counter full."""
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    if poll.poll(0):
        os.eventfd_write(fd, 1)
