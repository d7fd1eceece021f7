"""The destination of a migration: receives a machine by precopy or by postcopy.

Python reads what stands between RAM sections; the sections themselves are read in C, on a thread that never
needs the GIL (:mod:`vhostpc.ufd.ramchannel`). In postcopy three things go on at once, and none waits for another:
the page thread places what comes, the fault loop asks for what somebody waits for, and a task of its own loads
the package, which may wait for a page like anybody else.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from enum import Enum, auto

import trio

from vhostpc.errors import ChannelLost, StreamError, VhostpcError
from vhostpc.memory.ramblock import Bits
from vhostpc.migration.channel import Channel
from vhostpc.migration.checks import check_advise, check_discard, check_page_sizes
from vhostpc.migration.machine import Machine
from vhostpc.migration.state import Event
from vhostpc.migration.waits import tell_waits
from vhostpc.ufd.ramchannel import LoadNumbers, RamChannel
from vhostpc.ufd.service import FaultService, ServiceNumbers
from vhostpc.wire.elements import (
    BadStream,
    BitmapRequest,
    Configuration,
    DeviceSection,
    EnableColo,
    OpenReturnPath,
    Package,
    Ping,
    PostcopyAdvise,
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
from vhostpc.wire.split import Inside, read_package
from vhostpc.wire.stream import MAX_DEVICES, RamMode, StreamReader

log = logging.getLogger(__name__)

Report = Callable[[Event, BaseException | None], None]

CHUNK = 64 << 10
MAX_ANSWERS = 64 << 10
"""Bytes of the return path that may wait while a source sends PINGs and reads no answer."""
SHUT_LIMIT = 10.0  # seconds in which the source must take our last word
TROUBLE = (VhostpcError, OSError)
"""What a peer, a machine or the system can do to a migration. Anything else is an error of this program."""


class Phase(Enum):
    PRECOPY = auto()
    """The source can still go on by itself."""
    LISTENING = auto()
    """The package is here; the machine has not run."""
    RUNNING = auto()
    """It may have run here: never again at the source."""


def _no_report(event: Event, error: BaseException | None) -> None:
    pass


def _is_cancelled(error: BaseException) -> bool:
    """Whether it is nothing but a cancellation, of one task or of several."""
    if isinstance(error, BaseExceptionGroup):
        return all(map(_is_cancelled, error.exceptions))
    return isinstance(error, trio.Cancelled)


class Incoming:
    """One machine that comes on ``channel``, which stays the caller's.

    ``postcopy``: the capability ``postcopy-ram``; both sides must have it alike where the source uses it.
    ``report`` is called on the trio thread with PACKAGE, FINISH, FAIL, NEVER_RAN or LOSE, and the error; it must
    not raise. ``run(postcopy)`` is awaited where the machine is to start; if it raises, the machine has not run.
    ``spin_us``, ``trace``: see :class:`FaultService`. ``limit``: bytes of a package.
    """

    def __init__(
        self,
        channel: Channel,
        machine: Machine,
        *,
        postcopy: bool,
        report: Report = _no_report,
        run: Callable[[bool], Awaitable[None]] | None = None,
        spin_us: int = 0,
        trace: int = 0,
        limit: int = MAX_DEVICES,
    ) -> None:
        self.channel = channel
        self.machine = machine
        self.postcopy = postcopy
        self.phase = Phase.PRECOPY
        self.service = FaultService(machine.ram, spin_us=spin_us, trace=trace)
        """Over the machine's RAM; its numbers can be read until :meth:`close`."""
        self.kept: int | None = None
        """Host pages that had come by precopy and were not sent again, once postcopy has begun."""
        self._asked: ServiceNumbers | None = None
        self._report = report
        self._run = run
        self._reader = StreamReader(RamMode.PAUSE, limit=limit)
        self._events = self._reader.feed(b"")
        self._pages: RamChannel | None = None
        self._loads: list[LoadNumbers] = []
        self._last = False
        self._return_path = False
        self._advised: PostcopyAdvise | None = None
        self._description = b""
        self._running = trio.Event()
        self._loaded = trio.Event()
        self._faults = trio.CancelScope()
        self._faults_ended: trio.Event | None = None
        self._scope = trio.CancelScope()
        self._receiving = self._closed = False
        self._paused = self._reads_on = False
        self._error: BaseException | None = None
        """The first trouble, which all others follow from."""

    async def running(self) -> None:
        """Wait for RUN: from then on the machine may run here although most pages miss. Or for precopy's end."""
        await self._running.wait()

    def missing(self) -> int:
        """Host pages that have not come."""
        return self.service.missing()

    def loads(self) -> list[LoadNumbers]:
        """What came, one look at each channel that brought pages: that of precopy, then that of postcopy."""
        return [*self._loads, *([] if self._pages is None else [self._pages.numbers()])]

    def asked(self) -> ServiceNumbers:
        """What its fault service did, also after :meth:`close`."""
        return self.service.numbers() if self._asked is None else self._asked

    def close(self) -> None:
        """Let go of everything but the machine and the channel, before these. Pages that miss will never come.

        A :meth:`receive` that goes on, or stays in a pause, ends and raises ChannelLost, or what it was paused by.
        """
        self._closed = True
        self.service.give_up()
        if self._receiving:
            self._scope.cancel()  # it closes the rest as it ends
        else:
            self._release()

    async def receive(self) -> None:
        """Receive to the end: all pages are here, the source was told, the machine was started.

        Raises StreamError (what is wrong, at which byte), ChannelLost, PostcopyRefused, OSError: the machine has not
        run here; the source was told so, where it can be. From RUN on it does not raise for such: it pauses. All
        pages, clients and waiters stay, and so does this call, until it is cancelled or :meth:`close` is called.
        Then, and whenever it is cancelled with pages missing, who waits for a page gets MemoryLost.
        """
        self._receiving = True
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    await self._migrate(nursery)
                    nursery.cancel_scope.cancel()
            if self._scope.cancelled_caught:
                raise self._error or ChannelLost("the migration was given up here")
        except BaseException as caught:
            error = self._failed(caught)
            if self._reads_on:
                await self._read_on()
            if error is caught:
                raise
            raise error from None
        finally:
            self._receiving = False
            self._close_pages()
            if self._closed:
                self._release()
        self._report(Event.FINISH, None)

    def _close_pages(self) -> int:
        """The block that a record could have continued."""
        if self._pages is None:
            return -1
        self._loads.append(self._pages.numbers())
        block = self._pages.block
        self._pages.close()
        self._pages = None
        return block

    def _release(self) -> None:
        if not self.service.closed:
            self._asked = self.service.numbers()
            self.service.close()

    def _failed(self, caught: BaseException) -> BaseException:
        """The migration ended without success: tell both sides. The error that says why."""
        error = caught
        cancelled = _is_cancelled(caught)
        if not cancelled:
            while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
                error = error.exceptions[0]
            error = self._error or error
        if not self.service.closed:
            self.service.give_up()
            if self._return_path and self.phase is not Phase.RUNNING:
                with suppress(*TROUBLE):
                    self.service.send(Shut(1).encode())
        self._reads_on = (
            self._return_path and self.phase is Phase.LISTENING and not (cancelled or self._closed)
        )
        if not self._reads_on:
            self.channel.shut_down()
        if cancelled or self._closed:
            return error
        if self._paused:
            log.error("migration: the pause ends: %s", error)
        elif self.phase is Phase.RUNNING:
            self._report(Event.LOSE, error)
        else:
            self._report(Event.FAIL if self.phase is Phase.PRECOPY else Event.NEVER_RAN, error)
        return error

    async def _read_on(self) -> None:
        """Our word that it never ran lets the source go on. But it sends pages now, and what is sent to a channel that
        broke may come to its notice before our word does. So what comes is thrown away, until it hangs up."""
        with suppress(*TROUBLE):
            while True:
                with trio.move_on_after(SHUT_LIMIT) as limit:
                    data = await self.channel.receive_some(CHUNK)
                if limit.cancelled_caught or not data:
                    break
        self.channel.shut_down()

    # --- the phases

    async def _migrate(self, nursery: trio.Nursery) -> None:
        package = await self._precopy(nursery)
        if package is None:
            await self._end_precopy()
            return
        await self._listen(package)
        nursery.start_soon(self._load_package, package)
        nursery.start_soon(tell_waits, self.service, self.channel.shut_down)
        await self._postcopy()
        await self._loaded.wait()
        await self._end_postcopy()

    async def _precopy(self, nursery: trio.Nursery) -> list[Inside] | None:
        """All that comes before the package, whose elements are the result; None at the end of the stream."""
        while (event := await self._next()) is not None:
            if isinstance(event, OpenReturnPath):
                self._open_return_path(event, nursery)
            elif isinstance(event, Ping):
                self._pong(event)
            elif isinstance(event, Configuration):
                self.machine.accept(event)
            elif isinstance(event, PostcopyAdvise):
                await self._advise(event)
            elif isinstance(event, RamBlocks):
                self._accept_blocks(event)
            elif isinstance(event, RamDiscard):
                self._discard(event)
            elif isinstance(event, Package):
                if not self._return_path:
                    raise BadStream(
                        event.offset, "a package, and no return path to ask for pages on was opened"
                    )
                # The whole of it has come before anything of it is done: from LISTEN on the channel is for pages.
                return read_package(event)
            elif isinstance(event, DeviceSection):
                await self.machine.load(event)
            elif isinstance(event, VmDescription):
                self._description = event.text
                if event.disagrees is not None:
                    log.warning("migration: the description is not that of the sections: %s", event.disagrees)
            else:
                self._other(event)
        return None

    async def _end_precopy(self) -> None:
        if self._pages is None or not self._last:
            what = "before RAM" if self._pages is None else "before the end of RAM"
            raise BadStream(self._reader.offset, f"the stream ends {what}")
        if self._reader.unread:
            # A guest that can write a device's state could have forged an earlier end.
            raise BadStream(self._reader.offset, f"{self._reader.unread} bytes behind the end of the stream")
        await self.machine.loaded(self._description)
        log.info("migration: all is here, by precopy")
        if missing := self.missing():  # a source may leave out what its guest called free
            log.warning("migration: %d host pages were not sent: they are zero", missing)
        await self._stop_faults()
        if self._advised is not None:
            await self.machine.end()
        await self._start(False)
        await self._shut()

    async def _listen(self, package: Sequence[Inside]) -> None:
        """Our mapping may be missing pages; another channel, because this one places by ioctl."""
        self.service.arm()
        self.kept = sum(b.count_bits(Bits.RECEIVED) for b in self.machine.ram.blocks)
        block = self._close_pages()
        self._pages = self.service.open_channel(self.channel.in_fd)
        self._pages.block = block
        await self.machine.listen()
        self.phase = Phase.LISTENING
        log.info(
            "migration: postcopy: %d host pages to come, %d elements to load", self.missing(), len(package)
        )
        self._report(Event.PACKAGE, None)

    async def _load_package(self, package: Sequence[Inside]) -> None:
        """Device state, while pages come: what a load waits for is asked for and served meanwhile."""
        try:
            left = sum(isinstance(inside, DeviceSection) for inside in package)
            if not left:
                await self.machine.loaded(b"")
            for inside in package:
                if isinstance(inside, DeviceSection):
                    await self.machine.load(inside)
                    left -= 1
                    if not left:  # before PONG 3, which says that nothing can go wrong any more
                        await self.machine.loaded(b"")
                        log.info("migration: device state is loaded")
                elif isinstance(inside, Ping):
                    self._pong(inside)
                elif isinstance(inside, PostcopyRun):
                    await self._start(True)
            self._loaded.set()
        except TROUBLE as error:
            if self.machine.ram.lost:
                await trio.sleep_forever()  # given up by whoever ends all this, and says why
            self._error = self._error or error
            raise

    async def _postcopy(self) -> None:
        """Pages, to the end of the stream; a link that is lost in it is a pause."""
        try:
            while (event := await self._next()) is not None:
                if isinstance(event, Ping):
                    self._pong(event)
                else:
                    self._other(event)
            if missing := self.missing():
                raise StreamError(f"the source says that all is sent, and {missing} host pages never came")
        except TROUBLE as error:
            self._error = self._error or error
            if self.phase is not Phase.RUNNING:
                self.service.give_up()  # a load may wait for one
                raise
            await self._pause(error)
        log.info("migration: all pages are here")

    async def _pause(self, error: BaseException) -> None:
        """The link is lost, the machine may be running: keep all that there is, until this is cancelled."""
        log.warning("migration: %d host pages are missing; who waits for one goes on waiting", self.missing())
        self.channel.shut_down()
        self.service.set_return_path(None)  # requests wait in the outbox
        self._close_pages()  # and with it a host page of which a part has come
        self._paused = True
        self._report(Event.LOSE, error)
        await trio.sleep_forever()

    async def _end_postcopy(self) -> None:
        """Every page is here. In QEMU's order."""
        await self._stop_faults()
        await self.machine.end()
        self.service.disarm()
        if self._reader.unread:
            log.warning("migration: the source sent %d bytes behind the end", self._reader.unread)
        await self._shut()

    async def _start(self, postcopy: bool) -> None:
        """Where the machine is to run. It has run only if ``run`` does not say otherwise."""
        before, self.phase = self.phase, Phase.RUNNING
        if postcopy:
            log.info("migration: the machine may run here, %d host pages are missing", self.missing())
        self._running.set()
        try:
            if self._run is not None:
                await self._run(postcopy)
        except Exception:
            self.phase = before
            raise

    # --- elements

    async def _next(self) -> StreamEvent | None:
        """The next element; None at the end of the stream."""
        while True:
            event = next(self._events, None)
            if event is not None:
                return event
            if self._reader.ended:
                return None
            if self._reader.paused:
                await self._records()
                self._events = self._reader.feed(b"")
                continue
            data = await self.channel.receive_some(CHUNK)
            self._events = self._reader.feed(data) if data else self._reader.eof()

    async def _records(self) -> None:
        """The RAM section that begins, and what follows of it, in C."""
        pages, section = self._pages, self._reader.ram_section
        assert pages is not None
        assert section is not None
        begin = self._reader.offset
        pages.feed(self._reader.hand_over())
        before = pages.numbers().bytes
        try:
            numbers = await pages.load(section, last=self._last)
        except BadRamStream as e:
            raise BadStream(begin + e.offset - before, REASONS[e.why]) from None
        self._last = numbers.ended
        self._reader.resume(numbers.bytes - before, pages.take(), footer=True, ended=self._last)

    def _other(self, event: StreamEvent) -> None:
        """Headers, footers and ends need nothing, and RAM data is read where :meth:`_next` goes on."""
        if isinstance(event, SectionEnd):
            self._last = True
        elif isinstance(event, OpenReturnPath):
            log.warning("migration: the return path is opened again, at byte %d", event.offset)
        elif isinstance(event, EnableColo | PostcopyResume | BitmapRequest):
            raise BadStream(event.offset, f"{type(event).__name__}, which is not for a destination as this")

    def _open_return_path(self, event: OpenReturnPath, nursery: trio.Nursery) -> None:
        if self._return_path:
            self._other(event)
            return
        if not self.channel.two_way:
            raise BadStream(event.offset, "OPEN_RETURN_PATH on a channel that goes one way only")
        self.service.set_return_path(self.channel.out_fd)
        self._return_path = True
        self._faults_ended = trio.Event()
        nursery.start_soon(self._serve_faults, self._faults_ended)

    async def _serve_faults(self, ended: trio.Event) -> None:
        """From the first answer on: what a source does not take at once waits in the loop, not in the reader."""
        try:
            with self._faults:
                await self.service.run()
        except TROUBLE as error:
            self._error = self._error or error
            raise
        finally:
            ended.set()

    async def _stop_faults(self) -> None:
        self._faults.cancel()
        if self._faults_ended is not None:
            await self._faults_ended.wait()

    def _pong(self, event: Ping) -> None:
        if self.service.numbers().outbox_bytes > MAX_ANSWERS:
            raise BadStream(event.offset, "a PING, and the source does not read the answers to those before")
        self._send(Pong(event.value).encode())

    def _send(self, message: bytes) -> None:
        """Never waits; behind what waits already."""
        try:
            self.service.send(message)
        except OSError as e:
            raise ChannelLost(f"the return path to the source broke: {e.strerror}") from None

    async def _shut(self) -> None:
        """The last word. The machine is whole here: a source that does not take it changes nothing."""
        if not self._return_path:
            return
        try:
            with trio.fail_after(SHUT_LIMIT):
                self._send(Shut(0).encode())
                while self.service.numbers().outbox_bytes:
                    await trio.lowlevel.wait_writable(self.channel.out_fd)
                    self._send(b"")
        except trio.TooSlowError:
            log.warning("migration: the source takes nothing more on the return path")
        except ChannelLost as error:
            log.warning("migration: the source does not know that all is here: %s", error)

    async def _advise(self, event: PostcopyAdvise) -> None:
        check_advise(event, postcopy=self.postcopy, two_way=self.channel.two_way)
        self._advised = event
        await self.machine.advise(self.service)
        log.info("migration: the source may switch to postcopy")

    def _accept_blocks(self, event: RamBlocks) -> None:
        self.machine.accept_blocks(event, postcopy=self._advised is not None)
        blocks = self.machine.ram.blocks
        if self._advised is not None:
            check_page_sizes(event, self._advised, blocks)
        self._pages = self.service.open_channel(self.channel.in_fd, holes=self._advised is None)
        log.info(
            "migration: %r: %d KiB of RAM in %d blocks",
            self.machine.configuration.machine,
            event.total >> 10,
            len(blocks),
        )

    def _discard(self, event: RamDiscard) -> None:
        block = self.machine.ram[event.block]
        check_discard(event, block)
        for start, length in event.ranges:
            block.discard(start, length)
