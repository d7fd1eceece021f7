"""Both ends of a proxy, scripted: what each sends, what each gets, and how its connection ends."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import trio

from vhostpc.proxy import Fault, Proxy, open_proxy

LIMIT = 30


@dataclass
class Got:
    """What an end has read; ``how``: ``eof`` or ``reset`` once it has ended."""

    data: bytearray = field(default_factory=bytearray)
    how: str = ""


async def take(stream: trio.SocketStream, got: Got) -> None:
    """Read to the end."""
    try:
        async for data in stream:
            got.data += data
        got.how = "eof"
    except trio.BrokenResourceError:
        got.how = "reset"


async def give(stream: trio.SocketStream, data: bytes, piece: int = 1 << 20) -> None:
    """Send as much as is taken."""
    with contextlib.suppress(trio.BrokenResourceError):
        for at in range(0, len(data), piece):
            await stream.send_all(data[at : at + piece])
            if piece < 1000:  # each piece arrives by itself
                await trio.lowlevel.checkpoint()


class Stage:
    """A proxy, and a destination that listens behind it."""

    def __init__(self, proxy: Proxy, listener: trio.SocketListener) -> None:
        self.proxy = proxy
        self._listener = listener

    @contextlib.asynccontextmanager
    async def connection(self) -> AsyncIterator[tuple[trio.SocketStream, trio.SocketStream]]:
        """A connection of a source, and what the destination has of it."""
        scheme, _, rest = self.proxy.uri.partition(":")
        if scheme == "unix":
            near = await trio.open_unix_socket(rest)
        else:
            host, _, port = rest.rpartition(":")
            near = await trio.open_tcp_stream(host, int(port))
        async with near, await self._listener.accept() as far:
            yield near, far


@contextlib.asynccontextmanager
async def stage(
    folder: Path, faults: Sequence[str | Fault] = (), *, tcp: bool = False, seed: int | None = None
) -> AsyncIterator[Stage]:
    """A proxy over unix sockets in ``folder``, or over TCP."""
    if tcp:
        sock = trio.socket.socket()
        await sock.bind(("127.0.0.1", 0))
        listen_at, target = "tcp:127.0.0.1:0", f"tcp:127.0.0.1:{sock.getsockname()[1]}"
    else:
        sock = trio.socket.socket(socket.AF_UNIX)
        await sock.bind(str(folder / "target"))
        listen_at, target = f"unix:{folder / 'near'}", f"unix:{folder / 'target'}"
    sock.listen(8)
    with trio.fail_after(LIMIT):
        async with (
            trio.SocketListener(sock) as listener,
            open_proxy(listen_at, target, faults, seed=seed) as proxy,
        ):
            yield Stage(proxy, listener)


async def play(here: Stage, forward: bytes, back: bytes, piece: int = 1 << 20) -> tuple[Got, Got]:
    """Send both halves of a recorded connection at once: what the destination got, and the source.

    It ends when both have ended: cut, or each after the end that the other one has said.
    """
    there, returned = Got(), Got()
    before = len(here.proxy.events)
    async with here.connection() as (near, far), trio.open_nursery() as nursery:

        async def source() -> None:
            await give(near, forward, piece)
            with contextlib.suppress(trio.BrokenResourceError):
                await near.send_eof()

        async def destination() -> None:
            # The forward half has to begin first, or nobody knows what connection it is.
            await here.proxy.wait("kind", before)
            await give(far, back, piece)
            with contextlib.suppress(trio.BrokenResourceError):
                await far.send_eof()

        nursery.start_soon(take, far, there)
        nursery.start_soon(take, near, returned)
        nursery.start_soon(source)
        nursery.start_soon(destination)
    return there, returned
