"""One end's connection to the proxy: bytes in and out, and the ways in which it can end."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import termios
from contextlib import ExitStack, suppress

import trio

from vhostpc.migration.channel import Channel

PATIENCE = 10.0
"""Seconds that an end has to take what was sent to it before a reset."""
_LOOK = 0.001
_LINGER = struct.pack("ii", 1, 0)
_CLOSED = 7  # TCP_CLOSE of the kernel's tcp_states.h


class Side:
    """A connected stream socket."""

    def __init__(self, sock: trio.socket.SocketType) -> None:
        self._sock = sock
        self._tcp = sock.family != socket.AF_UNIX
        self.delivered = True

    @classmethod
    async def of(cls, channel: Channel) -> Side:
        """The socket of a channel that was just opened; takes it over."""
        with ExitStack() as unless_closed:
            async with channel:
                sock = unless_closed.enter_context(socket.socket(fileno=os.dup(channel.in_fd)))
            sock.setblocking(False)
            unless_closed.pop_all()
        return cls(trio.socket.from_stdlib_socket(sock))

    async def receive(self, most: int) -> bytes:
        """Some bytes, none at the end. Raises OSError."""
        return await self._sock.recv(most)

    async def send(self, data: memoryview) -> int:
        """How many of them were taken. Raises OSError."""
        return await self._sock.send(data)

    def finish(self) -> None:
        """FIN: the other end reads what was sent to it, and then the end."""
        with suppress(OSError):
            self._sock.shutdown(socket.SHUT_WR)

    async def deliver(self) -> None:
        """Wait until the other end's kernel has all that was sent, or does not take it; :attr:`delivered` says which.

        A reset throws away what is still here. What the kernel there has acknowledged its process can read, also after
        the reset, as long as it reads. On a unix socket sent is delivered.
        """
        with trio.move_on_after(PATIENCE) as patience:
            while self._tcp and self._unacknowledged():
                await trio.sleep(_LOOK)
        self.delivered = not patience.cancelled_caught

    def _unacknowledged(self) -> int:
        count = bytearray(4)
        try:
            if self._sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == _CLOSED:
                return 0  # it was reset by the other end
            fcntl.ioctl(self._sock.fileno(), termios.TIOCOUTQ, count)
        except OSError:  # it has ended by itself
            return 0
        return int.from_bytes(count, "little")

    def end(self, *, abruptly: bool) -> None:
        """Close it, as the end of a process would; abruptly: RST on TCP.

        On a unix socket the other end reads what is left and then the end, or ECONNRESET if it had sent what was not
        read here; its next write fails with EPIPE.
        """
        with suppress(OSError):
            if self._tcp and abruptly:
                self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER)
        self._sock.close()
