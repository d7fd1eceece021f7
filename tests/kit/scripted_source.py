"""A source of a migration that sends what a test tells it to, also what no honest one would, when it is told to.

It has no memory: a test says each page. What the destination answers is read all the time, and can be waited for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress

import trio

from tests.kit.streams import Encoded
from vhostpc.units import TARGET_PAGE
from vhostpc.wire.migration.elements import (
    BlockInfo,
    Configuration,
    DeviceSection,
    EndOfStream,
    Footer,
    Header,
    OpenReturnPath,
    Package,
    Ping,
    PostcopyAdvise,
    PostcopyListen,
    PostcopyRun,
    RamBlocks,
    RamDiscard,
    SectionEnd,
    SectionPart,
    SectionStart,
)
from vhostpc.wire.migration.ramrec import RamEncoder
from vhostpc.wire.migration.return_path import PageRequest, ReturnPathDecoder

RAM = 3
CLOCK = DeviceSection(9, "clk", 0, 1, b"\xde\xad\xbe\xef")


class ScriptedSource:
    """``blocks``: host pages, and bytes of one, by name. Run :meth:`listen` beside."""

    def __init__(self, stream: trio.SocketStream, blocks: Mapping[str, tuple[int, int]]) -> None:
        self.stream = stream
        self.blocks = dict(blocks)
        self.said: list[object] = []
        """What the destination said, in its order."""
        self.closed = False
        """It says nothing more."""
        self._news = trio.Event()
        self._encoder = RamEncoder()

    async def listen(self) -> None:
        decoder = ReturnPathDecoder()
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            async for data in self.stream:
                self.said += decoder.feed(bytes(data))
                self._tell()
        self.closed = True
        self._tell()

    def _tell(self) -> None:
        self._news.set()
        self._news = trio.Event()

    async def heard(self, *messages: object) -> None:
        """Wait until the destination said all of ``messages``."""
        while not all(message in self.said for message in messages):
            assert not self.closed, f"the destination closed, and said only {self.said}"
            await self._news.wait()

    async def asked(self, block: str, page: int) -> None:
        """Wait until this host page was asked for."""
        size = self.blocks[block][1]
        await self.heard(PageRequest(block, page * size, size))

    async def begin(self, *, postcopy: bool = True) -> None:
        """All before the first page."""
        infos, sizes = [], 0
        for name, (pages, size) in self.blocks.items():
            infos.append(BlockInfo(name, pages * size, size if postcopy and size != TARGET_PAGE else None))
            sizes |= size
        parts: list[Encoded] = [Header(), Configuration("toyvm"), OpenReturnPath(), Ping(1)]
        if postcopy:
            parts.append(PostcopyAdvise(sizes, TARGET_PAGE))
        parts += [SectionStart(RAM), RamBlocks(tuple(infos)), Footer(RAM)]
        await self.send(b"".join(part.encode() for part in parts))

    async def pages(self, block: str, *pages: tuple[int, bytes], last: bool = False) -> None:
        """A part of RAM: numbers of target pages and their 4096 bytes."""
        records = b"".join(self._encoder.page(block, page * TARGET_PAGE, data) for page, data in pages)
        head = SectionEnd(RAM) if last else SectionPart(RAM)
        await self.send(head.encode() + records + self._encoder.end() + Footer(RAM).encode())

    async def discard(self, block: str, first: int = 0, count: int | None = None) -> None:
        """Host pages; None: to the end."""
        pages, size = self.blocks[block]
        count = pages - first if count is None else count
        await self.send(RamDiscard(block, ((first * size, count * size),)).encode())

    async def package(self, devices: Sequence[DeviceSection] = (CLOCK,), *, forget: bool = True) -> None:
        """LISTEN, the devices, PING 3, RUN; then PING 4. ``forget``: the next page names its block, as QEMU's does."""
        inside: list[Encoded] = [PostcopyListen(), *devices, Ping(3), PostcopyRun()]
        if forget:
            self._encoder.forget()
        await self.send(Package(b"".join(element.encode() for element in inside)).encode() + Ping(4).encode())

    async def switch(self, devices: Sequence[DeviceSection] = (CLOCK,)) -> None:
        """Everything from the first byte to postcopy; no page was sent."""
        await self.begin()
        for block in self.blocks:
            await self.discard(block)
        await self.package(devices)

    async def end(self, devices: Sequence[DeviceSection] = ()) -> None:
        """The last byte; behind ``devices`` in precopy."""
        await self.send(b"".join(device.encode() for device in devices) + EndOfStream().encode())
        if devices:
            await self.stream.send_eof()  # else a description could follow

    async def send(self, data: bytes) -> None:
        await self.stream.send_all(data)
