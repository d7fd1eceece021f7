"""The work on a ring: pop and push, wait for late chains, pump, and give unanswered chains back when it stops."""

from __future__ import annotations

import errno
from typing import Any

import trio

from vhostpc._native import check, ffi, lib
from vhostpc._native.loop import run_loop
from vhostpc.errors import BrokenQueue
from vhostpc.memory.gate import Gate
from vhostpc.memory.table import GuestMemory
from vhostpc.virtio.chain import Chain
from vhostpc.virtio.late import Late, Spawn
from vhostpc.virtio.ledger import Ledger
from vhostpc.virtio.pump import Pump, PumpStats, pump_config
from vhostpc.virtio.ring import ENDED, Ring
from vhostpc.virtio.transfer import Transfers

#: Chains and bytes of private memory that one pop takes at most (one chain is always taken).
BATCH_CHAINS = 64
BATCH_BYTES = 256 * 1024


class Work:
    """One ring of one session, its books, and the work on it. After the session every method raises QueueEnded."""

    def __init__(self, index: int, gate: Gate, spawn: Spawn) -> None:
        self.ring = Ring(index, gate, self._free)
        self.ledger: Ledger[Chain] = Ledger()
        self._out = ffi.new("struct vpc_popped[]", BATCH_CHAINS)
        self._current: list[Chain] = []  # the device has had them since its last step
        self._pump: Pump | None = None
        self._counted = PumpStats()  # when the pump was closed
        #: Chains are taken, and answers pushed, as their pages arrive.
        self.apart = False
        self._late = Late(self.ring, self, spawn)
        self._transfers = Transfers(self.ring, self._late.room)
        self._answered = trio.Event()
        self._fresh = True  # no pump has run in this session

    # --- the device's steps

    async def next_chain(self) -> Chain | None:
        """The next chain for the device, which is done with the one before; None: the ring is stopping."""
        self._finish_current()
        ready = self.ledger.ready
        if not ready and not self.ring.stopping:
            await self._fill()
        if self.ring.stopping and not await self._gap_has_come():
            return None
        chain = ready.popleft()
        self._current = [chain]
        return chain

    async def next_batch(self) -> list[Chain] | None:
        """As :meth:`next_chain`, up to 64."""
        self._finish_current()
        ready = self.ledger.ready
        if not self.ring.stopping and await self._fill():
            self._current = list(ready)
            ready.clear()
        elif await self._gap_has_come():
            self._current = [ready.popleft()]
        else:
            return None
        return list(self._current)

    def _finish_current(self) -> None:
        self.ring.must_live()
        chains, self._current = self._current, []
        for chain in chains:
            if not chain.kept:
                chain.complete()

    def _completed(self, chain: Chain) -> None:
        self.ledger.answers.append(chain)
        self.ring.look_again()
        self._answered.set()

    # --- popping and pushing

    async def _fill(self) -> bool:
        """Push the answers and pop the next batch; wait for a kick when there is none. False: stopped."""
        ring, ready = self.ring, self.ledger.ready
        while True:
            await self._flush()
            if ready:
                return True
            if ring.stopping:
                return False
            if self._late.full:
                await ring.until_resumed()
                await self._wait_for_kick()
                continue
            with ring.in_use():
                rc = await ring.touch(self._pop)
                if rc > 0:
                    self._popped(rc)
            if rc == 0:
                rc = await ring.touch(lambda flags: lib.vpc_vq_enable_notify(ring.handle, flags))
                if rc == 0:
                    await self._wait_for_kick()
                    continue
                if rc > 0:
                    continue
            if rc == -errno.ECANCELED:
                continue
            if rc == -errno.EBADMSG:
                raise BrokenQueue(ring.error or "broken ring")
            check(rc, f"queue {ring.index}")
            ring.must_live()
            if ready:
                return True

    async def _wait_for_kick(self) -> None:
        if not (self.ledger.pushable() or self.ledger.ready):
            await self.ring.wait_for_kick(heard=not self._late.full)

    def _popped(self, count: int) -> None:
        """Take over the chains that C has popped, before anything else can happen to the ring."""
        self.ring.kick_told()
        for i in range(count):
            chain = Chain(self._out[i], self._completed, self._transfers)
            self.ledger.take(chain)
            if self.ring.closed:
                chain.end(ENDED)
            elif chain.late:
                self._late.await_chain(chain)
            else:
                self.ledger.ready.append(chain)

    def _pop(self, flags: int) -> int:
        flags |= (lib.VPC_LATE if self.apart else 0) | (lib.VPC_AGAIN if self.ring.stopping else 0)
        return lib.vpc_vq_pop(self.ring.handle, self._out, BATCH_CHAINS, BATCH_BYTES, flags)

    async def _flush(self) -> None:
        """Push all completed chains that may be. May wait for pages of their buffers and of the used ring."""
        ring, ledger = self.ring, self.ledger
        ring.must_live()
        if self.apart and not ring.stopping:
            self._set_late_answers_apart()
        while pushable := ledger.pushable():
            batch = pushable[: min(BATCH_CHAINS, ring.size or 1)]
            keep = []  # cffi: what an array points to must be held
            array = ffi.new("struct vpc_answer[]", len(batch))
            for slot, chain in zip(array, batch, strict=True):
                data = ffi.from_buffer(chain.answer())
                keep.append(data)
                slot.chain, slot.data, slot.len = chain.handle, data, chain.appended
                if chain.begun:
                    slot.skip = chain.begun

            def push(flags: int, array: Any = array, n: int = len(batch)) -> int:
                return lib.vpc_vq_push(ring.handle, array, n, flags)

            with ring.in_use():
                check(await ring.touch(push), f"queue {ring.index}: push")
                del keep
                for chain in batch:
                    chain.take()  # C has freed it
                ledger.pushed(batch)
            ring.must_live()

    # --- chains whose own pages are absent

    def has_come(self, chain: Chain) -> None:
        """A late chain's pages are present."""
        if not self.ring.closed:
            self.ledger.ready.append(chain)

    def may_be_pushed(self, chain: Chain) -> None:
        """The pages of a chain's answer are present, or the ring is stopping."""
        if not self.ring.closed:
            self.ledger.answers.append(chain)

    def _set_late_answers_apart(self) -> None:
        answers, self.ledger.answers = self.ledger.answers, []
        for chain in answers:
            if self._late.buffers_are_here(chain):
                self.ledger.answers.append(chain)
            else:
                self._late.await_buffers(chain)

    async def _gap_has_come(self) -> bool:
        """The ring is stopping: whether the device gets one more chain, which cannot be given back."""
        if not self.ledger.ready:
            await self._pop_again()
        await self._late.until_none()
        for chain in self.ledger.gaps():
            if chain.late and await self._late.load(chain, lib.VPC_UNSTOPPED) < 0:
                return False
            self.ledger.hand_over(chain)
            return True
        return False

    async def _pop_again(self) -> None:
        """Take chains to be served again, though the ring is stopping; those with absent pages stay in the region."""
        while lib.vpc_vq_again(self.ring.handle):
            with self.ring.in_use():
                rc = await self.ring.touch(self._pop)
                if rc > 0:
                    self._popped(rc)
            if rc <= 0:
                return

    # --- pumps

    @property
    def pump_stats(self) -> PumpStats:
        return self._pump.stats if self._pump is not None else self._counted

    async def run_pump(
        self,
        inward: bool,
        fd: int,
        to: tuple[Any, ...] | None,
        header: int,
        mergeable: bool,
        discard: bool,
        batch: int,
    ) -> None:
        """Pump until the ring stops: one long C call after the other, on a thread that may wait for pages.

        Raises BrokenQueue, MemoryLost, OSError.
        """
        ring = self.ring
        config = pump_config(fd, to, header, mergeable, batch)
        pump = self._pump = self._pump or Pump(ring.handle, ring.index)
        while True:
            await ring.until_resumed()  # and no checkpoint after it: another pause may begin at each
            if ring.stopping:
                pump.drop()
                break
            pump.clear()
            config.kick_fd = ring.kick
            config.discard = discard and (self._fresh or not inward)
            self._fresh = False
            ring.set_interrupt(pump.stop)
            try:
                with ring.call_in_flight():
                    thread = ring.gate.sleepers.on(pump.thread, left=ring.leave)
                    rc = await run_loop(lambda: pump.run(inward, config), pump.stop, thread)
            finally:
                ring.set_interrupt(None)
            if rc == -errno.EBADMSG:
                raise BrokenQueue(ring.error or "broken ring")
            if rc == -errno.EOWNERDEAD:
                ring.gate.checked(rc)
            check(rc, f"queue {ring.index}: pump")

    def forget_frames(self) -> None:
        """The device was reset: frames from before are not for the guest's next run, which drops them."""
        self._fresh = True

    # --- start and end of a run

    def set_memory(self, memory: GuestMemory | None) -> None:
        """As :meth:`Ring.set_memory`, for chains in flight too."""
        self.ring.set_memory(memory)
        if memory is not None:
            for chain in self.ledger.open:
                lib.vpc_chain_rebase(chain.handle, memory.handle)
        self.ring.ahead.look_again()  # in the new mappings, nothing has been asked for

    def start(self, kick: int) -> None:
        """Get ready for a new run of the device's handler."""
        self._drop(self.ledger.clear(), "this chain's ring broke, and was restarted")  # it is read anew
        self.ring.start(kick)

    async def settle(self) -> None:
        """After the handler has ended: push answers until the unanswered chains can be given back.

        A chain that is older than an answered one cannot be: only the device can complete it. May wait for
        pages of answers. Raises MemoryLost.
        """
        self.apart = False
        self._current = []
        await self._late.until_none()
        # Chains that are to be served again and that the device has not received.
        left = self.ledger.leave_again()
        self._drop(left, "this chain's ring has stopped: it stays in the inflight region")
        self.ledger.ready.clear()
        while True:
            await self._late.until_none()
            self._answered = trio.Event()
            await self._flush()
            if self.ledger.returnable:
                return
            await self._answered.wait()

    async def finish(self) -> int:
        """After :meth:`settle`: push the answers, give the other chains back. Returns the avail index.

        May wait for pages of answers. Raises MemoryLost.
        """
        self._current = []
        self.ledger.ready.clear()
        await self._late.until_none()
        await self._flush()
        if self.ring.left or not self.ledger.returnable:
            return self.ring.base  # the session is over; nobody will ask for the index
        rest = self.ledger.clear()
        for chain in rest:
            chain.completed = True
        await self._transfers.until_none()
        for chain in reversed(rest):
            lib.vpc_vq_unpop(self.ring.handle, chain.handle)
        why = "this chain's ring has stopped: chains that were not completed were given back to the driver"
        self._drop(rest, why)
        return self.ring.base

    @staticmethod
    def _drop(chains: list[Chain], why: str) -> None:
        for chain in chains:
            chain.end(why)
            lib.vpc_chain_free(chain.take())

    def close(self) -> None:
        """The session is over: release memory and chains. Every method of the queue and of its chains raises now.

        The objects that C works on are freed when its last call has returned.
        """
        if self.ring.closed:
            return
        self._current = []
        for chain in self.ledger.open:
            chain.end(ENDED)
        self.ledger.answers = []
        self.ledger.ready.clear()
        self.ring.close()

    def _free(self) -> None:
        """No C call runs, and none will; but a thread that was left asleep may still go on with its chains."""
        for chain in self.ledger.clear():
            raw = chain.take()
            if not self.ring.left:
                lib.vpc_chain_free(raw)
        if self._pump is not None:
            self._counted = self._pump.stats
            self._pump.close()
            self._pump = None
