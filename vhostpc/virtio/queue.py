"""A virtqueue as a device sees it: iterate over chains, or pump a file descriptor."""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import trio

from vhostpc._native import check, ffi, lib
from vhostpc._native.entries import Thread
from vhostpc._native.loop import run_loop
from vhostpc.errors import BrokenQueue
from vhostpc.memory.gate import Gate
from vhostpc.memory.log import DirtyLog
from vhostpc.memory.table import GuestMemory
from vhostpc.virtio.chain import Chain
from vhostpc.virtio.late import Late, Spawn
from vhostpc.virtio.pump import Pump, PumpStats, pump_config

#: Chains and readable bytes that one pop takes at most (one chain is always taken whole).
BATCH_CHAINS = 64
BATCH_BYTES = 256 * 1024


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


class Queue:
    """One ring of one session. Made and configured by the session; used by ``Device.handle_queue``.

    One task works a queue, with one C call at a time. ``async for chain in queue`` and the pumps end when the
    ring stops; they pause by themselves while the front-end changes memory, addresses or descriptors.
    """

    def __init__(self, index: int, gate: Gate, pump_limiter: trio.CapacityLimiter, spawn: Spawn) -> None:
        out = ffi.new("struct vpc_vq **")
        check(lib.vpc_vq_new(out), "virtqueue")
        self.handle: Any = ffi.gc(out[0], lib.vpc_vq_free)
        self.index = index
        #: Feature bits that driver and device agreed on.
        self.features = 0
        self.size = 0
        self._gate = gate
        self._limiter = pump_limiter
        self._kick = -1
        self._out = ffi.new("struct vpc_popped[]", BATCH_CHAINS)
        self._ready: deque[Chain] = deque()  # popped, not yet handed to the device
        self._open: dict[int, Chain] = {}  # popped and not pushed, in order of popping
        self._answers: list[Chain] = []  # completed, to be pushed
        self._current: list[Chain] = []  # the device has them since its last step
        self._sequence = 0
        self._pump: Pump | None = None
        self._apart = False  # chains are taken, and answers pushed, as their pages come
        self._late = Late(self, spawn)
        self._running: Callable[[], None] | None = None  # makes a pump in C return
        self._wait: trio.CancelScope | None = None  # round a wait for a kick
        self._pauses = 0
        self._answered = trio.Event()
        self._resumed = trio.Event()
        self._resumed.set()
        self._busy = 0  # C calls in flight
        self._idle = trio.Event()  # set when the last of them returns
        self.stopping = False
        self._fresh = True  # no pump has run in this session
        self.memory: GuestMemory | None = None

    # --- for the device ---

    def __aiter__(self) -> AsyncIterator[Chain]:
        return Steps(self._next_chain)

    def unordered(self) -> AsyncIterator[Chain]:
        """Iterate over chains as their pages come: none waits for another's missing page.

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
        self._finish_current()
        if not self._ready and not self.stopping:
            await self._fill()
        if self.stopping and not await self._gap_has_come():
            return None
        chain = self._ready.popleft()
        self._current = [chain]
        return chain

    async def _next_batch(self) -> list[Chain] | None:
        self._finish_current()
        if self.stopping or not await self._fill():
            return None
        self._current = list(self._ready)
        self._ready.clear()
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
        return self._pump.stats if self._pump is not None else PumpStats()

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
            rc = await self.touch(self._pop)
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
            for i in range(rc):
                chain = Chain(self._out[i], self._completed)
                self._sequence += 1
                self._open[self._sequence] = chain
                if chain.late:
                    self._late.await_chain(chain)
                else:
                    self._ready.append(chain)
            if self._ready:
                return True

    def _pop(self, flags: int) -> int:
        flags |= lib.VPC_LATE if self._apart else 0
        return lib.vpc_vq_pop(self.handle, self._out, BATCH_CHAINS, BATCH_BYTES, flags)

    async def _flush(self) -> None:
        """Push all completed chains. May wait for pages of their buffers and of the used ring."""
        if self._apart and not self.stopping:
            self._set_late_answers_apart()
        while self._answers:
            batch = self._answers[: min(BATCH_CHAINS, self.size or 1)]
            keep = []  # cffi: what an array points to must be held
            array = ffi.new("struct vpc_answer[]", len(batch))
            for slot, chain in zip(array, batch, strict=True):
                data = ffi.from_buffer(chain.answer())
                keep.append(data)
                slot.chain, slot.data, slot.len = chain.handle, data, chain.written

            def push(flags: int, array: Any = array, n: int = len(batch)) -> int:
                return lib.vpc_vq_push(self.handle, array, n, flags)

            check(await self.touch(push), f"queue {self.index}: push")
            del keep
            done = set(map(id, batch))
            self._answers = self._answers[len(batch) :]
            self._open = {s: c for s, c in self._open.items() if id(c) not in done}

    async def touch(
        self, call: Callable[[int], int], *, waiting_room: trio.CapacityLimiter | None = None
    ) -> int:
        """One touching C call, when the queue is not paused."""
        while not self._resumed.is_set():
            await self._resumed.wait()
        with self._call_in_flight():
            return await self._gate.call(call, waiting_room=waiting_room)

    @contextmanager
    def _call_in_flight(self) -> Iterator[None]:
        self._busy += 1
        try:
            yield
        finally:
            self._busy -= 1
            if not self._busy:
                self._idle.set()

    # --- chains whose own pages are absent ---

    def has_come(self, chain: Chain) -> None:
        """A late chain's pages are here."""
        self._ready.append(chain)

    def may_be_pushed(self, chain: Chain) -> None:
        """The pages of a chain's answer are here, or the ring stops."""
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

        Such a one can not be given back: only the device can close the gap.
        """
        if not self._apart:
            return False
        await self._late.until_none()
        for sequence, chain in list(self._open.items()):
            unanswered = sum(1 for s, c in self._open.items() if s > sequence and not c.completed)
            if unanswered == self._sequence - sequence or not (chain.late or chain in self._ready):
                continue
            if chain.late and await self._late.load(chain, lib.VPC_UNSTOPPED) < 0:
                return False
            if chain in self._ready:
                self._ready.remove(chain)
            self._ready.appendleft(chain)
            return True
        return False

    async def _wait_for_kick(self) -> None:
        if self.stopping or self._answers or self._ready or self._pauses:
            return  # whoever paused us changes something: look at the ring again after that
        try:
            with trio.CancelScope() as self._wait:
                if self._kick < 0:
                    await trio.sleep_forever()
                await trio.lowlevel.wait_readable(self._kick)
                lib.vpc_clear_event(self._kick)
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
        pump = self._pump = self._pump or Pump(self.handle)
        while True:
            # Asked again after the wait, and with no checkpoint behind it: another pause may begin at each.
            while not self._resumed.is_set():
                await self._resumed.wait()
            if self.stopping:
                break
            pump.clear()
            config.kick_fd = self._kick
            config.discard = discard and (self._fresh or not inward)
            self._fresh = False
            self._running = pump.stop
            try:
                with self._call_in_flight():
                    rc = await run_loop(
                        lambda: pump.run(inward, config), pump.stop, self._limiter, Thread.PUMP
                    )
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
        self.set_base(self.base)  # the used index is read anew: a driver may have reset the ring
        if self._pauses:  # whoever paused the stopped queue will resume it
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

    @property
    def returnable(self) -> bool:
        """Are all unanswered chains younger than all answered ones? Only then they can be given back."""
        seen_open = False
        for chain in self._open.values():
            if not chain.completed:
                seen_open = True
            elif seen_open:
                return False
        return not (seen_open and self._gap())

    def _gap(self) -> bool:
        first = next(s for s, c in self._open.items() if not c.completed)
        return self._sequence - first + 1 != sum(1 for s in self._open if s >= first)

    async def settle(self) -> None:
        """After the handler has ended: push answers until the unanswered chains can be given back.

        A chain that is older than an answered one can not be: only the device can complete it. May wait for
        pages of answers. Raises MemoryLost.
        """
        self._apart = False
        self._current = []
        self._ready.clear()
        while True:
            await self._late.until_none()
            self._answered = trio.Event()
            await self._flush()
            if self.returnable:
                return
            await self._answered.wait()

    async def finish(self) -> int:
        """After :meth:`settle`: push what is answered, give the rest back. Returns the avail index.

        May wait for pages of answers. Raises MemoryLost.
        """
        self._current = []
        self._ready.clear()
        await self._late.until_none()
        await self._flush()
        if not self.returnable:
            return self.base  # the session is over; nobody will ask for the index
        rest = list(self._open.values())
        self._open.clear()
        if rest:
            lib.vpc_vq_unpop(self.handle, len(rest))
        for chain in rest:
            chain.completed = True
            lib.vpc_chain_free(chain.handle)
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

    def set_base(self, index: int) -> None:
        lib.vpc_vq_set_base(self.handle, index)

    def set_call(self, fd: int) -> None:
        """Call the driver through this eventfd (duplicated); -1: not at all. Any time."""
        check(lib.vpc_vq_set_call(self.handle, fd), "call descriptor")

    def signal(self) -> None:
        """Call the driver once, whatever it asked for: a lost interrupt is worse than a spare one."""
        lib.vpc_vq_signal(self.handle)

    def close(self) -> None:
        """Let go of memory and chains."""
        for chain in self._open.values():
            lib.vpc_chain_free(chain.handle)
        self._open.clear()
        if self._pump is not None:
            self._pump.close()
            self._pump = None
        self.handle, handle = ffi.NULL, self.handle
        ffi.release(handle)
