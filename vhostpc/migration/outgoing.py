"""The source of a migration: sends a machine by precopy, by postcopy, or by both.

Python writes what stands between RAM sections; the sections are made and sent in C, on a thread without the GIL, in
rounds of a twentieth of a second. Between two rounds is the time to look: has somebody asked for postcopy, does what
is left fit the downtime, have pages become dirty again? The order of things on the wire is QEMU's.

One border divides failures, see :mod:`vhostpc.migration.phase`: before the package's last byte is written, or the byte
that ends a precopy, the machine runs on here after any failure. From that byte on only the destination's word that it
never ran (SHUT other than 0) lets it run here again; silence is a pause.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

import trio

from vhostpc.errors import ChannelLost, MigrationRefused, StreamError, sentence
from vhostpc.logs import rationed_logger
from vhostpc.migration.channel import Channel, Connect
from vhostpc.migration.info import RamInfo
from vhostpc.migration.left import Notes
from vhostpc.migration.link import OutgoingLink
from vhostpc.migration.machine import Machine
from vhostpc.migration.options import Options
from vhostpc.migration.outgoing_elements import check_package, head, packaged, tail
from vhostpc.migration.pace import Pace
from vhostpc.migration.phase import ALL_SENT, Course, Event, Phase, begun
from vhostpc.migration.silence import Silence, watch
from vhostpc.migration.watcher import Unwatched, Watcher
from vhostpc.pages.pagesource import UNLIMITED, Ended, PageScan, PageSource, SourceNumbers, over_links
from vhostpc.pages.ramblock import Bits, total_pages
from vhostpc.units import TARGET_PAGE
from vhostpc.wire.migration.elements import (
    LOADED,
    BitmapRequest,
    EndOfStream,
    Ping,
    PostcopyResume,
    SectionPart,
    SwitchoverStart,
    VmDescription,
)
from vhostpc.wire.migration.return_path import (
    RESUMED,
    PageRequest,
    Pong,
    ReceivedBitmap,
    ResumeAck,
    ReturnPathDecoder,
    Shut,
)

log = rationed_logger(__name__)

LAST_WORD = 10.0
"""Seconds to wait for a destination's report once a write to it has failed behind the border."""
READY = 5
"""The PING behind the discards that are sent while the machine runs: its PONG says that they are done."""
READY_LIMIT = 1.0
"""Seconds to wait for that PONG. Then the machine is stopped all the same."""
SECOND_OPEN = 6
"""The PING behind the second connection."""
PIECE = 64 << 10
"""Bytes of discards, at most, that are kept to go with the package."""
CANCELLED = "the migration was cancelled"
PAUSED = "the migration was paused (migrate-pause)"
_NEVER_RAN = "the destination says that it failed, and did not run the machine"
T = TypeVar("T")


@dataclass(frozen=True)
class After:
    """When to switch to postcopy by itself: ``seconds`` after the stream began, or at the end of pass ``passes``."""

    seconds: float | None = None
    passes: int | None = None


