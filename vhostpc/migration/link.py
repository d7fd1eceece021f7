"""A link: the life of one connection of a migration, at either end.

It has the channel, what reads and writes it, and the C loops that work on it. Nothing of a link outlives it: half a
record, half a host page, what was asked for and not answered. What was received, requested and sent belongs to the
transfer (:class:`~vhostpc.migration.incoming.Incoming`, :class:`~vhostpc.migration.outgoing.Outgoing`), which goes on
over another link where one is lost in postcopy. The channel stays its maker's.
"""

from __future__ import annotations

import math
from collections import deque

import trio

from vhostpc.errors import ChannelLost, StreamError
from vhostpc.migration.channel import Channel
from vhostpc.pages.pagesource import PageScan, PageSource
from vhostpc.pages.ramchannel import LoadNumbers, RamChannel, Share
from vhostpc.pages.service import FaultService
from vhostpc.wire.migration.elements import BadStream, Busy, SectionEnd, StreamEvent
from vhostpc.wire.migration.ramrec import REASONS, BadRamStream
from vhostpc.wire.migration.return_path import ReturnPathDecoder, ReturnPathMessage
from vhostpc.wire.migration.stream import RamMode, StreamReader

CHUNK = 64 << 10
END_WAIT = 2.0
"""Seconds in which more must come behind what may be the end of a precopy."""


class IncomingLink:
    """A destination's: elements in, with RAM records read in C; answers leave by the fault service.

    ``limit``: bytes of a package. ``continues``: the link that was lost in postcopy before this one.
    """

    def __init__(
        self, channel: Channel, service: FaultService, *, limit: int, continues: IncomingLink | None = None
    ) -> None:
        self.channel = channel
        self.bitmaps_said: set[str] = set()
        """Blocks whose bitmap it was asked for and has said."""
        self.settled = trio.Event()
        """The recovery it began with is complete, or the link has ended."""
        if continues is None:
            self.settled.set()
        self.ended = trio.Event()
        self.received = 0
        """Bytes that Python has received."""
        self.hung_up = False
        self.urgent: Channel | None = None
        """Brings requested pages, where they have a channel of their own."""
        self.ram_ended = False
        """The last section of RAM has begun, or has come."""
        self._service = service
        self.reader: StreamReader = StreamReader(
            RamMode.PAUSE, limit=limit, continues=continues.reader if continues is not None else None
        )
        self._events = self.reader.feed_in_slices(b"")
        self._pages: RamChannel | None = None
        self._ahead: RamChannel | None = None
        self._urgent_pages: RamChannel | None = None
        self._urgent_scope = trio.CancelScope()
        self._urgent_ended = trio.Event()
        self._urgent_expected: trio.Event | None = None
        self._finishing = False

    @property
    def has_pages(self) -> bool:
        """RAM records can be read."""
        return self._pages is not None

    @property
    def unread(self) -> int:
        """Bytes that came behind the end."""
        return self.reader.unread

    @property
    def doubt(self) -> int | None:
        """As :attr:`StreamReader.doubt`."""
        return self.reader.doubt

    @property
    def offset(self) -> int:
        """Byte of the stream up to which everything was read."""
        return self.reader.offset

    def make_ready(self, *, in_bulk: bool = False) -> None:
        """Make what :meth:`open_pages` needs once memory is armed, for which the service is ready. Raises as that."""
        share: Share = "bulk" if in_bulk else "all"
        self._ahead = self._service.open_channel(self.channel.in_fd, ahead=True, share=share)

    def open_pages(self, *, holes: bool = False, in_bulk: bool = False) -> None:
        """RAM records may come from now on. In the memory's current mode: written, or placed once it is armed.

        ``holes``: no page will be missing later. ``in_bulk``: those that are requested come by another channel.
        Raises Shortage, OSError.
        """
        block = -1
        if self._pages is not None:
            block = self._pages.block
            self._pages.close()
            self._pages = None
        self._pages, self._ahead = self._ahead, None
        if self._pages is None:
            share: Share = "bulk" if in_bulk else "all"
            self._pages = self._service.open_channel(self.channel.in_fd, holes=holes, share=share)
        self._pages.block = block

    def open_urgent(self, channel: Channel) -> None:
        """Requested pages come by this one, which stays its maker's. Raises Shortage, OSError."""
        self._urgent_pages = self._service.open_channel(channel.in_fd, share="urgent")
        self.urgent = channel

    async def load_urgent(self) -> None:
        """Place the pages of the urgent channel, until :meth:`finish_urgent`, or the source's word that it is over.

        Raises StreamError, ChannelLost, and as RamChannel.load: then the link is of no more use.
        """
        pages = self._urgent_pages
        try:
            with self._urgent_scope:
                if pages is not None:  # else the link has ended already
                    await pages.load()
        except BadRamStream as e:
            raise StreamError(
                f"the channel of requested pages: {REASONS[e.why]}, at byte {e.offset}"
            ) from None
        except ChannelLost:
            if not self._finishing:
                raise
        finally:
            self._urgent_ended.set()

    async def finish_urgent(self) -> None:
        """The main channel has ended: wait for what is in flight on the other, and end it.

        Raises ChannelLost: it ended too early.
        """
        if self._service.awaited() and self._urgent_expected is not None:
            await self._urgent_expected.wait()  # this end has overtaken even the making of it
        self._finishing = True
        if self._urgent_pages is not None:
            self._urgent_pages.finish()
            await self._urgent_ended.wait()
        elif self._urgent_expected is None:
            return
        if awaited := self._service.awaited():
            raise ChannelLost(
                f"the source closed the channel of requested pages, {awaited} of which have not come"
            )
        if self.urgent is not None:
            self.urgent.shut_down()

    def expect_urgent(self) -> None:
        """The urgent channel is being made, beside the main one: until :meth:`expect_no_urgent`."""
        self._urgent_expected = trio.Event()

    def expect_no_urgent(self) -> None:
        """It is made, or cannot be."""
        if self._urgent_expected is not None:
            self._urgent_expected.set()

    @property
    def awaits_urgent(self) -> bool:
        """An urgent channel that is made now can still be of use."""
        return not (self._finishing or self.ended.is_set())

    async def end_urgent(self) -> None:
        """Have nothing placed any more that comes by the urgent channel."""
        self._urgent_scope.cancel()
        if self.urgent is not None:
            await self._urgent_ended.wait()

    def numbers(self) -> LoadNumbers | None:
        """What its records have brought, over both channels; None before there could be one."""
        if self._pages is None:
            return None
        numbers = self._pages.numbers()
        return numbers if self._urgent_pages is None else self._urgent_pages.numbers() + numbers

    def moved(self) -> int:
        """Changes with whatever comes for those who wait for pages."""
        pages = self._pages if self._urgent_pages is None else self._urgent_pages
        return 0 if pages is None else pages.numbers().reads

    def shut_down(self) -> None:
        """Break it, in both channels."""
        self.channel.shut_down()
        self.expect_no_urgent()
        if self.urgent is not None:
            self.urgent.shut_down()

    def close(self) -> None:
        """Let go of the loaders, and of a host page of which only a part has come. The channels stay."""
        for pages in (self._pages, self._ahead, self._urgent_pages):
            if pages is not None:
                pages.close()
        self._pages = self._ahead = self._urgent_pages = None
        self.settled.set()
        self.ended.set()

    async def next(self) -> StreamEvent | None:
        """The next element; None at the end of the stream. Raises BadStream, ChannelLost, and as RamChannel.load."""
        while True:
            event = next(self._events, None)
            if isinstance(event, Busy):
                await trio.lowlevel.checkpoint()
                continue
            if event is not None:
                self.ram_ended = self.ram_ended or isinstance(event, SectionEnd)
                return event
            if self.reader.ended:
                return None
            if self.reader.paused:
                await self._records()
                self._events = self.reader.feed_in_slices(b"")
                continue
            data = b""
            # What could be the end may be what a guest wrote into a device's state: then more comes.
            with trio.move_on_after(END_WAIT if self.reader.may_end else math.inf):
                data = await self.channel.receive_some(CHUNK)
            self.received += len(data)
            self.hung_up = not data
            self._events = self.reader.feed_in_slices(data) if data else self.reader.eof_in_slices()

    async def _records(self) -> None:
        """The RAM section that begins, and what follows of it, in C."""
        pages, section = self._pages, self.reader.ram_section
        assert section is not None
        begin = self.reader.offset
        assert pages is not None
        if not self.settled.is_set():
            raise BadStream(begin, "pages before the recovery was complete (POSTCOPY_RESUME)")
        pages.feed(self.reader.hand_over())
        before = pages.numbers().bytes
        try:
            numbers = await pages.load(section, last=self.ram_ended)
        except BadRamStream as e:
            raise BadStream(begin + e.offset - before, REASONS[e.why]) from None
        self.ram_ended = numbers.ended
        self.reader.resume(numbers.bytes - before, pages.take(), footer=True, ended=self.ram_ended)


