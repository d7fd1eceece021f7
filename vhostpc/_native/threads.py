"""Threads: borrowed for one call, or kept. The one place that raises :class:`Shortage` where none can be started.

A thread that has done its work waits a while for more, but nobody can rely on that. Work that must not fail for lack of
a thread, because it follows a point of no return, has a :class:`KeptThread` from before that point.

They are not trio's threads: ``threading.Thread.start`` waits for ever, and the trio loop with it, for a thread that
starts without the memory for its first frame.
"""

from __future__ import annotations

import time
import weakref
from _thread import allocate_lock, start_new_thread
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any, Generic, TypeAlias, TypeVar

import trio

from vhostpc._native import lib
from vhostpc._native.entries import Thread
from vhostpc.errors import Shortage

T = TypeVar("T")

IDLE = 10.0
"""Seconds that a thread which was borrowed waits to be borrowed again."""
COMES_UP = 5.0
"""Seconds that a new thread has to begin."""


def _shortage(what: str) -> Shortage:
    return Shortage(f"no thread for {what}: the limit of processes or of memory is reached")


def _start(life: Callable[[], None], what: str) -> None:
    """Run ``life`` on a new thread, which has begun when this returns. Raises Shortage: it will not."""
    turn, begun = allocate_lock(), allocate_lock()
    begun.acquire()
    given_up = False

    def begin() -> None:
        with turn:
            if given_up:
                return
            begun.release()
        life()

    try:
        start_new_thread(begin, ())
    except (RuntimeError, MemoryError):
        raise _shortage(what) from None
    if not begun.acquire(timeout=COMES_UP):
        with turn:
            given_up = not begun.acquire(blocking=False)
        if given_up:
            raise _shortage(what)


class _Call(Generic[T]):
    """A call that another thread makes, and its outcome. To be created on the trio thread."""

    def __init__(self, call: Callable[[], T], name: Thread) -> None:
        self.name = name
        self._call = call
        self._done = trio.Event()
        self._token = trio.lowlevel.current_trio_token()
        self._error: BaseException | None = None
        self._value: T

    def make(self) -> None:
        try:
            self._value = self._call()
        except BaseException as error:
            self._error = error

    def tell(self) -> None:
        while True:
            try:
                self._token.run_sync_soon(self._done.set)
            except MemoryError:  # somebody waits for it
                time.sleep(0.01)
            except trio.RunFinishedError:
                return
            else:
                return

    async def result(self, abandon: bool) -> T:
        """Wait for it, shielded from cancellation unless it is one to ``abandon``."""
        with trio.CancelScope(shield=not abandon):
            await self._done.wait()
        if self._error is not None:
            raise self._error
        return self._value


Calls: TypeAlias = "SimpleQueue[_Call[Any] | None]"

# The queues of threads that nobody borrows just now, the last one first.
_idle: dict[Calls, None] = {}


def _be_borrowed(calls: Calls) -> None:
    """The life of a thread that is borrowed: it sleeps without the GIL between two calls."""
    while True:
        try:
            call = calls.get(timeout=IDLE)
        except Empty:
            if _idle.pop(calls, calls) is None:
                return
            continue  # somebody has just taken it
        assert call is not None
        lib.vpc_thread_name(call.name.encode())
        call.make()
        lib.vpc_thread_name(Thread.IDLE.encode())
        # First this, so that a task that is woken and needs a thread can have this one.
        try:
            _idle[calls] = None
        finally:  # without memory for that it ends here
            call.tell()
        del call


def _take_idle() -> Calls | None:
    return _idle.popitem()[0] if _idle else None


async def borrow(
    call: Callable[[], T],
    limiter: trio.CapacityLimiter,
    name: Thread,
    what: str,
    *,
    abandon: bool = False,
) -> T:
    """Run one call on a borrowed thread and return its result; it cannot be cancelled once it runs, unless it is
    one to ``abandon``: then the thread goes on alone.

    ``limiter`` must be the caller's own, so that calls which wait stall no unrelated one. ``name``: the thread's,
    meanwhile; ``what``: whose call it is, for people. Raises Shortage: nothing was called.
    """
    borrower = object()
    await limiter.acquire_on_behalf_of(borrower)
    try:
        calls = _take_idle()
        if calls is None:
            calls = SimpleQueue()
            _start(partial(_be_borrowed, calls), what)
        made = _Call(call, name)
        calls.put(made)
        return await made.result(abandon)
    finally:
        limiter.release_on_behalf_of(borrower)


def _be_kept(calls: Calls, name: Thread) -> None:
    lib.vpc_thread_name(name.encode())
    while (call := calls.get()) is not None:
        call.make()
        call.tell()
        del call


class KeptThread:
    """A thread that is kept until :meth:`close`, so that a call on it cannot fail for lack of a thread.

    It has ``name`` all the time, also while it sleeps. ``what``: whose it is, for people. Raises Shortage.
    """

    def __init__(self, name: Thread, what: str) -> None:
        calls: Calls = SimpleQueue()
        _start(partial(_be_kept, calls, name), what)
        self._name = name
        self._calls = calls
        self._turn = trio.Lock()
        self._end = weakref.finalize(self, calls.put, None)
        self._end.atexit = False

    async def call(self, call: Callable[[], T], *, abandon: bool = False) -> T:
        """Run one call after those before it and return its result; it cannot be cancelled once it runs, unless it
        is one to ``abandon``: then the thread goes on alone.

        Raises ValueError after :meth:`close`.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        try:
            self._turn.acquire_nowait()  # others get no turn before it has begun
        except trio.WouldBlock:
            await self._turn.acquire()
        try:
            if not self._end.alive:
                raise ValueError("this thread was given back")
            made = _Call(call, self._name)
            self._calls.put(made)
            return await made.result(abandon)
        finally:
            self._turn.release()

    @property
    def idle(self) -> bool:
        """It makes no call that anybody waits for."""
        return not self._turn.locked()

    def close(self) -> None:
        """Let it end, when its current call has ended. May be repeated."""
        self._end()


@contextmanager
def keeping(name: Thread, what: str) -> Iterator[KeptThread]:
    """A :class:`KeptThread` that outlives this block, unless it raises."""
    thread = KeptThread(name, what)
    try:
        yield thread
    except BaseException:
        thread.close()
        raise
