"""A virtqueue as a device sees it: iterate over chains, or pump a file descriptor."""

from __future__ import annotations

import errno
import os
import socket
import stat
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import trio

from vhostpc._native import check, ffi, lib
from vhostpc._native.loop import run_loop
from vhostpc.errors import BrokenQueue
from vhostpc.memory.gate import Gate
from vhostpc.memory.log import DirtyLog
from vhostpc.memory.table import GuestMemory
from vhostpc.virtio.chain import Chain

#: Chains and readable bytes that one pop takes at most (one chain is always taken whole).
BATCH_CHAINS = 64
BATCH_BYTES = 256 * 1024


@dataclass(frozen=True)
class PumpStats:
    """Counts of a queue's pumps since the session began; ``calls``: interrupts sent to the driver."""

    frames: int = 0
    bytes: int = 0
    dropped: int = 0
    discarded: int = 0
    batches: int = 0
    syscalls: int = 0
    calls: int = 0


class Queue:
    """One ring of one session. Made and configured by the session; used by ``Device.handle_queue``.

    One task works a queue, with one C call at a time. ``async for chain in queue`` and the pumps end when the
    ring stops; they pause by themselves while the front-end changes memory, addresses or descriptors.
    """

    def __init__(self, index: int, gate: Gate, pump_limiter: trio.CapacityLimiter) -> None:
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
        self._current: Chain | None = None
        self._sequence = 0
        self._pump: Any = None
        self._running: Callable[[], None] | None = None  # makes a pump in C return
        self._wait: trio.CancelScope | None = None  # round a wait for a kick
        self._pauses = 0
        self._answered = trio.Event()
        self._resumed = trio.Event()
        self._resumed.set()
        self._idle = trio.Event()  # no C call in flight
        self._idle.set()
        self.stopping = False
        self.fresh = True  # nothing has run since the ring was stopped
        self.memory: GuestMemory | None = None

    # --- for the device ---

    def __aiter__(self) -> AsyncIterator[Chain]:
        return self._chains()

    async def _chains(self) -> AsyncIterator[Chain]:
        while True:
            if not self._ready and not await self._fill():
                return
            chain = self._current = self._ready.popleft()
            yield chain
            self._finish_current()
            if self.stopping:
                return

    async def batches(self) -> AsyncIterator[list[Chain]]:
        """Iterate over lists of up to 64 chains; those not kept are completed when the next list is asked for."""
        while await self._fill():
            batch = list(self._ready)
            self._ready.clear()
            yield batch
            for chain in batch:
                if not chain.kept:
                    chain.complete()
            if self.stopping:
                return

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
        came before the ring started are dropped unless ``keep_stale``. Otherwise as :meth:`pump_out`.
        """
        await self._run_pump(True, fd, None, header, mergeable, not keep_stale, batch)

    @property
    def pump_stats(self) -> PumpStats:
        if self._pump is None:
            return PumpStats()
        out = ffi.new("struct vpc_pump_stats *")
        lib.vpc_pump_stats(self._pump, out)
        return PumpStats(
            out.frames, out.bytes, out.dropped, out.discarded, out.batches, out.syscalls, out.calls
        )

    # --- popping and pushing ---

    def _finish_current(self) -> None:
        chain, self._current = self._current, None
        if chain is not None and not chain.kept:
            chain.complete()

    def _completed(self, chain: Chain) -> None:
        self._answers.append(chain)
        if self._wait is not None:
            self._wait.cancel()
        self._answered.set()

    async def _fill(self) -> bool:
        """Push what is answered and pop the next batch; wait for a kick when there is none. False: stopped."""
        while True:
            await self._flush()
            if self.stopping:
                return False
            rc = await self._touch(self._pop)
            if rc == 0:
                rc = await self._touch(lambda flags: lib.vpc_vq_enable_notify(self.handle, flags))
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
                self._ready.append(chain)
            return True

    def _pop(self, flags: int) -> int:
        return lib.vpc_vq_pop(self.handle, self._out, BATCH_CHAINS, BATCH_BYTES, flags)

    async def _flush(self) -> None:
        """Push all completed chains. May wait for pages of their buffers and of the used ring."""
        while self._answers:
            batch = self._answers[: min(BATCH_CHAINS, self.size or 1)]
            keep = []  # cffi: what an array points to must be held
            array = ffi.new("struct vpc_answer[]", len(batch))
            for slot, chain in zip(array, batch, strict=True):
                data = ffi.from_buffer(chain.answer())
                keep.append(data)
                slot.chain, slot.data, slot.len = chain._handle, data, chain.written

            def push(flags: int, array: Any = array, n: int = len(batch)) -> int:
                return lib.vpc_vq_push(self.handle, array, n, flags)

            check(await self._touch(push), f"queue {self.index}: push")
            del keep
            done = set(map(id, batch))
            self._answers = self._answers[len(batch) :]
            self._open = {s: c for s, c in self._open.items() if id(c) not in done}

    async def _touch(self, call: Callable[[int], int]) -> int:
        """One touching C call, when the queue is not paused."""
        while not self._resumed.is_set():
            await self._resumed.wait()
        self._idle = trio.Event()
        try:
            return await self._gate.call(call)
        finally:
            self._idle.set()

    async def _wait_for_kick(self) -> None:
        if self.stopping or self._answers or self._pauses:
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
        config = ffi.new("struct vpc_pump_config *")
        config.fd = fd
        config.kind = lib.VPC_FAR_SOCKET if stat.S_ISSOCK(os.fstat(fd).st_mode) else lib.VPC_FAR_FILE
        config.header, config.mergeable, config.max_batch = header, mergeable, batch
        if to is not None:
            packed = pack_address(to)
            ffi.memmove(config.addr, packed, len(packed))  # private memory
            config.addr_len = len(packed)
        if self._pump is None:
            out = ffi.new("struct vpc_pump **")
            check(lib.vpc_pump_new(self.handle, out), "pump")
            self._pump = ffi.gc(out[0], lib.vpc_pump_free)
        pump = self._pump
        call = lib.vpc_pump_in if inward else lib.vpc_pump_out
        while True:
            # Asked again after the wait, and with no checkpoint behind it: another pause may begin at each.
            while not self._resumed.is_set():
                await self._resumed.wait()
            if self.stopping:
                break
            lib.vpc_pump_clear(pump)
            config.kick_fd = self._kick
            config.discard = discard and (self.fresh or not inward)
            self.fresh = False
            self._running = lambda: lib.vpc_pump_stop(pump)
            self._idle = trio.Event()
            try:
                rc = await run_loop(lambda: call(pump, config), self._running, self._limiter)
            finally:
                self._running = None
                self._idle.set()
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
        while not self._idle.is_set():
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
        self.fresh = True
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
        self._current = None
        self._ready.clear()
        while True:
            self._answered = trio.Event()
            await self._flush()
            if self.returnable:
                return
            await self._answered.wait()

    async def finish(self) -> int:
        """After :meth:`settle`: push what is answered, give the rest back. Returns the avail index.

        May wait for pages of answers. Raises MemoryLost.
        """
        self._current = None
        self._ready.clear()
        await self._flush()
        if not self.returnable:
            return self.base  # the session is over; nobody will ask for the index
        rest = list(self._open.values())
        self._open.clear()
        if rest:
            lib.vpc_vq_unpop(self.handle, len(rest))
        for chain in rest:
            chain.completed = True
            lib.vpc_chain_free(chain._handle)
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
                lib.vpc_chain_rebase(chain._handle, memory.handle)

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
            lib.vpc_chain_free(chain._handle)
        self._open.clear()
        if self._pump is not None:
            ffi.release(self._pump)
            self._pump = None
        self.handle, handle = ffi.NULL, self.handle
        ffi.release(handle)


def pack_address(address: tuple[Any, ...]) -> bytes:
    """``struct sockaddr_in`` or ``sockaddr_in6`` of a Python address with a numeric host."""
    host, port = str(address[0]), int(address[1])
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    packed = int(family).to_bytes(2, "little") + port.to_bytes(2, "big")
    if family == socket.AF_INET:
        return packed + socket.inet_aton(host) + bytes(8)
    flow, scope = (*address[2:], 0, 0)[:2]
    packed += socket.htonl(flow).to_bytes(4, "little") + socket.inet_pton(family, host)
    return packed + int(scope).to_bytes(4, "little")
