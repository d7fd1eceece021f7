"""The proxy: all connections made to one address are carried to another, and faults are done to them in order."""

from __future__ import annotations

import random
import time
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import trio

from vhostpc.errors import ChannelLost
from vhostpc.migration.channel import Listener, connect, listen
from vhostpc.migration.uri import Address, Tcp, Unix, parse_address
from vhostpc.proxy.faults import BadFault, Fault, Plan, parse_fault
from vhostpc.proxy.pumps import Relay
from vhostpc.proxy.side import Side
from vhostpc.proxy.timeline import Event, Tell, Timeline
from vhostpc.wire.migration.stream import StreamReader

SEEDS = 1 << 32


def socket_address(uri: str, *, incoming: bool) -> Tcp | Unix:
    """An address that connections can be made to. Raises MigrationRefused, and BadFault for another kind."""
    address: Address = parse_address(uri, incoming=incoming)
    if not isinstance(address, Tcp | Unix):
        raise BadFault(f"{uri!r} is neither tcp:HOST:PORT nor unix:PATH: a proxy carries sockets")
    return address


class Proxy:
    """What :func:`open_proxy` gives. ``uri``: where it listens; ``target``: where it connects to; ``seed``: what the
    random numbers were drawn with."""

    def __init__(self, target: str, seed: int | None, timeline: Timeline) -> None:
        self.uri = ""
        self.target = target
        self.seed = random.SystemRandom().randrange(SEEDS) if seed is None else seed
        self.plan = Plan()
        self.last_stream: StreamReader | None = None
        self.open: list[Relay] = []
        self.recoveries = 0
        self._target = socket_address(target, incoming=False)
        self._random = random.Random(self.seed)
        self._timeline = timeline
        self._number = 0

    @property
    def events(self) -> list[Event]:
        """All that was noticed so far."""
        return self._timeline.events

    @property
    def connections(self) -> int:
        """How many are open."""
        return len(self.open)

    @property
    def pending(self) -> list[Fault]:
        """Faults that were not done yet."""
        return self.plan.pending

    def add(self, fault: str | Fault) -> Fault:
        """One more thing to do, behind the others; ``cut@time=0`` is done at once. Raises BadFault."""
        added = parse_fault(fault, self._random) if isinstance(fault, str) else fault
        self.plan.add(added)
        return added

    async def wait(self, name: str, since: int = 0, **details: Any) -> Event:
        """The first event of that name and with these details, from ``events[since]`` on; waits for it. Besides the
        event's own details, ``connection`` and ``way`` may be given."""
        return await self._timeline.wait(name, since, **details)

    def tell(self, event: Event) -> None:
        """For the connections."""
        self._timeline.add(event)

    def _say(self, name: str, connection: int = 0, **details: Any) -> None:
        self.tell(Event(time.monotonic(), name, connection, details=details))

    async def serve(self, listener: Listener) -> None:
        """Carry all connections, one by one in the order in which they came: by it a destination tells them apart."""
        async with trio.open_nursery() as nursery:
            while True:
                near = await Side.of(await listener.accept())
                self._number += 1
                number = self._number
                try:
                    far = await Side.of(await connect(self._target))
                except ChannelLost as error:
                    near.end(abruptly=True)
                    self._say("refused", number, reason=str(error))
                    continue
                except BaseException:
                    near.end(abruptly=False)
                    raise
                relay = Relay(self, number, near, far)
                self.open.append(relay)
                self._say("connect", number)
                nursery.start_soon(relay.run)


@contextmanager
def _lone() -> Iterator[None]:
    """One error of the block is raised as it is, not in a group."""
    try:
        yield
    except BaseExceptionGroup as group:
        if len(group.exceptions) == 1:
            raise group.exceptions[0] from None
        raise


@asynccontextmanager
async def open_proxy(
    listen_at: str,
    target: str,
    faults: Iterable[str | Fault] = (),
    *,
    seed: int | None = None,
    tell: Tell | None = None,
    keep: bool = True,
) -> AsyncIterator[Proxy]:
    """Listen at ``listen_at`` for the length of a block, and carry each connection to ``target``. Both are ``tcp:`` or
    ``unix:``.

    ``faults`` are done in order; ``seed`` draws from their ranges. ``tell`` is called with each event; without ``keep``
    they are not kept in :attr:`Proxy.events`. Raises BadFault, and MigrationRefused for an address that is not one or
    cannot be listened at.
    """
    where = socket_address(listen_at, incoming=True)
    proxy = Proxy(target, seed, Timeline(tell, keep=keep))
    for fault in faults:
        proxy.add(fault)
    with _lone():
        async with listen(where, many=True) as listener:
            told = listener.socket_address[0]
            proxy.uri = f"unix:{told['path']}" if told["type"] == "unix" else _tcp(told["host"], told["port"])
            proxy._say("listening", uri=proxy.uri, seed=proxy.seed, faults=[str(f) for f in proxy.pending])
            async with trio.open_nursery() as nursery:
                nursery.start_soon(proxy.serve, listener)
                yield proxy
                nursery.cancel_scope.cancel()


def _tcp(host: str, port: str) -> str:
    return f"tcp:[{host}]:{port}" if ":" in host else f"tcp:{host}:{port}"
