"""Waiting for a condition of another process or thread, which no event of ours announces."""

from __future__ import annotations

from collections.abc import Callable

import trio


async def until(condition: Callable[[], object], limit: float = 30, what: str = "") -> None:
    """Look every few milliseconds until ``condition()`` holds; fail after ``limit`` seconds."""
    with trio.move_on_after(limit):
        while not condition():
            await trio.sleep(0.002)
        return
    raise AssertionError(f"did not happen within {limit} s: {what or condition}")
