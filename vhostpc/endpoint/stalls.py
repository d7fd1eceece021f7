"""A waiting migration logs what it waits for."""

from __future__ import annotations

from collections.abc import Callable

import trio

from vhostpc.errors import sentence
from vhostpc.logs import rationed_logger

log = rationed_logger(__name__)

FIRST, LONGEST = 1.0, 60.0
"""Seconds without progress until the first line, and between two lines at most."""


async def tell_waits(progress: Callable[[], tuple[object, str]]) -> None:
    """Log a line when there is no progress for a while, and again at growing intervals, until cancelled.

    ``progress``: something that changes while it goes on, and what to say when it does not. What goes wrong here stops
    nothing but the telling.
    """
    try:
        await _tell(progress)
    except Exception as error:
        log.error("migration: what it waits for is no longer reported: %s", sentence(error), exc_info=error)


async def _tell(progress: Callable[[], tuple[object, str]]) -> None:
    seen, _ = progress()
    since = trio.current_time()
    told_at = FIRST
    while True:
        await trio.sleep(FIRST / 2)
        now, why = progress()
        waited = trio.current_time() - since
        if now != seen:
            seen, since, told_at = now, trio.current_time(), FIRST
        elif waited >= told_at:
            log.warning("migration: %s, for %.0f s", why, waited)
            told_at = waited + min(LONGEST, told_at)
