"""Dirty tracking: which host pages were written through a RAM set's own mapping, without stopping the writers.

Writes of other processes (back-ends) are not seen; those mark their writes themselves, in the dirty log.
"""

from __future__ import annotations

import enum
import errno
import mmap
import os
import platform
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import trio

from vhostpc._native import ffi, lib
from vhostpc._native.entries import Thread
from vhostpc._native.handles import Handle, Owner, made
from vhostpc._native.loop import run_loop
from vhostpc._native.numbers import numbers_of
from vhostpc._native.threads import KeptThread
from vhostpc.errors import UfdError, VhostpcError
from vhostpc.pages.loops import Loops
from vhostpc.pages.ramblock import RamSet
from vhostpc.ufd.flags import Features, names
from vhostpc.ufd.probe import SHORT
from vhostpc.ufd.uffd import Userfaultfd


class DirtyWay(enum.Enum):
    """The ways to detect writes, best first."""

    WP_ASYNC = "wp-async"
    """The kernel records them and a scan collects them (Linux 6.7); a writer never waits."""
    WP_SYNC = "wp-sync"
    """The first write to each page between two syncs waits for one of our threads, which records it (Linux 5.19)."""


_FEATURES = {
    DirtyWay.WP_ASYNC: Features.WP_HUGETLBFS_SHMEM | Features.WP_ASYNC,
    DirtyWay.WP_SYNC: Features.WP_HUGETLBFS_SHMEM | Features.PAGEFAULT_FLAG_WP,
}
_NEEDS = {DirtyWay.WP_ASYNC: "Linux 6.7", DirtyWay.WP_SYNC: "Linux 5.19"}


@dataclass(frozen=True, slots=True)
class DirtyNumbers:
    """The results and costs of tracking."""

    syncs: int
    found: int
    """Host pages that syncs found written, all together."""
    faults: int
    """WP_SYNC: writes that waited until they were recorded."""
    calls: int
    """System calls that syncs made: scans, or protecting a run of pages."""
    sync_ns: int
    """Time spent in syncs."""


