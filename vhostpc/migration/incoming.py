"""The destination of a migration: receives a machine by precopy or by postcopy.

Python reads what stands between RAM sections; the sections themselves are read in C, on a thread that never
needs the GIL (:mod:`vhostpc.pages.ramchannel`). In postcopy three things go on at once, and none waits for another:
the page thread places arriving pages, the fault loop requests missing pages, and a task of its own loads
the package, which may wait for a page like anybody else.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from functools import reduce
from operator import add

import trio

from vhostpc.errors import ChannelLost, PageBorn, StreamError, VhostpcError, first_of, is_foreseen, sentence
from vhostpc.logs import rationed_logger
from vhostpc.migration.answers import SHUT_LIMIT, Answers
from vhostpc.migration.channel import Channel, Connect
from vhostpc.migration.heads import check_head
from vhostpc.migration.link import CHUNK, IncomingLink
from vhostpc.migration.long_waits import tell_waits
from vhostpc.migration.machine import Machine
from vhostpc.migration.phase import Course, Event, Phase, begun
from vhostpc.migration.postcopy_checks import check_advise, check_discard, check_page_sizes
from vhostpc.migration.silence import Silence, watch
from vhostpc.migration.turns import batches, in_turns, pieces
from vhostpc.migration.watcher import Unwatched, Watcher
from vhostpc.pages.ramblock import Bits
from vhostpc.pages.ramchannel import LoadNumbers
from vhostpc.pages.service import FaultService, ServiceNumbers
from vhostpc.wire.migration.elements import (
    LOADED,
    MUST_HEAR,
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
    StreamEvent,
    VmDescription,
)
from vhostpc.wire.migration.return_path import Shut
from vhostpc.wire.migration.split import Inside, split_package_in_slices
from vhostpc.wire.migration.stream import MAX_DEVICES, StreamReader

log = rationed_logger(__name__)

DISCARD = 512 << 20
"""Bytes of a block that are discarded in one turn of the loop."""
RANGES = 128
"""The same: how many ranges, each of which is a system call or two."""
ELEMENTS = 1000
"""Elements of a package that are loaded in one turn of the loop."""
SECOND_LIMIT = 10.0
"""Seconds in which the connection of requested pages must be there, once the source says that it is."""
TROUBLE = (VhostpcError, OSError)
"""What a peer or the system can do to a channel."""
NO_PACKAGE = (Phase.PRECOPY, Phase.SWITCHING)
"""The stream may still turn out to be no postcopy."""
NOT_RUN = (Phase.PACKAGED, Phase.NOT_STARTED, Phase.PAUSED_PACKAGED, Phase.RECOVERING_PACKAGED)
"""The package is here, and its load or the machine's start is what failed."""
LOST = (Phase.PAUSED_STARTING, Phase.PAUSED, Phase.RECOVERING_STARTING, Phase.RECOVERING)
"""The machine may run, and the link was lost."""
STILL_SENT = (Phase.SWITCHING, *NOT_RUN)
"""The package or pages are in flight."""


def _is_cancelled(error: BaseException) -> bool:
    """Whether it is nothing but a cancellation, of one task or of several."""
    if isinstance(error, BaseExceptionGroup):
        return all(map(_is_cancelled, error.exceptions))
    return isinstance(error, trio.Cancelled)


