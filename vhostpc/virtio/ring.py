"""A ring of one session: its native half, when a call may touch guest memory, pause and stop, its settings."""

from __future__ import annotations

from collections.abc import Callable

import trio

from vhostpc._native import check, ffi, lib
from vhostpc._native.handles import Handle, Owner, made
from vhostpc.errors import QueueEnded
from vhostpc.memory.ahead import Ahead
from vhostpc.memory.gate import Gate
from vhostpc.memory.inflight import InflightRegion
from vhostpc.memory.log import DirtyLog
from vhostpc.memory.table import GuestMemory
from vhostpc.virtio.event import clear_event

#: Kicks in a row without work, after which the ring is polled at intervals (s), because their counter never empties
#: (EFD_SEMAPHORE, eventfd(2)). A kick counts only if the wait for it was shorter than this (s).
VAIN = 16
CALM = 0.01
AT_ONCE = 0.0005
ENDED = "the session of this queue has ended"


class _Use:
    """A piece of work on a ring. No generator: there are several for each batch of a device."""

    __slots__ = ("_calls", "_ring")

    def __init__(self, ring: Ring, calls: int) -> None:
        self._ring = ring
        self._calls = calls

    def __enter__(self) -> None:
        self._ring.begin_use(self._calls)

    def __exit__(self, *_: object) -> None:
        self._ring.end_use(self._calls)


