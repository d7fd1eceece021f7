"""The run of ``vhostpc demo``: a machine of our own moves between two endpoints, by precopy and then by postcopy.

Four other processes: a source and a destination endpoint, driven by their monitors as a user would drive them, and a
bridge at each end. The far side of the bridges is here: a UDP socket that sends each frame back.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import trio

from vhostpc.cli.demo import books
from vhostpc.cli.demo.books import (
    Far,
    Frames,
    Pages,
    Phase,
    Requests,
    Result,
    Together,
    Traffic,
    Waits,
    judge,
)
from vhostpc.cli.demo.outages import PAUSED, RECOVER_FOR, Outages
from vhostpc.cli.demo.processes import STEP, End, bridge, endpoint, far_side, machine
from vhostpc.cli.demo.relay import Relay, open_relay
from vhostpc.errors import VhostpcError
from vhostpc.frontend import FarSide
from vhostpc.listener import socket_folder
from vhostpc.pages.trace import Way
from vhostpc.ufd import Userfaultfd
from vhostpc.units import TARGET_PAGE

MIB = 1 << 20
SIZE = 128 * MIB
VCPUS = 2
BEFORE, PRECOPY, AFTER = 1.0, 2.5, 1.0
"""Seconds."""
PRECOPY_RATE, POSTCOPY_RATE = 0.24, 0.15
"""Shares of memory per second: precopy stops far from its end, and the background of postcopy takes a while."""
ONLY_REQUESTS = 1
"""Bytes per second in the background: next to nothing."""
BRIDGE_WAITS = 10.0
"""Seconds in which a bridge at the destination needs a page."""
CHECKS = 3000
"""Pages that a vCPU reads per second: not so many that it fetches all on its own."""
SHORT = 0.001
SAMPLE = 0.05
CELLS = 640
"""Parts of memory whose pages are counted in each sample."""
LIMIT, LIMIT_OF_A_PAUSE = 120.0, 30.0
MANY = 1000
"""Answered faults that are told at once, while there are more."""
DEVICES_AREA = 4 * MIB
DRIVERS = "guest's drivers"
STARTING, RUNNING, COPYING, FOLLOWING, THERE = (
    "starting two endpoints and two bridges",
    "before: the machine runs at its source",
    "precopy: pages are sent while it runs",
    "postcopy: it runs at the destination",
    "after: all of its memory has arrived",
)
LOSING = "pauses: the link is lost and recovered"

Show = Callable[[str, float], None]
"""Receives the phase, and how much of it is done (0 to 1)."""


def _silent(what: str, share: float) -> None:
    pass


class Sample(NamedTuple):
    """Seconds since the traffic began, and host pages present at the destination in each part of memory."""

    at: float
    cells: list[int]

    @property
    def present(self) -> int:
        return sum(self.cells)


class Fault(NamedTuple):
    """An answered fault: the client, the host page, the time from and to (seconds), and whether the page was
    requested because of it."""

    who: str
    page: int
    begin: float
    end: float
    asked: bool


@dataclass
class Story:
    """The data of a report besides the numbers. Times in seconds since the traffic began."""

    size: int = SIZE
    cells: list[int] = field(default_factory=list)
    """Host pages in each part of memory."""
    samples: list[Sample] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    stood: dict[str, tuple[float, float]] = field(default_factory=dict)
    """By vCPU: its last beat at the source and its first at the destination."""


class Demo:
    """One run. ``size``: bytes of memory. ``harm``: damage one byte of a page in transit.

    ``cuts``: how many times the link is lost in postcopy; ``recover_for``: seconds for which both ends then recover.
    """

    def __init__(
        self,
        show: Show = _silent,
        *,
        size: int = SIZE,
        harm: bool = False,
        cuts: int = 0,
        recover_for: float = RECOVER_FOR,
    ) -> None:
        self.show = show
        self.size = size
        self.harm = harm
        self.cuts = cuts
        self.recover_for = recover_for
        self.result = Result()
        self.story = Story(size)
        self._zero_ns = 0
        self._moving = ("active", "device", "postcopy-active", *(PAUSED if cuts else ()))
        self._sampling = trio.CancelScope()
        self._relay: Relay | None = None
        self._outages: Outages | None = None
        self._traced: list[list[Any]] = []
        self._clients: dict[str, str] = {}
        self._next_fault = 0

    async def run(self) -> Result:
        """Raises UfdError where this computer cannot do postcopy, VhostpcError when the work failed."""
        Userfaultfd.open().close()  # a user without the privilege is told before the run
        started = time.monotonic()
        limit = LIMIT + self.cuts * LIMIT_OF_A_PAUSE
        with trio.move_on_after(limit) as scope, socket_folder("vhostpc-demo-") as folder:
            async with AsyncExitStack() as stack:
                await self._story(folder, stack)
        if scope.cancelled_caught:
            raise VhostpcError(f"the demonstration did not end within {limit:g} s")
        self.result.seconds = time.monotonic() - started
        return self.result

    def _now(self) -> float:
        return self._at(time.monotonic_ns())

    def _at(self, ns: int) -> float:
        return (ns - self._zero_ns) / 1e9

    # --- the story

    async def _story(self, folder: Path, stack: AsyncExitStack) -> None:
        self.show(STARTING, 0)
        far, address = await stack.enter_async_context(far_side())
        paths = []
        for i, name in enumerate(("source's bridge", "destination's bridge")):
            paths.append(await stack.enter_async_context(bridge(name, folder, address)))
            self.show(STARTING, (i + 1) / 4)
        made = [machine(self.size, VCPUS, CHECKS, path) for path in paths]
        recovers = ("--recover-for", f"{self.recover_for:g}") if self.cuts else ()
        source = await stack.enter_async_context(endpoint("source", folder, *made[0], *recovers))
        self.show(STARTING, 3 / 4)
        destination = await stack.enter_async_context(
            endpoint("destination", folder, *made[1], "--incoming", "defer", "--trace-faults", *recovers)
        )
        self.show(STARTING, 1)
        self._zero_ns = time.monotonic_ns()
        await self._pass(RUNNING, BEFORE)
        uri = await self._wire(folder, stack, destination)
        nursery = await stack.enter_async_context(trio.open_nursery())
        nursery.start_soon(self._sample, destination)
        await self._move(source, destination, uri)
        arrived = self._now()
        await self._pass(THERE, AFTER)
        self._sampling.cancel()
        await destination.command("stop")
        ended = self._now()
        await self._count(source, destination, far, arrived, ended)
        for end in (source, destination):
            await end.command("quit")

    async def _pass(self, what: str, seconds: float) -> None:
        begin = trio.current_time()
        while (passed := trio.current_time() - begin) < seconds:
            self.show(what, passed / seconds)
            await trio.sleep(STEP)
        self.show(what, 1)

    async def _wire(self, folder: Path, stack: AsyncExitStack, destination: End) -> str:
        """The address of the destination, or of the relay before it that damages a byte or is lost."""
        path = folder / "migration.sock"
        await destination.set("postcopy-ram", "postcopy-blocktime", "events")
        await destination.command("migrate-incoming", uri=f"unix:{path}")
        if self.harm or self.cuts:
            near = folder / "relay.sock"
            self._relay = await stack.enter_async_context(open_relay(near, path, DEVICES_AREA))
            path = near
        return f"unix:{path}"

    async def _move(self, source: End, destination: End, uri: str) -> None:
        await source.set(
            "postcopy-ram",
            "events",
            max_bandwidth=int(self.size * PRECOPY_RATE),
            max_postcopy_bandwidth=ONLY_REQUESTS,
        )
        await source.command("migrate", uri=uri)
        begin = trio.current_time()
        while (passed := trio.current_time() - begin) < PRECOPY:
            self._must_go_on(await source.migration(), source, "active", "setup", "device")
            self.show(COPYING, passed / PRECOPY)
            await trio.sleep(STEP)
        self.show(COPYING, 1)
        await source.command("migrate-start-postcopy")
        async with trio.open_nursery() as nursery:
            if self.cuts:
                nursery.start_soon(self._lose_links, source, destination)
            await self._until_a_bridge_waits(source, destination)
            rate = int(self.size * POSTCOPY_RATE)
            await source.command("migrate-set-parameters", max_postcopy_bandwidth=rate)
            await self._follow(source, destination)
            nursery.cancel_scope.cancel()
        if self.harm and not (self._relay and self._relay.harmed):
            raise VhostpcError("a byte was to be damaged in transit, but no page passed")

    async def _lose_links(self, source: End, destination: End) -> None:
        async def over(number: int) -> None:
            self.show(LOSING, number / self.cuts)
            await self._take_faults(destination)

        assert self._relay is not None
        self.show(LOSING, 0)
        self._outages = Outages(
            self.cuts,
            self.size // TARGET_PAGE,
            source,
            destination,
            self._relay,
            at=self._at,
            recover_for=self.recover_for,
            over=over,
        )
        await self._until_a_bridge_waits(
            source, destination, SHORT
        )  # the first pause shows the bridge waiting, too
        await self._outages.run()

    async def _follow(self, source: End, destination: End) -> None:
        """Until all of the memory has arrived."""
        most = 0
        for end, left in ((source, True), (destination, False)):
            while (found := await end.migration())["status"] != "completed":
                self._must_go_on(found, end, *self._moving)
                if self._relay is not None and self.harm:
                    self._relay.harm = found["status"] == "postcopy-active"
                if left:
                    remaining = found["ram"]["remaining"]
                    most = max(most, remaining)
                    self.show(FOLLOWING, 1 - remaining / max(most, 1))
                await trio.sleep(STEP)
        self.show(FOLLOWING, 1)

    async def _until_a_bridge_waits(self, source: End, destination: End, step: float = STEP) -> None:
        """Wait for the bridge's faults, before the background can deliver all its pages on a busy computer."""
        with trio.move_on_after(BRIDGE_WAITS):
            while not any(device["faults"]["count"] for device in (await destination.report())["devices"]):
                self._must_go_on(await source.migration(), source, *self._moving)
                await trio.sleep(step)

    @staticmethod
    def _must_go_on(found: dict[str, Any], end: End, *statuses: str) -> None:
        if found["status"] not in statuses:
            why = found.get("error-desc", "")
            raise VhostpcError(
                f"the migration is {found['status']} at the {end.name}{': ' if why else ''}{why}"
            )

    async def _sample(self, destination: End) -> None:
        """Sample how memory fills, until cancelled."""
        with self._sampling:
            while True:
                found = await destination.command("x-vhostpc-map", cells=CELLS)
                self.story.samples.append(Sample(self._at(found["time-ns"]), found["blocks"][0]["received"]))
                await trio.sleep(SAMPLE)

    # --- the numbers

    async def _count(self, source: End, destination: End, far: FarSide, arrived: float, ended: float) -> None:
        there, here = await source.report(), await destination.report()
        checked = await destination.command("x-vhostpc-verify")
        moved, arrival = await source.migration(), await destination.migration()
        await self._faults(destination, here)
        for old, new in zip(there["vcpus"], here["vcpus"], strict=True):
            self.story.stood[new["name"]] = (self._at(old["last-beat-ns"]), self._at(new["first-beat-ns"]))
        begun = source.event_ns("MIGRATION", status="setup")
        over = source.event_ns("MIGRATION", status="completed")
        assert begun is not None
        assert over is not None
        stands, runs = self._at(there["stopped-ns"]), max(end for _, end in self.story.stood.values())
        marks = [0.0, self._at(begun), stands, runs, max(self._at(over), runs), ended]
        names = ("before", "precopy", "switch", "postcopy", "after")
        r = self.result
        r.phases = [Phase(*row) for row in zip(names, marks, marks[1:], strict=False)]
        sent, asked = there["sent"], here["asked"]
        came = here["came"] if here["kept"] is not None else dict.fromkeys(here["came"], 0)
        arrivals = (here["came-before"] or here["came"])["placed"]
        kept = here["kept"] if here["kept"] is not None else here["blocks"][0]["received"]
        r.pages = Pages(
            total=self.size // TARGET_PAGE,
            precopy=kept,
            resent=arrivals - kept,
            background=sent["background-pages"] - arrivals,
            requested=sent["requested-pages"],
            placed=came["placed"],
            twice=came["already"],
            checked=checked["pages"],
            bad=checked["bad"],
        )
        r.requests = Requests(
            asked["events"], asked["wakes"], asked["requests"], sent["requests"], asked["asked-again"]
        )
        ram = moved["ram"]
        r.bytes = Traffic(
            ram["precopy-bytes"], ram["downtime-bytes"], ram["postcopy-bytes"], ram["transferred"]
        )
        r.downtime_ms, r.total_ms = moved["downtime"], moved["total-time"]
        r.waits = self._waits(here)
        blocked = here["blocked"]
        r.together = Together(
            blocked["all-vcpus-ns"], blocked["all-ns"], arrival.get("postcopy-blocktime", 0)
        )
        r.frames = [books.frames_of(device) for device in here["devices"]]
        numbers = far.numbers()
        r.far = Far(numbers.frames, far.echoed, numbers.bad, numbers.duplicates)
        if self._outages is not None:
            self._outages.waited((f.who, f.begin, f.end) for f in self.story.faults)
            r.pauses, r.steps = self._outages.pauses, self._outages.steps()
        r.problems = judge(r, (there, here), self.cuts)

    async def _take_faults(self, destination: End) -> None:
        """The faults that were answered since the last time: the destination keeps a limited number."""
        while True:
            found = await destination.command("x-vhostpc-trace", from_=self._next_fault)
            self._next_fault = found["next"]
            self._clients |= found["clients"]
            self._traced += found["faults"]
            if len(found["faults"]) < MANY:
                return

    async def _faults(self, destination: End, here: dict[str, Any]) -> None:
        """Every answered fault, with the name of the client that waited."""
        await self._take_faults(destination)
        vcpus = {vcpu["thread"]: vcpu["name"] for vcpu in here["vcpus"]}
        backends = {device["name"] for device in here["devices"]}
        for client, thread, _, page, way, read_ns, woken_ns in self._traced:
            name = self._clients[str(client)]
            who = f"{name}'s bridge" if name in backends else vcpus.get(thread, DRIVERS)
            self.story.faults.append(
                Fault(who, page, self._at(read_ns), self._at(woken_ns), way == str(Way.ASKED))
            )

    def _waits(self, here: dict[str, Any]) -> list[Waits]:
        rows = []
        for vcpu in here["vcpus"]:
            row = self._row(vcpu["name"], vcpu["faults"])
            stood, ran = self.story.stood[vcpu["name"]]
            row.standstill_ns = round((ran - stood) * 1e9)
            rows.append(row)
        rows.append(self._row(DRIVERS, here["blocked"]["drivers"]))
        return rows + [
            self._row(f"{device['name']}'s bridge", device["faults"]) for device in here["devices"]
        ]

    @staticmethod
    def _row(name: str, told: dict[str, int]) -> Waits:
        return Waits(
            name, told["count"], *(told[f"{part}-ns"] for part in ("p50", "p99", "longest", "blocked"))
        )


__all__ = ["CELLS", "Demo", "Fault", "Frames", "Result", "Sample", "Show", "Story"]