class Incoming:
    """Receives ``machine`` on ``channel``, which stays the caller's. For one migration, whose phase is ``course``.

    ``postcopy``: the capability ``postcopy-ram``; both sides must have it alike where the source uses it.
    ``spin_us``, ``trace``: see :class:`FaultService`. ``limit``: bytes of a package. ``second``: takes the
    connection of requested pages, with the capability ``postcopy-preempt``, which both sides must have alike, too.
    Without a ``watcher`` the machine is not started.
    """

    def __init__(
        self,
        channel: Channel,
        machine: Machine,
        course: Course | None = None,
        watcher: Watcher | None = None,
        *,
        postcopy: bool,
        spin_us: int = 0,
        trace: int = 0,
        limit: int = MAX_DEVICES,
        second: Connect | None = None,
    ) -> None:
        self.machine = machine
        self.course = course or begun("destination", Event.START, Event.CONNECT)
        self.postcopy = postcopy
        self.service = FaultService(machine.ram, spin_us=spin_us, trace=trace)
        """Over the machine's RAM; its numbers can be read until :meth:`close`."""
        self._answers = Answers(self.service)
        self.resumptions = 0
        """How many links have gone on where another was lost."""
        self.kept: int | None = None
        """Host pages that had come by precopy and were not sent again, once postcopy has begun."""
        self._asked: ServiceNumbers | None = None
        self._watcher = watcher or Unwatched(machine)
        self._limit = limit
        self._second = second
        self._link = IncomingLink(channel, self.service, limit=limit)
        """The last one, while there is none."""
        self._loads: list[list[LoadNumbers]] = [[]]  # of links that have ended: in precopy, in postcopy
        self._attached = trio.Event()
        self._return_path = False
        self._advised: PostcopyAdvise | None = None
        self._description = b""
        self._ready: trio.Event | None = None
        """Everything is ready for the package, once it is set; None: nothing says yet that one will come."""
        self._running = trio.Event()
        self._loaded = trio.Event()
        self._faults = trio.CancelScope()
        self._faults_ended: trio.Event | None = None
        self._scope = trio.CancelScope()
        self._receiving = self._closed = False
        self._must_hear = False
        """The source takes its machine back if it does not hear a PONG of the package."""
        self._error: BaseException | None = None
        """The first trouble, which all others follow from."""

    @property
    def preempt(self) -> bool:
        """Requested pages have a connection of their own."""
        return self._second is not None

    async def watch(self, limit: float) -> None:
        """Break a link that is silent for ``limit`` seconds while a page is waited for. Runs until cancelled."""
        await watch(self._silence, limit)

    def _silence(self) -> Silence | None:
        link = self._link
        if link.ended.is_set() or not self.course.in_postcopy:
            return None
        numbers = self.service.numbers()
        waits = bool(numbers.waiting_now or numbers.outbox_bytes) or not link.settled.is_set()
        heard = (link.received, link.moved())
        return Silence(link.channel, waits, heard, link.shut_down)

    async def running(self) -> None:
        """Wait for RUN: from then on the machine may run here although most pages miss. Or for precopy's end."""
        await self._running.wait()

    def missing(self) -> int:
        """Host pages that have not come."""
        return self.service.missing()

    @property
    def advised(self) -> bool:
        """Whether the source has said that it may switch to postcopy."""
        return self._advised is not None

    @property
    def channel(self) -> Channel:
        """That of the link, or of the last one."""
        return self._link.channel

    @property
    def reader(self) -> StreamReader:
        """Of the link, or of the last one."""
        return self._link.reader

    def loads(self) -> list[LoadNumbers]:
        """What was received: in precopy, then in postcopy, over all its links. None of what has not begun."""
        now = self._link.numbers()
        *before, last = self._loads
        return [reduce(add, each) for each in (*before, last + ([] if now is None else [now])) if each]

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

        Raises StreamError (what is wrong, at which byte), ChannelLost, PostcopyRefused, OSError, and whatever else
        goes wrong in this process: the machine has not run here; the source was told so, where it can be. From RUN on
        it raises for nothing: it pauses. All pages, clients and waiters stay, and so does this call, until it is
        cancelled or :meth:`close` is called. Then, and whenever it is cancelled with pages missing, a waiter for a
        page gets MemoryLost.
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
            reads_on = self.course.phase in STILL_SENT and self._return_path
            reads_on = reads_on and not (self._closed or _is_cancelled(caught))
            takes_back = self._ready is not None and self.course.phase in NO_PACKAGE
            takes_back = takes_back and not (self._closed or _is_cancelled(caught))
            error = self._failed(caught, shut=not reads_on)
            if takes_back:
                await self._take_back()
            if reads_on:
                await self._read_on()
            if error is caught:
                raise
            raise error from None
        finally:
            self._receiving = False
            self._close_link()
            if self._closed:
                self._release()
        self.course.move(Event.FINISH)

    def _close_link(self) -> None:
        self._keep_numbers()
        self._link.close()

    def _keep_numbers(self) -> None:
        if (numbers := self._link.numbers()) is not None:
            self._loads[-1].append(numbers)

    def _release(self) -> None:
        if not self.service.closed:
            self._asked = self.service.numbers()
            self.service.close()

    def _failed(self, caught: BaseException, *, shut: bool) -> BaseException:
        """The migration ended without success: tell both sides. The error that says why. ``shut``: the channel too."""
        error, phase = caught, self.course.phase
        cancelled = _is_cancelled(caught)
        if not cancelled:
            error = self._error or first_of(error)
        if not self.service.closed:
            self.service.give_up()
            if self._return_path and not self.course.may_run:
                with suppress(*TROUBLE):
                    self.service.send(Shut(1).encode())
        if shut:
            self._link.shut_down()
        if cancelled or self._closed:
            return error
        if not is_foreseen(error):
            log.error("migration: %s", sentence(error), exc_info=error)
        if phase in LOST:
            log.error("migration: the pause ends: %s", sentence(error))
        elif phase in NOT_RUN:
            self.course.move(Event.NEVER_RAN, error)
        else:
            self.course.move(self.course.trouble(), error)
        return error

    async def _take_back(self) -> None:
        """Back-ends that heard LISTEN wait for pages that nobody will send: END, although no package came."""
        with trio.move_on_after(SHUT_LIMIT):
            try:
                await self.machine.end()
            except Exception as error:
                log.error(
                    "migration: back-ends may still be in postcopy: %s", sentence(error), exc_info=error
                )

    async def _read_on(self) -> None:
        """Our word that it never ran lets the source go on. But it sends its package or pages now, and what is sent to
        a channel that broke may come to its notice before our word does. So its data is thrown away, until it hangs
        up."""
        with suppress(*TROUBLE):
            while True:
                with trio.move_on_after(SHUT_LIMIT) as limit:
                    data = await self.channel.receive_some(CHUNK)
                if limit.cancelled_caught or not data:
                    break
        self._link.shut_down()

    # --- the phases

    async def _migrate(self, nursery: trio.Nursery) -> None:
        package = await self._precopy(nursery)
        if package is None:
            await self._end_precopy()
            return
        self._must_hear = any(isinstance(inside, Ping) and inside.value == MUST_HEAR for inside in package)
        await self._listen(package, nursery)
        nursery.start_soon(self._load_package, package)
        nursery.start_soon(self._tell_running)
        nursery.start_soon(self._tell_waits)
        await self._postcopy(nursery)
        await self._loaded.wait()
        await self._end_postcopy()

    async def _precopy(self, nursery: trio.Nursery) -> list[Inside] | None:
        """All that comes before the package, whose elements are the result; None at the end of the stream."""
        refusal: Exception | None = None
        while (event := await self._link.next()) is not None:
            if isinstance(event, OpenReturnPath):
                self._open_return_path(event, nursery)
            if refusal is not None:
                raise refusal
            if isinstance(event, OpenReturnPath):
                continue
            if isinstance(event, Ping):
                if self._ready is not None:  # our answer says so
                    await self._ready.wait()
                self._answers.pong(event)
            elif isinstance(event, Configuration):
                try:
                    check_head(event)
                    self.machine.accept(event)
                except Exception as error:  # told when it can be: the return path is opened behind this
                    refusal = error
            elif isinstance(event, PostcopyAdvise):
                await self._advise(event)
            elif isinstance(event, RamBlocks):
                self._accept_blocks(event)
            elif isinstance(event, RamDiscard):
                self.course.move(Event.SWITCH)  # the package is in flight, or follows soon
                if self._advised is not None:
                    self._begin_ready(nursery)
                await self._discard(event)
            elif isinstance(event, Package):
                if not self._return_path:
                    raise BadStream(
                        event.offset, "a package, but no return path for page requests was opened"
                    )
                # The whole of it has come before anything of it is done: from LISTEN on the channel is for pages.
                return await self._elements(event)
            elif isinstance(event, DeviceSection):
                await self.machine.load(event)
            elif isinstance(event, VmDescription):
                self._description = event.text
                if event.disagrees is not None:
                    log.warning("migration: the description does not match the sections: %s", event.disagrees)
            else:
                self._other(event)
        return None

    async def _end_precopy(self) -> None:
        link = self._link
        if not link.has_pages:
            raise BadStream(link.offset, "the stream ends before RAM")
        # A source without a return path has ended: what QEMU takes is not refused here.
        if not link.ram_ended:
            log.warning("migration: the stream ends without the last section of RAM")
        self._tell_rest(link.unread, link.doubt)
        if self._ready is not None:
            await self._ready.wait()
        await self.machine.loaded(self._description)
        log.info("migration: everything has arrived, by precopy")
        self._settle()
        await self._stop_faults()
        if self._advised is not None:
            await self.machine.end()
        await self._start(False)
        if self._return_path:
            await self._answers.shut(self.channel)

    def _begin_ready(self, nursery: trio.Nursery) -> trio.Event:
        """What a package needs that does not depend on it is made beside the elements before it."""
        if self._ready is None:
            self._ready = trio.Event()
            nursery.start_soon(self._make_ready, self._ready)
        return self._ready

    async def _make_ready(self, ready: trio.Event) -> None:
        """Another loader, because this one places by ioctl; and back-ends: LISTEN, and the exchange of addresses."""
        self.service.make_ready()
        self._link.make_ready(in_bulk=self.preempt)
        await self.machine.listen()
        ready.set()

    async def _listen(self, package: Sequence[Inside], nursery: trio.Nursery) -> None:
        """Our mapping may be missing pages."""
        urgent = None if self._second is None else await self._take_second(self._second)
        await self._begin_ready(nursery).wait()
        self.service.arm()
        self.kept = sum(b.count_bits(Bits.RECEIVED) for b in self.machine.ram.blocks)
        self._keep_numbers()
        self._loads.append([])
        self._link.open_pages()
        if urgent is not None:
            self._open_urgent(self._link, urgent, nursery)
        self.course.move(Event.PACKAGE)

    async def _take_second(self, second: Connect) -> Channel:
        """The source has made it before it sent what was read last."""
        with trio.move_on_after(SECOND_LIMIT):
            channel = await second()
            if not channel.two_way:
                raise ChannelLost("the channel of requested pages has to go both ways")
            return channel
        raise ChannelLost(
            "postcopy-preempt is on here, but the source has made no second connection: is it on there?"
        )

    def _open_urgent(self, link: IncomingLink, channel: Channel, nursery: trio.Nursery) -> None:
        link.open_urgent(channel)
        nursery.start_soon(self._load_urgent, link)

    async def _load_urgent(self, link: IncomingLink) -> None:
        """If one of its channels is lost, the link is."""
        try:
            await link.load_urgent()
        except Exception as error:
            if not link.ended.is_set():
                self._error = self._error or error
                link.shut_down()

    async def _open_urgent_again(self, link: IncomingLink, nursery: trio.Nursery) -> None:
        assert self._second is not None
        try:
            channel = await self._take_second(self._second)
            if link.awaits_urgent:
                self._open_urgent(link, channel, nursery)
        except Exception as error:
            if link.awaits_urgent:
                self._error = self._error or error
                link.shut_down()
        finally:
            link.expect_no_urgent()

    async def _load_package(self, package: Sequence[Inside]) -> None:
        """Device state, while pages come: what a load waits for is asked for and served meanwhile."""
        try:
            missing, left = self.missing(), sum(isinstance(inside, DeviceSection) for inside in package)
            held: list[Ping] = []
            if not left:
                await self.machine.loaded(b"")
            for number, inside in enumerate(package, 1):
                if isinstance(inside, DeviceSection):
                    await self.machine.load(inside)
                    left -= 1
                    if not left:
                        await self.machine.loaded(b"")
                elif isinstance(inside, Ping) and inside.value == LOADED:
                    held.append(inside)  # that it runs: behind it our word that it never ran is not believed
                elif isinstance(inside, Ping):
                    self._pong_in_package(inside)
                elif isinstance(inside, PostcopyRun):
                    await self._start(True)
                else:
                    self._other(inside)
                if not number % ELEMENTS:
                    await trio.lowlevel.checkpoint()
            for ping in held:
                self._pong_in_package(ping)
            self._loaded.set()
            log.info(
                "migration: postcopy: %d elements loaded, %d host pages missing before", len(package), missing
            )
        except Exception as error:
            if self.machine.ram.lost:
                await trio.sleep_forever()  # given up by the task that ends the migration, and says why
            if not self.course.may_run:
                await self._until_it_can_be_told(error)
                self._error = error
                raise
            self._error = self._error or error
            log.error(
                "migration: the machine runs, but: %s",
                sentence(error),
                exc_info=None if is_foreseen(error) else error,
            )
            if self.missing():
                self._link.shut_down()  # which is a pause
            self._loaded.set()

    async def _until_it_can_be_told(self, error: Exception) -> None:
        """The machine never ran, and its source may run it again once it hears that: over a link, if there is none."""
        told = False
        while self.course.phase in (Phase.PAUSED_PACKAGED, Phase.RECOVERING_PACKAGED):
            if not told:
                told = True
                log.error(
                    "migration: the machine could not be started here: %s; a recovery tells the source, "
                    "which goes on with it then",
                    sentence(error),
                    exc_info=None if is_foreseen(error) else error,
                )
            if self.course.phase is Phase.PAUSED_PACKAGED:
                await self._attached.wait()
            await self._link.settled.wait()

    async def _postcopy(self, nursery: trio.Nursery) -> None:
        """Pages, to the end of the stream, over as many links as that takes: one that is lost is a pause."""
        while True:
            try:
                await self._read_pages(nursery)
                await self._link.finish_urgent()
                self._settle()
                break
            except Exception as error:
                self._error = self._error or error
                # A link that is lost is no failure: the whole package is here, and nothing but we can run it.
                # Nor is a stranger that comes in place of the source.
                link = self._link
                lost = link.hung_up or not link.settled.is_set() or isinstance(error, ChannelLost)
                lost = lost and not self._must_hear
                if not (self.course.may_run or lost):
                    self.service.give_up()  # a load may wait for one
                    raise
                await self._pause(self._error)
        log.info("migration: all pages have arrived")

    async def _read_pages(self, nursery: trio.Nursery) -> None:
        """What one link brings, to the end of the stream."""
        link = self._link
        while (event := await link.next()) is not None:
            if isinstance(event, Ping):
                self._answers.pong(event)
            elif isinstance(event, BitmapRequest) and not link.settled.is_set():
                self._answers.say_bitmap(link, self.machine.ram, event)
            elif isinstance(event, PostcopyResume) and not link.settled.is_set():
                self._resume(link, event)
                if self._second is not None:
                    link.expect_urgent()
                    nursery.start_soon(self._open_urgent_again, link, nursery)
            else:
                self._other(event)
        if not link.settled.is_set():
            raise BadStream(link.offset, "the stream ends before the recovery was complete (POSTCOPY_RESUME)")

    def _resume(self, link: IncomingLink, event: PostcopyResume) -> None:
        """The source knows what is missing: pages are asked for, and come."""
        self._answers.resume(link, self.machine.ram, event)
        self.course.move(Event.RESUME)
        self.resumptions += 1
        link.settled.set()
        log.info("migration: recovered, %d host pages are missing", self.missing())

    def _settle(self) -> None:
        """The source says that all is sent. It leaves out what its guest called free, and what of a virtio-mem is not
        plugged: such a page is zero. One that it discarded here it has to send."""
        if owed := self.service.owed():
            raise StreamError(f"the source says that everything is sent, but {owed} host pages never came")
        if zero := self.service.settle():
            log.warning("migration: %d host pages were not sent: they are zero", zero)

    async def _pause(self, error: BaseException) -> None:
        """The link is lost, the machine runs or is about to: keep all that there is, until there is another link."""
        log.warning(
            "migration: %d host pages are missing; threads that wait for one go on waiting", self.missing()
        )
        self._link.shut_down()
        await (
            self._link.end_urgent()
        )  # what is asked for in a recovery is right only if nothing is placed meanwhile
        self._close_link()  # and with it a host page of which a part has come
        self.service.mute(None)
        self._attached = trio.Event()
        self.course.move(Event.LOSE, error)
        await self._attached.wait()

    def attach(self, channel: Channel, second: Connect | None = None) -> IncomingLink:
        """Go on over another channel, behind a pause: the source recovers. The channel stays the caller's.

        Raises ChannelLost (it cannot carry a postcopy, or this is not paused), Shortage, OSError: nothing has changed.
        """
        if not channel.two_way:
            raise ChannelLost("a recovery needs a channel that goes both ways")
        if self.service.closed or not self.course.allows(Event.RECOVER):
            raise ChannelLost("nothing is paused here that could be recovered")
        link = IncomingLink(channel, self.service, limit=self._limit, continues=self._link)
        try:
            link.open_pages(in_bulk=second is not None)  # now, while the source makes its own half
            self.service.mute(channel.out_fd)
        except BaseException:
            link.close()
            raise
        self._error = None
        self._link, self._second = link, second
        self.course.move(Event.RECOVER)
        self._attached.set()
        return link

    async def resume(
        self, channel: Channel, patience: float = math.inf, second: Connect | None = None
    ) -> None:
        """:meth:`attach`, and wait until the link has ended, by being lost or with the migration. Raises as that.

        ``patience``: seconds that the source has to recover; then the link is broken.
        """
        link = self.attach(channel, second)
        with trio.move_on_after(patience) as limit:
            await link.settled.wait()
        if limit.cancelled_caught:
            log.warning("migration: the source has not recovered within %g s: the link is broken", patience)
            link.shut_down()
        await link.ended.wait()

    def pause(self) -> None:
        """Break the link, where it is the pages' (``migrate-pause``). Harmless otherwise."""
        if self.course.in_postcopy and not self._link.ended.is_set():
            self._error = self._error or ChannelLost("the migration was paused (migrate-pause)")
            self._link.shut_down()

    async def _tell_running(self) -> None:
        """A line of the log takes its time, so it is not written before the machine runs."""
        await self._running.wait()
        log.info("migration: the machine may run here, %d host pages are missing", self.missing())

    async def _tell_waits(self) -> None:
        """What goes wrong in telling stops nothing but the telling."""
        try:
            await tell_waits(self.service, self.loads, lambda: self._link.shut_down())
        except Exception as error:
            log.error(
                "migration: waiting threads are no longer reported: %s", sentence(error), exc_info=error
            )

    async def _end_postcopy(self) -> None:
        """Every page is here, in QEMU's order: whatever goes wrong now, the machine is whole and the source is told."""
        try:
            await self.machine.end()
        except Exception as error:
            log.error("migration: all pages have arrived, but: %s", sentence(error), exc_info=error)
        await self._stop_faults()  # behind END: a fault that was in flight until then is still answered
        try:
            self.service.disarm()
        except Exception as error:
            log.error("migration: all pages have arrived, but: %s", sentence(error), exc_info=error)
        self._tell_rest(self._link.unread, None)
        if self._return_path:
            await self._answers.shut(self.channel)

    async def _start(self, postcopy: bool) -> None:
        """Where the machine is to run."""
        if not self.course.allows(Event.RUN):
            log.warning("migration: the package says once more that the machine is to run")
            return
        self.course.move(Event.RUN)
        self._running.set()
        try:
            await self._watcher.let_run(postcopy)
        except Exception:
            self.course.move(Event.NOT_RUN)
            raise
        self.course.move(Event.RAN)

    # --- elements

    def _other(self, event: StreamEvent) -> None:
        """Headers, footers and ends need nothing, and RAM data is read where :meth:`_next` goes on."""
        if isinstance(event, OpenReturnPath):
            log.warning("migration: the return path is opened again, at byte %d", event.offset)
        elif isinstance(event, PostcopyResume | BitmapRequest):
            log.warning("migration: %s outside a recovery, at byte %d", type(event).__name__, event.offset)
        elif isinstance(event, EnableColo):
            raise BadStream(
                event.offset, "ENABLE_COLO command come in migration stream, but x-colo capability is not set"
            )

    async def _elements(self, package: Package) -> list[Inside]:
        found = await in_turns(split_package_in_slices(package))
        self._tell_rest(package.start + len(package.blob) - found.end, found.doubt)
        return found.elements

    @staticmethod
    def _tell_rest(unread: int, doubt: int | None) -> None:
        """What was not read, and what could have been read otherwise: QEMU minds neither."""
        if unread:
            log.warning("migration: the source sent %d bytes behind the end", unread)
        if doubt is not None:
            log.warning("migration: the sections before byte %d have more than one reading", doubt)

    def _open_return_path(self, event: OpenReturnPath, nursery: trio.Nursery) -> None:
        if self._return_path:
            self._other(event)
            return
        if not self.channel.two_way:
            raise BadStream(event.offset, "OPEN_RETURN_PATH on a one-way channel")
        self.service.set_return_path(self.channel.out_fd)
        self._return_path = True
        self._faults_ended = trio.Event()
        nursery.start_soon(self._serve_faults, self._faults_ended)

    async def _serve_faults(self, ended: trio.Event) -> None:
        """From the first answer on: what a source does not take at once waits in the loop, not in the reader."""
        try:
            with self._faults:
                await self.service.run()
        except Exception as error:
            self._error = self._error or error
            raise
        finally:
            ended.set()

    async def _stop_faults(self) -> None:
        self._faults.cancel()
        if self._faults_ended is not None:
            await self._faults_ended.wait()

    def _pong_in_package(self, event: Ping) -> None:
        """A link that is lost by now keeps nobody from loading, unless the source counts on the answer."""
        try:
            self._answers.pong(event)
        except ChannelLost as error:
            if self._must_hear and event.value == MUST_HEAR:
                raise
            log.warning("migration: PING %d cannot be answered: %s", event.value, error)

    async def _advise(self, event: PostcopyAdvise) -> None:
        check_advise(event, postcopy=self.postcopy, two_way=self.channel.two_way)
        if event.page_sizes is None:
            log.info("migration: POSTCOPY_ADVISE for dirty bitmaps, but there are none here")
            return
        self._advised = event
        await self.machine.advise(self.service)
        log.info("migration: the source may switch to postcopy")

    def _accept_blocks(self, event: RamBlocks) -> None:
        check_head(event)
        self.machine.accept_blocks(event, postcopy=self._advised is not None)
        blocks = self.machine.ram.blocks
        if self._advised is not None:
            check_page_sizes(event, self._advised, blocks)
        for block in blocks:  # what another stream discarded is nothing to this one
            block.set_bits(Bits.DISCARDED, value=False)
        self._link.open_pages(holes=self._advised is None)
        log.info(
            "migration: %r: %d KiB of RAM in %d blocks",
            self.machine.configuration.machine,
            event.total >> 10,
            len(blocks),
        )

    async def _discard(self, event: RamDiscard) -> None:
        block = self.machine.ram[event.block]
        check_discard(event, block)
        try:
            # Each page once, whatever the ranges are, and not too many without giving others their turn.
            for ranges in batches(pieces(event.ranges, max(DISCARD, block.page_size)), DISCARD, RANGES):
                block.discard_for(ranges)
                await trio.lowlevel.checkpoint()
        except PageBorn as e:
            if not (others := self.service.others()):
                raise
            raise PageBorn(f"{e} (the back-ends are {others})", e.block, e.page) from None
