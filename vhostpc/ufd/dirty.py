"""Dirty tracking: which host pages were written through a RAM set's own mapping. Nobody is stopped for it.

Writes of other processes (back-ends) are not seen; those say themselves what they write, in the dirty log.
"""

from __future__ import annotations

import enum
import errno
import mmap
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import trio

from vhostpc._native import ffi, lib
from vhostpc._native.entries import Thread
from vhostpc._native.loop import run_loop
from vhostpc.errors import UfdError
from vhostpc.memory.ramblock import RamSet
from vhostpc.ufd.flags import Features, names
from vhostpc.ufd.loops import Loops
from vhostpc.ufd.uffd import Userfaultfd


class DirtyWay(enum.Enum):
    """How writes are found, best first."""

    WP_ASYNC = "wp-async"
    """The kernel notes them and a scan collects (Linux 6.7); a writer never waits."""
    WP_SYNC = "wp-sync"
    """The first write to each page between two syncs waits for a thread of ours that notes it (Linux 5.19)."""


_FEATURES = {
    DirtyWay.WP_ASYNC: Features.WP_HUGETLBFS_SHMEM | Features.WP_ASYNC,
    DirtyWay.WP_SYNC: Features.WP_HUGETLBFS_SHMEM | Features.PAGEFAULT_FLAG_WP,
}
_NEEDS = {DirtyWay.WP_ASYNC: "Linux 6.7", DirtyWay.WP_SYNC: "Linux 5.19"}


@dataclass(frozen=True, slots=True)
class DirtyNumbers:
    """What tracking found and cost."""

    syncs: int
    found: int
    """Host pages that syncs found written, all together."""
    faults: int
    """WP_SYNC: writes that waited to be noted."""
    calls: int
    """System calls that syncs made: scans, or protecting a run of pages."""
    sync_ns: int
    """Time spent in syncs."""


