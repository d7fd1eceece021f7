"""The endpoint: one machine, and its migrations in and out, as the monitor drives them.

All moves of a status are made here, each told to the listener; run states are QEMU's. Two rules hold whatever
happens: the machine never runs at both ends, and a machine that does not run has a status that says why.
"""

from __future__ import annotations

import gc
import logging
import math
import os
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, ExitStack
from dataclasses import replace
from typing import Any, Protocol

import trio

from vhostpc.endpoint.connections import accepted, another, check_many
from vhostpc.endpoint.recovery import (
    Backoff,
    Links,
    advice,
    can_be_repeated,
    keep_listening,
    listened_at,
    take_link,
    tell_no_recovery,
)
from vhostpc.endpoint.reports import came, map_of, sent, trace_of
from vhostpc.endpoint.stalls import tell_waits
from vhostpc.endpoint.unfailing import Unfailing
from vhostpc.errors import (
    ChannelLost,
    MigrationRefused,
    VhostpcError,
    first_of,
    is_foreseen,
    let_go,
    sentence,
)
from vhostpc.logs import rationed_logger
from vhostpc.migration.channel import Channel, Connect, connect
from vhostpc.migration.incoming import Incoming
from vhostpc.migration.info import MigrationInfo
from vhostpc.migration.left import Notes
from vhostpc.migration.machine import Machine
from vhostpc.migration.options import Options
from vhostpc.migration.outgoing import After, Outgoing
from vhostpc.migration.phase import LEFT, Course, Event, Phase, Told, begun
from vhostpc.migration.runstate import RunState, check_migrate
from vhostpc.migration.status import BUSY, IN_POSTCOPY, Status
from vhostpc.migration.uri import Address, Exec, Fd, File
from vhostpc.pages.blocktime import Blocktime

log = rationed_logger(__name__)


class Listener(Protocol):
    """The receiver of events: ``vhostpc.qmp.Events``. On the trio thread; nothing here waits or raises."""

    def emit(self, name: str, data: dict[str, Any] | None = None) -> None: ...
    def migration(self, status: Status) -> None: ...
    def migration_pass(self, number: int) -> None: ...
    def stop(self) -> None: ...
    def resume(self) -> None: ...


PAUSED_BY_HAND = "the recovery was paused (migrate-pause)"
NOT_FINAL = "Migration is not finalized yet"
# QEMU tells nothing but the status there.
_WITHOUT_NUMBERS = frozenset({Status.NONE, Status.SETUP, Status.FAILING, Status.FAILED, Status.CANCELLED})


