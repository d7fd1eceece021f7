"""Waiting for a condition of another process or thread, which no event of ours announces."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import trio


async def until(condition: Callable[[], object], limit: float = 30, what: str = "") -> None:
    """Look every few milliseconds until ``condition()`` holds; fail after ``limit`` seconds."""
    with trio.move_on_after(limit):
        while not condition():
            await trio.sleep(0.002)
        return
    raise AssertionError(f"did not happen within {limit} s: {what or condition}")


def unread_faults(ufd: int) -> int:
    """How many threads wait whose faults nobody has read from this userfaultfd (its fdinfo in proc(5))."""
    rows = Path(f"/proc/self/fdinfo/{ufd}").read_text().split("pending:", 1)[1]
    return int(rows.split(None, 1)[0])
