"""The source of a migration: sends a held machine to QEMU, by precopy or by postcopy.

The machine does not run here, so one pass over its memory is all: nothing gets dirty. In postcopy it runs over
there from the start, and what it asks for goes first. All bytes behind the header of RAM's last section are
sent by C, on a thread without the GIL; the machine stays as it is and can be sent again.
"""

from __future__ import annotations

import logging

import trio

from vhostpc.errors import ChannelLost, StreamError
from vhostpc.memory.ramblock import TARGET_PAGE, Bits
from vhostpc.migration.held import HeldMachine
from vhostpc.migration.state import Status
from vhostpc.ufd.pagesource import UNLIMITED, Ended, PageSource
from vhostpc.wire.elements import (
    BlockInfo,
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
    SectionStart,
    VmDescription,
)

log = logging.getLogger(__name__)


class Outgoing:
    """Sends ``machine`` on ``stream``, a connected tcp or unix socket, which stays the caller's.

    One at a time: what is still to be sent is marked in the machine's blocks.
    """

    def __init__(self, machine: HeldMachine, stream: trio.SocketStream) -> None:
        self.machine = machine
        self.stream = stream
        self.status = Status.NONE
        self.source: PageSource | None = None
        """Numbers of what is sent, and its rate, while it is."""

    async def send(self, *, postcopy: bool = False, rate: int = UNLIMITED) -> None:
        """Send all and wait for the destination's word that it has it.

        ``rate``: bytes a second of what nobody asked for. Raises ChannelLost when the destination is gone: before
        the package nothing runs there; behind it, only the destination knows, and ``status`` is
        ``postcopy-paused``. StreamError for a message of it that is none.
        """
        self.status = Status.ACTIVE
        try:
            await self._say(self._head(postcopy))
            for block in self.machine.ram.blocks:
                block.set_bits(Bits.DIRTY)
            if postcopy:
                await self._say(self._discards())
                # From its first byte on the machine may run there.
                self.status = Status.POSTCOPY_ACTIVE
                await self._say(self._package())
            await self._ram(postcopy, rate)
        except BaseException as error:
            postcopy_began = self.status is Status.POSTCOPY_ACTIVE
            self.status = Status.POSTCOPY_PAUSED if postcopy_began else Status.FAILED
            log.error("migration: %s: %s", self.status.value, error)
            raise
        self.status = Status.COMPLETED
        log.info("migration: completed")

    async def _say(self, data: bytes) -> None:
        try:
            await self.stream.send_all(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            raise ChannelLost("the destination closed the connection") from None

    @property
    def section_id(self) -> int:
        """The number of RAM's section: one that no device has."""
        return 1 + max((section.section_id for section in self.machine.devices), default=0)

    def _head(self, postcopy: bool) -> bytes:
        blocks = self.machine.ram.blocks
        parts = [Header().encode(), self.machine.configuration.encode()]
        parts += [OpenReturnPath().encode(), Ping(1).encode()]
        if postcopy:
            sizes = 0
            for block in blocks:
                sizes |= block.page_size
            parts.append(PostcopyAdvise(sizes, TARGET_PAGE).encode())
        listed = RamBlocks(
            tuple(
                # The size of a page is said only where postcopy may follow and it is not that of a target page.
                BlockInfo(b.name, b.length, b.page_size if postcopy and b.page_size != TARGET_PAGE else None)
                for b in blocks
            )
        )
        start = SectionStart(self.section_id)
        return b"".join([*parts, start.encode(), listed.encode(), Footer(self.section_id).encode()])

    def _discards(self) -> bytes:
        """No page was sent yet: all of each block is to come."""
        discards = [RamDiscard(b.name, ((0, b.length),)).encode() for b in self.machine.ram.blocks]
        return b"".join([*discards, Ping(2).encode()])

    def _package(self) -> bytes:
        devices = b"".join(section.encode() for section in self.machine.devices)
        blob = PostcopyListen().encode() + devices + Ping(3).encode() + PostcopyRun().encode()
        return Package(blob).encode() + Ping(4).encode()

    def _tail(self, postcopy: bool) -> bytes:
        """What follows the last page."""
        footer, end = Footer(self.section_id).encode(), EndOfStream().encode()
        if postcopy:
            return footer + end
        devices = b"".join(section.encode() for section in self.machine.devices)
        # A destination waits for a description; what it says is not looked at.
        description = VmDescription(self.machine.description or b"{}")
        return footer + devices + end + description.encode()

    async def _ram(self, postcopy: bool, rate: int) -> None:
        """All pages in one section, the last."""
        await self._say(SectionEnd(self.section_id).encode())
        source = PageSource(self.machine.ram, self.stream, background_rate=rate)
        self.source = source
        try:
            source.set_tail(self._tail(postcopy))
            ended = await source.serve()
            left = source.numbers().dirty_left
        finally:
            source.close()
            self.source = None
        if ended is not Ended.SHUT:
            raise ChannelLost(f"the destination closed the connection; {left} host pages were not sent")
        if left:
            raise StreamError(f"the destination says that it is done, and {left} host pages were not sent")