class Endpoint:
    """``machine`` and its migrations. Its methods are those of ``vhostpc.qmp.Endpoint``; :meth:`serve` does the work.

    ``incoming``: it waits for a machine to come. ``autostart``: a machine that came runs. ``after``: when a precopy
    switches to postcopy by itself. ``trace``: how many answered faults of a machine that comes are remembered one by
    one. ``spin_us``: how long its fault loop and its load look on before they sleep. ``links``: when one is lost, and
    what follows. ``notes``: where it is noted that a postcopy from here goes on; ``left``: one did, and the machine is
    what its process has left.
    """

    def __init__(
        self,
        machine: Machine,
        options: Options,
        events: Listener,
        *,
        incoming: bool = False,
        autostart: bool = True,
        after: After | None = None,
        trace: int = 0,
        spin_us: int = 0,
        links: Links | None = None,
        notes: Notes | None = None,
        left: bool = False,
    ) -> None:
        self.machine = machine
        self.options = options
        self.error: BaseException | None = None
        """Why the program ends, where an expected machine did not arrive."""
        self._events = Unfailing(events)
        self._after = after
        self._trace = trace
        self._spin_us = spin_us
        self._links = links or Links()
        self._by_hand = False  # somebody has paused it: nothing is recovered automatically
        self._autostart = autostart
        self._quit = trio.Event()
        self._nursery: trio.Nursery | None = None
        self.run_state = RunState.INMIGRATE
        if not incoming:
            self.run_state = RunState.RUNNING if machine.running else RunState.PRELAUNCH
        self._course = Course("destination" if incoming else "source", options.dialect, self._moved)
        self._error_desc: str | None = None
        self._began = 0.0
        self._total_ms: int | None = None
        # As a source.
        self._outgoing: Outgoing | None = None
        self._connecting: trio.CancelScope | None = None
        self._to_command = False
        self._taken: RunState | None = None
        """The migration has stopped the machine, and it alone starts it again: its run state before, and behind."""
        self._starting = trio.Lock()  # one migrate at a time
        self._sent = trio.Event()  # nothing of the last one is under way any more
        self._sent.set()
        self._notes = notes
        if left:
            self._course = begun("source", *LEFT, dialect=options.dialect, tell=self._moved)
            self.run_state = RunState.FINISH_MIGRATE
            self._began = trio.current_time()
            self._outgoing = Outgoing(None, machine, self._course, self, options=options, notes=notes)
        # As a destination.
        self._incoming: Incoming | None = None
        self._tells_blocktime = False
        self._recovery: trio.CancelScope | None = None
        """Listens for a source that recovers."""
        self._retrying: trio.CancelScope | None = None
        """As a source: connects again by itself."""
        self._paused = trio.Event()
        self._addresses: list[dict[str, Any]] = []
        self._ends_with_it = False  # the program does, if a machine does not come, and tells why
        self.has_listened = False

    async def serve(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until :meth:`quit`. Whatever is under way then is broken off."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            task_status.started()
            await self._quit.wait()
            nursery.cancel_scope.cancel()
        if self._outgoing is not None:
            self._outgoing.close()

    def quit(self, why: str = "quit") -> None:
        if not self._quit.is_set():
            listens = self._course.side == "destination" and self.status is Status.SETUP
            if self.status in BUSY and not listens:
                log.error("migration: interrupted by %s, it was %s", why, self.status)
            else:
                log.info("ended by %s", why)
        self._quit.set()

    async def ended(self) -> None:
        """Wait for :meth:`quit`."""
        await self._quit.wait()

    @property
    def status(self) -> Status:
        return self._course.status

    @property
    def owes_pages(self) -> bool:
        """A destination needs the memory that is here."""
        return self._course.side == "source" and self._course.in_postcopy

    def info(self) -> MigrationInfo:
        status, dialect = self.status, self.options.dialect
        came = self._course.side == "destination"
        # Why a postcopy is paused is told by a source only, and not by all; the log has it always.
        told_early = dialect.error_before_failed and not came
        error = self._error_desc if status is Status.FAILED or told_early else None
        told_always = MigrationInfo(
            status,
            error_desc=error,
            blocked_reasons=[*self.machine.blocked()],
            advice=advice(self._course.side) if status is Status.POSTCOPY_PAUSED else None,
        )
        if came:
            told = self._addresses if dialect.address_after_listening or status in BUSY else []
            return replace(told_always, socket_address=told, blocktime=self._blocktime())
        outgoing = self._outgoing
        if outgoing is None or status in _WITHOUT_NUMBERS:
            return told_always
        ended = status not in BUSY
        stopped = status in IN_POSTCOPY and dialect.downtime_in_postcopy
        elapsed = self._total_ms
        if elapsed is None:
            elapsed = round((trio.current_time() - self._began) * 1000)
        ram = outgoing.ram_info()
        return replace(
            told_always,
            ram=ram,
            remaining=None if ended else ram.remaining,
            setup_time=outgoing.setup_ms,
            total_time=elapsed,
            downtime=outgoing.downtime_ms if ended or stopped else None,
            expected_downtime=None if ended or stopped else outgoing.expected_downtime_ms,
        )

    def _blocktime(self) -> Blocktime | None:
        """Of a machine that has come, and runs here: nobody knows the vCPUs of one that is held."""
        incoming = self._incoming
        if incoming is None or not self._tells_blocktime or self.status is not Status.COMPLETED:
            return None
        by_postcopy = incoming.kept is not None
        if not (by_postcopy or (incoming.advised and self.options.dialect.blocktime_of_precopy)):
            return None
        return incoming.service.blocktime()

    def report(self) -> dict[str, Any]:
        """The state of the machine, and the counts of pages in the last migration from and to here."""
        return {
            **self.machine.report(),
            "status": str(self.status),
            **sent(self._outgoing),
            **came(self._incoming),
        }

    def trace(self, start: int) -> dict[str, Any]:
        """Answered faults from number ``start`` on, at most some thousand; the names of their clients."""
        return trace_of(self._incoming, start)

    def map(self, cells: int) -> dict[str, Any]:
        """Host pages that have come, in each of ``cells`` equal parts of each block."""
        return map_of(self.machine, cells)

    async def verify(self) -> dict[str, Any]:
        """Check every page of the machine, which stands still."""
        if self.machine.running or self.status in BUSY or self.run_state is RunState.INMIGRATE:
            raise MigrationRefused(
                "The machine's memory can be checked while it stands still and is all here"
            )
        return await self.machine.verify()

    def postcopy_refusal(self) -> str | None:
        return self.machine.postcopy_refusal()

    # --- running or not

    async def stop(self) -> None:
        while self._taken is not None:
            self._taken = RunState.PAUSED  # it stands, or is about to; it stays so should the migration fail
            if not await self._put_back():
                break
        if self._taken is not None and self.status in BUSY:
            return
        if self.run_state is RunState.INMIGRATE:
            self._autostart = False
        elif self.machine.running:
            await self._stand(RunState.PAUSED)
        elif self.run_state is RunState.POSTMIGRATE and not self.machine.runnable:
            self.run_state = RunState.PAUSED  # a held machine is taken back, and can be sent once more

    async def cont(self) -> None:
        while self._taken is not None:
            if not await self._put_back():
                raise MigrationRefused(self._not_final())
        if self.run_state is RunState.INMIGRATE:
            self._autostart = True
            return
        if self._course.side == "source" and not self._course.person_may_run:
            raise MigrationRefused(self._not_final())
        if self.machine.running and self.run_state is RunState.RUNNING:
            return
        if self.status is Status.COMPLETED and self._course.side == "source" and self.machine.runnable:
            log.warning(
                "the machine runs here again, although it was sent: make sure that it runs nowhere else"
            )
        await self._go()

    async def _put_back(self) -> bool:
        """A migration that has told its last status still has the machine for a moment: wait for its end. False, and at
        once, where that is not to be waited for: it is under way, or its command takes its time."""
        if self.status in BUSY or (self.status is Status.COMPLETED and self._to_command):
            return False
        await self._sent.wait()
        return True

    def _not_final(self) -> str:
        if self._course.person_may_run:
            return NOT_FINAL
        return f"{NOT_FINAL}: the guest may be running at the destination ({self.status})"

    async def _stand(self, run_state: RunState) -> None:
        """Stop the machine, if it runs."""
        ran, before = self.machine.running, self.run_state
        self.run_state = run_state
        try:
            await self.machine.stop()
        except Exception:
            self.run_state = before
            raise
        if ran:
            self._events.stop()

    async def _go(self) -> None:
        # First the state, as QEMU does: a stop that comes while the machine is being started is one.
        before, self.run_state = self.run_state, RunState.RUNNING
        told = False

        def runs() -> None:
            nonlocal told
            told = True
            self._events.resume()

        try:
            await self.machine.cont(runs)
        except BaseException:
            self.run_state = before
            if told:
                self._events.stop()
            raise
        if not told:  # it was running
            self._events.resume()

    # --- statuses

    def _moved(self, told: Told) -> None:
        """A status is new: tell of it."""
        status, error = told.status, told.error
        if error is not None and status is not Status.CANCELLED:
            self._error_desc = sentence(error)
        if status is Status.FAILING:
            self._events.migration(status)
            return
        if status is Status.POSTCOPY_PAUSED:
            self._paused.set()
        elif status is Status.POSTCOPY_ACTIVE:
            self._error_desc = None  # of the pause before
        if status is Status.COMPLETED and self._course.side == "source":
            self.run_state = RunState.POSTMIGRATE
        if status not in BUSY:
            self._total_ms = round((trio.current_time() - self._began) * 1000)
        at_the_end = (
            self._ends_with_it and status is Status.FAILED and error is not None and is_foreseen(error)
        )
        why = f": {sentence(error)}" if error is not None and not at_the_end else ""
        log.log(
            logging.ERROR if why and status is not Status.CANCELLED else logging.INFO,
            f"migration: {status}%s",  # each status is a line of its own kind, of which not too many come
            why,
        )
        if status is Status.POSTCOPY_PAUSED and (not self._links.recover_for or self._by_hand):
            log.warning("migration: %s", advice(self._course.side))
        self._events.migration(status)

    def passed(self, number: int) -> None:
        self._events.migration_pass(number)

    # --- out

    async def migrate(self, address: Address, *, resume: bool) -> None:
        """``resume``: go on with a migration that is paused, over a connection to this address."""
        async with AsyncExitStack() as stack:
            with _closing(address) as unless_begun:
                await stack.enter_async_context(self._starting)
                self._check_migrate(resume)
                await self._sent.wait()  # after a failure the last one may still be putting things back
                self._check_migrate(resume)
                check_many(address, preempt=self._preempt)
                unless_begun.pop_all()
            channel: Channel | None = None
            if isinstance(address, Exec | Fd | File):
                try:  # a failure is known at once
                    channel = await connect(address)
                except ChannelLost as error:
                    raise MigrationRefused(str(error)) from None
            self._sent = trio.Event()
            self._by_hand = False
            if resume:
                if self._retrying is not None:
                    self._retrying.cancel()
                self._course.move(Event.RECOVER)
                self._start(self._carry_out, address, channel, True)
                return
            self._outgoing = None
            self._to_command = isinstance(address, Exec)
            self._course = Course("source", self.options.dialect, self._moved)
            self._error_desc, self._total_ms = None, None
            self._began = trio.current_time()
            self._early_switch = False
            self._course.move(Event.START)
            self._start(self._carry_out, address, channel, False)

    def _check_migrate(self, resume: bool) -> None:
        if resume and not (self._course.side == "source" and self._course.phase is Phase.PAUSED):
            raise MigrationRefused("Cannot resume if there is no paused migration")
        check_migrate(self.run_state, self.status, resume=resume)
        if not resume and (reasons := self.machine.blocked()):
            raise MigrationRefused(reasons[0])

    def _start(self, task: Callable[..., Awaitable[None]], *args: object) -> None:
        if self._nursery is None:
            raise VhostpcError("the endpoint does not run")
        self._nursery.start_soon(task, *args)

    async def _carry_out(self, address: Address, channel: Channel | None, resume: bool) -> None:
        """A migration, and what is recovered of it automatically."""
        await self._send(address, channel, resume)
        if not (self._links.recover_for and can_be_repeated(address)):
            return
        while self._course.phase is Phase.PAUSED and not self._by_hand:
            if not await self._retry(address):
                return

    async def _retry(self, address: Address) -> bool:
        """Connect again and again, until pages move, or for so long. Whether another pause may be recovered."""
        outgoing, backoff = self._outgoing, Backoff()
        assert outgoing is not None
        resumed, until = outgoing.resumptions, trio.current_time() + self._links.recover_for
        while self._course.phase is Phase.PAUSED and not self._by_hand and outgoing.resumptions == resumed:
            with trio.CancelScope(deadline=until) as scope:
                self._retrying = scope
                await backoff.wait()
            self._retrying = None
            if scope.cancelled_caught:
                if trio.current_time() >= until:
                    log.warning("migration: not recovered within %g s", self._links.recover_for)
                return False
            async with self._starting:
                if self._course.phase is not Phase.PAUSED:
                    return False
                self._sent = trio.Event()
                self._course.move(Event.RECOVER)
            await self._send(address, None, True, until)
        return True

    async def _send(
        self, address: Address, channel: Channel | None, resume: bool, until: float = math.inf
    ) -> None:
        """All that goes over one link, the first or another. ``until``: when connecting is given up."""
        outgoing = self._outgoing if resume else None
        try:
            async with AsyncExitStack() as stack:
                if channel is None:
                    channel = await self._connect(address, until)
                await stack.enter_async_context(channel)
                channel.limit_silence(self._links.timeout)
                if outgoing is None:
                    self._outgoing = outgoing = Outgoing(
                        channel,
                        self.machine,
                        self._course,
                        self,
                        options=self.options,
                        after=self._after,
                        notes=self._notes,
                        second=self._second(stack, address),
                    )
                    if self._early_switch:
                        outgoing.start_postcopy()
                    if self.status is Status.CANCELLING:
                        outgoing.cancel()
                nursery = await stack.enter_async_context(trio.open_nursery())
                nursery.start_soon(tell_waits, outgoing.progress)
                if self._links.timeout:
                    nursery.start_soon(outgoing.watch, self._links.timeout)
                try:
                    if resume:
                        await outgoing.resume(channel, self._second(stack, address))
                    else:
                        await outgoing.send()
                finally:
                    nursery.cancel_scope.cancel()
        except* Exception as group:  # whatever it is, it ends the migration and not the machine
            error = first_of(group)
            if not is_foreseen(error):
                log.error("migration: %s", sentence(error), exc_info=error)
            if outgoing is None or self._course.phase is Phase.RECONNECTING:
                before = self.status
                self._course.move(self._course.trouble(), error)
                if self.status is before:  # QEMU 7.2 shows no attempt
                    self._error_desc = sentence(error)
                    log.error("migration: not recovered: %s", self._error_desc)
            let_go(group)
        finally:
            try:
                await self._after_sending()
            finally:
                # A pause keeps what a recovery goes on with, and that may be at once.
                if self._course.phase is not Phase.PAUSED:
                    self._taken = None
                    if outgoing is not None:
                        outgoing.close()
                    _free_now()
                self._sent.set()

    def _second(self, stack: AsyncExitStack, address: Address) -> Connect | None:
        return another(stack, address, self._links.timeout) if self._preempt else None

    @property
    def _preempt(self) -> bool:
        return "postcopy-preempt" in self.options

    async def _connect(self, address: Address, until: float) -> Channel:
        channel: Channel | None = None
        try:
            with trio.CancelScope(deadline=until) as self._connecting:
                channel = await connect(address)
        finally:
            self._connecting = None
        if channel is not None:
            return channel
        if trio.current_time() >= until:
            raise ChannelLost("the destination's address did not answer in time")
        raise ChannelLost("the migration was cancelled" if self._outgoing is None else PAUSED_BY_HAND)

    async def _after_sending(self) -> None:
        if self.status is Status.COMPLETED:
            if not (self.machine.runnable or self.machine.blocked()):
                log.info("the machine is still held here: stop takes it back, and it can be sent again")
            return
        if self._taken is not None and self._course.phase is Phase.UNKNOWN:
            # All was sent and the destination did not say what became of it: only a person can find out.
            self.run_state = RunState.PAUSED
            log.error(
                "migration: the guest may be running at the destination: it is not started here automatically (cont)"
            )
            return
        if self._taken is None or not self._course.may_run:
            return
        if self._taken is not RunState.RUNNING:
            self.run_state = self._taken
            return
        try:
            await self._go()
        except Exception as trouble:
            self.run_state = RunState.PAUSED
            why = sentence(trouble)
            log.error(
                "the machine could not be started again (cont): %s", why, exc_info=not is_foreseen(trouble)
            )

    async def cancel(self) -> None:
        if self._course.in_postcopy:
            # 7.2 would do it, and lose the pages that only one side has.
            raise MigrationRefused("Postcopy migration in progress, cannot cancel.")
        if self._course.side != "source" or self.status not in BUSY:
            return
        if self._outgoing is not None:
            self._outgoing.cancel()
            return
        self._course.move(Event.CANCEL)
        if self._connecting is not None:
            self._connecting.cancel()

    async def pause(self) -> None:
        """Break the link of a postcopy, also one that is being made: ``migrate-pause``. What was waiting waits on."""
        going = (Status.POSTCOPY_ACTIVE, Status.POSTCOPY_RECOVER)
        connecting = self._connecting if self._course.phase is Phase.RECONNECTING else None
        if self.status not in going and connecting is None:
            raise MigrationRefused(self.options.dialect.pause_refusal)
        end = self._outgoing if self._course.side == "source" else self._incoming
        self._by_hand = True
        if connecting is not None:
            connecting.cancel()
        elif end is not None:
            end.pause()

    async def start_postcopy(self) -> None:
        if self._course.side == "destination":
            raise MigrationRefused("Postcopy must be started after migration has been started")
        self._early_switch = True
        if self._outgoing is not None:
            self._outgoing.start_postcopy()

    def parameters_changed(self) -> None:
        """What is under way takes its new limits."""
        going = (Status.ACTIVE, Status.POSTCOPY_DEVICE, Status.POSTCOPY_ACTIVE)
        if self._outgoing is not None and self.status in going:
            self._outgoing.limits_changed()

    async def stop_to_send(self) -> None:
        """The source's last look is over: the machine stands still until the end."""
        self._taken = self.run_state
        await self._stand(RunState.FINISH_MIGRATE)

    # --- in

    async def incoming(self, address: Address, *, exit_on_error: bool) -> None:
        if self._nursery is None:
            raise VhostpcError("the endpoint does not run")
        with _closing(address) as unless_begun:
            check_many(address, preempt=self._preempt)
            unless_begun.pop_all()
        self.has_listened = True  # or is about to: a second one is refused
        try:
            await self._nursery.start(self._receive, address, exit_on_error)
        except BaseException:
            self.has_listened = False
            raise

    async def _receive(
        self, address: Address, exit_on_error: bool, task_status: trio.TaskStatus[None]
    ) -> None:
        begun = False

        def listens(told: list[dict[str, Any]]) -> None:
            nonlocal begun
            self._addresses = told
            self._course.move(Event.START)
            if not self.options.dialect.setup_while_listening:  # the event is told in any case
                self._events.emit("MIGRATION", {"status": str(Status.SETUP)})
            task_status.started()
            begun = True  # from here on the status says what becomes of it

        self._ends_with_it = exit_on_error
        try:
            async with AsyncExitStack() as stack:
                channel, second = await stack.enter_async_context(
                    accepted(address, self._links.timeout, listens, preempt=lambda: self._preempt)
                )
                self._course.move(Event.CONNECT)
                self._tells_blocktime = "postcopy-blocktime" in self.options
                incoming = self._incoming = Incoming(
                    channel,
                    self.machine,
                    self._course,
                    self,
                    postcopy="postcopy-ram" in self.options,
                    trace=self._trace,
                    spin_us=self._spin_us,
                    second=second,
                )
                stack.callback(incoming.close)
                attending = trio.CancelScope()
                stack.callback(attending.cancel)
                again = listened_at(address, self._addresses)
                self._start(self._attend, incoming, again, attending)
                await incoming.receive()
        except Exception as error:
            if not begun:
                raise
            if self._incoming is None:  # else it has told
                self._course.move(Event.FAIL, error)
            let_go(error)
            _free_now()
            if exit_on_error:
                self.error = error
                self.quit("a machine that did not arrive")
        else:
            _free_now()
            if self._links.recover_for and self._course.phase is Phase.MOVED and can_be_repeated(again):
                # Whether the source has heard the last word is not known here.
                self._start(self._listen_by_itself, incoming, again)
        finally:
            self._ends_with_it = False

    async def _attend(self, incoming: Incoming, address: Address, scope: trio.CancelScope) -> None:
        """What goes on beside a migration to here, until it ends."""
        with scope:
            async with trio.open_nursery() as nursery:
                if self._links.timeout:
                    nursery.start_soon(incoming.watch, self._links.timeout)
                if self._links.recover_for and can_be_repeated(address):
                    nursery.start_soon(self._recover_by_itself, incoming, address)

    def check_recover(self) -> None:
        """Raises MigrationRefused: nothing is paused here that came from elsewhere."""
        incoming, moved = self._incoming, self._course.phase is Phase.MOVED
        can = moved or (
            incoming is not None and not incoming.service.closed and self._course.allows(Event.RECOVER)
        )
        if incoming is None or self._course.side == "source" or not can:
            raise MigrationRefused("Migrate recover can only be run when postcopy is paused.")

    async def recover(self, address: Address) -> None:
        """Listen at the address for the source of a postcopy that is paused: ``migrate-recover``."""
        with _closing(address) as unless_begun:
            self.check_recover()
            check_many(address, preempt=self._preempt)
            if self._nursery is None:
                raise VhostpcError("the endpoint does not run")
            unless_begun.pop_all()
        if self._recovery is not None:  # another address takes the place of the first
            self._recovery.cancel()
        await self._nursery.start(self._recover, self._incoming, address)

    async def _recover(
        self, incoming: Incoming, address: Address, task_status: trio.TaskStatus[None]
    ) -> None:
        begun = False

        def listens(told: list[dict[str, Any]]) -> None:
            nonlocal begun
            if self._recovery is not None:
                self._recovery.cancel()
            begun, self._recovery = True, scope
            self._listens(told)
            task_status.started()

        def connected() -> None:
            if self._recovery is scope:
                self._recovery = None

        self._by_hand = False
        with trio.CancelScope() as scope:
            try:
                await take_link(incoming, address, self._links.timeout, listens, connected)
            except Exception as error:  # it stays paused
                if not begun:
                    raise
                tell_no_recovery(error)
            finally:
                connected()

    def _listens(self, told: list[dict[str, Any]]) -> None:
        self._addresses = told
        if not self.options.dialect.setup_while_listening:  # the event is told in any case
            self._events.emit("MIGRATION", {"status": str(Status.SETUP)})

    async def _recover_by_itself(self, incoming: Incoming, address: Address) -> None:
        """Listen where it listened, in each pause."""
        while True:
            await self._paused.wait()
            self._paused = trio.Event()
            if not self._by_hand and incoming.course.allows(Event.RECOVER):
                await self._listen_by_itself(incoming, address)

    async def _listen_by_itself(self, incoming: Incoming, address: Address) -> None:
        self._recovery = scope = trio.CancelScope()
        recovered = await keep_listening(
            incoming, address, self._links, scope, self._listens, lambda: not self._by_hand
        )
        if self._recovery is scope:
            self._recovery = None
        if not recovered:  # what its attempts have told is no other link that was lost
            self._paused = trio.Event()

    async def let_run(self, postcopy: bool) -> None:
        """The machine may run here now."""
        machine = self.machine
        to_run = postcopy or machine.came_as == RunState.RUNNING
        if machine.runnable and self._autostart and to_run:
            await self._go()
        else:
            self.run_state = RunState.PAUSED if to_run else machine.came_as


def _closing(address: Address) -> ExitStack:
    """Closes an ``Fd`` address's descriptor, unless it is emptied: then somebody else has it."""
    stack = ExitStack()
    if isinstance(address, Fd) and address.fd >= 0:
        stack.callback(os.close, address.fd)
    return stack


def _free_now() -> None:
    """A migration has ended. The tracebacks of its cancelled tasks are cycles, which hold descriptors until they are
    collected, and that could be hours in a process that does little."""
    gc.collect()
