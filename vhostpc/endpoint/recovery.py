"""Another link for a migration that is paused: where a destination waits for it, and how long an end tries."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import trio

from vhostpc.endpoint.connections import accepted
from vhostpc.errors import ChannelLost, MigrationRefused, is_foreseen, let_go, sentence
from vhostpc.logs import rationed_logger
from vhostpc.migration.incoming import Incoming
from vhostpc.migration.last_word import say_again
from vhostpc.migration.phase import Phase, Side
from vhostpc.migration.uri import Address, Tcp, Unix

log = rationed_logger(__name__)

PATIENCE = 30.0
"""Seconds that a source has to recover once it has connected, where silence has no limit."""
FIRST, LONGEST = 0.1, 5.0
"""Seconds between two attempts to connect, and to listen."""
LINK_TIMEOUT = 30.0
"""Default of :attr:`Links.timeout`."""


@dataclass(frozen=True)
class Links:
    """When a link is lost, and what is done about it automatically. Seconds."""

    timeout: float = LINK_TIMEOUT
    """Of silence that end a link while something is outstanding; 0: never."""
    recover_for: float = 0
    """For which a paused postcopy connects, or listens, again; 0: it waits for a person."""


def advice(side: Side) -> str:
    """The commands that recover a paused migration."""
    here, there = ("here", "at the source") if side == "destination" else ("at the destination", "here")
    return f"to recover, enter migrate_recover URI {here}, then migrate -r URI {there}"


def can_be_repeated(address: Address) -> bool:
    """Another connection can be made there."""
    return isinstance(address, Tcp | Unix)


def listened_at(address: Address, told: list[dict[str, Any]]) -> Address:
    """The address again, with the port that was chosen where it left the choice."""
    if isinstance(address, Tcp) and told:
        return replace(address, port=told[0]["port"], to=None)
    return address


class Backoff:
    """Waits between attempts, each twice as long as the one before, up to a limit."""

    def __init__(self) -> None:
        self._next = FIRST

    async def wait(self) -> None:
        await trio.sleep(self._next)
        self._next = min(2 * self._next, LONGEST)


async def take_link(
    incoming: Incoming,
    address: Address,
    limit: float,
    listens: Callable[[list[dict[str, Any]]], None],
    connected: Callable[[], None],
) -> None:
    """Listen at the address and go on over the first connection, until that has ended.

    Where everything has arrived already, the source has not heard of it: it is told again. ``limit``: seconds of
    silence that end a link, 0 for none. ``listens`` is told the addresses as ``query-migrate`` tells them.

    Raises MigrationRefused (it cannot listen there), ChannelLost, StreamError, Shortage, OSError: nothing has changed,
    or it is paused again.
    """
    patience = limit or PATIENCE
    taking = accepted(address, limit, listens, preempt=lambda: incoming.preempt, patience=patience)
    async with taking as (channel, second):
        connected()
        if incoming.course.phase is Phase.MOVED:
            with trio.move_on_after(patience) as late:
                await say_again(channel, incoming.machine.ram, incoming.reader)
            if late.cancelled_caught:
                raise ChannelLost(f"the source has not recovered within {patience:g} s")
        else:
            await incoming.resume(channel, patience, second)


async def keep_listening(
    incoming: Incoming,
    address: Address,
    links: Links,
    scope: trio.CancelScope,
    listens: Callable[[list[dict[str, Any]]], None],
    goes_on: Callable[[], bool],
) -> bool:
    """Take links at the address for ``links.recover_for`` seconds, until one has carried pages. Whether one has.

    ``goes_on``: asked before each attempt. Whatever goes wrong is a log line.
    """
    backoff = Backoff()
    until = scope.deadline = trio.current_time() + links.recover_for

    def connected() -> None:
        scope.deadline = math.inf  # the silence of a link has a limit of its own

    resumed = incoming.resumptions
    with scope:
        while incoming.resumptions == resumed and goes_on():
            moved = incoming.course.phase is Phase.MOVED
            try:
                await take_link(incoming, address, links.timeout, listens, connected)
                if moved:
                    return True
            except MigrationRefused:  # the address is taken for the moment
                await backoff.wait()
            except Exception as error:
                tell_no_recovery(error)
            scope.deadline = until
    if scope.cancelled_caught and trio.current_time() >= until:
        log.warning("migration: no source has recovered within %g s", links.recover_for)
    return incoming.resumptions > resumed


def tell_no_recovery(error: BaseException) -> None:
    log.error("migration: no recovery: %s", sentence(error), exc_info=None if is_foreseen(error) else error)
    let_go(error)
