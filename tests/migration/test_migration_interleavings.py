"""Both ends of a migration under random interleavings and cuts: where the machine runs, and where never.

Two endpoints of this process are joined by a wire that lets bytes through when it is told to, and breaks where it is
told to. Each of the machine's methods can find that something is short, and so can whatever else an end allocates.
Whatever is played: the machine never runs at both ends, and where it runs nowhere a status says why.
With postcopy-preempt there are two wires, of which either is cut.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest import mock

import pytest
import trio
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.kit.scripted_destination import LivelyMachine, content
from tests.kit.until import until
from tests.kit.wires import Wires
from vhostpc.dialect import DIALECTS, Compat
from vhostpc.endpoint import Endpoint
from vhostpc.errors import MemoryLost, MigrationRefused
from vhostpc.migration.held import HeldMachine
from vhostpc.migration.link import IncomingLink
from vhostpc.migration.machine import nobody
from vhostpc.migration.options import Options
from vhostpc.migration.phase import Event, Phase
from vhostpc.migration.runstate import RunState
from vhostpc.migration.status import BUSY, Status
from vhostpc.pages.pagesource import PageSource
from vhostpc.pages.service import FaultService
from vhostpc.wire.migration.elements import Configuration, DeviceSection, RamBlocks

PAGES = 400
PREEMPT = "postcopy-preempt"
LARGE = 1 << 20
"""Bytes of device state that no socket takes at once: the package can be cut."""


@dataclass
class World:
    """Where the machine runs: looked at with every start.

    ``short``: at which end, and at which call of the machine or allocation there, something is short.
    """

    running: set[str] = field(default_factory=set)
    both: bool = False
    short: tuple[str, int | str] | None = None
    """The number of the call, or the name of what is called."""
    fell_short: str = ""
    """The end and the method that met it."""
    called: set[tuple[str, str]] = field(default_factory=set)
    recovered: int = 0

    def call(self, where: str, what: str) -> None:
        self.called.add((where, what))
        if self.short is None or self.short[0] != where or self.fell_short:
            return
        number = self.short[1]
        if isinstance(number, int) and number:
            self.short = (where, number - 1)
        elif number in (0, what):
            self.fell_short = f"{where} {what}"
            raise RuntimeError("can't start new thread")

    def starts(self, where: str) -> None:
        self.running.add(where)
        self.both |= len(self.running) > 1

    def stops(self, where: str) -> None:
        self.running.discard(where)


ALLOCATIONS: tuple[tuple[str, type, str], ...] = (
    ("source", PageSource, "__init__"),
    ("source", PageSource, "set_tail"),
    ("source", PageSource, "add_urgent"),
    ("destination", FaultService, "__init__"),
    ("destination", FaultService, "set_return_path"),
    ("destination", FaultService, "arm"),
    ("destination", FaultService, "open_channel"),
    ("destination", IncomingLink, "open_urgent"),
)
"""What the ends allocate themselves: threads, descriptors, mappings, memory."""


@contextmanager
def allocations(world: World) -> Iterator[None]:
    """Each of them can find that something is short."""
    with ExitStack() as stack:
        for where, kind, name in ALLOCATIONS:

            def allocate(where: str, what: str, whole: Callable[..., Any], *args: Any, **more: Any) -> Any:
                if args[1:] != (None,):  # a return path that is taken away
                    world.call(where, what)
                return whole(*args, **more)

            call = partial(allocate, where, f"{kind.__name__}.{name}", getattr(kind, name))
            stack.enter_context(
                mock.patch.object(kind, name, lambda *args, call=call, **more: call(*args, **more))
            )
        yield


class Here(LivelyMachine):
    """The machine at its source; it writes a page with every look at its memory."""

    def __init__(self, world: World, state: int = 4) -> None:
        super().__init__(ram0=PAGES)
        self.world = world
        self.state = state
        self.runnable = True
        self.running = True
        world.starts("source")

    async def start_tracking(self) -> None:
        self.world.call("source", "start_tracking")
        await super().start_tracking()

    async def sync_dirty(self) -> int:
        self.world.call("source", "sync_dirty")
        return await super().sync_dirty()

    async def stop_tracking(self) -> None:
        await super().stop_tracking()
        self.world.call("source", "stop_tracking")

    async def stop(self) -> None:
        self.world.call("source", "stop")
        self.stopped = True
        self.running = False
        self.world.stops("source")

    async def cont(self, runs: Callable[[], None] = nobody) -> None:
        self.world.call("source", "cont")
        self.stopped = False
        self.running = True
        self.world.starts("source")

    def state_size(self) -> int:
        self.world.call("source", "state_size")
        return super().state_size()

    async def save(self) -> tuple[list[DeviceSection], bytes]:
        self.world.call("source", "save")
        return [DeviceSection(9, "clk", 0, 1, bytes(self.state))], b"{}"


class There(HeldMachine):
    """The machine where it goes."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self.world = world
        self.runnable = True
        self.came_as = RunState.RUNNING

    def accept(self, configuration: Configuration) -> None:
        self.world.call("destination", "accept")
        super().accept(configuration)

    async def advise(self, service: FaultService) -> None:
        self.world.call("destination", "advise")

    def accept_blocks(self, listed: RamBlocks, *, postcopy: bool) -> None:
        self.world.call("destination", "accept_blocks")
        super().accept_blocks(listed, postcopy=postcopy)

    async def listen(self) -> None:
        self.world.call("destination", "listen")

    async def load(self, section: DeviceSection) -> None:
        self.world.call("destination", "load")
        await super().load(section)

    async def loaded(self, description: bytes) -> None:
        self.world.call("destination", "loaded")
        await super().loaded(description)

    async def end(self) -> None:
        self.world.call("destination", "end")

    async def stop(self) -> None:
        self.running = False
        self.world.stops("destination")

    async def cont(self, runs: Callable[[], None] = nobody) -> None:
        self.world.call("destination", "cont")
        self.running = True
        self.world.starts("destination")


