"""A virtqueue as a device sees it: iterate over chains, or pump a file descriptor."""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from itertools import takewhile
from typing import Any, Generic, TypeVar

import trio

from vhostpc._native import check, ffi, lib
from vhostpc._native.handles import Handle, Owner, made
from vhostpc._native.loop import run_loop
from vhostpc.errors import BrokenQueue, QueueEnded
from vhostpc.memory.gate import Gate
from vhostpc.memory.inflight import InflightRegion
from vhostpc.memory.log import DirtyLog
from vhostpc.memory.table import GuestMemory
from vhostpc.virtio.chain import Chain
from vhostpc.virtio.event import clear_event
from vhostpc.virtio.late import Late, Spawn
from vhostpc.virtio.pump import Pump, PumpStats, pump_config
from vhostpc.virtio.transfer import Transfers

#: Chains and bytes of private memory that one pop takes at most (one chain is always taken).
BATCH_CHAINS = 64
BATCH_BYTES = 256 * 1024
#: Kicks for nothing, in a row, that are taken as such: behind them the ring is looked at in intervals (s), since their
#: counter does not empty (EFD_SEMAPHORE, eventfd(2)). Only those count for which nobody had to wait this long (s).
VAIN = 16
CALM = 0.01
AT_ONCE = 0.0005
ENDED = "the session of this queue has ended"


T = TypeVar("T")


class Steps(Generic[T]):
    """Iterates until a step gives None. No generator: a handler may leave its loop at any place."""

    def __init__(self, step: Callable[[], Awaitable[T | None]]) -> None:
        self._step = step

    def __aiter__(self) -> Steps[T]:
        return self

    async def __anext__(self) -> T:
        found = await self._step()
        if found is None:
            raise StopAsyncIteration
        return found


class _Held:
    """A piece of work on a queue. No generator: there are several for each batch of a device."""

    __slots__ = ("_calls", "_queue")

    def __init__(self, queue: Queue, calls: int) -> None:
        self._queue = queue
        self._calls = calls

    def __enter__(self) -> None:
        self._queue.hold(self._calls)

    def __exit__(self, *_: object) -> None:
        self._queue.let_go(self._calls)


