"""A guest that moves to a back-end: our front-end and page source in front of our back-end in its own process.

The guest is a set of virtqueues in RAM blocks. It is made at the source, calm; then it moves: its memory at
the destination is all holes, which the back-end meets one after the other.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import trio

from vhostpc.errors import ChannelLost
from vhostpc.frontend import (
    BackendPostcopy,
    Driver,
    FarSide,
    FrontEnd,
    GuestRegion,
    MemoryShare,
    Mode,
    RingLayout,
    connect,
    start_ring,
)
from vhostpc.frontend.source import SourceProcess, start_source
from vhostpc.pages.ramblock import Bits, RamBlock, RamSet
from vhostpc.pages.ramchannel import LoadNumbers, RamChannel
from vhostpc.pages.service import FaultService
from vhostpc.wire.vhost_user import Feature, Request

SEED = 11
HIGH = 1 << 32  # guest address of the second block
HEADER = 12


class BackendChild:
    """The back-end's process."""

    def __init__(self, tmp: Path, spec: dict[str, Any], name: str = "backend") -> None:
        self.path = tmp / f"{name}.sock"
        self.stderr = tmp / f"{name}.err"
        ours, theirs = socket.socketpair()
        with theirs, self.stderr.open("wb") as err:
            self.process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "tests.kit.backend_child",
                    str(theirs.fileno()),
                    json.dumps({**spec, "path": str(self.path)}),
                ],
                pass_fds=[theirs.fileno()],
                stderr=err,
                stdin=subprocess.DEVNULL,
            )
        ours.setblocking(False)
        self.control = trio.SocketStream(trio.socket.from_stdlib_socket(ours))

    async def answer(self) -> dict[str, Any]:
        line = b""
        with trio.fail_after(30):
            while not line.endswith(b"\n"):
                data = await self.control.receive_some(4096)
                assert data, f"the back-end died:\n{self.log()}"
                line += data
        result: dict[str, Any] = json.loads(line)
        return result

    async def ask(self, question: str) -> dict[str, Any]:
        await self.control.send_all(json.dumps(question).encode() + b"\n")
        return await self.answer()

    async def gap(self) -> float:
        """Largest gap of its trio loop's beat since the last call, in seconds."""
        beat = await self.ask("beat")
        return float(beat["gap"])

    def log(self) -> str:
        return self.stderr.read_text()

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


@asynccontextmanager
async def backend_child(tmp: Path, name: str = "backend", **spec: Any) -> AsyncIterator[BackendChild]:
    child = BackendChild(tmp, spec, name)
    try:
        await child.answer()
        yield child
        assert child.process.poll() is None, f"the back-end died:\n{child.log()}"
    except BaseException:
        sys.stderr.write(f"--- {name}'s log ---\n{child.log()}\n")
        raise
    finally:
        child.end()
        await trio.aclose_forcefully(child.control)


class Guest:
    """Blocks at the source and at the destination, and how the guest sees them."""

    def __init__(
        self, *, page_size: int = 4096, low: int = 64, high: int = 256, high_page: int | None = None
    ) -> None:
        """``low`` and ``high``: host pages of the two blocks; ``high_page``: their size in the second, if another."""
        self.page_size = page_size
        self.source, self.ram = RamSet(), RamSet()
        for ram in (self.source, self.ram):
            ram.create("low.ram", low * page_size, page_size)
            ram.create("high.ram", high * (high_page or page_size), high_page or page_size)

    def regions(self, ram: RamSet) -> list[GuestRegion]:
        low, high = ram.blocks
        return [GuestRegion(0, low.length, low), GuestRegion(HIGH, high.length, high)]

    async def fill(self) -> None:
        for block in self.source.blocks:
            await block.fill(SEED)

    def layout(self, start: int, *, num: int = 64, slots: int = 16, **more: int) -> RingLayout:
        """Each part of the ring in low memory on host pages of its own, buffers in high memory."""
        p = self.page_size
        index = start // (4 * p)
        return RingLayout(
            desc=start,
            avail=start + p,
            used=start + 2 * p,
            tables=start + 3 * p if more.pop("indirect", 0) else 0,
            table_stride=64,
            buffers=HIGH + index * (32 if p == 4096 else 2) * p,
            buffer_stride=4096,
            num=num,
            slots=slots,
            **more,
        )

    def bytes_of(self, ram: RamSet) -> list[bytes]:
        """The whole content, read from the files: touches no mapping and makes no page."""
        return [
            b"".join(os.pread(b.fd, min(1 << 20, b.length - at), at) for at in range(0, b.length, 1 << 20))
            for b in ram.blocks
        ]

    def holes(self) -> list[tuple[str, int, int]]:
        return [(b.name, *hole) for b in self.ram.blocks for hole in b.holes()]

    def close(self) -> None:
        self.source.close()
        self.ram.close()