class DirtyTracker(Owner):
    """Finds the host pages of a RAM set's blocks that are written through its mapping.

    Use::

        tracker = DirtyTracker(ram)
        await tracker.start(nursery)        # writes from here on are found
        count = await tracker.sync()        # sets Bits.DIRTY
        await tracker.stop()

    It is started once. ``way``: one of DirtyWay, None for the best that the kernel has. It creates no absent pages.
    Blocks that are added later are not tracked; no page may be discarded meanwhile; and the memory may not be armed for
    postcopy, which uses another userfaultfd. Raises UfdError, saying what the kernel lacks, and OSError and Shortage
    for lack of a resource. Everything that it needs until its end is allocated here.
    """

    def __init__(self, ram: RamSet, way: DirtyWay | None = None) -> None:
        self.ram = ram
        self.way = _best() if way is None else way
        with ExitStack() as stack:
            self._thread = _thread(stack, "dirty tracking")
            self._loop_thread: KeptThread | None = None
            if self.way is DirtyWay.WP_SYNC:
                self._loop_thread = _thread(stack, "the loop of dirty tracking")
            self._native = _made(ram, self.way)
            self._threads = stack.pop_all()
        self._loops = Loops()
        self._loop_ended: trio.Event | None = None
        self._started = False

    async def start(self, nursery: trio.Nursery) -> None:
        """Protect all blocks; writes from here on are detected.

        The thread of WP_SYNC runs in ``nursery``; when that ends, tracking ends, and no writer waits any more. Raises
        UfdError.
        """
        if self._started:
            raise ValueError("dirty tracking was started before")
        self._started = True
        if self._loop_thread is not None:
            await nursery.start(self._run, self._loop_thread)
        try:
            rc = await self._hop(lib.vpc_dirty_start)
            if rc < 0:
                raise _start_failure(self.ram, self.way, self.handle, -rc)
        except BaseException:
            with trio.CancelScope(shield=True):
                await self.stop()
            raise

    async def sync(self) -> int:
        """Set Bits.DIRTY of pages written since the last call, protect them again; returns how many bits were new.

        No write is lost: the next call finds a write to a page that was already examined. Raises UfdError when
        tracking has not begun or has ended.
        """
        rc = await self._hop(lib.vpc_dirty_sync) if self._started else -errno.ESHUTDOWN
        if rc < 0:
            raise _failure(-rc)
        return rc

    async def stop(self) -> None:
        """Protect nothing any more. Writes since the last :meth:`sync` are unknown. May be repeated."""
        if self.closed:
            return
        if self._loop_ended is not None:
            lib.vpc_dirty_stop(self.handle)
            await self._loop_ended.wait()
        await self._hop(lib.vpc_dirty_end)

    def numbers(self) -> DirtyNumbers:
        raw = ffi.new("struct vpc_dirty_stats *")
        lib.vpc_dirty_stats(self.handle, raw)
        return numbers_of(DirtyNumbers, raw)

    async def _run(
        self, thread: KeptThread, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        handle = self.handle
        ended = self._loop_ended = trio.Event()
        task_status.started()
        try:
            with self._loops.running(lambda: lib.vpc_dirty_stop(handle)):
                rc = await run_loop(
                    lambda: lib.vpc_dirty_run(handle),
                    lambda: lib.vpc_dirty_stop(handle),
                    thread,
                )
        finally:
            ended.set()
        if rc < 0:
            raise _failure(-rc)

    async def _hop(self, call: Any) -> int:
        """On a thread, since its time grows with the size of memory; it waits for nothing."""
        handle = self.handle
        with self._loops.running(lambda: None):
            return await self._thread.call(lambda: int(call(handle)))

    def close(self) -> None:
        """Stop and free, at once or when its threads have ended."""
        if not self.closed:
            lib.vpc_dirty_stop(self.handle)
            self._native.close(idle=self._loops.idle)
            self._loops.close()
            self._threads.close()


def probe_dirty() -> dict[DirtyWay, str]:
    """Try each way on a page of our own: why it does not work, "" where it does. Does not raise."""
    found = {}
    for way in DirtyWay:
        try:
            _try(way)
            found[way] = ""
        except (VhostpcError, OSError) as e:
            found[way] = str(e)
    return found


def _try(way: DirtyWay) -> None:
    """Start and sync, on memory that nobody writes, to test the kernel. Raises UfdError, OSError."""
    with RamSet() as ram:
        ram.create("probe", mmap.PAGESIZE)
        native = _made(ram, way)
        try:
            if (rc := lib.vpc_dirty_start(native.raw)) < 0:
                raise _start_failure(ram, way, native.raw, -rc)
            if (rc := lib.vpc_dirty_sync(native.raw)) < 0:
                raise _failure(-rc)
        finally:
            native.close(idle=True)


def _best() -> DirtyWay:
    """Test what the kernel supports. A shortage is raised; it is no reason to choose a lesser way."""
    last: UfdError | None = None
    for way in DirtyWay:
        try:
            _try(way)
            return way
        except UfdError as e:
            if e.errno in SHORT:
                raise
            last = e
    assert last is not None
    raise last


def _made(ram: RamSet, way: DirtyWay) -> Handle:
    """A tracker in C. Raises UfdError, OSError."""
    with _open(way) as ufd, _pagemap(way) as pagemap:
        raw = made("dirty", "dirty tracking", lib.vpc_dirty_new, ram.handle, ufd.fileno(), pagemap)
    return Handle(raw, lib.vpc_dirty_free, "this dirty tracker is closed", needs=[ram.handle])


def _failure(err: int) -> UfdError:
    if err == errno.ESHUTDOWN:
        return UfdError("dirty tracking does not run", err)
    return UfdError(f"dirty tracking: {os.strerror(err)} [{errno.errorcode.get(err, err)}]", err)


def _start_failure(ram: RamSet, way: DirtyWay, handle: Any, err: int) -> UfdError:
    raw = ffi.new("struct vpc_dirty_stats *")
    lib.vpc_dirty_stats(handle, raw)
    if raw.block < 0:
        return _lacks(way, "the ioctl PAGEMAP_SCAN", err)
    name = ram.blocks[raw.block].name
    watched = "another userfaultfd watches it (it is armed for postcopy, or tracked already)"
    why = watched if err == errno.EBUSY else os.strerror(err)
    return UfdError(f"writes to {name} cannot be tracked: {why} [{errno.errorcode.get(err, err)}]", err)


def _thread(stack: ExitStack, what: str) -> KeptThread:
    thread = KeptThread(Thread.DIRTY, what)
    stack.callback(thread.close)
    return thread


def _lacks(way: DirtyWay, what: str, err: int) -> UfdError:
    needs = f"tracking writes by {way.value} needs {_NEEDS[way]}, this is {platform.release()}"
    return UfdError(f"the kernel lacks {what}: {needs}", err)


def _open(way: DirtyWay) -> Userfaultfd:
    with Userfaultfd.open() as ufd:
        missing = names(Features(int(_FEATURES[way]) & ~int(ufd.offered)))
    if missing:
        raise _lacks(way, f"{' and '.join(missing)} of userfaultfd", errno.EINVAL)
    return Userfaultfd.open(features=_FEATURES[way])


@contextmanager
def _pagemap(way: DirtyWay) -> Iterator[int]:
    """/proc/self/pagemap for the way that needs it, otherwise -1."""
    if way is not DirtyWay.WP_ASYNC:
        yield -1
        return
    try:
        fd = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    except OSError as e:
        text = (
            f"tracking writes by {way.value} needs /proc/self/pagemap, which cannot be opened: {e.strerror}"
        )
        raise UfdError(text, e.errno or 0) from None
    try:
        yield fd
    finally:
        os.close(fd)
