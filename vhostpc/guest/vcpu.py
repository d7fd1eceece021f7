"""vCPUs: threads that read, check and rewrite RAM as a guest's processors do, and detect wrong pages.

Each target page of the areas contains its number, its owner, its generation and the seed, and every word of it follows
from these. The generation that each page must have follows from one number, the step, which is part of the machine's
state. So the destination finds and names a page that is stale, torn, doubled, lost or in the wrong place.
"""

from __future__ import annotations

import errno
import struct
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import trio

from vhostpc._native import check, ffi, lib
from vhostpc._native.entries import Thread
from vhostpc._native.handles import Handle, Owner, made
from vhostpc._native.loop import run_loop
from vhostpc._native.numbers import numbers_of
from vhostpc._native.threads import KeptThread, borrow
from vhostpc.errors import StreamError
from vhostpc.pages.ramblock import RamBlock, RamSet, touched
from vhostpc.pages.waits import Waits, waits_of
from vhostpc.units import TARGET_PAGE

UNLIMITED = lib.VPC_RATE_UNLIMITED
STATE_VERSION = 1
_HEAD = struct.Struct(">IIIQQQHH")
_AREA = struct.Struct(">QQ")


@dataclass(frozen=True, slots=True)
class Area:
    """``count`` target pages (4096 bytes each) of ``block`` from page ``first``."""

    block: RamBlock
    first: int
    count: int


@dataclass(frozen=True, slots=True)
class BadPage:
    """A page with unexpected content: its location, and its own claim."""

    block: str
    page: int
    """Target page in the block."""
    word: int
    """First word of 8 bytes in it that is wrong."""
    index: int
    """Its number over all areas."""
    generation: int
    """The one it should have."""
    found_index: int
    found_generation: int
    found_owner: int
    found_seed: int

    def __str__(self) -> str:
        return (
            f"page {self.page} of {self.block}: number {self.index} in generation {self.generation} expected, found "
            f"number {self.found_index} in generation {self.found_generation} (first wrong word: {self.word})"
        )


@dataclass(frozen=True, slots=True)
class VCpuNumbers:
    """Counts of a vCPU, over all its runs."""

    beats: int
    """Operations of all kinds together."""
    reads: int
    """Pages read, all kinds together."""
    writes: int
    """Own pages rewritten; each was checked before."""
    checks: int
    """Own pages compared word by word."""
    glances: int
    """Pages of the other vCPUs, of which one word was read."""
    touches: int
    """Pages of the touch areas, of which one byte was read."""
    bad: int
    first_bad: BadPage | None
    step: int
    first_beat_ns: int
    """CLOCK_MONOTONIC at the end of the first beat of the last run; 0 before."""
    last_beat_ns: int
    """CLOCK_MONOTONIC at the end of the last beat; 0 before the first."""
    thread: int
    """Kernel thread id of the last run; 0 before the first."""
    stalled_ns: int
    """All of these together."""
    stalls: Waits
    """The first touch of each page, which is the one that may wait for it."""