class Told:
    def __init__(self) -> None:
        self.events: list[str] = []

    def emit(self, name: str, data: dict[str, Any] | None = None) -> None:
        self.events.append(name)

    def migration(self, status: Status) -> None:
        self.events.append(str(status))

    def migration_pass(self, number: int) -> None:
        pass

    def stop(self) -> None:
        self.events.append("STOP")

    def resume(self) -> None:
        self.events.append("RESUME")


Step = tuple[str, int]
STEPS = st.one_of(
    st.tuples(st.just("forward"), st.sampled_from([1, 7, 60, 500, 5000, 70000, 400000])),
    st.tuples(st.just("back"), st.sampled_from([1, 8, 100, 5000])),
    st.tuples(st.sampled_from(["all", "all there", "until it runs there"]), st.just(0)),
    st.tuples(st.just("postcopy"), st.just(0)),
    st.tuples(st.just("cancel"), st.just(0)),
    st.tuples(
        st.sampled_from(["source stop", "source cont", "destination cont", "destination stop"]), st.just(0)
    ),
    st.tuples(st.just("cut"), st.just(0)),
    st.tuples(st.just("touch"), st.integers(0, PAGES - 1)),
    st.tuples(st.just("cut beside"), st.just(0)),
    st.tuples(st.just("forward beside"), st.sampled_from([1, 7, 60, 5000])),
    st.tuples(st.sampled_from(["recover here", "recover there", "recover", "recover"]), st.just(0)),
    st.tuples(st.sampled_from(["source pause", "destination pause"]), st.just(0)),
)


