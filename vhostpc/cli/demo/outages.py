"""The link of ``vhostpc demo`` is lost in postcopy, and both ends recover: when that is, and how each pause was."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable

import trio

from vhostpc.cli.demo.books import Pause, Step, Waiting
from vhostpc.cli.demo.processes import STEP, End
from vhostpc.cli.demo.relay import Relay
from vhostpc.errors import VhostpcError
from vhostpc.units import TARGET_PAGE

MOST_CUTS = 20
RECOVER_FOR = 20.0
"""Seconds for which both ends try to recover."""
ANSWER = 5.0
"""Seconds in which both ends notice that the link is lost, and in which a recovery is made once there is a link."""
OUTAGE = 0.4
"""Seconds in which nobody can connect."""
RECORD = TARGET_PAGE + 8
"""Bytes of a page on the wire."""
PAUSED = ("postcopy-paused", "postcopy-recover-setup", "postcopy-recover")
"""Statuses of an end until it has recovered."""


class Outages:
    """``cuts`` losses of the link that ``relay`` is: at once, and then at even distances over the pages of postcopy.

    ``pages``: of the machine. ``at``: a time of CLOCK_MONOTONIC, in nanoseconds, as seconds since the traffic began.
    ``recover_for``: seconds for which the ends recover. ``over``: called after each pause, with how many there were.
    """

    def __init__(
        self,
        cuts: int,
        pages: int,
        source: End,
        destination: End,
        relay: Relay,
        *,
        at: Callable[[int], float],
        recover_for: float,
        over: Callable[[int], Awaitable[None]],
    ) -> None:
        self.pauses: list[Pause] = []
        self._cuts = cuts
        self._pages = pages
        self._kept = 0
        """Pages of precopy that were not sent again."""
        self._source = source
        self._destination = destination
        self._relay = relay
        self._at = at
        self._recover_for = recover_for
        self._over = over
        self._back: list[float] = []
        """When the link came back, for each pause."""

    async def run(self) -> None:
        """From now on. Raises VhostpcError: one was not noticed, or not recovered."""
        behind = 1
        for number in range(1, self._cuts + 1):
            await self._lose(behind)
            await self._over(number)
            blocks = (await self._destination.command("x-vhostpc-map", cells=1))["blocks"]
            wanted = self._kept + (self._pages - self._kept) * number // self._cuts
            behind = max(1, wanted - blocks[0]["received"][0])

    async def _lose(self, behind: int) -> None:
        """One pause, ``behind`` so many more pages, in the middle of one."""
        source, destination = self._source, self._destination
        since = {end: len(end.monitor.events) for end in (source, destination)}
        lost_ns = await self._relay.lose_after(behind * RECORD + RECORD // 2)
        until = trio.current_time() + OUTAGE
        await self._both("postcopy-paused", since, ANSWER, "noticed")
        # Neither sends or receives anything now.
        there, here = await source.report(), await destination.report()
        sent = there["sent"]["background-pages"] + there["sent"]["requested-pages"]
        sent -= here["came-before"]["placed"]
        in_flight = (await source.migration())["ram"]["transferred"] - self._relay.carried
        await trio.sleep_until(until)
        self._relay.mend()
        went_on = await self._both("postcopy-active", since, self._recover_for + ANSWER, "recovered")
        asked = (await destination.report())["asked"]["asked-again"] - here["asked"]["asked-again"]
        self._back.append(self._at(self._relay.begun_ns))
        placed, self._kept = here["came"]["placed"], here["kept"]
        self.pauses.append(
            Pause(
                begin=self._at(lost_ns),
                end=self._at(went_on),
                share=placed / (self._pages - self._kept),
                attempts=len(source.events("MIGRATION", since[source], status="postcopy-recover-setup")),
                in_flight=in_flight - sum(p.in_flight for p in self.pauses),
                sent_twice=sent - placed - sum(p.sent_twice for p in self.pauses),
                asked_again=asked,
            )
        )

    async def _both(self, status: str, since: dict[End, int], limit: float, what: str) -> int:
        """Wait until both ends have told the status since then; when the later one did."""
        with trio.move_on_after(limit):
            while True:
                told = [end.event_ns("MIGRATION", first, status=status) for end, first in since.items()]
                if None not in told:
                    return max(when for when in told if when is not None)
                await trio.sleep(STEP)
        found = [(await end.migration())["status"] for end in since]
        raise VhostpcError(
            f"the link was lost, and this was not {what} within {limit:g} s: the migration is {found[0]} at the source "
            f"and {found[1]} at the destination"
        )

    def waited(self, faults: Iterable[tuple[str, float, float]]) -> None:
        """Enter who waited when a link came back. ``faults``: who had it, and from when to when it was."""
        rows = list(faults)
        for pause, back in zip(self.pauses, self._back, strict=True):
            found: dict[str, list[float]] = {}
            for who, begin, end in rows:
                if begin < back < end:
                    found.setdefault(who, []).append(end - begin)
            pause.waiting = [
                Waiting(who, len(waits), round(max(waits) * 1e9)) for who, waits in sorted(found.items())
            ]

    def steps(self) -> list[Step]:
        """The statuses of both ends from the first loss on, until each has completed."""
        found: list[Step] = []
        for end in (self._source, self._destination) if self.pauses else ():
            for when, event in end.monitor.events:
                status = event.get("data", {}).get("status")
                # With "setup" an end tells that it listens again.
                if (
                    event["event"] != "MIGRATION"
                    or status == "setup"
                    or self._at(when) < self.pauses[0].begin
                ):
                    continue
                found.append(Step(self._at(when), end.name, status))
                if status == "completed":
                    break
        return sorted(found, key=lambda step: step.at)


__all__ = ["MOST_CUTS", "PAUSED", "RECOVER_FOR", "Outages"]
