"""One ring's life: when its handler runs, stops, starts again. The one place that decides it."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import Any, Protocol

import trio

from vhostpc.backend.device import Device
from vhostpc.errors import BrokenQueue, MemoryLost, RemoteProtocolError
from vhostpc.logs import rationed_logger
from vhostpc.memory.gate import Gate
from vhostpc.memory.inflight import InflightRegion
from vhostpc.memory.log import DirtyLog
from vhostpc.memory.table import GuestMemory
from vhostpc.units import in_units
from vhostpc.virtio.queue import Queue
from vhostpc.virtio.work import Work
from vhostpc.wire.vhost_user import VringAddr

log = rationed_logger(__name__)

#: Seconds that a handler waiting for the outside world has to end by itself when its ring stops.
GRACE = 0.2
#: Seconds for which a ring that is started and not enabled is left alone. Front-ends enable a moment after they
#: start; a device that drops the input of a disabled queue would drop data that the guest sends in between.
ENABLE_SOON = 0.1
#: Seconds after which a stop that waits for the device is logged.
GAP_WARNING = 5.0


class RingHost(Protocol):
    """The interface of a session that a ring uses."""

    device: Device
    name: str
    gate: Gate
    nursery: trio.Nursery
    features: int
    memory: GuestMemory | None
    dirty_log: DirtyLog | None
    inflight: InflightRegion | None

    @property
    def log_all(self) -> bool: ...
    @property
    def may_run(self) -> bool: ...
    def ring_starts(self) -> None: ...
    def own_call(self, index: int) -> int: ...
    def ring_failed(self, index: int) -> None: ...


class Vring:
    """A ring: what the front-end has said about it, its queue, and the task that works it.

    ``started`` and ``enabled`` are independent (specification, "Ring states"). The handler runs while both are
    set and the ring has an address. Descriptors are owned here.
    """

    def __init__(self, session: RingHost, index: int) -> None:
        self._session = session
        self.index = index
        self.work = Work(index, session.gate, self._spawn)
        self.ring = self.work.ring
        self.queue = Queue(self.work)
        self.size = 0
        self.addr: VringAddr | None = None
        self.started = False
        self.enabled = False
        self.kick = -1
        self.err = -1
        self.broken = False
        self._call_known = False
        #: The scope of the task that writes our own kick descriptor at intervals, where the front-end gave none.
        self.poller: trio.CancelScope | None = None
        self._scope: trio.CancelScope | None = None
        self._expecting: trio.CancelScope | None = None  # the scope of the wait for an enable
        self._done = trio.Event()
        self._done.set()
        self._with_enabled = False

    @property
    def running(self) -> bool:
        """The handler's task has been started and has not ended."""
        return not self._done.is_set()

    def _spawn(self, task: Callable[..., Any], *args: Any) -> None:
        self._session.nursery.start_soon(task, *args)

    # --- configuration ---

    def configure(self) -> None:
        """Look up the ring's addresses in the present table, and where its writes are logged.

        Only while the queue is paused or stopped. Touches nothing. Raises RemoteProtocolError for addresses
        outside guest memory.
        """
        if self.addr is None or self.size == 0:
            return
        addr, session = self.addr, self._session
        self.work.set_memory(session.memory)
        self.ring.set_features(session.features)
        rc = self.ring.set_addresses(self.size, addr.desc, addr.avail, addr.used)
        if rc == -errno.EFAULT:
            raise RemoteProtocolError(
                f"ring {self.index}: desc {addr.desc:#x}, avail {addr.avail:#x} or used {addr.used:#x} with"
                f" {self.size} entries is not inside one memory region"
            )
        if rc < 0:
            raise RemoteProtocolError(
                f"ring {self.index}: misaligned addresses, or a size that is not a power of two"
            )
        self.set_log()

    def set_log(self) -> None:
        """Log writes as SET_FEATURES and SET_VRING_ADDR want it; only while paused or stopped.

        Raises RemoteProtocolError for a log that has no bit for some of memory: writes there would be lost.
        """
        dirty = self._session.dirty_log if self._session.log_all else None
        memory = self._session.memory
        if dirty is not None and memory is not None and not dirty.covers(memory.end):
            raise RemoteProtocolError(f"the dirty log of {in_units(dirty.size)} does not cover all memory")
        addr = self.addr
        self.ring.set_log(dirty, addr is not None and bool(addr.flags & 1), addr.log if addr else 0)

    async def changed(self, change: Callable[[], None]) -> None:
        """Apply a change that a running queue must not see half done."""
        if not self.running:
            change()
            return
        await self.ring.pause()
        try:
            change()
        finally:
            self.ring.resume()

    def set_kick(self, fd: int, poller: trio.CancelScope | None = None) -> None:
        """Take over another kick descriptor, and the task that writes it, if any; only while paused or stopped."""
        old, self.kick = self.kick, fd
        old_poller, self.poller = self.poller, poller
        self.ring.set_kick(fd)
        if old_poller is not None:
            old_poller.cancel()
        if old >= 0:
            os.close(old)

    def set_call(self, fd: int) -> None:
        """Call the driver through this descriptor, ours from now on; -1: in-band if negotiated, or not at all."""
        if fd < 0:
            fd = self._session.own_call(self.index)
        self._call_known = True
        self.ring.set_call(fd)
        if fd >= 0:
            os.close(fd)
            if self.running:
                # An interrupt may have been lost with the old descriptor.
                self.ring.signal()

    def set_err(self, fd: int) -> None:
        old, self.err = self.err, fd
        if old >= 0:
            os.close(old)

    # --- life ---

    async def update(self) -> None:
        """Start or stop the handler according to the present state."""
        session = self._session
        wanted = (
            self.started and self.addr is not None and self.size > 0 and not self.broken and session.may_run
        )
        if self.running and (not wanted or self._with_enabled != self.enabled):
            await self._halt()
        if wanted and not self.running:
            self._launch()

    def _launch(self) -> None:
        self.configure()
        self.ring.set_inflight(self._session.inflight)
        if not self._call_known:
            self.set_call(-1)  # a driver that is called in-band need not say so for each ring
        self._session.ring_starts()
        self.work.start(self.kick)
        self._with_enabled = self.enabled
        self._done = trio.Event()
        self._session.nursery.start_soon(self._run)
        self.ring.signal()

    async def _run(self) -> None:
        device = self._session.device
        handler = device.handle_queue if self._with_enabled else device.handle_disabled_queue
        try:
            with trio.CancelScope() as self._scope:
                try:
                    if not self._with_enabled:
                        with trio.CancelScope() as self._expecting:
                            await trio.sleep(ENABLE_SOON)
                    if not self.ring.stopping:
                        await handler(self.queue)
                except* BrokenQueue as group:
                    self._break(str(_first(group)))
                except* MemoryLost:
                    log.debug("%s: ring %d: its memory is lost", self._session.name, self.index)
            try:
                if not self.broken:
                    await self.work.settle()
                with trio.CancelScope(shield=True):
                    # Answers that the device has given must reach the driver before the base does.
                    await self.work.finish()
            except MemoryLost:
                log.debug("%s: ring %d: its memory is lost", self._session.name, self.index)
        finally:
            self._scope = self._expecting = None
            self._done.set()

    def _break(self, why: str) -> None:
        """The driver broke the ring: log it once, signal the error descriptor, stay stopped."""
        self.broken = True
        log.error("%s: ring %d stopped: %s", self._session.name, self.index, why)
        self._session.ring_failed(self.index)

    async def _halt(self) -> None:
        """End the handler; return when its answers are pushed and the rest is given back."""
        self.ring.end()
        if self._expecting is not None:
            self._expecting.cancel()
        waited = 0.0
        while self.running:
            with trio.move_on_after(GRACE):
                await self._done.wait()
            waited += GRACE
            if self._scope is not None and self.work.ledger.returnable:
                self._scope.cancel()
                await self._done.wait()
            elif self.running and waited >= GAP_WARNING:
                # A younger chain is answered already: only the device can close the gap, so it is not cancelled.
                log.warning(
                    "%s: ring %d: the stop waits for a request that is older than one already answered",
                    self._session.name,
                    self.index,
                )
                waited = 0.0

    async def set_up_anew(self) -> None:
        """The front-end sets the ring up again instead of changing it while it runs: the next KICK starts it.

        Some front-ends do so after a reset, without GET_VRING_BASE. Waits for a page only if a touch in progress does.
        """
        self.started = False
        await self.update()
        self.broken = False

    async def stop(self) -> int:
        """GET_VRING_BASE: stop, and return the next avail index. Waits for a page only if a touch in progress does."""
        await self.set_up_anew()
        base = self.ring.base
        self.set_kick(-1)
        self.ring.set_call(-1)
        self._call_known = False
        return base

    def close(self) -> None:
        """Release memory, close descriptors. The handler has ended; other users of the queue have to end now."""
        try:
            self.work.close()
        finally:
            self.set_kick(-1)
            self.set_err(-1)


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    first = group.exceptions[0]
    return _first(first) if isinstance(first, BaseExceptionGroup) else first
