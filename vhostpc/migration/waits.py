"""Who waits for pages that do not come: a line in the log that says which client, which page and how long."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import trio

from vhostpc.ufd.service import FaultService

log = logging.getLogger(__name__)

FIRST = 1.0
"""Seconds of a wait after which it is told; then each time it has become twice as long."""
_MOST = 60.0


async def tell_waits(service: FaultService, lost: Callable[[], None], first: float = FIRST) -> None:
    """Look on until cancelled. ``lost`` is called when requests can no longer be sent: nobody else would notice."""
    told: tuple[int, int] | None = None  # client and since when
    due = first
    while True:
        await trio.sleep(first / 2)
        numbers = service.numbers()
        if numbers.send_errno:
            lost()
        longest = service.waiting(1)
        if not longest:
            continue
        waiter = longest[0]
        age = (time.monotonic_ns() - waiter.since_ns) / 1e9
        if told != (waiter.client, waiter.since_ns):
            told, due = (waiter.client, waiter.since_ns), first
        if age < due:
            continue
        where = f"page {waiter.page} of {waiter.block!r}" if waiter.block else f"address {waiter.address:#x}"
        log.warning(
            "migration: %s has waited %.1f s for %s, %d others wait; requests not sent yet: %d bytes",
            service.name_of(waiter.client),
            age,
            where,
            numbers.waiting_now - 1,
            numbers.outbox_bytes,
        )
        due = age + min(age, _MOST)
