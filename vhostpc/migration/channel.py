"""The connection that a migration goes over."""

from __future__ import annotations

import socket
from contextlib import suppress

import trio

from vhostpc.errors import ChannelLost


class Channel:
    """A connected transport: Python sends and receives what is small, C loops take the descriptors.

    ``in_fd`` and ``out_fd`` are the descriptors to read from and to write to, the same one for a socket; -1 where
    the channel goes one way only. They are non-blocking and belong to the channel.
    """

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        self.in_fd = self.out_fd = stream.socket.fileno()

    @property
    def two_way(self) -> bool:
        """Whether the destination can answer: postcopy and a return path need it."""
        return self.in_fd >= 0 and self.out_fd >= 0

    async def receive_some(self, most: int) -> bytes:
        """Up to ``most`` bytes, none at the end. Raises ChannelLost when the connection broke."""
        try:
            return bytes(await self._stream.receive_some(most))
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            raise ChannelLost("the peer closed the connection") from None

    async def send_all(self, data: bytes) -> None:
        """Raises ChannelLost when the connection broke."""
        try:
            await self._stream.send_all(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            raise ChannelLost("the peer closed the connection") from None

    def shut_down(self) -> None:
        """Break both directions, for the peer and for every loop of ours that uses the descriptors. Never waits."""
        with suppress(OSError):
            self._stream.socket.shutdown(socket.SHUT_RDWR)

    async def aclose(self) -> None:
        await trio.aclose_forcefully(self._stream)

    async def __aenter__(self) -> Channel:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()