class Ring(Owner):
    """Made and configured by the session. One task works it, with one C call at a time.

    ``freed`` is called once no C call runs and none will, after :meth:`close`. Then every method raises QueueEnded.
    """

    def __init__(self, index: int, gate: Gate, freed: Callable[[], None]) -> None:
        self._native = Handle(made("vq", "virtqueue", lib.vpc_vq_new), lib.vpc_vq_free, ENDED, QueueEnded)
        self.index = index
        self.features = 0
        self.inflight = False
        self.size = 0
        self.gate = gate
        self.memory: GuestMemory | None = None
        self.stopping = False
        #: A C call never returned: the objects that it uses stay.
        self.left = False
        self._freed = freed
        self._kick = -1
        self._interrupt: Callable[[], None] | None = None  # makes a long call in C return
        self._wait: trio.CancelScope | None = None  # the scope of a wait for a kick
        self._vain = 0  # kicks in a row that came at once and brought no work
        self._pauses = 0
        self._resumed = trio.Event()
        self._resumed.set()
        self._busy = 0  # C calls in flight
        self._uses = 0  # those calls, and the tasks that take over their results
        self._idle = trio.Event()  # set when the last of them returns

    def must_live(self) -> None:
        """Raises QueueEnded after the session."""
        if self.closed:
            raise QueueEnded(ENDED)

    @property
    def error(self) -> str | None:
        """Why the ring is broken, or None."""
        text = lib.vpc_vq_error(self.handle)
        return ffi.string(text).decode() if text else None

    @property
    def ahead(self) -> Ahead:
        """Reports of pages that were asked for ahead."""
        return self.gate.ahead

    # --- C calls

    async def touch(
        self,
        call: Callable[[int], int],
        *,
        waiting_room: trio.CapacityLimiter | None = None,
        try_first: bool = False,
    ) -> int:
        """One touching C call, when the ring is not paused. Raises MemoryLost, QueueEnded."""
        await self.until_resumed()
        with self.call_in_flight():
            return await self.gate.call(call, waiting_room=waiting_room, try_first=try_first, left=self.leave)

    async def until_resumed(self) -> None:
        """Return when it is not paused, with no checkpoint after the check. Raises QueueEnded."""
        while not self._resumed.is_set():
            await self._resumed.wait()
        self.must_live()

    def leave(self) -> None:
        """A C call on it will not return."""
        self.left = True

    def call_in_flight(self) -> _Use:
        """As :meth:`in_use`, and a pause waits for its end."""
        return _Use(self, 1)

    def in_use(self) -> _Use:
        """Keep the objects that C works on, even after :meth:`close`."""
        return _Use(self, 0)

    def begin_use(self, calls: int) -> None:
        """A piece of work begins, with so many C calls."""
        self._uses += 1
        self._busy += calls

    def end_use(self, calls: int) -> None:
        """It has ended."""
        self._busy -= calls
        if calls and not self._busy:
            self._idle.set()
        self._uses -= 1
        if not self._uses and self.closed:
            self._freed()

    def set_interrupt(self, interrupt: Callable[[], None] | None) -> None:
        """``interrupt`` makes a long call that runs from now on return; None: none runs."""
        self._interrupt = interrupt

    # --- kicks

    @property
    def kick(self) -> int:
        """The driver's kick descriptor, -1 without one. It belongs to the session."""
        return self._kick

    async def wait_for_kick(self, *, heard: bool = True) -> None:
        """Wait for a kick of the driver or :meth:`look_again`; without ``heard`` for the latter only."""
        if self.stopping or self._pauses:
            return  # the pausing task changes something: examine the ring again after that
        try:
            with trio.CancelScope() as self._wait:
                if self._kick < 0 or not heard:
                    await trio.sleep_forever()
                if self._vain >= VAIN:
                    await trio.sleep(CALM)
                asleep = trio.current_time()
                await trio.lowlevel.wait_readable(self._kick)
                if clear_event(self._kick) and trio.current_time() - asleep < AT_ONCE:
                    self._vain += 1
        finally:
            self._wait = None

    def kick_told(self) -> None:
        """There was work in the ring."""
        self._vain = 0

    def look_again(self) -> None:
        """There is work before the next kick."""
        if self._wait is not None:
            self._wait.cancel()

    # --- pause and stop

    async def pause(self) -> None:
        """Return when no C call is in flight and none will start before :meth:`resume`; pauses nest.

        Waits for a page only if a call in flight does; it stops before its next one.
        """
        self.must_live()
        self._pauses += 1
        if self._resumed.is_set() and not self.stopping:
            self._resumed = trio.Event()
        self._break_in()
        while self._busy:
            self._idle = trio.Event()
            await self._idle.wait()

    def resume(self) -> None:
        self._pauses -= 1
        if self._pauses:
            return
        if not self.stopping:
            lib.vpc_vq_stop(self.handle, 0)
        self._resumed.set()

    def start(self, kick: int) -> None:
        """Get ready for a new run of the device's handler."""
        self._kick = kick
        self.stopping = False
        self.set_base(self.base)  # the used index is read anew: a driver may have reset the ring
        if self._pauses:  # the task that paused the stopped ring will resume it
            self._resumed = trio.Event()
        else:
            self._resumed.set()
            lib.vpc_vq_stop(self.handle, 0)

    def end(self) -> None:
        """Ask the handler to end: iterators and pumps stop, a wait for a kick is over."""
        self.stopping = True
        self._break_in()
        self._resumed.set()

    def _break_in(self) -> None:
        lib.vpc_vq_stop(self.handle, 1)
        if self._interrupt is not None:
            self._interrupt()
        self.look_again()

    # --- set by the session; only while paused or stopped, unless stated otherwise

    def set_kick(self, kick: int) -> None:
        """Use another kick descriptor."""
        self._kick = kick

    @property
    def base(self) -> int:
        """The next avail index."""
        return lib.vpc_vq_base(self.handle)

    def set_base(self, index: int) -> None:
        lib.vpc_vq_set_base(self.handle, index)

    def set_memory(self, memory: GuestMemory | None) -> None:
        """Look up addresses in this table from now on."""
        self.memory = memory
        lib.vpc_vq_set_memory(self.handle, memory.handle if memory else ffi.NULL)

    def set_addresses(self, size: int, desc: int, avail: int, used: int) -> int:
        """0, or -EFAULT (outside memory) or -EINVAL (misaligned, size no power of two)."""
        self.size = size
        return lib.vpc_vq_set_ring(self.handle, size, desc, avail, used)

    def set_features(self, features: int) -> None:
        self.features = features
        lib.vpc_vq_set_features(self.handle, features)

    def set_log(self, log: DirtyLog | None, log_used: bool, used_gpa: int) -> None:
        lib.vpc_vq_set_log(self.handle, log.handle if log else ffi.NULL, log_used, used_gpa)

    def set_inflight(self, region: InflightRegion | None) -> None:
        """Note in this region which chains are taken and not answered; only while stopped.

        The first touching call of the next run reads it. Raises OSError.
        """
        self.inflight = region is not None and self.index < region.queues
        handle, offset, size = ffi.NULL, 0, 0
        if region is not None and self.inflight:
            handle, offset, size = region.handle, self.index * region.stride, region.queue_size
        rc = lib.vpc_vq_set_inflight(self.handle, handle, offset, size)
        check(rc, f"queue {self.index}: inflight region")

    def set_call(self, fd: int) -> None:
        """Call the driver through this eventfd (duplicated); -1: not at all. Any time."""
        check(lib.vpc_vq_set_call(self.handle, fd), "call descriptor")

    def signal(self) -> None:
        """Call the driver once, whatever it requested: a lost interrupt is worse than a spurious one. Any time."""
        lib.vpc_vq_signal(self.handle)

    def close(self) -> None:
        """The session is over. The objects that C works on are freed when its last call has returned."""
        if self.closed:
            return
        self.end()
        self._native.close()
        self.memory = None
        if not self._uses:
            self._freed()