class Outgoing:
    """Sends ``machine`` over ``channel``, which stays the caller's. For one migration, whose phase is ``course``.

    None as a channel: another process has sent it, and was killed in postcopy; :meth:`resume` goes on from there.
    ``notes``: where that is noted, as long as it can happen.
    ``second``: makes the connection of requested pages, with the capability ``postcopy-preempt``.
    One at a time: what is still to be sent is marked in the machine's blocks. ``options``: QEMU's defaults if left
    out. Without a ``watcher`` the machine is stopped when it has to be.
    """

    def __init__(
        self,
        channel: Channel | None,
        machine: Machine,
        course: Course | None = None,
        watcher: Watcher | None = None,
        *,
        options: Options | None = None,
        after: After | None = None,
        notes: Notes | None = None,
        second: Connect | None = None,
        clock: Callable[[], float] = trio.current_time,
    ) -> None:
        self.machine = machine
        self.course = course or begun("source", Event.START)
        self.options = options = options or Options()
        self.dialect = options.dialect.of_machine(machine.configuration.machine)
        self.after = after or After()
        self._postcopy = "postcopy-ram" in options
        self._preempt = "postcopy-preempt" in options
        self._second = second
        self._opening: trio.CancelScope | None = None
        self._asked = False  # a PONG is waited for
        self._return_path = self._postcopy or "return-path" in options
        self.scan = PageScan(machine.ram)
        self._notes = notes
        self._before: list[SourceNumbers] = []  # of links that have ended
        self._linked = channel is not None
        self._link: OutgoingLink
        """The last one, while there is none."""
        if channel is None:
            self._before.append(SourceNumbers.nothing())
        else:
            try:
                self._link = OutgoingLink(channel, self.scan, return_path=self._return_path)
            except BaseException:
                self.scan.close()
                raise
        self.resumptions = 0
        """How many links have gone on where another was lost."""
        self._by_hand = False  # somebody has broken it
        self._pongs = 0  # as SourceNumbers.pongs, heard in recoveries
        self._watcher = watcher or Unwatched(machine)
        self._clock = clock
        self._pace = Pace(clock)
        self._postcopy_wanted = False
        self._said_before = 0  # over links that have ended
        self._marks = {"begin": clock()}
        self._bytes_at: dict[str, int] = {}
        self._passes = 0
        self._package_going: trio.CancelScope | None = None
        self._remaining = 0

    # --- what may be asked while it runs

    def start_postcopy(self) -> None:
        """Switch at the next look. Harmless when it is too late."""
        self._postcopy_wanted = True

    def cancel(self) -> None:
        """Break it off: :meth:`send` fails, unless the package's last byte has just gone: then it goes on.

        Where a precopy waits for the destination's last word, the machine may run there: it stays to a person.
        Raises MigrationRefused where it may run there by postcopy.
        """
        if self.course.in_postcopy:
            raise MigrationRefused("Postcopy migration in progress, cannot cancel.")
        self.course.move(Event.CANCEL)
        if self._opening is not None:
            self._opening.cancel()
        if self._package_going is not None:
            self._package_going.cancel()  # the channel stays: the last byte may be through
            return
        self.source.stop()  # first, or the end of the channel could pass for the destination's; and a pipe wakes nobody
        self._link.shut_down()

    @property
    def _cancelled(self) -> bool:
        return self.course.phase in (Phase.CANCELLING, Phase.BREAKING_OFF)

    def _check_cancelled(self) -> None:
        """Just before a border from which on nothing can be cancelled."""
        if self._cancelled:
            raise ChannelLost(CANCELLED)

    @property
    def setup_ms(self) -> int | None:
        return self._between("begin", "active")

    @property
    def downtime_ms(self) -> int | None:
        """From the machine's stop to the package's last byte, or to the end."""
        return self._between("stopped", "switched")

    @property
    def expected_downtime_ms(self) -> int:
        options = self.options
        wide = options.values.get("avail-switchover-bandwidth", 0)
        return self._pace.expected_downtime(self._remaining, options["downtime-limit"], wide)

    def _between(self, first: str, second: str) -> int | None:
        marks = self._marks
        if first not in marks or second not in marks:
            return None
        return round((marks[second] - marks[first]) * 1000)

    @property
    def channel(self) -> Channel:
        """That of the link, or of the last one."""
        return self._link.channel

    @property
    def source(self) -> PageSource:
        """Sends pages over the link; closed while there is none."""
        return self._link.source

    @property
    def _said(self) -> int:
        """Bytes that Python sent."""
        return self._said_before + (self._link.said if self._linked else 0)

    def numbers(self) -> SourceNumbers:
        """What was sent until now, over all links."""
        return over_links([*self._before, *([self._link.source.numbers()] if self._linked else [])])

    def ram_info(self) -> RamInfo:
        """The numbers of ``query-migrate``."""
        numbers = self.numbers()
        total = self._said + numbers.bytes
        stopped = self._bytes_at.get("stopped", total)
        switched = self._bytes_at.get("package", total)
        all_sent = self.course.phase in ALL_SENT
        return RamInfo(
            total=sum(block.length for block in self.machine.ram.blocks),
            transferred=total,
            remaining=0 if all_sent else self._count_dirty(),
            duplicate=numbers.zero_pages,
            normal=numbers.data_pages,
            dirty_pages_rate=0 if all_sent else self._pace.dirty_rate,
            mbps=round(self._pace.bandwidth * 8 / 1e6, 6),
            pages_per_second=self._pace.pages_per_second,
            dirty_sync_count=self._passes,
            postcopy_requests=numbers.requests,
            precopy_bytes=stopped,
            downtime_bytes=switched - stopped,
            postcopy_bytes=total - switched,
        )

    async def watch(self, limit: float) -> None:
        """Break a link that is silent for ``limit`` seconds while something is outstanding on it.

        That is: data that the peer has not accepted, an answer in a recovery, or the last word of a postcopy. Not
        that of a precopy: what a silent destination does then only a person can find out. Runs until cancelled.
        """
        await watch(self._silence, limit)

    def _silence(self) -> Silence | None:
        if not self._linked or self.course.phase in (Phase.SENT, Phase.SWITCHED_SENT):
            return None
        numbers, phase = self._link.source.numbers(), self.course.phase
        waits = self._asked or phase is Phase.RECOVERING or (numbers.eos_sent and self.course.in_postcopy)
        heard = (numbers.requests, numbers.pongs, self._link.heard, numbers.bytes, self._link.said)
        return Silence(self.channel, waits, heard, self._break)

    # --- the migration

    async def send(self) -> None:
        """Send all and, where there is a return path, wait for the destination's word that it has it.

        The outcome moves the phase: FINISH; FAIL before the border; behind it NEVER_RAN where the destination said
        that it could not run it, else LOSE. The same error is raised: ChannelLost, StreamError, OSError, and whatever
        else goes wrong in this process. A cancelled task is a lost link.
        """
        await self._carry(self._send)

    async def resume(self, channel: Channel, second: Connect | None = None) -> None:
        """Go on over another channel behind a pause, once the phase is RECONNECTING. The channel stays the caller's.

        What is missing over there is asked, and sent again. The outcome is that of :meth:`send`. Raises Shortage and
        OSError also where another link cannot be made: that is a LOSE, too.
        """
        try:
            if not channel.two_way:
                raise MigrationRefused("A recovery needs a channel that goes both ways")
            link = OutgoingLink(channel, self.scan, return_path=True)
        except BaseException as error:
            self.course.move(Event.LOSE, error)
            raise
        self._link, self._linked, self._by_hand = link, True, False
        self._second = second
        self.course.move(Event.RECONNECT)
        await self._carry(self._recover)

    async def _carry(self, what: Callable[[], Awaitable[None]]) -> None:
        """What goes over one link: its outcome moves the phase, and the link ends with it."""
        error: BaseException | None = None
        try:
            await what()
        except BaseException as caught:
            error = ChannelLost(PAUSED) if self._by_hand and isinstance(caught, ChannelLost) else caught
            self._by_hand = False
            self._link.shut_down()  # the destination is told, even if others still hold the descriptor
        # First things are put back, then it is told: a listener may begin another one.
        with trio.CancelScope(shield=True):
            try:
                await self.machine.stop_tracking()
            except Exception as trouble:  # it changes nothing about where the machine is
                log.warning("migration: writes may still be tracked: %s", sentence(trouble))
        self._end_link()
        self._mark("ended")
        event = Event.NEVER_RAN if isinstance(error, NeverRan) else self.course.trouble()
        if self._notes is not None and (error is None or event is not Event.LOSE):
            try:
                self._notes.remove()
            except OSError as trouble:
                log.warning("migration: its note cannot be removed: %s", sentence(trouble))
        self.course.move(event if error is not None else Event.FINISH, error)
        if error is not None:
            raise error

    def _end_link(self) -> None:
        if self._linked:
            numbers, said = self._link.source.numbers(), self._link.said
            self._before.append(numbers)
            self._said_before += said
            self._linked = False
            self._link.close()

    def pause(self) -> None:
        """Break the link, where it is the pages' (``migrate-pause``). Harmless otherwise."""
        if self.course.in_postcopy and self._linked:
            self._by_hand = True
            self._break()

    def _break(self) -> None:
        """Break the link, also while its second connection is being made."""
        self._link.shut_down()
        if self._opening is not None:
            self._opening.cancel()

    def close(self) -> None:
        """Let go of the copy of the channel, and of what a recovery needs. Not while :meth:`send` runs."""
        self._end_link()
        self.scan.close()

    async def _send(self) -> None:
        machine, options = self.machine, self.options
        if self._return_path and not self.channel.two_way:
            raise MigrationRefused("Postcopy and a return path need a channel that goes both ways")
        if self._preempt and self.dialect.preempt_first:
            await self._open_second()
        self.source.keep_zeros(options.values.get("zero-page-detection") == "none")
        for block in machine.ram.blocks:
            block.set_bits(Bits.DIRTY)
        await machine.start_tracking()
        self._passed(tell=not self.dialect.precopy_passes_only)
        await self._say(head(machine, postcopy=self._postcopy, return_path=self._return_path))
        self._mark("active")
        self.course.move(Event.CONNECT)
        total = sum(block.length for block in machine.ram.blocks)
        log.info("migration: %r, %d MiB of RAM", machine.configuration.machine, total >> 20)
        if not self._postcopy and self.after != After():
            log.warning(
                "migration: it cannot switch to postcopy automatically: the capability postcopy-ram is off"
            )
        if await self._precopy():
            await self._switch()
        else:
            await self._complete()

    async def _open_second(self) -> None:
        """The connection of requested pages: with QEMU's machine types up to 7.2 right behind the main one, else
        when postcopy begins or pages can be asked for again, and the destination has answered on the main one."""
        if self._second is None:
            raise MigrationRefused("postcopy-preempt needs a second connection, and none can be made")
        try:
            with trio.CancelScope() as self._opening:
                self._check_cancelled()
                channel = await self._second()
        except ChannelLost as error:
            raise ChannelLost(f"no connection for requested pages (postcopy-preempt): {error}") from None
        finally:
            opening, self._opening = self._opening, None
        if opening is not None and opening.cancelled_caught:
            broken = "the link was broken while its second connection was being made"
            raise ChannelLost(CANCELLED if self._cancelled else broken)
        if not channel.two_way:
            raise MigrationRefused("postcopy-preempt needs a second channel that goes both ways")
        self._link.add_urgent(channel, closing_word=self.dialect.preempt_first)

    async def _have_second(self) -> None:
        """Postcopy is about to begin, and the machine still runs. An answer behind the second connection shows that the
        destination has had the time to refuse it."""
        if self._link.urgent is None:
            await self._heard(1)
            await self._open_second()
        await self._say(Ping(SECOND_OPEN).encode())
        await self._heard(SECOND_OPEN)
        self._check_second()

    async def _heard(self, ping: int) -> None:
        self._asked = True
        try:
            while not self.source.numbers().pongs >> ping & 1:
                if (ended := await self.source.hear(ping, READY_LIMIT)) is not None:
                    raise self._failed(ended)
        finally:
            self._asked = False

    def _check_second(self) -> None:
        """While the machine can still run on here."""
        urgent = self._link.urgent
        if urgent is not None and urgent.hung_up:
            raise ChannelLost(
                "the destination has closed the connection for requested pages: is postcopy-preempt on there?"
            )

    def _mark(self, what: str) -> None:
        self._marks[what] = self._clock()

    def _count_dirty(self) -> int:
        return sum(b.count_bits(Bits.DIRTY) * b.page_size for b in self.machine.ram.blocks)

    def _passed(self, *, tell: bool) -> None:
        self._passes += 1
        if tell:
            self._watcher.passed(self._passes)

    async def _sync(self, *, tell: bool = True) -> None:
        before = self._count_dirty()
        await self.machine.sync_dirty()
        self._remaining = self._count_dirty()
        self._pace.synced((self._remaining - before) // TARGET_PAGE)
        self._passed(tell=tell)

    # --- precopy

    async def _precopy(self) -> bool:
        """Pass after pass, until what is left fits the downtime (False) or postcopy is to begin (True)."""
        source, options = self.source, self.options
        section = self.machine.ram_section
        while True:
            if self._postcopy and self._switches() and self._count_dirty():
                return True
            source.set_rate(options["max-bandwidth"] or UNLIMITED)
            more = await source.round(section)
            if isinstance(more, Ended):
                raise self._failed(more)
            numbers = source.numbers()
            self._pace.sent(self._said + numbers.bytes, numbers.data_pages + numbers.zero_pages)
            self._remaining = self._count_dirty()
            fits = self._fits()
            if more and not fits:
                continue
            # It seems to be enough: what has been written meanwhile?
            await self._sync()
            if self._fits():
                return False

    def _fits(self) -> bool:
        wide = self.options.values.get("avail-switchover-bandwidth", 0)
        return not self._remaining or self._remaining < self._pace.threshold(
            self.options["downtime-limit"], wide
        )

    def _switches(self) -> bool:
        after = self.after
        return (
            self._postcopy_wanted
            or (after.seconds is not None and self._clock() - self._marks["active"] >= after.seconds)
            or (after.passes is not None and self._passes > after.passes)
        )

    async def _stop(self) -> None:
        """The machine stands still from here on; what it wrote last is yet to be looked for."""
        self._mark("stopped")
        self._bytes_at["stopped"] = self._said + self.source.numbers().bytes
        await self._watcher.stop_to_send()
        self.course.move(Event.STOP)

    async def _last_look(self) -> bytes:
        """What it wrote last is dirty. What a destination is told then."""
        await self._sync(tell=not self.dialect.precopy_passes_only)
        return SwitchoverStart().encode() if self.dialect.switchover_start else b""

    async def _complete(self) -> None:
        """All that is left, then the devices."""
        await self._stop()
        await self._say(await self._last_look())
        log.info("migration: the last pass, %d MiB", self._remaining >> 20)
        await self._last()

    async def _last(self) -> None:
        more = await self.source.round(self.machine.ram_section, last=True)
        if isinstance(more, Ended):
            raise self._failed(more)
        if more:
            raise StreamError("withheld pages cannot be left out of the last pass")
        devices, description = await self.machine.save()
        await self._say(b"".join(section.encode() for section in devices))
        self._check_cancelled()
        # The border, a byte by itself: from here on a cancel leaves the machine to a person.
        self.course.move(Event.SENT)
        try:
            await self._say(EndOfStream().encode())
        except BaseException:
            self.course.move(Event.UNSENT)
            raise
        # A destination waits for a description; what it says is not looked at.
        await self._finish_precopy(VmDescription(description or b"{}").encode())
        self._mark("switched")

    async def _finish_precopy(self, last: bytes) -> None:
        broken: ChannelLost | None = None
        try:
            await self._say(last)
        except ChannelLost as error:
            broken = error
        if self._return_path:
            ended = await self._last_word() if broken else await self.source.wait()
            if ended is Ended.SHUT and not self.source.numbers().shut:
                return  # it has all, whatever became of the description
            if ended is not None:
                raise self._failed(ended)
        if broken:
            raise broken

    async def _last_word(self) -> Ended | None:
        """A write has failed behind the border: what has the destination said? None: nothing that it ended with."""
        ended: Ended | None = None
        with trio.move_on_after(LAST_WORD):
            ended = await self.source.wait()
        return ended

    # --- postcopy

    async def _switch(self) -> None:
        machine, source = self.machine, self.source
        check_package(machine.state_size())  # while it still runs
        if self._preempt:
            await self._have_second()
        self.course.move(Event.SWITCH)
        for block in machine.ram.blocks:
            block.set_bits(Bits.DISCARDED, value=False)  # nothing has been told yet
        if machine.running:
            await self._discard_early()
        self.source.set_tail(
            tail(self.machine.ram_section)
        )  # behind the border it may be too late for memory
        await self._stop()
        devices, _ = await machine.save()
        package = packaged(devices, must_hear=self.dialect.loaded_ping)
        ahead = await self._last_look()
        if not self._remaining:
            await self._say(ahead)
            await self._last()
            return
        if self._notes is not None:
            self._notes.write(machine, preempt=self._preempt)
        for block in machine.ram.blocks:
            for commands in block.discards():
                if len(ahead) > PIECE:
                    await self._say(ahead)
                    ahead = b""
                ahead += commands
        self._check_second()
        self._check_cancelled()
        await self._send_package(ahead + Ping(2).encode() + package)
        self._mark("switched")
        self._bytes_at["package"] = self._said + source.numbers().bytes
        for block, offset in machine.first():
            source.send_first(block, offset)
        log.info("migration: postcopy, %d MiB left to send", self._remaining >> 20)
        await self._serve(Ping(4).encode())

    async def _discard_early(self) -> None:
        """Tell what is dirty now, while the machine runs: it stands only for what it writes from here on.

        Nothing of precopy is sent any more. The answer to a PING says that the destination has done this, and has made
        itself ready; one that does not answer is not waited for.
        """
        await self.machine.sync_dirty()
        for block in self.machine.ram.blocks:
            for commands in block.discards():
                await self._say(commands)
        await self._say(Ping(READY).encode())
        ended = await self.source.hear(READY, READY_LIMIT)
        if ended is not None:
            raise self._failed(ended)

    async def _serve(self, ahead: bytes = b"") -> None:
        """Pages to the last one, what is asked for first; then the destination's word."""
        source = self.source
        await self._say_behind(ahead + SectionPart(self.machine.ram_section).encode())
        source.set_rate(self.options["max-postcopy-bandwidth"] or UNLIMITED)
        source.switch()
        self.channel.keep_unsent_small()
        try:
            ended = await source.serve(self._tell_loaded)
        finally:
            if source.numbers().heard:
                self._tell_loaded()  # it came with what ended it
        numbers = source.numbers()
        if ended is not Ended.SHUT or numbers.shut or numbers.dirty_left:
            raise self._failed(ended)

    async def _recover(self) -> None:
        """Ask which pages have arrived over there, in QEMU's order, and go on with the rest."""
        blocks = self.machine.ram.blocks
        if self._preempt and self.dialect.preempt_first:
            await self._open_second()
        self.source.set_tail(tail(self.machine.ram_section))
        decoder = ReturnPathDecoder(max(block.bitmap_size for block in blocks))
        await self._say(b"".join(BitmapRequest(block.name).encode() for block in blocks))
        for block in blocks:
            bitmap = await self._hear(decoder, ReceivedBitmap)
            if bitmap.block != block.name:
                raise StreamError(
                    f"the bitmap of RAM block {bitmap.block!r} in place of that of {block.name!r}"
                )
            block.take_bitmap(bitmap.bits)
        if self._preempt and not self.dialect.preempt_first:
            await self._open_second()
        await self._say(PostcopyResume().encode())
        ack = await self._hear(decoder, ResumeAck, exactly=True)  # requests follow at once
        if ack.value != RESUMED:
            raise StreamError(f"the destination answers {ack.value} to POSTCOPY_RESUME, not {RESUMED}")
        self.course.move(Event.RESUME)
        self.resumptions += 1
        log.info("migration: recovered, %d host pages left to send", total_pages(blocks, Bits.DIRTY))
        await self._serve()

    async def _hear(self, decoder: ReturnPathDecoder, kind: type[T], *, exactly: bool = False) -> T:
        """The next message of the recovery. What a destination says besides counts where it counts otherwise."""
        while True:
            message = await self._link.hear(decoder, exactly=exactly)
            if isinstance(message, kind):
                return message
            if isinstance(message, Pong):
                self._pongs |= 1 << message.value if message.value < 32 else 0
            elif isinstance(message, Shut):
                if message.status and not self._has_loaded(self.numbers()):
                    raise NeverRan(_NEVER_RAN)
                raise StreamError("the destination says that it is done, in the middle of a recovery")
            elif not isinstance(message, PageRequest):  # what it asks for now it asks for again
                raise StreamError(f"{type(message).__name__} in the middle of a recovery")

    def _has_loaded(self, numbers: SourceNumbers) -> bool:
        """The destination has said that it loaded the package, and was about to run it."""
        return bool((numbers.pongs | self._pongs) >> LOADED & 1)

    async def _send_package(self, package: bytes) -> None:
        """The border is its last byte: until the kernel has taken that one the machine cannot run there.

        What goes ahead of the package goes with it, in one call.
        """
        sent, too_late = False, False
        try:
            with trio.CancelScope() as self._package_going:
                await self.channel.send_all(package)
                sent, too_late = True, self._cancelled
                self.course.move(Event.PACKAGE)
        finally:
            self._package_going = None
        if not sent:
            raise ChannelLost(CANCELLED)
        self._link.said += len(package)
        if too_late:
            log.warning(
                "migration: the cancel came too late: the package had been sent, it goes on as postcopy"
            )

    async def _say_behind(self, data: bytes) -> None:
        """As :meth:`_say`, behind the border: a link that broke may have brought the destination's word before."""
        try:
            await self._say(data)
        except ChannelLost as error:
            ended = await self._last_word()
            raise (self._failed(ended) if ended is Ended.SHUT else error) from None

    def _tell_loaded(self) -> None:
        if self.dialect.loaded_ping and self.course.phase is Phase.PACKAGED:
            self.course.move(Event.LOADED)

    # --- both

    def limits_changed(self) -> None:
        """``max-bandwidth`` or ``max-postcopy-bandwidth`` was changed: the new one holds at once."""
        name = "max-postcopy-bandwidth" if self.course.in_postcopy else "max-bandwidth"
        self.source.set_rate(self.options[name] or UNLIMITED)

    def _failed(self, ended: Ended) -> Exception:
        numbers = self.numbers()
        if ended is Ended.STOPPED:
            waits = ", before the destination's final report: the guest may be running there"
            return ChannelLost(CANCELLED + (waits if self.course.phase in ALL_SENT else ""))
        if ended is Ended.SHUT and numbers.shut and not self._has_loaded(numbers):
            return NeverRan(_NEVER_RAN)
        left = total_pages(self.machine.ram.blocks, Bits.DIRTY)
        if ended is Ended.SHUT and not numbers.shut:
            return StreamError(f"the destination says that it is done, but {left} host pages were not sent")
        if ended is Ended.SHUT:
            return ChannelLost("the destination says that it failed after it had run the machine")
        return ChannelLost(f"the destination closed the connection; {left} host pages were not sent")

    async def _say(self, data: bytes) -> None:
        await self._link.say(data)

    def progress(self) -> tuple[object, str]:
        """Something that changes as long as it goes on, and whom it waits for when it does not."""
        numbers = self.numbers()
        left = total_pages(self.machine.ram.blocks, Bits.DIRTY)
        what = f"{left} host pages are left" if left else "everything is sent, its final report is missing"
        return (self._said, numbers.bytes, numbers.requests), f"waiting for the destination: {what}"


class NeverRan(StreamError):
    """The destination's word that it never ran the machine."""