class Queue(Owner):
    """One ring of one session. Made and configured by the session; used by ``Device.handle_queue``.

    One task works a queue, with one C call at a time. ``async for chain in queue`` and the pumps end when the
    ring stops; they pause by themselves while the front-end changes memory, addresses or descriptors. After the end
    of the session every method raises QueueEnded.
    """

    def __init__(self, index: int, gate: Gate, spawn: Spawn) -> None:
        self._native = Handle(made("vq", "virtqueue", lib.vpc_vq_new), lib.vpc_vq_free, ENDED, QueueEnded)
        self.index = index
        #: Feature bits that driver and device agreed on.
        self.features = 0
        #: Does the front-end keep an inflight region of this ring? Then a restart repeats just what is not answered.
        self.inflight = False
        #: Set by the device: answers reach the driver in the order in which their chains were taken, each when those
        #: before it have come. Without an inflight region nothing is then lost or done twice that was answered.
        self.in_order = False
        self.size = 0
        self._gate = gate
        self._kick = -1
        self._out = ffi.new("struct vpc_popped[]", BATCH_CHAINS)
        self._ready: deque[Chain] = deque()  # popped, not yet handed to the device
        self._open: dict[int, Chain] = {}  # popped and not pushed, in order of popping
        self._answers: list[Chain] = []  # completed, to be pushed
        self._current: list[Chain] = []  # the device has them since its last step
        self._sequence = 0
        self._pump: Pump | None = None
        self._counted = PumpStats()  # when the pump was closed
        self._apart = False  # chains are taken, and answers pushed, as their pages come
        self._late = Late(self, spawn)
        self._transfers = Transfers(self, self._late.room)
        self._running: Callable[[], None] | None = None  # makes a pump in C return
        self._wait: trio.CancelScope | None = None  # round a wait for a kick
        self._vain = 0  # kicks in a row that came at once and told of nothing
        self._pauses = 0
        self._answered = trio.Event()
        self._resumed = trio.Event()
        self._resumed.set()
        self._busy = 0  # C calls in flight
        self._holds = 0  # they, and who takes over what they did
        self._idle = trio.Event()  # set when the last of them returns
        self._left = False  # one of them never did: what it uses stays
        self.stopping = False
        self._fresh = True  # no pump has run in this session
        self.memory: GuestMemory | None = None

    # --- for the device ---

    def __aiter__(self) -> AsyncIterator[Chain]:
        return Steps(self._next_chain)

    def unordered(self) -> AsyncIterator[Chain]:
        """Iterate over chains as their pages arrive: none waits for another's missing page.

        For devices whose requests may be done in any order (virtio-blk is one). Each chain whose pages are
        absent waits by itself, up to 64 of a queue at a time, and so does each answer. When nothing is
        missing the order is the driver's.
        """
        self._apart = True
        return Steps(self._next_chain)

    def batches(self) -> AsyncIterator[list[Chain]]:
        """Iterate over lists of up to 64 chains; those not kept are completed when the next list is asked for."""
        return Steps(self._next_batch)

    async def _next_chain(self) -> Chain | None:
        self._must_live()
        self._finish_current()
        if not self._ready and not self.stopping:
            await self._fill()
        if self.stopping and not await self._gap_has_come():
            return None
        chain = self._ready.popleft()
        self._current = [chain]
        return chain

    async def _next_batch(self) -> list[Chain] | None:
        self._must_live()
        self._finish_current()
        if not self.stopping and await self._fill():
            self._current = list(self._ready)
            self._ready.clear()
        elif await self._gap_has_come():
            self._current = [self._ready.popleft()]
        else:
            return None
        return list(self._current)

    async def pump_out(
        self,
        fd: int,
        *,
        to: tuple[Any, ...] | None = None,
        header: int = 0,
        discard: bool = False,
        batch: int = 64,
    ) -> None:
        """Send every chain's readable bytes behind ``header`` to ``fd`` as one frame, until the ring stops.

        ``fd`` is a datagram socket (``to`` is an address as ``socket.sendto`` takes it, IPv4 or IPv6; without
        it the socket must be connected) or a tap device. Nothing is waited for at the far side: what it does
        not take is dropped and counted. ``discard``: consume and drop. ``batch``: frames at a time, 1 to 64.

        One long C call on a thread of its own, which may wait for pages there. Raises BrokenQueue,
        MemoryLost, and OSError when ``fd`` is dead.
        """
        await self._run_pump(False, fd, to, header, False, discard, batch)

    async def pump_in(
        self, fd: int, *, header: int = 0, mergeable: bool = False, keep_stale: bool = False, batch: int = 64
    ) -> None:
        """Put every frame of ``fd`` into the next chain behind a zeroed header, until the ring stops.

        ``mergeable``: a frame may go to several chains, whose number stands in the header's last two bytes
        (VIRTIO_NET_F_MRG_RXBUF); else one that is longer than its chain is dropped and counted. Frames that
        came before the session's first run of the ring are dropped unless ``keep_stale``; those that come while a
        ring is stopped and started again, or disabled, wait. Otherwise as :meth:`pump_out`.
        """
        await self._run_pump(True, fd, None, header, mergeable, not keep_stale, batch)

    @property
    def pump_stats(self) -> PumpStats:
        return self._pump.stats if self._pump is not None else self._counted

    def _must_live(self) -> None:
        if self.closed:
            raise QueueEnded(ENDED)

    # --- popping and pushing ---

    def _finish_current(self) -> None:
        chains, self._current = self._current, []
        for chain in chains:
            if not chain.kept:
                chain.complete()

    def _completed(self, chain: Chain) -> None:
        self._answers.append(chain)
        self.look_again()
        self._answered.set()

    def look_again(self) -> None:
        """There is something to do before the next kick."""
        if self._wait is not None:
            self._wait.cancel()

    async def _fill(self) -> bool:
        """Push what is answered and pop the next batch; wait for a kick when there is none. False: stopped."""
        while True:
            await self._flush()
            if self._ready:
                return True
            if self.stopping:
                return False
            if self._late.full:
                await self._resumed.wait()
                await self._wait_for_kick()
                continue
            with self._held():
                rc = await self.touch(self._pop)
                if rc > 0:
                    self._popped(rc)
            if rc == 0:
                rc = await self.touch(lambda flags: lib.vpc_vq_enable_notify(self.handle, flags))
                if rc == 0:
                    await self._wait_for_kick()
                    continue
                if rc > 0:
                    continue
            if rc == -errno.ECANCELED:
                continue
            if rc == -errno.EBADMSG:
                raise BrokenQueue(self.error or "broken ring")
            check(rc, f"queue {self.index}")
            self._must_live()
            if self._ready:
                return True

    def _popped(self, count: int) -> None:
        """Take over what C has popped, before anything else can happen to the queue."""
        self._vain = 0
        for i in range(count):
            chain = Chain(self._out[i], self._completed, self._transfers)
            self._sequence += 1
            self._open[self._sequence] = chain
            if self.closed:
                chain.end(ENDED)
            elif chain.late:
                self._late.await_chain(chain)
            else:
                self._ready.append(chain)

    def _pop(self, flags: int) -> int:
        flags |= (lib.VPC_LATE if self._apart else 0) | (lib.VPC_AGAIN if self.stopping else 0)
        return lib.vpc_vq_pop(self.handle, self._out, BATCH_CHAINS, BATCH_BYTES, flags)

    def _pushable(self) -> list[Chain]:
        """Completed chains, without those that wait for older ones."""
        if not self.in_order:
            return self._answers
        completed = set(map(id, self._answers))
        return list(takewhile(lambda chain: id(chain) in completed, self._open.values()))

    async def _flush(self) -> None:
        """Push all completed chains that may be. May wait for pages of their buffers and of the used ring."""
        self._must_live()
        if self._apart and not self.stopping:
            self._set_late_answers_apart()
        while pushable := self._pushable():
            batch = pushable[: min(BATCH_CHAINS, self.size or 1)]
            keep = []  # cffi: what an array points to must be held
            array = ffi.new("struct vpc_answer[]", len(batch))
            for slot, chain in zip(array, batch, strict=True):
                data = ffi.from_buffer(chain.answer())
                keep.append(data)
                slot.chain, slot.data, slot.len = chain.handle, data, chain.appended
                if chain.begun:
                    slot.skip = chain.begun

            def push(flags: int, array: Any = array, n: int = len(batch)) -> int:
                return lib.vpc_vq_push(self.handle, array, n, flags)

            with self._held():
                check(await self.touch(push), f"queue {self.index}: push")
                del keep
                for chain in batch:
                    chain.take()  # C has freed it
                done = set(map(id, batch))
                self._answers = [c for c in self._answers if id(c) not in done]
                self._open = {s: c for s, c in self._open.items() if id(c) not in done}
            self._must_live()

    async def touch(
        self,
        call: Callable[[int], int],
        *,
        waiting_room: trio.CapacityLimiter | None = None,
        try_first: bool = False,
    ) -> int:
        """One touching C call, when the queue is not paused. Raises MemoryLost, QueueEnded."""
        while not self._resumed.is_set():
            await self._resumed.wait()
        self._must_live()
        with self._call_in_flight():
            return await self._gate.call(
                call, waiting_room=waiting_room, try_first=try_first, left=self._leave
            )

    def _leave(self) -> None:
        self._left = True

    def _call_in_flight(self) -> _Held:
        """As :meth:`_held`, and a pause waits for its end."""
        return _Held(self, 1)

    def _held(self) -> _Held:
        """Keep the objects that C works on, even after :meth:`close`."""
        return _Held(self, 0)

    def hold(self, calls: int) -> None:
        """For :class:`_Held`: a piece of work begins, with so many C calls."""
        self._holds += 1
        self._busy += calls

    def let_go(self, calls: int) -> None:
        """It has ended."""
        self._busy -= calls
        if calls and not self._busy:
            self._idle.set()
        self._holds -= 1
        if not self._holds and self.closed:
            self._free()

    # --- chains whose own pages are absent ---

    def has_come(self, chain: Chain) -> None:
        """A late chain's pages are here."""
        if not self.closed:
            self._ready.append(chain)

    def may_be_pushed(self, chain: Chain) -> None:
        """The pages of a chain's answer are here, or the ring stops."""
        if not self.closed:
            self._answers.append(chain)

    def _set_late_answers_apart(self) -> None:
        answers, self._answers = self._answers, []
        for chain in answers:
            if self._late.buffers_are_here(chain):
                self._answers.append(chain)
            else:
                self._late.await_buffers(chain)

    async def _gap_has_come(self) -> bool:
        """The ring is stopping: is there a chain older than an answered one that the device has not had?

        Such a one cannot be given back: only the device can close the gap.
        """
        if not self._ready:
            await self._pop_again()
        await self._late.until_none()
        for sequence, chain in list(self._open.items()):
            if not (chain.late or chain in self._ready):
                continue
            unanswered = sum(1 for s, c in self._open.items() if s > sequence and not c.completed)
            if unanswered == self._sequence - sequence and not chain.again:
                continue
            if chain.late and await self._late.load(chain, lib.VPC_UNSTOPPED) < 0:
                return False
            if chain in self._ready:
                self._ready.remove(chain)
            self._ready.appendleft(chain)
            return True
        return False

    async def _pop_again(self) -> None:
        """Take what is to be done again, though the ring is stopping; what has absent pages stays in the region."""
        while lib.vpc_vq_again(self.handle):
            with self._held():
                rc = await self.touch(self._pop)
                if rc > 0:
                    self._popped(rc)
            if rc <= 0:
                return

    async def _wait_for_kick(self) -> None:
        if self.stopping or self._pushable() or self._ready or self._pauses:
            return  # the pausing task changes something: look at the ring again after that
        try:
            with trio.CancelScope() as self._wait:
                if self._kick < 0 or self._late.full:
                    await trio.sleep_forever()
                if self._vain >= VAIN:
                    await trio.sleep(CALM)
                asleep = trio.current_time()
                await trio.lowlevel.wait_readable(self._kick)
                if clear_event(self._kick) and trio.current_time() - asleep < AT_ONCE:
                    self._vain += 1
        finally:
            self._wait = None

    # --- pumps ---

    async def _run_pump(
        self,
        inward: bool,
        fd: int,
        to: tuple[Any, ...] | None,
        header: int,
        mergeable: bool,
        discard: bool,
        batch: int,
    ) -> None:
        config = pump_config(fd, to, header, mergeable, batch)
        pump = self._pump = self._pump or Pump(self.handle, self.index)
        while True:
            # Asked again after the wait, and with no checkpoint behind it: another pause may begin at each.
            while not self._resumed.is_set():
                await self._resumed.wait()
            self._must_live()
            if self.stopping:
                pump.drop()
                break
            pump.clear()
            config.kick_fd = self._kick
            config.discard = discard and (self._fresh or not inward)
            self._fresh = False
            self._running = pump.stop
            try:
                with self._call_in_flight():
                    thread = self._gate.sleepers.on(pump.thread, left=self._leave)
                    rc = await run_loop(lambda: pump.run(inward, config), pump.stop, thread)
            finally:
                self._running = None
            if rc == -errno.EBADMSG:
                raise BrokenQueue(self.error or "broken ring")
            if rc == -errno.EOWNERDEAD:
                self._gate.checked(rc)
            check(rc, f"queue {self.index}: pump")

    # --- for the session: configuration, pause, stop ---

    @property
    def error(self) -> str | None:
        """Why the ring is broken, or None."""
        text = lib.vpc_vq_error(self.handle)
        return ffi.string(text).decode() if text else None

    async def pause(self) -> None:
        """Return when no C call is in flight and none will start before :meth:`resume`; pauses nest.

        Waits for a page only if a call in flight does; it stops before its next one.
        """
        self._must_live()
        self._pauses += 1
        if self._resumed.is_set() and not self.stopping:
            self._resumed = trio.Event()
        lib.vpc_vq_stop(self.handle, 1)
        if self._running is not None:
            self._running()
        if self._wait is not None:
            self._wait.cancel()
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
        for chain in self._open.values():  # of a ring that broke: what is to be done again is read anew
            chain.end("this chain's ring broke, and was restarted")
            lib.vpc_chain_free(chain.take())
        self._open.clear()
        self._answers.clear()
        self.set_base(self.base)  # the used index is read anew: a driver may have reset the ring
        if self._pauses:  # the task that paused the stopped queue will resume it
            self._resumed = trio.Event()
        else:
            self._resumed.set()
            lib.vpc_vq_stop(self.handle, 0)

    def set_kick(self, kick: int) -> None:
        """Use another kick descriptor; only while paused or stopped."""
        self._kick = kick

    def end(self) -> None:
        """Ask the handler to end: iterators and pumps stop, a wait for a kick is over."""
        self.stopping = True
        lib.vpc_vq_stop(self.handle, 1)
        if self._running is not None:
            self._running()
        if self._wait is not None:
            self._wait.cancel()
        self._resumed.set()

    def forget_frames(self) -> None:
        """The device was reset: frames that came before are not for the guest's next life, which drops them."""
        self._fresh = True

    @property
    def returnable(self) -> bool:
        """Are all unanswered chains younger than all answered ones? Only then they can be given back."""
        seen_open = False
        for chain in self._open.values():
            if not chain.completed:
                if chain.again:
                    return False
                seen_open = True
            elif seen_open:
                return False
        return not (seen_open and self._gap())

    def _gap(self) -> bool:
        first = next(s for s, c in self._open.items() if not c.completed)
        return self._sequence - first + 1 != sum(1 for s in self._open if s >= first)

    async def settle(self) -> None:
        """After the handler has ended: push answers until the unanswered chains can be given back.

        A chain that is older than an answered one cannot be: only the device can complete it. May wait for
        pages of answers. Raises MemoryLost.
        """
        self._apart = False
        self._current = []
        await self._late.until_none()
        self._leave_again()
        self._ready.clear()
        while True:
            await self._late.until_none()
            self._answered = trio.Event()
            await self._flush()
            if self.returnable:
                return
            await self._answered.wait()

    def _leave_again(self) -> None:
        """The handler has ended: what is to be done again and it has not had stays in the inflight region."""
        for sequence, chain in list(self._open.items()):
            if chain.again and (chain.late or chain in self._ready):
                del self._open[sequence]
                chain.end("this chain's ring has stopped: it stays in the inflight region")
                lib.vpc_chain_free(chain.take())

    async def finish(self) -> int:
        """After :meth:`settle`: push what is answered, give the rest back. Returns the avail index.

        May wait for pages of answers. Raises MemoryLost.
        """
        self._current = []
        self._ready.clear()
        await self._late.until_none()
        await self._flush()
        if self._left or not self.returnable:
            return self.base  # the session is over; nobody will ask for the index
        rest = list(self._open.values())
        self._open.clear()
        for chain in rest:
            chain.completed = True
        await self._transfers.until_none()
        for chain in reversed(rest):
            lib.vpc_vq_unpop(self.handle, chain.handle)
            chain.end(
                "this chain's ring has stopped: chains that were not completed were given back to the driver"
            )
            lib.vpc_chain_free(chain.take())
        return self.base

    @property
    def base(self) -> int:
        """The next avail index."""
        return lib.vpc_vq_base(self.handle)

    def set_memory(self, memory: GuestMemory | None) -> None:
        """Look up in this table from now on, for chains in hand too; only while paused or stopped."""
        self.memory = memory
        lib.vpc_vq_set_memory(self.handle, memory.handle if memory else ffi.NULL)
        if memory is not None:
            for chain in self._open.values():
                lib.vpc_chain_rebase(chain.handle, memory.handle)

    def set_ring(self, size: int, desc: int, avail: int, used: int) -> int:
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
        if region is None or not self.inflight:
            check(
                lib.vpc_vq_set_inflight(self.handle, ffi.NULL, 0, 0), f"queue {self.index}: inflight region"
            )
            return
        offset = self.index * region.stride
        rc = lib.vpc_vq_set_inflight(self.handle, region.handle, offset, region.queue_size)
        check(rc, f"queue {self.index}: inflight region")

    def set_base(self, index: int) -> None:
        lib.vpc_vq_set_base(self.handle, index)

    def set_call(self, fd: int) -> None:
        """Call the driver through this eventfd (duplicated); -1: not at all. Any time."""
        check(lib.vpc_vq_set_call(self.handle, fd), "call descriptor")

    def signal(self) -> None:
        """Call the driver once, whatever it requested: a lost interrupt is worse than a spurious one."""
        lib.vpc_vq_signal(self.handle)

    def close(self) -> None:
        """The session is over: release memory and chains. Every method of the queue and of its chains raises now.

        What C works on is freed when its last call has returned.
        """
        if self.closed:
            return
        self.end()
        self._native.close()
        for chain in self._open.values():
            chain.end(ENDED)
        self._current, self._answers, self.memory = [], [], None
        self._ready.clear()
        if not self._holds:
            self._free()

    def _free(self) -> None:
        """No C call runs, and none will; but a thread that was left asleep may still go on with its chains."""
        for chain in self._open.values():
            raw = chain.take()
            if not self._left:
                lib.vpc_chain_free(raw)
        self._open.clear()
        if self._pump is not None:
            self._counted = self._pump.stats
            self._pump.close()
            self._pump = None