class Move:
    """One back-end's part of a move. Everything is open while the context of :func:`moving` lasts."""

    guest: Guest
    service: FaultService
    source: SourceProcess
    channel: RamChannel
    front: FrontEnd
    memory: MemoryShare
    postcopy: BackendPostcopy
    nursery: trio.Nursery

    def __init__(self) -> None:
        self.loaded: LoadNumbers | None = None
        self.lost: ChannelLost | None = None
        self.load_ended = trio.Event()
        self.drivers: dict[int, Driver] = {}

    async def load(self) -> None:
        try:
            self.loaded = await self.channel.load()
        except ChannelLost as e:
            self.lost = e
        self.load_ended.set()

    async def start(self, index: int, driver: Driver, base: int = 0) -> None:
        """Start a ring at the destination; the driver must be the source's."""
        driver.move(self.guest.ram)
        self.drivers[index] = driver
        await start_ring(self.front, self.memory, index, driver, base=base)

    async def rest(self) -> LoadNumbers:
        """Let the rest come."""
        for block in self.guest.ram.blocks:
            await self.source.release(block.name)
        await self.source.withhold_all(False)
        await self.source.set_rate(1 << 40)
        await self.load_ended.wait()
        assert self.loaded is not None, str(self.lost)
        return self.loaded

    async def finish(self) -> LoadNumbers:
        """Let the rest come, then END."""
        loaded = await self.rest()
        await self.postcopy.end()
        return loaded


@asynccontextmanager
async def moving(
    guest: Guest,
    backend: BackendChild | Path,
    *,
    mode: Mode = Mode.TABLE,
    rate: int = 0,
    ack: Request | None = None,
    hide_features: int = 0,
    exchange: bool = True,
) -> AsyncIterator[Move]:
    """ADVISE, LISTEN and the exchange of addresses are done; rings are started by the test."""
    m = Move()
    m.guest = guest
    path = backend if isinstance(backend, Path) else backend.path
    async with AsyncExitStack() as stack:
        m.service = stack.enter_context(FaultService(guest.ram))
        m.source = await stack.enter_async_context(start_source(guest.source.blocks, background_rate=rate))
        m.front = await stack.enter_async_context(connect(path))
        await m.front.negotiate(hide_features=hide_features)
        m.memory = MemoryShare(m.front, guest.regions(guest.ram), mode)
        m.postcopy = BackendPostcopy(m.front, m.service)
        m.service.set_return_path(m.source.sock.fileno())
        m.service.arm()
        m.channel = stack.enter_context(m.service.open_channel(m.source.sock.fileno()))
        async with trio.open_nursery() as nursery:
            m.nursery = nursery
            nursery.start_soon(m.service.run)
            nursery.start_soon(m.load)
            await m.postcopy.advise()
            await m.postcopy.listen()
            if exchange:
                await m.postcopy.share(m.memory, ack=ack)
            yield m
            nursery.cancel_scope.cancel()


@asynccontextmanager
async def far_side(*, echo: bool) -> AsyncIterator[tuple[FarSide, tuple[str, int]]]:
    """A UDP socket that checks (and echoes) frames; its address."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
        with FarSide(sock, echo=echo) as far:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(far.run)
                yield far, sock.getsockname()
                nursery.cancel_scope.cancel()


def has_event_idx(front: FrontEnd) -> bool:
    return bool(front.features & Feature.EVENT_IDX)


def pages_of(block: RamBlock, spans: Sequence[tuple[int, int]]) -> list[tuple[str, int, int]]:
    """(block, first, count) of the host pages that byte spans of a block touch."""
    found = []
    for offset, length in spans:
        first = offset // block.page_size
        found.append((block.name, first, (offset + length - 1) // block.page_size - first + 1))
    return found


def missing(ram: RamSet) -> int:
    return sum(b.pages - b.count_bits(Bits.RECEIVED) for b in ram.blocks)
