"""Shortages: of threads (injected, anywhere), of descriptors and of address space (real, of any process).

A shortage of threads can be of one side of a test only: whatever a task does for a side, and the tasks that it starts,
stand under ``as_side``.
"""

from __future__ import annotations

import itertools
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any
from unittest import mock

from trio._core._thread_cache import ThreadCache

from vhostpc._native import threads

_side: ContextVar[str] = ContextVar("side", default="")


@contextmanager
def as_side(name: str) -> Iterator[None]:
    """What is started in here, and what that starts, is of this side."""
    token = _side.set(name)
    try:
        yield
    finally:
        _side.reset(token)


class Threads:
    """Counts the threads that were asked for and refused."""

    def __init__(self) -> None:
        self.asked = 0
        self.refused = 0


@contextmanager
def threads_left(count: int, *, side: str | None = None, once: bool = False) -> Iterator[Threads]:
    """``count`` more are available, by ``side`` if it is given, idle ones and trio's included; then none, or (``once``)
    all but the next one."""
    found = Threads()

    def refuses() -> bool:
        if side is None or _side.get() == side:
            found.asked += 1
            if found.asked == count + 1 if once else found.asked > count:
                found.refused += 1
                return True
        return False

    def start_new_thread(*args: Any) -> Any:
        if refuses():
            raise RuntimeError("can't start new thread")  # CPython's words
        return start(*args)

    def start_thread_soon(cache: ThreadCache, *args: Any) -> None:
        if refuses():
            raise RuntimeError("can't start new thread")
        start_soon(cache, *args)

    start, start_soon = vars(threads)["start_new_thread"], ThreadCache.start_thread_soon
    with (
        mock.patch.object(threads, "start_new_thread", start_new_thread),
        mock.patch.object(threads, "_take_idle", return_value=None),
        mock.patch.object(ThreadCache, "start_thread_soon", start_thread_soon),
    ):
        yield found


def open_descriptors(pid: int | None = None) -> set[int]:
    """Numbers of the open descriptors of a process, this one if none is given; without what listing them opens."""
    folder = f"/proc/{pid or 'self'}/fd"
    return {int(name) for name in os.listdir(folder) if os.path.lexists(f"{folder}/{name}")}


@contextmanager
def descriptors_left(count: int, pid: int = 0) -> Iterator[None]:
    """A process, this one if none is given, can have ``count`` more."""
    used = open_descriptors(pid)
    limit = next(itertools.islice((n for n in itertools.count() if n not in used), count, None))
    with limited(resource.RLIMIT_NOFILE, limit, pid):
        yield


@contextmanager
def address_space_left(count: int, pid: int) -> Iterator[None]:
    """A process can map ``count`` bytes more: for stacks of threads, files, memory."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[0])
    with limited(resource.RLIMIT_AS, pages * resource.getpagesize() + count, pid):
        yield


@contextmanager
def limited(what: int, limit: int, pid: int = 0) -> Iterator[None]:
    soft, hard = resource.prlimit(pid, what)
    resource.prlimit(pid, what, (limit, hard))
    try:
        yield
    finally:
        resource.prlimit(pid, what, (soft, hard))
