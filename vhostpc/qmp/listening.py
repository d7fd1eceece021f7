"""A unix socket for the monitors, with any number of clients up to a limit."""

from __future__ import annotations

import contextlib
import os
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator

import trio

from vhostpc.listener import accept, listening
from vhostpc.logs import rationed_logger

CLIENTS = 64

log = rationed_logger(__name__)


class SocketServer(ABC):
    """``clients`` counts those connected; one beyond :data:`CLIENTS` is turned away."""

    def __init__(self) -> None:
        self.clients = 0

    @abstractmethod
    async def serve(self, client: trio.socket.SocketType) -> None:
        """Serve one connected stream socket until it ends; closes it. Counts it in ``clients``."""

    @contextlib.asynccontextmanager
    async def listening(self, path: str | os.PathLike[str]) -> AsyncIterator[None]:
        """Serve at a unix socket's path for the length of a block. The socket exists when it begins and is
        removed when it ends. Raises VhostpcError if the path is not available."""
        with listening(path) as sock, trio.socket.from_stdlib_socket(sock) as listener:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._accept, listener, nursery)
                yield
                nursery.cancel_scope.cancel()

    async def _accept(self, listener: trio.socket.SocketType, nursery: trio.Nursery) -> None:
        while True:
            client = await accept(listener)
            if self.clients >= CLIENTS:
                log.warning("monitor: more than %d clients, one is rejected", CLIENTS)
                client.close()
            else:
                nursery.start_soon(self.serve, client)
