"""The connections of a migration: one, or a second one beside it for requested pages (postcopy-preempt)."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import trio

from vhostpc.errors import ChannelLost, MigrationRefused
from vhostpc.migration.channel import Channel, Connect, Listener, connect, listen
from vhostpc.migration.uri import Address, Tcp, Unix


def check_many(address: Address, *, preempt: bool) -> None:
    """Raises MigrationRefused, in QEMU's words: only one connection can be made there."""
    if preempt and not isinstance(address, Tcp | Unix):
        raise MigrationRefused("Migration requires multi-channel URIs (e.g. tcp)")


class _Taken:
    """The connections that came to a listener; ``limit``: seconds of silence that end one, 0 for none."""

    def __init__(self, listener: Listener, stack: AsyncExitStack, limit: float) -> None:
        self._listener = listener
        self._stack = stack
        self._limit = limit
        self.waiting: list[Channel] = []
        """Those that were not given to anybody."""

    async def take(self) -> None:
        """Raises ChannelLost."""
        channel = await self._stack.enter_async_context(await self._listener.accept())
        channel.limit_silence(self._limit)
        self.waiting.append(channel)

    async def speaking(self, patience: float) -> Channel:
        """The main one, behind the first :meth:`take`, whichever came first.

        On the other one a source says nothing until it is asked for a page. Raises ChannelLost, also ``patience``
        seconds from now, if none has said anything.
        """
        spoke: list[Channel] = []
        lost: ChannelLost | None = ChannelLost(f"who connected has said nothing within {patience:g} s")
        async with trio.open_nursery() as nursery:
            nursery.cancel_scope.deadline = trio.current_time() + patience

            async def hear(channel: Channel) -> None:
                await trio.lowlevel.wait_readable(channel.in_fd)
                nonlocal lost
                lost = None
                spoke.append(channel)
                nursery.cancel_scope.cancel()

            nursery.start_soon(hear, self.waiting[0])
            try:
                await self.take()
                await hear(self.waiting[1])
            except ChannelLost as error:
                lost = error
                nursery.cancel_scope.cancel()
        if lost is not None:
            raise lost
        self.waiting.remove(spoke[0])
        return spoke[0]


@asynccontextmanager
async def accepted(
    address: Address,
    limit: float,
    listens: Callable[[list[dict[str, Any]]], None],
    *,
    preempt: Callable[[], bool],
    patience: float = math.inf,
) -> AsyncIterator[tuple[Channel, Connect | None]]:
    """Listen at the address; the main connection, and with ``preempt`` what takes the second one.

    ``preempt`` is asked when the first connection has come: a capability may change until then.
    ``limit``: seconds of silence that end a connection, 0 for none. ``listens`` is told the addresses as
    ``query-migrate`` tells them. Behind the last connection it listens no longer. ``patience``: seconds in which one of
    two has to say something.
    Raises MigrationRefused (it cannot listen there), ChannelLost.
    """
    async with AsyncExitStack() as stack:
        async with AsyncExitStack() as listening:
            listener = await listening.enter_async_context(listen(address))
            taken = _Taken(listener, stack, limit)
            listens(listener.socket_address)
            second: Connect | None = None
            await taken.take()
            main = taken.waiting[0]
            if preempt():
                main = await taken.speaking(patience)
                until_second = await stack.enter_async_context(listening.pop_all())

                async def take_second() -> Channel:
                    if not taken.waiting:
                        await taken.take()
                    await until_second.aclose()
                    return taken.waiting.pop()

                second = take_second
        yield main, second


def another(stack: AsyncExitStack, address: Address, limit: float) -> Connect:
    """Makes a second connection to the address, which the stack closes."""

    async def make() -> Channel:
        channel = await stack.enter_async_context(await connect(address))
        channel.limit_silence(limit)
        return channel

    return make
