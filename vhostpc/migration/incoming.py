"""The destination of a migration: receives a machine from QEMU by precopy or by postcopy, and holds it.

Python reads what stands between RAM sections; the sections themselves are read in C, on a thread that never
needs the GIL (:mod:`vhostpc.ufd.ramchannel`). In postcopy two such threads run: one for the pages, one for the
faults of whoever touches what has not come. A device section is only kept, so nothing here waits for a page.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

import trio

from vhostpc.errors import ChannelLost, StreamError, UfdError
from vhostpc.memory.ramblock import RamSet
from vhostpc.migration.held import HeldMachine, page_size_of
from vhostpc.migration.state import Status
from vhostpc.ufd.ramchannel import RamChannel
from vhostpc.ufd.service import FaultService
from vhostpc.ufd.uffd import Userfaultfd
from vhostpc.wire.elements import (
    BadStream,
    BitmapRequest,
    BlockInfo,
    Configuration,
    DeviceSection,
    EnableColo,
    OpenReturnPath,
    Package,
    Ping,
    PostcopyAdvise,
    PostcopyListen,
    PostcopyResume,
    PostcopyRun,
    RamBlocks,
    RamDiscard,
    SectionEnd,
    StreamEvent,
    VmDescription,
)
from vhostpc.wire.ramrec import REASONS, BadRamStream
from vhostpc.wire.return_path import Pong, Shut
from vhostpc.wire.split import read_package
from vhostpc.wire.stream import RamMode, StreamReader

log = logging.getLogger(__name__)

CHUNK = 64 << 10
SHUT_LIMIT = 10.0  # seconds in which the source must take our last word


class Incoming:
    """One machine that comes on ``stream``, a connected tcp or unix socket, which stays the caller's.

    ``postcopy``: the capability ``postcopy-ram``; both sides must have it alike where the source uses it.
    ``page_sizes``: bytes of a host page by name of a block. A source says them only where postcopy may follow, so
    a machine of huge pages that comes by precopy needs them said, or it is held in small ones.
    :attr:`machine` is there as soon as its RAM blocks are known; in postcopy (from :meth:`running` on) its
    memory may be touched while it comes: whoever touches a page that is missing has it brought next.
    """

    def __init__(
        self,
        stream: trio.SocketStream,
        *,
        postcopy: bool = False,
        page_sizes: Mapping[str, int] | None = None,
    ) -> None:
        self.stream = stream
        self.postcopy = postcopy
        self.page_sizes = dict(page_sizes or {})
        self.status = Status.NONE
        self.machine: HeldMachine | None = None
        self.service: FaultService | None = None
        self._running = trio.Event()
        self._configuration: Configuration | None = None
        self._reader = StreamReader(RamMode.PAUSE)
        self._channel: RamChannel | None = None
        self._last = False
        self._return_path = False
        self._advised = False
        self._faults = trio.CancelScope()

    async def running(self) -> None:
        """Wait until the source said RUN: from now on the machine may run here although most pages miss."""
        await self._running.wait()

    async def receive(self) -> HeldMachine:
        """Receive to the end; the machine is the caller's, to close.

        Raises StreamError (what is wrong, at which byte), ChannelLost when the source is gone, UfdError and
        OSError where postcopy or its memory can not be had here. What came is lost then, but for a connection
        lost in postcopy: that is a pause, and ``machine`` keeps all pages that came, until :meth:`close`. Who waits
        for one that did not come gets MemoryLost.
        """
        self.status = Status.SETUP
        try:
            async with trio.open_nursery() as nursery:
                await self._read(nursery)
                self._faults.cancel()
        except BaseException as caught:
            error = caught
            while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
                error = error.exceptions[0]
            self._end(error)
            raise error from None
        assert self.machine is not None
        self._release()
        self.status = Status.COMPLETED
        log.info("migration: completed")
        return self.machine

    def _end(self, error: BaseException) -> None:
        if self._running.is_set():
            self.status = Status.POSTCOPY_PAUSED
            log.error("migration: paused in postcopy: %s", error)
            return
        self.status = Status.FAILED
        log.error("migration: failed: %s", error)
        self.close()

    def close(self) -> None:
        """After a failure or a pause: give up what is missing, let go of everything."""
        self._release()
        if self.machine is not None:
            self.machine.close()
            self.machine = None

    def _release(self) -> None:
        if self._channel is not None:
            self._channel.close()
            self._channel = None
        if self.service is not None:
            self.service.close()
            self.service = None

    # --- the stream

    async def _read(self, nursery: trio.Nursery) -> None:
        data = b""
        while not self._reader.ended:
            for event in self._reader.feed(data):
                await self._handle(event, nursery)
            if self._reader.ended:
                break
            if self._reader.paused:
                data = b""
                await self._load()
                continue
            data = await self._receive()
            if not data:
                for event in self._reader.eof():
                    await self._handle(event, nursery)
        await self._finish()

    async def _receive(self) -> bytes:
        try:
            return bytes(await self.stream.receive_some(CHUNK))
        except trio.BrokenResourceError:
            raise ChannelLost("the source closed the connection in the middle of the stream") from None

    async def _load(self) -> None:
        """The RAM section that begins, and what follows of it, in C."""
        channel, section = self._channel, self._reader.ram_section
        assert channel is not None
        assert section is not None
        begin = self._reader.offset
        channel.feed(self._reader.hand_over())
        before = channel.numbers().bytes
        try:
            numbers = await channel.load(section, last=self._last)
        except BadRamStream as e:
            raise BadStream(begin + e.offset - before, REASONS[e.why]) from None
        self._reader.resume(numbers.bytes - before, channel.take(), footer=True)

    async def _handle(self, event: StreamEvent, nursery: trio.Nursery) -> None:
        """What is not named here needs nothing: headers, footers, ends, RAM data (where :meth:`_load` goes on)."""
        if isinstance(event, Configuration):
            self._configuration = event
        elif isinstance(event, OpenReturnPath):
            self._return_path = True
        elif isinstance(event, Ping):
            await self._say(Pong(event.value).encode())
        elif isinstance(event, PostcopyAdvise):
            self._advise(event)
        elif isinstance(event, RamBlocks):
            self._make_ram(event)
        elif isinstance(event, SectionEnd):
            self._last = True
        elif isinstance(event, RamDiscard):
            self._discard(event)
        elif isinstance(event, Package):
            await self._package(event, nursery)
        elif isinstance(event, DeviceSection):
            self._held(event).devices.append(event)
        elif isinstance(event, VmDescription):
            self._held(event).description = event.text
            if event.disagrees is not None:
                log.warning("migration: the description is not that of the sections: %s", event.disagrees)
        elif isinstance(event, EnableColo | PostcopyResume | BitmapRequest):
            raise BadStream(event.offset, f"{type(event).__name__}, which is not for a destination as this")

    def _held(self, event: DeviceSection | VmDescription | RamDiscard | Package) -> HeldMachine:
        if self.machine is None:
            raise BadStream(event.offset, f"{type(event).__name__} before RAM")
        return self.machine

    async def _say(self, message: bytes) -> None:
        """One return-path message. While the fault loop runs it goes behind the page requests."""
        if self.service is not None and self.service.armed:
            self.service.send(message)
            return
        try:
            await self.stream.send_all(message)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            raise ChannelLost("the source closed the connection in the middle of the stream") from None

    def _advise(self, event: PostcopyAdvise) -> None:
        if not self.postcopy:
            raise StreamError("the source may switch to postcopy, and postcopy-ram is not enabled here")
        if event.page_sizes is None:
            raise BadStream(event.offset, "POSTCOPY_ADVISE without page sizes: not for RAM")
        try:
            Userfaultfd.open().close()
        except UfdError as e:
            raise StreamError(f"postcopy can not be done here: {e}") from None
        self._advised = True

    def _make_ram(self, event: RamBlocks) -> None:
        assert self._configuration is not None
        ram = RamSet()
        self.machine = HeldMachine(self._configuration, ram)
        for block in event.blocks:
            size = self._page_size(block)
            try:
                ram.create(block.name, block.length, size)
            except OSError as e:
                raise StreamError(
                    f"RAM block {block.name!r}, {block.length:#x} bytes in pages of {size:#x}: {e.strerror or e}"
                ) from None
        self.service = FaultService(ram)
        self._channel = self.service.open_channel(self.stream)
        self.status = Status.ACTIVE
        log.info("migration: %s, %d MiB of RAM", self._configuration.machine, event.total >> 20)

    def _page_size(self, block: BlockInfo) -> int:
        said = self.page_sizes.get(block.name, page_size_of(block))
        if self._advised and said != page_size_of(block):
            raise StreamError(
                f"RAM block {block.name!r} has pages of {page_size_of(block):#x} at the source, not of {said:#x}"
            )
        return said

    def _discard(self, event: RamDiscard) -> None:
        block = self._held(event).ram[event.block]
        for start, length in event.ranges:
            if (start | length) % block.page_size:
                raise BadStream(
                    event.offset, f"discard of {length:#x} bytes at {start:#x}, which are not whole pages"
                )
            block.discard(start, length)

    # --- postcopy

    async def _package(self, event: Package, nursery: trio.Nursery) -> None:
        """The whole of it has come before anything of it is done: from LISTEN on the socket is for pages."""
        machine = self._held(event)
        for inside in read_package(event):
            if isinstance(inside, PostcopyListen):
                self._listen(nursery)
            elif isinstance(inside, DeviceSection):
                machine.devices.append(inside)
            elif isinstance(inside, Ping):
                await self._say(Pong(inside.value).encode())
            elif isinstance(inside, PostcopyRun):
                self.status = Status.POSTCOPY_ACTIVE
                log.info("migration: postcopy, %d pages to come", self._missing())
                self._running.set()

    def _listen(self, nursery: trio.Nursery) -> None:
        """Our mapping may be missing pages; another channel, because this one places by ioctl."""
        assert self.service is not None
        assert self._channel is not None
        self.service.arm()
        self.service.set_return_path(self.stream)
        nursery.start_soon(self._serve_faults, self.service)
        block = self._channel.block
        self._channel.close()
        self._channel = self.service.open_channel(self.stream)
        self._channel.block = block

    async def _serve_faults(self, service: FaultService) -> None:
        with self._faults:
            await service.run()

    def _missing(self) -> int:
        assert self.service is not None
        return self.service.missing()

    async def _finish(self) -> None:
        """All has been read: in postcopy every page is here, and the source waits for a word."""
        if self.machine is None:
            raise BadStream(self._reader.offset, "the stream ends before RAM")
        service = self.service
        assert service is not None
        if service.armed:
            if missing := service.missing():
                raise StreamError(f"the source says that all is sent, and {missing} pages never came")
            service.send(Shut(0).encode())
            with trio.move_on_after(SHUT_LIMIT) as limit:
                while service.numbers().outbox_bytes:  # the fault loop sends it when the socket has room
                    await trio.sleep(0.01)
            if limit.cancelled_caught:
                raise ChannelLost("the source takes nothing more on the return path")
        elif self._reader.unread:
            # A guest that can write a device's state could have forged an earlier end.
            raise BadStream(self._reader.offset, f"{self._reader.unread} bytes behind the end of the stream")
        elif self._return_path:
            await self._say(Shut(0).encode())