class DirtyTracker:
    """Finds the host pages of a RAM set's blocks that are written through its mapping.

    Use::

        tracker = DirtyTracker(ram)
        await tracker.start(nursery)        # writes from here on are found
        count = await tracker.sync()        # sets Bits.DIRTY
        await tracker.stop()

    It is started once. ``way``: one of DirtyWay, None for the best that the kernel has. Absent pages are not made
    by it. Blocks that are added later are not tracked; no page may be discarded meanwhile; and the memory may not be
    armed for postcopy, which is another userfaultfd. Raises UfdError, saying what the kernel lacks.
    """

    def __init__(self, ram: RamSet, way: DirtyWay | None = None) -> None:
        self.ram = ram
        self.way = _best() if way is None else way
        with _open(self.way) as ufd, _pagemap(self.way) as pagemap:
            self._handle = lib.vpc_dirty_new(ram.handle, ufd.fileno(), pagemap)
        if self._handle == ffi.NULL:
            raise MemoryError("dirty tracking")
        handle = self._handle
        self._loops = Loops(lambda: lib.vpc_dirty_free(handle))
        self._limiter = trio.CapacityLimiter(1)
        self._loop_limiter = trio.CapacityLimiter(1)
        self._loop_ended: trio.Event | None = None
        self._started = False

    @property
    def handle(self) -> Any:
        """The C handle; ValueError after :meth:`close`."""
        if self._handle is None:
            raise ValueError("this dirty tracker is closed")
        return self._handle

    async def start(self, nursery: trio.Nursery) -> None:
        """Protect all blocks; writes from here on are found.

        The thread of WP_SYNC runs in ``nursery``; when that ends, tracking ends, and nobody waits for it. Raises
        UfdError.
        """
        if self._started:
            raise ValueError("dirty tracking was started before")
        self._started = True
        if self.way is DirtyWay.WP_SYNC:
            await nursery.start(self._run)
        try:
            rc = await self._hop(lib.vpc_dirty_start)
            if rc < 0:
                raise self._start_failure(-rc)
        except BaseException:
            with trio.CancelScope(shield=True):
                await self.stop()
            raise

    async def sync(self) -> int:
        """Set Bits.DIRTY of what was written since the last call, protect it again; how many bits were not set before.

        No write is lost: whatever is written later than its page was looked at is found by the next call. Raises
        UfdError when tracking has not begun or has ended.
        """
        rc = await self._hop(lib.vpc_dirty_sync) if self._started else -errno.ESHUTDOWN
        if rc < 0:
            raise self._failure(-rc)
        return rc

    async def stop(self) -> None:
        """Protect nothing any more. What was written since the last :meth:`sync` is not known. Harmless again."""
        if self._handle is None:
            return
        if self._loop_ended is not None:
            lib.vpc_dirty_stop(self._handle)
            await self._loop_ended.wait()
        await self._hop(lib.vpc_dirty_end)

    def numbers(self) -> DirtyNumbers:
        raw = ffi.new("struct vpc_dirty_stats *")
        lib.vpc_dirty_stats(self.handle, raw)
        return DirtyNumbers(
            syncs=int(raw.syncs),
            found=int(raw.found),
            faults=int(raw.faults),
            calls=int(raw.calls),
            sync_ns=int(raw.sync_ns),
        )

    def try_once(self) -> None:
        """Start and sync, on memory that nobody writes: does the kernel do it? Raises UfdError."""
        rc = lib.vpc_dirty_start(self.handle)
        if rc < 0:
            raise self._start_failure(-rc)
        rc = lib.vpc_dirty_sync(self.handle)
        if rc < 0:
            raise self._failure(-rc)

    def _failure(self, err: int) -> UfdError:
        if err == errno.ESHUTDOWN:
            return UfdError("dirty tracking does not run", err)
        return UfdError(f"dirty tracking: {os.strerror(err)} [{errno.errorcode.get(err, err)}]", err)

    async def _run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        handle = self.handle
        ended = self._loop_ended = trio.Event()
        task_status.started()
        try:
            with self._loops.running(lambda: lib.vpc_dirty_stop(handle)):
                rc = await run_loop(
                    lambda: lib.vpc_dirty_run(handle),
                    lambda: lib.vpc_dirty_stop(handle),
                    self._loop_limiter,
                    Thread.DIRTY,
                )
        finally:
            ended.set()
        if rc < 0:
            raise self._failure(-rc)

    async def _hop(self, call: Any) -> int:
        """On a borrowed thread, since it takes as long as there is memory; it waits for nothing."""
        handle = self.handle
        with self._loops.running(lambda: None):
            return await trio.to_thread.run_sync(
                lambda: int(call(handle)), limiter=self._limiter, thread_name=Thread.DIRTY
            )

    def _start_failure(self, err: int) -> UfdError:
        raw = ffi.new("struct vpc_dirty_stats *")
        lib.vpc_dirty_stats(self.handle, raw)
        if raw.block < 0:
            return _lacks(self.way, "the ioctl PAGEMAP_SCAN", err)
        name = self.ram.blocks[raw.block].name
        watched = "another userfaultfd watches it (it is armed for postcopy, or tracked already)"
        why = watched if err == errno.EBUSY else os.strerror(err)
        return UfdError(f"writes to {name} can not be tracked: {why} [{errno.errorcode.get(err, err)}]", err)

    def close(self) -> None:
        """Stop and free, at once or when its threads have ended."""
        if self._handle is not None:
            lib.vpc_dirty_stop(self._handle)
            self._handle = None
            self._loops.close()

    def __enter__(self) -> DirtyTracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def probe_dirty() -> dict[DirtyWay, str]:
    """Try each way on a page of our own: why it does not work, "" where it does. Does not raise."""
    found = {}
    for way in DirtyWay:
        with RamSet() as ram:
            ram.create("probe", mmap.PAGESIZE)
            try:
                with DirtyTracker(ram, way) as tracker:
                    tracker.try_once()
                found[way] = ""
            except UfdError as e:
                found[way] = str(e)
    return found


def _best() -> DirtyWay:
    found = probe_dirty()
    for way, problem in found.items():
        if not problem:
            return way
    raise UfdError(found[DirtyWay.WP_SYNC])


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
    """/proc/self/pagemap for the way that needs it, else -1."""
    if way is not DirtyWay.WP_ASYNC:
        yield -1
        return
    try:
        fd = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    except OSError as e:
        text = (
            f"tracking writes by {way.value} needs /proc/self/pagemap, which can not be opened: {e.strerror}"
        )
        raise UfdError(text, e.errno or 0) from None
    try:
        yield fd
    finally:
        os.close(fd)
