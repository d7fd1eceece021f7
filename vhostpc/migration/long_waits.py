"""A destination's log lines while pages arrive: long waits for one, and lack of memory for them."""

from __future__ import annotations

import time
from collections.abc import Callable

import trio

from vhostpc.logs import rationed_logger
from vhostpc.pages.ramchannel import LoadNumbers
from vhostpc.pages.service import FaultService

log = rationed_logger(__name__)

FIRST = 1.0
"""Seconds of a wait after which it is logged; then again each time its length has doubled."""


class Shortage:
    """No memory for pages that have arrived: one line when it begins, one when it is over."""

    def __init__(self) -> None:
        self._since: float | None = None

    def look(self, short: bool) -> None:
        if short and self._since is None:
            self._since = time.monotonic()
            log.warning(
                "migration: no memory for a page that has arrived (a full tmpfs, no huge page, a limit): "
                "retrying until there is some"
            )
        elif not short and self._since is not None:
            log.warning(
                "migration: there is memory for pages again, after %.1f s", time.monotonic() - self._since
            )
            self._since = None


async def tell_waits(
    service: FaultService, loads: Callable[[], list[LoadNumbers]], lost: Callable[[], None]
) -> None:
    """Watch until cancelled: long waits, and whether there is memory for arriving pages.

    ``loads``: the numbers of the channels, the newest last. ``lost`` is called when requests can no longer be sent:
    nobody else would notice.
    """
    told: tuple[int, int] | None = None  # client and since when
    first = due = FIRST
    shortage = Shortage()
    while True:
        await trio.sleep(first / 2)
        numbers = service.numbers()
        if numbers.send_errno:
            lost()
        shortage.look(bool(numbers.short_now) or any(load.short for load in loads()[-1:]))
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
        due = 2 * age
