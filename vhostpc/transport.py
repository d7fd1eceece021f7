"""A unix socket as a stream of vhost-user frames with their descriptors; both ends use it."""

from __future__ import annotations

import array
import os
import select
import socket
from collections.abc import Iterable

import trio

from vhostpc.errors import LocalProtocolError, RemoteProtocolError
from vhostpc.own_sockets import leads_to_us
from vhostpc.wire.vhost_user import MAX_FDS, Frame, FrameReader

_CONTROL = socket.CMSG_SPACE(4 * (MAX_FDS + 1))


class MessageSocket:
    """Frames in and out of one connected socket. One reader and one writer at a time.

    The peer may have made the socket, and have this end of it too, so each call asks for no waiting by a flag.
    """

    def __init__(self, sock: trio.socket.SocketType) -> None:
        self._sock = sock
        self._reader = FrameReader()

    async def receive(self) -> Frame | None:
        """The next frame, which owns its descriptors; None at the end of the connection.

        Never receives more than the current message: the descriptors of the next one could come with it.
        Raises RemoteProtocolError for anything that is not a frame, including an incomplete one.
        """
        reader = self._reader
        while True:
            try:
                data, control, flags, _ = await self._sock.recvmsg(
                    reader.want, _CONTROL, socket.MSG_CMSG_CLOEXEC | socket.MSG_DONTWAIT
                )
            except (ConnectionResetError, BrokenPipeError):
                return None
            fds: list[int] = []
            for level, kind, value in control:
                if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                    numbers = array.array("i")
                    numbers.frombytes(value[: len(value) - len(value) % numbers.itemsize])
                    fds.extend(numbers)
            # Before anything can wait: while we have such a descriptor, the end of the connection is not seen.
            if any(map(leads_to_us, fds)):
                for fd in fds:
                    os.close(fd)
                raise RemoteProtocolError(
                    "a descriptor that was passed is the other end of our own connection"
                )
            try:
                frame = reader.feed(data, fds)
            except LocalProtocolError as e:
                raise RemoteProtocolError(str(e)) from None
            if flags & socket.MSG_CTRUNC:
                raise RemoteProtocolError(
                    f"descriptors of a message did not fit: more than {MAX_FDS}, or more than this process may open"
                )
            if frame is not None:
                return frame
            if not data:
                if reader.started:
                    raise RemoteProtocolError("the connection ended in the middle of a message")
                return None

    async def hung_up(self) -> None:
        """Return when the peer has closed its end, also while bytes that it sent before are still unread."""
        # An epoll set of its own, which only the end makes readable: unread bytes would hide the end from trio.
        with select.epoll() as end:
            end.register(self._sock.fileno(), select.EPOLLRDHUP)
            await trio.lowlevel.wait_readable(end.fileno())

    async def hand_on(self, frame: Frame, to: trio.MemorySendChannel[Frame]) -> bool:
        """Put a received frame into a channel. False: there was no room, and the peer has hung up meanwhile.

        Nobody may be left to make room. A frame that was not handed on is closed.
        """
        handed_on = False
        try:
            try:
                to.send_nowait(frame)
            except trio.WouldBlock:
                async with trio.open_nursery() as nursery:

                    async def watch() -> None:
                        await self.hung_up()
                        nursery.cancel_scope.cancel()

                    nursery.start_soon(watch)
                    await to.send(frame)
                    handed_on = True
                    nursery.cancel_scope.cancel()
            else:
                handed_on = True
        finally:
            if not handed_on:
                frame.close_fds()
        return handed_on

    async def send(self, data: bytes, fds: Iterable[int] = ()) -> None:
        """Send one message; its descriptors go with its first byte and stay the caller's.

        Raises OSError when the peer is gone.
        """
        numbers = array.array("i", fds)
        control = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, numbers.tobytes())] if numbers else []
        sent = await self._sock.sendmsg([data], control, socket.MSG_DONTWAIT)
        while sent < len(data):
            sent += await self._sock.send(data[sent:], socket.MSG_DONTWAIT)

    def close(self) -> None:
        """Close the socket and the descriptors of an unfinished message."""
        self._reader.close()
        self._sock.close()
