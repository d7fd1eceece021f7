"""A peer that is gone without a word: a host that lost its power, a network that drops everything."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import trio

from vhostpc.logs import rationed_logger
from vhostpc.migration.channel import Channel

log = rationed_logger(__name__)

LOOKS = 8
"""Looks in the time of the limit, at least; and one each second."""


@dataclass(frozen=True)
class Silence:
    """A look at a link. ``waits``: an answer is outstanding; ``heard``: changes with each byte that moves."""

    channel: Channel
    waits: bool
    heard: tuple[int, ...]
    shut_down: Callable[[], None]
    """Breaks all of it, also what is about to be made."""


async def watch(look: Callable[[], Silence | None], limit: float) -> None:
    """Shut a link down on which nothing has moved for ``limit`` seconds, although something is outstanding.

    Data in the kernel that the peer has not taken is outstanding, too, and moves when it gets less. A link that moves a
    byte a second lives. ``look``: None while there is no link. Until cancelled.
    """
    seen: tuple[Channel, int, tuple[int, ...]] | None = None
    since = trio.current_time()
    while True:
        await trio.sleep(min(1.0, limit / LOOKS))
        now, found = trio.current_time(), look()
        if found is None:
            seen = None
            continue
        unsent = found.channel.unsent()
        if (found.channel, unsent, found.heard) != seen or not (unsent or found.waits):
            seen, since = (found.channel, unsent, found.heard), now
        elif now - since >= limit:
            log.error(
                "migration: nothing has moved on the connection for %.0f s: it is given up", now - since
            )
            found.shut_down()
            seen = None