async def play(
    compat: Compat,
    capability: str,
    steps: list[Step],
    state: int = 4,
    short: tuple[str, int | str] | None = None,
    silent: bool = False,
) -> World:
    world, wires = World(short=short), Wires()
    needed = {"postcopy-ram"} if capability == PREEMPT else set()
    chosen = Options(compat, on={"events", capability, *needed})
    here, there = Here(world, state), There(world)
    tells = Told(), Told()
    source = Endpoint(here, chosen, tells[0])
    destination = Endpoint(there, Options(compat, on=set(chosen.on)), tells[1], incoming=True)
    for page in range(0, PAGES, 2):
        await here.write("ram0", page, b"page %d" % page)
    asked_to_stop = {"source": False, "destination": False}

    async def refusable(call: Callable[[], Any]) -> bool:
        try:
            await call()
        except (MigrationRefused, RuntimeError):  # refused, or short of something: the monitor says so
            return False
        return True

    async def recover(*ends: str) -> None:
        """Join both ends anew, or have one of them wait for the other: over a wire that one end has already."""
        if not wires.last.left.issuperset(ends):
            wires.add()
        for end in ends:
            waits = destination._course.allows(Event.RECOVER) or destination._course.phase is Phase.MOVED
            if end == "destination" and waits and destination._course.side == "destination":
                await refusable(lambda: destination.recover(wires.take("destination")))
            elif end == "source" and source.status is Status.POSTCOPY_PAUSED:
                await refusable(lambda: source.migrate(wires.take("source"), resume=True))

    async def touch(page: int) -> None:
        with suppress(MemoryLost):  # it ends in a pause
            await there.ram["ram0"].read(page * 4096, 1)

    async def do(step: Step) -> None:
        name, number = step
        wire, beside = wires.last, wires.beside
        if name == "forward":
            wire.forward(number)
        elif name == "forward beside":
            beside.forward(number)
        elif name == "back":
            wire.back(number)
        elif name in ("all", "all there", "until it runs there"):
            idle, size = 0, 4000 if name == "until it runs there" else 1 << 20
            while idle < 10 and not (name == "until it runs there" and "destination" in world.running):
                moved = wire.forward(size) | beside.forward(size) or (name == "all" and wire.back(1 << 20))
                if not moved and capability == PREEMPT and "destination" not in world.running:
                    moved = wire.back(1 << 20)  # it waits for answers before postcopy
                idle = 0 if moved else idle + 1
                await trio.sleep(0.002)
        elif name == "postcopy":
            if capability != "return-path":
                await source.start_postcopy()
        elif name == "cancel":
            await refusable(source.cancel)
        elif name == "cut":
            wire.break_it()
        elif name == "touch":
            if "destination" in world.running:
                nursery.start_soon(touch, number)
        elif name == "cut beside":
            beside.break_it()
        elif name.startswith("recover"):
            end = {"recover here": ["source"], "recover there": ["destination"]}.get(name)
            await recover(*(end or ["destination", "source"]))
        else:
            side, word = name.split()
            endpoint = source if side == "source" else destination
            if name == "source cont" and (undecided(source) or source.status is Status.COMPLETED):
                return  # only a person can know: see test_silence_at_the_end_of_precopy, and behind it
            if await refusable(getattr(endpoint, word)) and word != "pause":
                asked_to_stop[side] = word == "stop"
        # Let what was set off happen, or not quite: both ends have threads.
        await trio.sleep(0.001 if number % 2 else 0)

    with trio.fail_after(60), here, there, allocations(world), wires.joined():
        async with trio.open_nursery() as nursery:
            for endpoint in (source, destination):
                await nursery.start(endpoint.serve)
            await destination.incoming(wires.take("destination"), exit_on_error=False)
            await source.migrate(wires.take("source"), resume=False)
            for step in steps:
                await do(step)
                assert not world.both
            if silent:  # nothing moves any more; a person cancels, and in the end the link is lost
                await refusable(source.cancel)
                await trio.sleep(0.005)
                assert not world.both
                wires.last.break_it()
            # To its end: all data still in flight gets there, or the wire breaks.
            pumping = trio.CancelScope()

            async def pump() -> None:
                with pumping:
                    while True:
                        moved = wires.move(1 << 20)
                        await trio.sleep(0 if moved else 0.002)

            nursery.start_soon(pump)
            settled = BUSY - {Status.POSTCOPY_PAUSED}

            async def settle() -> None:
                await until(
                    lambda: source.status not in settled
                    and (destination.status not in settled or source.status is Status.CANCELLED),
                    what=f"an end of {steps}: {source.status} {destination.status}",
                    limit=30,
                )

            for wire in wires.all:
                if wire.left:  # nobody comes any more to an end that waits there
                    wire.break_it()
            await settle()
            # A pause is never the end, unless the machine has run nowhere: it is recovered, and all is there.
            for _ in range(3):
                if source.status is Status.POSTCOPY_PAUSED and destination.status is not Status.FAILED:
                    await recover("destination", "source")
                    await settle()
            if source.status is Status.POSTCOPY_PAUSED:
                assert destination.status is Status.FAILED, (steps, destination.status)
            if source._course.phase is Phase.MOVED:
                assert await content(there.ram) == await content(here.ram)
                assert destination._incoming is not None
                assert destination._incoming.loads()[-1].already == 0
            await until(lambda: source.run_state != "finish-migrate" or not may_go_on(source))
            assert not world.both
            if world.fell_short == "source cont":
                asked_to_stop["source"] = True  # it stands, and its status says so
            world.recovered = getattr(source._outgoing, "resumptions", 0)
            judge(world, source, destination, asked_to_stop, tells[0].events)
            pumping.cancel()
            nursery.cancel_scope.cancel()
        wires.close()
    return world