class OutgoingLink:
    """A source's: pages out in C, by the order of ``scan``; what stands between them from Python.

    ``return_path``: the destination's messages are read. Raises Shortage, OSError.
    """

    def __init__(self, channel: Channel, scan: PageScan, *, return_path: bool) -> None:
        self.channel = channel
        self.urgent: Channel | None = None
        """Takes requested pages, where they have a channel of their own."""
        self.source = PageSource(
            scan.ram, channel.out_fd, return_path=channel.in_fd if return_path else -1, scan=scan
        )
        self.said = self.heard = 0
        """Bytes that Python sent, and received."""
        self._decoded: deque[ReturnPathMessage] = deque()

    def add_urgent(self, channel: Channel, *, closing_word: bool) -> None:
        """As :meth:`PageSource.add_urgent`. The channel stays its maker's."""
        self.source.add_urgent(channel.out_fd, closing_word=closing_word)
        self.urgent = channel

    def shut_down(self) -> None:
        """Break it, in both channels."""
        self.channel.shut_down()
        if self.urgent is not None:
            self.urgent.shut_down()

    async def say(self, data: bytes) -> None:
        """Raises ChannelLost."""
        await self.channel.send_all(data)
        self.said += len(data)

    async def hear(self, decoder: ReturnPathDecoder, *, exactly: bool = False) -> ReturnPathMessage:
        """One message of the destination. Raises ChannelLost, StreamError.

        ``exactly``: not a byte of the message behind it is read, since that may be for the page source.
        """
        while not self._decoded:
            data = await self.channel.receive_some(min(decoder.lacks, CHUNK) if exactly else CHUNK)
            if not data:
                raise ChannelLost("the destination closed the connection")
            self.heard += len(data)
            self._decoded.extend(decoder.feed(data))
        return self._decoded.popleft()

    def close(self) -> None:
        """Let go of the copy of the channel. Not while anything of it runs."""
        self.source.close()
