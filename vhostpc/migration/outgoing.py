"""The source of a migration: sends a machine by precopy, by postcopy, or by both.

Python writes what stands between RAM sections; the sections are made and sent in C, on a thread without the GIL, in
rounds of a twentieth of a second. Between two rounds is the time to look: has somebody asked for postcopy, does what
is left fit the downtime, have pages become dirty again? The order of things on the wire is QEMU's.

One border divides failures: the first byte of the package lets the destination run. Before it the machine runs on
here; behind it only the destination knows, and a lost link is a pause.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import trio

from vhostpc.errors import ChannelLost, MigrationRefused, StreamError, VhostpcError
from vhostpc.memory.ramblock import TARGET_PAGE, Bits, total_pages
from vhostpc.migration.channel import Channel
from vhostpc.migration.info import RamInfo
from vhostpc.migration.machine import Machine
from vhostpc.migration.options import Options
from vhostpc.migration.pace import Pace
from vhostpc.migration.state import Event
from vhostpc.ufd.pagesource import UNLIMITED, Ended, PageSource, SourceNumbers
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
    SectionEnd,
    SectionPart,
    SectionStart,
    SwitchoverStart,
    VmDescription,
)
from vhostpc.wire.ramrec import RamFlag

log = logging.getLogger(__name__)

LOADED = 3
"""The PING inside the package: its PONG says that all device state was taken, just before the machine runs."""
_END_OF_PAGES = int(RamFlag.EOS).to_bytes(8, "big")
_VERSIONED = re.compile(r"-(\d+)\.\d+$")


class Watcher(Protocol):
    """Whoever started it is told what happens; nothing here may raise."""

    def moved(self, event: Event, error: BaseException | None) -> None:
        """A step of the migration (never START, CANCEL or CANCELLED, which are the watcher's own)."""
        ...

    def passed(self, number: int) -> None:
        """The dirty log was read for the ``number``-th time."""
        ...

    async def stop(self) -> None:
        """Stop the machine now: what is left fits, or postcopy begins."""
        ...


@dataclass(frozen=True)
class After:
    """When to switch to postcopy by itself: ``seconds`` after the stream began, or at the end of pass ``passes``."""

    seconds: float | None = None
    passes: int | None = None


class Outgoing:
    """Sends ``machine`` over ``channel``, which stays the caller's. For one migration.

    One at a time: what is still to be sent is marked in the machine's blocks.
    """

    def __init__(
        self,
        machine: Machine,
        channel: Channel,
        options: Options,
        watcher: Watcher,
        *,
        after: After | None = None,
        clock: Callable[[], float] = trio.current_time,
    ) -> None:
        self.machine = machine
        self.channel = channel
        self.options = options
        self.after = after or After()
        self._postcopy = "postcopy-ram" in options
        self._return_path = self._postcopy or "return-path" in options
        self.source = PageSource(
            machine.ram, channel.out_fd, return_path=channel.in_fd if self._return_path else -1
        )
        self._final: SourceNumbers | None = None
        self._watcher = watcher
        self._clock = clock
        self._pace = Pace(clock)
        self._postcopy_wanted = False
        self._said = 0  # bytes that Python sent
        self._marks = {"begin": clock()}
        self._bytes_at: dict[str, int] = {}
        self._passes = 0
        self._package_told = False
        self._package_begun = False
        self._all_sent = False
        self._cancelled = False
        self._remaining = 0

    # --- what may be asked while it runs

    def start_postcopy(self) -> None:
        """Switch at the next look. Harmless when it is too late."""
        self._postcopy_wanted = True

    def cancel(self) -> None:
        """Break it off: :meth:`send` fails. Raises MigrationRefused where the machine may run there already."""
        if self._package_told or self._package_begun:
            raise MigrationRefused("Postcopy migration in progress, cannot cancel.")
        if self._all_sent:
            raise MigrationRefused(
                "All has been sent and the guest may run at the destination, cannot cancel."
            )

        self._cancelled = True
        self.channel.shut_down()
        self.source.stop()  # a pipe wakes nobody

    def _check_cancelled(self) -> None:
        """Just before a border from which on nothing can be cancelled."""
        if self._cancelled:
            raise ChannelLost("the migration was cancelled")

    @property
    def may_run_there(self) -> bool:
        """All that the destination needs to run has been sent, or has begun to be."""
        return self._package_begun or self._all_sent

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

    def numbers(self) -> SourceNumbers:
        """What was sent until now."""
        return self._final or self.source.numbers()

    def ram_info(self) -> RamInfo:
        """The numbers of ``query-migrate``."""
        numbers = self.numbers()
        total = self._said + numbers.bytes
        stopped = self._bytes_at.get("stopped", total)
        switched = self._bytes_at.get("package", total)
        remaining = 0 if self._all_sent else self._count_dirty()
        return RamInfo(
            total=sum(block.length for block in self.machine.ram.blocks),
            transferred=total,
            remaining=remaining,
            duplicate=numbers.zero_pages,
            normal=numbers.data_pages,
            dirty_pages_rate=0 if self._all_sent else self._pace.dirty_rate,
            mbps=round(self._pace.bandwidth * 8 / 1e6, 6),
            pages_per_second=self._pace.pages_per_second,
            dirty_sync_count=self._passes,
            postcopy_requests=numbers.requests,
            precopy_bytes=stopped,
            downtime_bytes=switched - stopped,
            postcopy_bytes=total - switched,
        )

    # --- the migration

    async def send(self) -> None:
        """Send all and, where there is a return path, wait for the destination's word that it has it.

        What comes of it is told to the watcher: FINISH; FAIL where the machine has not run there and may go on here;
        NEVER_RAN where the destination said that it could not run it; LOSE where only the destination knows. The same
        error is raised: ChannelLost, StreamError, OSError. Cancelled, it tells the watcher as for a lost link.
        """
        error: BaseException | None = None
        try:
            await self._send()
        except BaseException as caught:
            error = caught
            self.channel.shut_down()  # the destination is told, whoever else still holds the descriptor
        # First things are put back, then it is told: whoever hears of it may begin another one.
        with trio.CancelScope(shield=True):
            try:
                await self.machine.stop_tracking()
            except (VhostpcError, OSError) as trouble:  # it changes nothing about where the machine is
                log.warning("migration: writes may still be tracked: %s", trouble)
        self._mark("ended")
        if error is None:
            self._watcher.moved(Event.FINISH, None)
        elif not self._package_begun:
            # 7.2's status said postcopy before anything of the package had been sent.
            self._watcher.moved(Event.NEVER_RAN if self._package_told else Event.FAIL, error)
        else:
            self._tell_package()
            self._watcher.moved(Event.NEVER_RAN if isinstance(error, NeverRan) else Event.LOSE, error)
        if error is not None:
            raise error

    def close(self) -> None:
        """Let go of the copy of the channel. Not while :meth:`send` runs."""
        self._final = self.numbers()
        self.source.close()

    async def _send(self) -> None:
        machine, options = self.machine, self.options
        if self._return_path and not self.channel.two_way:
            raise MigrationRefused("Postcopy and a return path need a channel that goes both ways")
        self.source.keep_zeros(options.values.get("zero-page-detection") == "none")
        for block in machine.ram.blocks:
            block.set_bits(Bits.DIRTY)
        await machine.start_tracking()
        self._passed()
        await self._say(self._head())
        self._mark("active")
        self._watcher.moved(Event.CONNECT, None)
        total = sum(block.length for block in machine.ram.blocks)
        log.info("migration: %r, %d MiB of RAM", machine.configuration.machine, total >> 20)
        if not self._postcopy and self.after != After():
            log.warning(
                "migration: it can not switch to postcopy by itself: the capability postcopy-ram is off"
            )
        if await self._precopy():
            await self._switch()
        else:
            await self._complete()

    def _mark(self, what: str) -> None:
        self._marks[what] = self._clock()

    def _count_dirty(self) -> int:
        return sum(b.count_bits(Bits.DIRTY) * b.page_size for b in self.machine.ram.blocks)

    def _passed(self) -> None:
        self._passes += 1
        self._watcher.passed(self._passes)

    async def _sync(self) -> None:
        before = self._count_dirty()
        await self.machine.sync_dirty()
        self._remaining = self._count_dirty()
        self._pace.synced((self._remaining - before) // TARGET_PAGE)
        self._passed()

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
        """The machine stands still from here on; what it wrote last is dirty."""
        self._mark("stopped")
        self._bytes_at["stopped"] = self._said + self.source.numbers().bytes
        await self._watcher.stop()
        if not self._package_told:
            self._watcher.moved(Event.SWITCH, None)
        await self._sync()
        found = _VERSIONED.search(self.machine.configuration.machine)
        if found and int(found[1]) >= 10:  # QEMU's own machines; older ones do not know it
            await self._say(SwitchoverStart().encode())

    async def _complete(self) -> None:
        """All that is left, then the devices."""
        await self._stop()
        log.info("migration: the last pass, %d MiB", self._remaining >> 20)
        await self._last()

    async def _last(self) -> None:
        more = await self.source.round(self.machine.ram_section, last=True)
        if isinstance(more, Ended):
            raise self._failed(more)
        if more:
            raise StreamError("pages that are withheld can not be left out of the last pass")
        devices, description = await self.machine.save()
        await self._say(b"".join(section.encode() for section in devices))
        # A destination waits for a description; what it says is not looked at. Its last byte may let it run.
        self._check_cancelled()
        self._all_sent = True
        await self._say(EndOfStream().encode() + VmDescription(description or b"{}").encode())
        if self._return_path:
            ended = await self.source.wait()
            if ended is not Ended.SHUT or self.source.numbers().shut:
                raise self._failed(ended)
        self._mark("switched")

    # --- postcopy

    async def _switch(self) -> None:
        machine, source = self.machine, self.source
        if self.options.compat == "7.2":  # its status says so before the machine has stopped
            self._tell_package()
        await self._stop()
        if not self._remaining:
            await self._last()
            return
        log.info("migration: postcopy, %d MiB to come", self._remaining >> 20)
        for block in machine.ram.blocks:
            for commands in block.discards():
                await self._say(commands)
        devices, _ = await machine.save()
        blob = PostcopyListen().encode() + b"".join(section.encode() for section in devices)
        blob += Ping(LOADED).encode() + PostcopyRun().encode()
        await self._say(Ping(2).encode())
        self._check_cancelled()
        self._package_begun = True  # from its first byte on the machine may run there
        await self._say(Package(blob).encode() + Ping(4).encode())
        self._mark("switched")
        self._bytes_at["package"] = self._said + source.numbers().bytes
        self._tell_package()
        section = machine.ram_section
        await self._say(SectionPart(section).encode())
        footer = Footer(section).encode()
        nothing = SectionEnd(section).encode() + _END_OF_PAGES + footer
        source.set_tail(footer + nothing + EndOfStream().encode())
        source.set_rate(self.options["max-postcopy-bandwidth"] or UNLIMITED)
        source.switch()
        self.channel.keep_unsent_small()
        ended = await source.serve()
        numbers = source.numbers()
        if ended is not Ended.SHUT or numbers.shut or numbers.dirty_left:
            raise self._failed(ended)
        self._all_sent = True

    def _tell_package(self) -> None:
        if not self._package_told:
            self._package_told = True
            self._watcher.moved(Event.PACKAGE, None)

    # --- both

    def limits_changed(self) -> None:
        """``max-bandwidth`` or ``max-postcopy-bandwidth`` was changed: the new one holds at once."""
        name = "max-postcopy-bandwidth" if self._package_begun else "max-bandwidth"
        self.source.set_rate(self.options[name] or UNLIMITED)

    def _failed(self, ended: Ended) -> Exception:
        numbers = self.source.numbers()
        if ended is Ended.STOPPED:
            return ChannelLost("the migration was cancelled")
        if ended is Ended.SHUT and numbers.shut and not numbers.pongs >> LOADED & 1:
            return NeverRan("the destination says that it failed, and did not run the machine")
        left = total_pages(self.machine.ram.blocks, Bits.DIRTY)
        if ended is Ended.SHUT and not numbers.shut:
            return StreamError(f"the destination says that it is done, and {left} host pages were not sent")
        if ended is Ended.SHUT:
            return ChannelLost("the destination says that it failed after it had run the machine")
        return ChannelLost(f"the destination closed the connection; {left} host pages were not sent")

    async def _say(self, data: bytes) -> None:
        await self.channel.send_all(data)
        self._said += len(data)

    def progress(self) -> tuple[object, str]:
        """Something that changes as long as it goes on, and whom it waits for when it does not."""
        numbers = self.numbers()
        left = total_pages(self.machine.ram.blocks, Bits.DIRTY)
        what = f"{left} host pages are left" if left else "all is sent, its last word is missing"
        return (self._said, numbers.bytes, numbers.requests), f"the destination is waited for: {what}"

    def _head(self) -> bytes:
        blocks = self.machine.ram.blocks
        parts = [Header().encode(), self.machine.configuration.encode()]
        if self._return_path:
            parts += [OpenReturnPath().encode(), Ping(1).encode()]
        if self._postcopy:
            sizes = 0
            for block in blocks:
                sizes |= block.page_size
            parts.append(PostcopyAdvise(sizes, TARGET_PAGE).encode())
        listed = RamBlocks(
            tuple(
                # The size of a page is said only where postcopy may follow and it is not that of a target page.
                BlockInfo(
                    b.name, b.length, b.page_size if self._postcopy and b.page_size != TARGET_PAGE else None
                )
                for b in blocks
            )
        )
        section = self.machine.ram_section
        return b"".join([*parts, SectionStart(section).encode(), listed.encode(), Footer(section).encode()])


class NeverRan(StreamError):
    """The destination's word that it never ran the machine."""