def undecided(source: Endpoint) -> bool:
    """All was sent, and no word came: where it runs is not known here."""
    return source._course.phase is Phase.UNKNOWN


def may_go_on(source: Endpoint) -> bool:
    return source.status in (Status.FAILED, Status.CANCELLED)


def judge(
    world: World,
    source: Endpoint,
    destination: Endpoint,
    asked_to_stop: dict[str, bool],
    events: list[str],
) -> None:
    told = f"{source.status}/{source.run_state} {destination.status}/{destination.run_state} {world.running}"
    if "source" in world.running:
        assert source.status in (Status.FAILED, Status.CANCELLED), told
        assert "destination" not in world.running, told
    if "destination" in world.running:
        assert source.status in (Status.COMPLETED, Status.POSTCOPY_PAUSED, Status.FAILED), told
        if source.status is Status.FAILED:  # the end of a precopy, whose last word was lost
            assert str(Status.POSTCOPY_ACTIVE) not in events, told
        # It was not started again here, whatever was asked.
        assert source.run_state in ("postmigrate", "finish-migrate", "paused"), told
    if not world.running:
        stopped_on_purpose = any(asked_to_stop.values())
        paused = Status.POSTCOPY_PAUSED in (source.status, destination.status)
        assert stopped_on_purpose or paused or undecided(source), told


