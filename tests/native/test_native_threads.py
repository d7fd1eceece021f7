"""Threads that are borrowed for a call or kept, and what happens where none is available."""

from __future__ import annotations

import _thread
import threading
from collections.abc import Callable
from typing import Any

import pytest
import trio

from tests.kit.shortages import threads_left
from tests.kit.thread_names import thread_names
from tests.kit.until import until
from vhostpc._native import threads
from vhostpc._native.entries import Thread
from vhostpc._native.threads import KeptThread, borrow
from vhostpc.errors import Shortage


def named(name: Thread) -> int:
    return list(thread_names().values()).count(name)


async def test_a_kept_thread_has_its_name_until_it_is_given_back() -> None:
    """Also while it sleeps; and nobody has to give it back."""
    thread, forgotten = KeptThread(Thread.FILE, "a test"), KeptThread(Thread.FILE, "a test")
    await until(lambda: named(Thread.FILE) == 2)
    ids = {await thread.call(threading.get_native_id) for _ in range(3)}
    assert len(ids) == 1
    with pytest.raises(ZeroDivisionError):
        await thread.call(lambda: 1 // 0)
    assert await forgotten.call(threading.get_native_id) not in ids
    del forgotten
    await until(lambda: named(Thread.FILE) == 1)
    with trio.CancelScope() as scope:
        scope.cancel()
        await thread.call(lambda: ids.clear())
    assert ids, "nothing is called for who was cancelled before"
    thread.close()
    thread.close()
    await until(lambda: named(Thread.FILE) == 0)
    with pytest.raises(ValueError, match="given back"):
        await thread.call(lambda: 0)


async def test_a_thread_is_borrowed_again() -> None:
    """It has its name for the call alone; as many at a time as the limiter has places."""
    limiter = trio.CapacityLimiter(2)
    gate, inside, ids = threading.Semaphore(0), [], set()

    def call() -> int:
        inside.append(thread_names()[threading.get_native_id()])
        gate.acquire()
        return threading.get_native_id()

    async def one() -> None:
        ids.add(await borrow(call, limiter, Thread.HOP, "a test"))

    async with trio.open_nursery() as nursery:
        for _ in range(6):
            nursery.start_soon(one)
        await until(lambda: len(inside) == 2)
        await trio.lowlevel.checkpoint()
        assert len(inside) == 2
        gate.release(6)
    assert inside == [Thread.HOP] * 6
    assert len(ids) <= 2
    assert named(Thread.HOP) == 0
    assert ids <= set(thread_names())
    with pytest.raises(ZeroDivisionError):
        await borrow(lambda: 1 // 0, limiter, Thread.HOP, "a test")
    assert limiter.borrowed_tokens == 0


async def test_no_thread_can_be_started() -> None:
    limiter = trio.CapacityLimiter(1)
    kept = KeptThread(Thread.FILE, "a test")
    called: list[int] = []
    with threads_left(0):
        with pytest.raises(Shortage, match="no thread for the moon: the limit of processes or of memory"):
            await borrow(lambda: called.append(1), limiter, Thread.HOP, "the moon")
        with pytest.raises(Shortage, match="no thread for the moon"):
            KeptThread(Thread.HOP, "the moon")
        assert await kept.call(lambda: 7) == 7
    assert not called
    assert limiter.borrowed_tokens == 0
    kept.close()


async def test_a_thread_that_does_not_come_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPython's own start would wait for it for ever. If it comes after all, it goes again and makes no call."""
    stillborn: list[Callable[[], Any]] = []
    monkeypatch.setattr(threads, "start_new_thread", lambda begin, _: stillborn.append(begin))
    monkeypatch.setattr(threads, "_take_idle", lambda: None)
    monkeypatch.setattr(threads, "COMES_UP", 0.01)
    called: list[int] = []
    with pytest.raises(Shortage, match="no thread for the moon"):
        await borrow(lambda: called.append(1), trio.CapacityLimiter(1), Thread.HOP, "the moon")
    with pytest.raises(Shortage, match="no thread for the moon"):
        KeptThread(Thread.HOP, "the moon")
    gone: list[int] = []
    for begin in stillborn:
        _thread.start_new_thread(lambda begin=begin: gone.append(begin() or 1), ())  # type: ignore[misc]
    await until(lambda: len(gone) == 2)
    assert not called
