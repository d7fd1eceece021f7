"""Wires between both ends of a migration, which a test moves and breaks: one of each link, and one beside it."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager, suppress
from typing import Any
from unittest import mock

import trio

from vhostpc.endpoint.connections import accepted
from vhostpc.errors import ChannelLost
from vhostpc.migration.channel import Channel, Connect, connect
from vhostpc.migration.uri import Fd


class Wire:
    """Two socket pairs; what is between them moves when it is told to."""

    def __init__(self) -> None:
        self.source_end, self._s = socket.socketpair()
        self.destination_end, self._d = socket.socketpair()
        for sock in (self._s, self._d):
            sock.setblocking(False)
        self.cut = False
        self.left = {"source", "destination"}
        """Ends that nobody has yet."""
        self.connected = trio.Event()
        """As a second one: the source has made it."""

    def take(self, end: str) -> int:
        """The descriptor of an end, which is the taker's."""
        self.left.remove(end)
        return (self.source_end if end == "source" else self.destination_end).detach()

    def _move(self, src: socket.socket, dst: socket.socket, most: int) -> bool:
        """Whether anything moved, or an end was passed on."""
        try:
            data = src.recv(most, socket.MSG_PEEK)
        except (BlockingIOError, ConnectionError):
            return False
        if not data:
            with suppress(OSError):
                dst.shutdown(socket.SHUT_WR)
            return False
        try:
            sent = dst.send(data)
        except BlockingIOError:
            return False
        except OSError:
            sent = len(data)  # nobody reads there any more
        src.recv(sent)
        return True

    def forward(self, most: int) -> bool:
        return not self.cut and self._move(self._s, self._d, most)

    def back(self, most: int) -> bool:
        return not self.cut and self._move(self._d, self._s, most)

    def break_it(self) -> None:
        if not self.cut:
            self.cut = True
            for sock in (self._s, self._d, self.source_end, self.destination_end):
                sock.close()

    def close(self) -> None:
        self.break_it()


class Wires:
    """The one of each link, and the one beside it, for requested pages."""

    def __init__(self) -> None:
        self.all: list[Wire] = []
        self._beside: dict[int, Wire] = {}  # by the main one's descriptor at either end
        self._of: dict[Wire, Wire] = {}
        self.add()

    @property
    def last(self) -> Wire:
        return self.all[-1]

    @property
    def beside(self) -> Wire:
        """The last one's."""
        return self._of[self.last]

    def add(self) -> Wire:
        self.all.append(wire := Wire())
        self._of[wire] = Wire()
        return wire

    def take(self, end: str) -> Fd:
        """An end of the last one."""
        fd = self.last.take(end)
        self._beside[fd] = self.beside
        return Fd("in" if end == "destination" else "out", fd)

    def move(self, size: int) -> bool:
        """As much as can be, of all."""
        return any([w.forward(size) | w.back(size) for w in (*self.all, *self._of.values())])

    def close(self) -> None:
        for wire in (*self.all, *self._of.values()):
            wire.close()

    def another(self, stack: AsyncExitStack, address: Any, limit: float) -> Connect:
        """As :func:`vhostpc.endpoint.connections.another`."""
        wire = self._beside[address.fd]

        async def make() -> Channel:
            await trio.lowlevel.checkpoint()
            wire.connected.set()
            return await self._channel(stack, wire, "source")

        return make

    @asynccontextmanager
    async def accepted(
        self, address: Any, limit: float, listens: Any, *, preempt: Callable[[], bool], patience: float = 0
    ) -> AsyncIterator[tuple[Channel, Connect | None]]:
        """As :func:`vhostpc.endpoint.connections.accepted`."""
        wire = self._beside[address.fd]
        async with AsyncExitStack() as stack:

            async def take() -> Channel:
                await wire.connected.wait()
                return await self._channel(stack, wire, "destination")

            main, _ = await stack.enter_async_context(
                accepted(address, limit, listens, preempt=lambda: False)
            )
            yield main, take if preempt() else None

    @staticmethod
    async def _channel(stack: AsyncExitStack, wire: Wire, end: str) -> Channel:
        if wire.cut:
            raise ChannelLost("the second wire is cut")
        return await stack.enter_async_context(await connect(Fd(end, wire.take(end))))

    @contextmanager
    def joined(self) -> Iterator[None]:
        """Both ends get theirs from here."""
        with ExitStack() as stack:
            for name, what in (
                ("endpoint.endpoint.another", self.another),
                ("endpoint.endpoint.accepted", self.accepted),
                ("endpoint.recovery.accepted", self.accepted),
                ("endpoint.endpoint.check_many", lambda *_, **__: None),
            ):
                stack.enter_context(mock.patch(f"vhostpc.{name}", what))
            yield