@given(
    compat=st.sampled_from(sorted(DIALECTS)),
    capability=st.sampled_from(["postcopy-ram", PREEMPT, "return-path"]),
    steps=st.lists(STEPS, max_size=25),
    state=st.sampled_from([4, LARGE]),
    short=st.none() | st.tuples(st.sampled_from(["source", "destination"]), st.integers(0, 14)),
    silent=st.booleans(),
)
@example("10.0", "postcopy-ram", [("postcopy", 0), ("until it runs there", 0), ("cut", 0)], 4, None, False)
@example(
    "7.2", "postcopy-ram", [("postcopy", 0), ("all there", 0), ("cut", 0), ("source cont", 0)], 4, None, False
)
@example("11.1", "postcopy-ram", [("postcopy", 0), ("until it runs there", 0), ("cut", 0)], 4, None, False)
@example("11.1", "postcopy-ram", [("postcopy", 0), ("all", 0)], 4, ("destination", 11), False)
@example("11.1", "postcopy-ram", [("postcopy", 0), ("forward", 400000)], LARGE, None, True)
@example("10.0", "return-path", [("all there", 0), ("cut", 0)], 4, None, False)
@example("10.0", "postcopy-ram", [("postcopy", 0), ("forward", 1), ("cut", 0)], 4, None, False)
@example("10.0", "return-path", [("all there", 0), ("cancel", 0), ("source cont", 0)], 4, None, False)
@example("10.0", "postcopy-ram", [("postcopy", 0), ("forward", 400000), ("cut", 0)], LARGE, None, False)
@example(
    "10.0", "postcopy-ram", [("postcopy", 0), ("all there", 0), ("cut", 0), ("recover", 0)], 4, None, False
)
@example(
    "7.2",
    "postcopy-ram",
    [("postcopy", 0), ("until it runs there", 0), ("cut", 0), ("recover", 0), ("forward", 60), ("cut", 0)],
    4,
    None,
    False,
)
@example("10.0", "postcopy-ram", [("postcopy", 0), ("forward", 400000)], LARGE, None, True)
@example("7.2", "postcopy-ram", [("postcopy", 0), ("forward", 400000)], LARGE, None, True)
@example("10.0", "return-path", [("all there", 0)], 4, None, True)
@example("10.0", "postcopy-ram", [("postcopy", 0), ("all", 0)], 4, ("destination", 11), False)
@example(
    "10.0",
    "postcopy-ram",
    [("source stop", 0), ("postcopy", 0), ("forward", 400000), ("cut", 0)],
    LARGE,
    ("source", "stop"),
    False,
)
@example("10.0", PREEMPT, [("postcopy", 0), ("until it runs there", 0), ("cut beside", 0)], 4, None, False)
@example(
    "10.0",
    PREEMPT,
    [("postcopy", 0), ("until it runs there", 0), ("touch", 398), ("back", 100), ("cut beside", 0)],
    4,
    None,
    False,
)
@example("7.2", PREEMPT, [("postcopy", 0), ("until it runs there", 0), ("cut beside", 0)], 4, None, False)
@example("10.0", PREEMPT, [("postcopy", 0), ("cut beside", 0), ("all", 0)], 4, None, False)
@example("7.2", PREEMPT, [("postcopy", 0), ("all", 0)], 4, ("destination", "IncomingLink.open_urgent"), False)
@example("7.2", PREEMPT, [("postcopy", 0), ("forward", 400000)], LARGE, None, True)
@settings(suppress_health_check=[HealthCheck.too_slow])
def test_it_never_runs_at_both_ends(
    compat: Compat,
    capability: str,
    steps: list[Step],
    state: int,
    short: tuple[str, int | str] | None,
    silent: bool,
) -> None:
    trio.run(play, compat, capability, steps, state, short, silent)


AT_SOURCE = ["PageSource.__init__", "start_tracking", "sync_dirty", "stop", "save", "stop_tracking"]
AT_DESTINATION = ["FaultService.__init__", "accept", "FaultService.set_return_path", "accept_blocks"]
AT_DESTINATION += ["FaultService.open_channel", "load", "loaded", "cont"]
IN_POSTCOPY = [("source", "state_size"), ("source", "PageSource.set_tail")]
IN_POSTCOPY += [("destination", what) for what in ("advise", "FaultService.arm", "listen", "end")]
CALLS = [
    *(("return-path", "source", what) for what in AT_SOURCE),
    *(("return-path", "destination", what) for what in AT_DESTINATION),
    *(("postcopy-ram", "source", what) for what in AT_SOURCE),
    *(("postcopy-ram", "destination", what) for what in AT_DESTINATION),
    *(("postcopy-ram", where, what) for where, what in IN_POSTCOPY),
    *((PREEMPT, "source", what) for what in (*AT_SOURCE, "PageSource.add_urgent")),
    *((PREEMPT, "destination", what) for what in (*AT_DESTINATION, "IncomingLink.open_urgent")),
    *((PREEMPT, where, what) for where, what in IN_POSTCOPY),
]
WHOLE: list[Step] = [("postcopy", 0), ("all", 0)]


@pytest.mark.parametrize(("capability", "where", "what"), CALLS, ids=str)
async def test_each_call_falls_short_once(capability: str, where: str, what: str) -> None:
    world = await play("10.0", capability, WHOLE, short=(where, what))
    assert world.fell_short == f"{where} {what}"


@pytest.mark.parametrize("capability", ["return-path", "postcopy-ram", PREEMPT])
async def test_no_call_is_left_out(capability: str) -> None:
    world = await play("10.0", capability, WHOLE)
    assert world.called == {call[1:] for call in CALLS if call[0] == capability}