class VCpu(Owner):
    """vCPU ``index`` of ``count``; all of one machine have the same ``areas``, in the same order, and ``touch``.

    ``touch`` are pages that belong to others (to devices): one byte of one of them is read now and then. Per
    second ``writes`` own pages are rewritten and ``reads`` pages read, most of them own ones that are checked;
    each may be 0 or UNLIMITED. A vCPU does not make up for work missed in a stall.

    Use::

        await vcpu.fill()                   # all of them, before any runs
        await nursery.start(vcpu.park)      # it has its thread, parked
        vcpu.go()                           # this cannot fail for lack of anything
        ...
        await vcpu.stop()                   # parked again: it touches no memory any more
        state = vcpu.save()                 # ... at the destination: restore(state), park, go

    Raises ValueError for areas with fewer pages than vCPUs, OSError. Close it before the RAM set.
    """

    def __init__(
        self,
        ram: RamSet,
        areas: Sequence[Area],
        index: int = 0,
        count: int = 1,
        *,
        seed: int = 0,
        touch: Sequence[Area] = (),
        writes: int = 0,
        reads: int = 0,
    ) -> None:
        self.ram = ram
        self.areas, self.touch = tuple(areas), tuple(touch)
        self.index, self.count = index, count
        self._limiter = trio.CapacityLimiter(1)
        self._look = trio.Lock()
        self.has_thread = False
        """Whether it has a thread."""
        self.thread = 0
        """The kernel thread id of its thread, 0 while it has none."""
        self._run: trio.Event | None = None  # the end of a run that has a thread for itself
        if not 0 <= index < count:
            raise ValueError(f"there is no vCPU {index} of {count}")
        raw = made("vcpu", self.name, lib.vpc_vcpu_new, ram.handle, index, count)
        self._native = Handle(raw, lib.vpc_vcpu_free, f"vCPU {index} is closed", needs=[ram.handle])
        try:
            for is_touch, listed in ((0, self.areas), (1, self.touch)):
                for a in listed:
                    rc = lib.vpc_vcpu_add_area(self.handle, a.block.index, a.first, a.count, is_touch)
                    check(rc, f"pages {a.first} to {a.first + a.count} of {a.block.name}")
            if self._set_state(seed, 0, 0) < 0:
                raise ValueError(f"{count} vCPUs need at least a page of memory each")
        except BaseException:
            self.close()
            raise
        self.set_rates(writes, reads)

    @property
    def name(self) -> str:
        return f"vCPU {self.index}"

    @property
    def running(self) -> bool:
        """From :meth:`go` until its thread has parked again, or has ended."""
        return not self.closed and not lib.vpc_vcpu_parked(self.handle)

    def set_rates(self, writes: int, reads: int) -> None:
        """Pages a second that are rewritten and read; 0: none. Also while it runs."""
        check(lib.vpc_vcpu_set_rates(self.handle, writes, reads), self.name)

    async def fill(self) -> None:
        """Write its own pages in generation 0. Raises OSError (EINVAL) when it has rewritten some already."""
        await self._hop(lambda: lib.vpc_vcpu_fill(self.handle))

    async def park(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keep its thread until cancelled: one C call, parked except from :meth:`go` to :meth:`stop`. In between it may
        wait for a page, which delays a stop or a cancellation too.

        Started once there is a thread. Raises Shortage, naming the vCPU; MemoryLost when the RAM set is given up: then
        no data read after that has counted.
        """
        await self._live(False, task_status)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """:meth:`park` for one run that begins at once, until :meth:`stop` or cancelled. Raises as that does."""
        await self._live(True, task_status)

    async def _live(self, once: bool, task_status: trio.TaskStatus[None]) -> None:
        handle = self.handle
        check(
            -errno.EBUSY if self.has_thread else lib.vpc_vcpu_arm(handle), f"{self.name} is running already"
        )
        thread = KeptThread(Thread.VCPU, self.name)
        self.has_thread = True
        self._run = trio.Event() if once else None
        try:
            self.thread = await thread.call(threading.get_native_id)
            if once:
                self.go()
            task_status.started()
            rc = await run_loop(
                lambda: lib.vpc_vcpu_run(handle, once), lambda: lib.vpc_vcpu_end(handle), thread
            )
        finally:
            self.has_thread, self.thread = False, 0
            thread.close()
            if self._run is not None:
                self._run.set()
        touched(rc, self.name)

    def go(self) -> None:
        """Let its thread run. Raises ValueError when it has none, OSError (EBUSY) when it runs."""
        if not self.has_thread:
            raise ValueError(f"{self.name} has no thread: call park first")
        check(lib.vpc_vcpu_go(self.handle), self.name)

    async def stop(self) -> None:
        """When this returns, its thread no longer touches memory. Does nothing if it does not run."""
        if not self.running:
            return
        run, event = self._run, lib.vpc_vcpu_parked_fd(self.handle)
        lib.vpc_vcpu_stop(self.handle)
        async with self._look:
            lib.vpc_event_clear(event)
            while self.running:
                await trio.lowlevel.wait_readable(event)
                lib.vpc_event_clear(event)
        if run is not None:
            await run.wait()

    async def sweep(self) -> tuple[int, BadPage | None]:
        """Check all its own pages, stopped: how many are bad, and the first. May wait for each of them."""
        self._must_stand()
        raw = ffi.new("struct vpc_vcpu_bad *")
        bad = await self._hop(lambda: lib.vpc_vcpu_sweep(self.handle, raw))
        return bad, self._bad_page(raw)

    def numbers(self) -> VCpuNumbers:
        raw = ffi.new("struct vpc_vcpu_stats *")
        lib.vpc_vcpu_stats(self.handle, raw)
        return numbers_of(
            VCpuNumbers,
            raw,
            first_bad=self._bad_page(raw.first_bad),
            stalls=waits_of(raw.histogram, raw.longest_ns),
        )

    # --- state

    def save(self) -> bytes:
        """The state that the destination needs to continue: version, place, seed, step, draws and areas, big-endian.

        Raises ValueError while it runs.
        """
        self._must_stand()
        raw = ffi.new("struct vpc_vcpu_state *")
        check(lib.vpc_vcpu_state(self.handle, raw), self.name)
        return self._head(raw.seed, raw.step, raw.draws) + self._layout()

    def next_page(self) -> tuple[RamBlock, int]:
        """Where the page lies that it rewrites next: its block, and the offset there in bytes. Touches nothing.

        Raises OSError (EBUSY) while it runs.
        """
        block = ffi.new("int *")
        page = check(lib.vpc_vcpu_next(self.handle, block), self.name)
        return self.ram.blocks[block[0]], page * TARGET_PAGE

    def restore(self, data: bytes) -> None:
        """Continue where another vCPU was when it was saved. Raises StreamError, ValueError while it runs."""
        self._must_stand()
        version = int.from_bytes(data[:4], "big")
        if len(data) >= 4 and version != STATE_VERSION:
            raise StreamError(
                f"the state of {self.name} has version {version}, only {STATE_VERSION} is known here"
            )
        if len(data) < _HEAD.size:
            raise StreamError(f"the state of {self.name} ends after {len(data)} bytes")
        _, index, count, seed, step, draws, _, _ = _HEAD.unpack_from(data)
        if count != self.count:
            raise StreamError(f"the incoming machine has {count} vCPUs, this one has {self.count}")
        if index != self.index:
            raise StreamError(f"the state of {self.name} is that of vCPU {index}")
        expected = self._head(seed, step, draws) + self._layout()
        if len(data) != len(expected):
            raise StreamError(
                f"the state of {self.name} has {len(data)} bytes, "
                f"but needs {len(expected)} with the areas of this machine"
            )
        if data != expected:
            raise StreamError(f"the vCPUs of the incoming machine work on other areas than {self.name} here")
        if self._set_state(seed, step, draws) < 0:
            raise StreamError(f"the state of {self.name} says step {step}, which cannot have been reached")

    def _head(self, seed: int, step: int, draws: int) -> bytes:
        sizes = len(self.areas), len(self.touch)
        return _HEAD.pack(STATE_VERSION, self.index, self.count, seed, step, draws, *sizes)

    def _layout(self) -> bytes:
        parts = []
        for a in self.areas + self.touch:
            name = a.block.name.encode()
            parts += [bytes([len(name)]), name, _AREA.pack(a.first, a.count)]
        return b"".join(parts)

    def _set_state(self, seed: int, step: int, draws: int) -> int:
        raw = ffi.new("struct vpc_vcpu_state *", {"seed": seed, "step": step, "draws": draws})
        return lib.vpc_vcpu_set_state(self.handle, raw)

    # ---

    def _must_stand(self) -> None:
        if self.running:
            raise ValueError(f"{self.name} is running: stop it first")

    def _bad_page(self, raw: Any) -> BadPage | None:
        if raw.block < 0:
            return None
        return numbers_of(
            BadPage,
            raw,
            block=self.ram.blocks[raw.block].name,
            found_owner=raw.found_owner & 0xFFFFFFFF,
        )

    async def _hop(self, call: Callable[[], int]) -> int:
        return touched(await borrow(call, self._limiter, Thread.VCPU, self.name), self.name)

    def close(self) -> None:
        """Free it. It must not be running, nor have a thread."""
        if not self.closed:
            self._must_stand()
            if self.has_thread:
                raise ValueError(f"{self.name} still has its thread")
            self._native.close(idle=not self._limiter.borrowed_tokens)


async def stop_all(cpus: Sequence[VCpu]) -> None:
    """:meth:`VCpu.stop` of all, each told before the first is waited for."""
    async with trio.open_nursery() as nursery:
        for cpu in cpus:
            nursery.start_soon(cpu.stop)
