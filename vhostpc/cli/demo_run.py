"""What ``vhostpc demo`` does: a guest's queues and memory move to another place while frames flow.

Three processes: this one is the front-end (the guest's driver, its memory, QEMU's part in postcopy, and the
far end of the bridge's UDP link), the bridge is one, the page source is one. No frame and no page passes
through Python.
"""

from __future__ import annotations

import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import trio

from vhostpc.errors import PeerClosed, VhostpcError
from vhostpc.frontend import (
    BackendPostcopy,
    Driver,
    FarSide,
    FrontEnd,
    GuestRegion,
    MemoryShare,
    RingLayout,
    connect,
    start_ring,
    stop_ring,
)
from vhostpc.frontend.source import SourceProcess, start_source
from vhostpc.memory.ramblock import Bits, RamSet
from vhostpc.ufd.client import ClientNumbers
from vhostpc.ufd.service import FaultService
from vhostpc.wire.vhost_user import Feature

MEMORY = 64 << 20
PAGE = 4096
PAGES = MEMORY // PAGE
SEED = 2026
FRAME = 1400
#: Frames that may be on their way at a time: the loop is closed, so that no socket buffer can overflow.
WINDOW = 64
RX, TX = 0, 1
#: Queues and buffers live in the first megabytes, each buffer on a page of its own; what is behind them names
#: itself and is verified.
SLOTS = 1024
RINGS = [RingLayout.packed_at(start, SLOTS, buffer_stride=PAGE) for start in (0x10000, 0x500000)]
WORKLOAD = 0xA00000 // PAGE
BEFORE, WITHHOLD, AFTER = 1.5, 1.0, 1.5
#: Bytes a second of pages that nobody asked for.
BACKGROUND = 24 << 20

Show = Callable[[str, float], None]
"""Told what is going on, and the share of memory that has moved (0 to 1)."""


@dataclass
class Phase:
    """Frames of one phase: sent by the guest and received back by it."""

    name: str
    sent: int = 0
    received: int = 0


@dataclass
class Result:
    """The numbers of a demonstration; ``problems`` says which of them do not agree."""

    phases: list[Phase] = field(default_factory=list)
    far_frames: int = 0
    echoed: int = 0
    damaged: int = 0
    duplicates: int = 0
    pages: int = PAGES
    placed: int = 0
    zero_pages: int = 0
    requests: int = 0
    bad_pages: int = 0
    withheld_pages: int = 0
    withheld_s: float = 0
    answered_meanwhile: int = 0
    """Control messages that the bridge answered while pages were withheld."""
    bridge: ClientNumbers | None = None
    guest: ClientNumbers | None = None
    seconds: float = 0
    problems: list[str] = field(default_factory=list)

    @property
    def sent(self) -> int:
        return sum(p.sent for p in self.phases)

    @property
    def received(self) -> int:
        return sum(p.received for p in self.phases)


class Traffic:
    """A closed loop of frames: out by the sending queue, back by the receiving one."""

    def __init__(self, drivers: list[Driver]) -> None:
        self.rx, self.tx = drivers
        self.sending = True
        self._paused = trio.Event()
        self._ended = (0, 0)

    def end_phase(self, name: str) -> Phase:
        """What was sent and received since the phase before ended."""
        sent, received = self.counts()
        phase = Phase(name, sent - self._ended[0], received - self._ended[1])
        self._ended = sent, received
        return phase

    def counts(self) -> tuple[int, int]:
        return self.tx.numbers().posted, self.rx.numbers().received.frames

    async def run(self) -> None:
        """Until cancelled. Python sees batches only."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.rx.run)
            while True:
                await self.tx.reap()
                sent, received = self.counts()
                if not self.sending:
                    self._paused.set()
                elif sent - received < WINDOW:
                    await self.tx.post(min(16, WINDOW - (sent - received)), FRAME)
                await trio.sleep(0.004)

    async def drain(self) -> None:
        """Stop sending and wait until every frame is back. Raises VhostpcError if some do not come."""
        self.sending, self._paused = False, trio.Event()
        with trio.move_on_after(5):
            await self._paused.wait()
            while self.counts()[0] != self.counts()[1]:
                await trio.sleep(0.005)
            return
        sent, received = self.counts()
        raise VhostpcError(f"{sent - received} of {sent} frames did not come back")


@asynccontextmanager
async def bridge(path: Path, far: tuple[str, int]) -> AsyncIterator[subprocess.Popen[bytes]]:
    """The bridge's process."""
    process = subprocess.Popen(  # noqa: ASYNC220  not waited for
        [sys.executable, "-m", "vhostpc.cli.demo_bridge", str(path), far[0], str(far[1])],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        process_group=0,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        with trio.move_on_after(15):
            await trio.lowlevel.wait_readable(process.stdout.fileno())
        if process.stdout.readline() != b"ready\n":
            raise VhostpcError("the bridge's process did not start")
        yield process
    finally:
        process.stdin.close()
        process.stdout.close()
        process.kill()
        process.wait()


class Demo:
    """One run. ``show`` is called now and then."""

    def __init__(self, show: Show) -> None:
        self.show = show
        self.result = Result()
        self.source_ram, self.ram = RamSet(), RamSet()

    async def run(self) -> Result:
        """Raises UfdError where the machine can not do postcopy, VhostpcError when the work failed."""
        started = time.monotonic()
        try:
            for ram in (self.source_ram, self.ram):
                ram.create("pc.ram", MEMORY)
            self.show("filling the guest's memory", 0)
            await self.source_ram["pc.ram"].fill(SEED, WORKLOAD, (PAGES - WORKLOAD) // 2)
            with (
                tempfile.TemporaryDirectory(prefix="vhostpc-demo-") as folder,
                socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock,
            ):
                sock.bind(("127.0.0.1", 0))
                with FarSide(sock, echo=True) as far:
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(far.run)
                        async with bridge(Path(folder) / "bridge.sock", sock.getsockname()) as process:
                            await self._guest(Path(folder) / "bridge.sock", far)
                            if process.poll() is not None:
                                self.result.problems.append("the bridge ended by itself")
                        nursery.cancel_scope.cancel()
            self.result.seconds = time.monotonic() - started
            return self.result
        finally:
            self.source_ram.close()
            self.ram.close()

    def _regions(self, ram: RamSet) -> list[GuestRegion]:
        return [GuestRegion(0, MEMORY, ram["pc.ram"])]

    async def _guest(self, path: Path, far: FarSide) -> None:
        event_idx = True
        regions = self._regions(self.source_ram)
        with (
            Driver(self.source_ram, regions, RINGS[RX], receive=True, event_idx=event_idx) as rx,
            Driver(self.source_ram, regions, RINGS[TX], event_idx=event_idx) as tx,
        ):
            traffic = Traffic([rx, tx])
            for driver in (rx, tx):
                await driver.reset()
            self.show("before: frames flow at the source", 0)
            bases = await self._before(path, traffic)
            for driver in (rx, tx):
                driver.move(self.ram)
            await self._move(path, traffic, bases)
            for driver in (rx, tx):
                numbers = driver.numbers()
                self.result.damaged += numbers.received.bad + numbers.bad_used
                self.result.duplicates += numbers.received.duplicates
            came = far.numbers()
            self.result.damaged += came.bad
            self.result.duplicates += came.duplicates
            self.result.far_frames, self.result.echoed = came.frames, far.echoed
        await self._verify()

    async def _before(self, path: Path, traffic: Traffic) -> list[int]:
        """The session at the source; returns where each queue goes on."""
        async with connect(path) as front:
            await self._negotiate(front)
            memory = MemoryShare(front, self._regions(self.source_ram))
            await memory.share()
            async with trio.open_nursery() as nursery:
                await traffic.rx.post(RINGS[RX].slots)
                await self._start(front, memory, traffic, [0, 0])
                nursery.start_soon(traffic.run)
                await trio.sleep(BEFORE)
                await traffic.drain()
                self.result.phases.append(traffic.end_phase("before"))
                nursery.cancel_scope.cancel()
            return [await stop_ring(front, index) for index in (RX, TX)]

    async def _negotiate(self, front: FrontEnd) -> None:
        await front.negotiate()
        if not front.features & Feature.EVENT_IDX:
            raise PeerClosed("the bridge does not offer the event index")

    @staticmethod
    async def _start(front: FrontEnd, memory: MemoryShare, traffic: Traffic, bases: list[int]) -> None:
        for index, driver in ((RX, traffic.rx), (TX, traffic.tx)):
            await start_ring(front, memory, index, driver, base=bases[index])

    async def _move(self, path: Path, traffic: Traffic, bases: list[int]) -> None:
        result, block = self.result, self.ram["pc.ram"]
        async with AsyncExitStack() as stack:
            service = stack.enter_context(FaultService(self.ram))
            source = await stack.enter_async_context(start_source(self.source_ram.blocks))
            front = await stack.enter_async_context(connect(path))
            await self._negotiate(front)
            memory = MemoryShare(front, self._regions(self.ram))
            postcopy = BackendPostcopy(front, service, name="bridge")
            service.set_return_path(source.sock.fileno())
            service.arm()
            loaded: list[int] = []
            async with trio.open_nursery() as nursery:

                async def load() -> None:
                    numbers = await service.load(source.sock.fileno())
                    loaded.append(numbers.placed)
                    result.zero_pages = numbers.zero_pages

                nursery.start_soon(service.run)
                nursery.start_soon(load)
                await postcopy.advise()
                await postcopy.listen()
                await postcopy.share(memory)
                # What the bridge will receive into after a few hundred frames stays away for a while.
                first, soon = RINGS[RX].buffers // PAGE, (bases[RX] + SLOTS // 2) % SLOTS
                await source.hold("pc.ram", first + soon, min(SLOTS // 4, SLOTS - soon))
                await self._start(front, memory, traffic, bases)
                traffic.sending = True
                nursery.start_soon(traffic.run)
                nursery.start_soon(self._workload)
                await self._withhold(front, source)
                await source.set_rate(BACKGROUND)
                while not loaded:
                    self.show("during: pages follow", block.count_bits(Bits.RECEIVED) / PAGES)
                    await trio.sleep(0.05)
                result.phases.append(traffic.end_phase("during"))
                self.show("after: every page has come", 1)
                result.bridge = postcopy.client.numbers() if postcopy.client else None
                result.guest = service.own.numbers()
                await postcopy.end()
                await trio.sleep(AFTER)
                await traffic.drain()
                result.phases.append(traffic.end_phase("after"))
                result.placed = loaded[0]
                result.requests = service.numbers().requests
                nursery.cancel_scope.cancel()
            for index in (RX, TX):
                await stop_ring(front, index)

    async def _withhold(self, front: FrontEnd, source: SourceProcess) -> None:
        """Hold pages back until the queues stand still for them, see that the bridge answers, let go."""
        self.show("during: pages come when asked for", 0)
        with trio.move_on_after(10):
            await source.wait_held(1)
        start = trio.current_time()
        while trio.current_time() - start < WITHHOLD:
            await front.barrier()
            self.result.answered_meanwhile += 1
            share = self.ram["pc.ram"].count_bits(Bits.RECEIVED) / PAGES
            self.show("during: pages are withheld", share)
            await trio.sleep(0.02)
        self.result.withheld_pages = (await source.numbers()).held
        await source.release("pc.ram")
        self.result.withheld_s = trio.current_time() - start

    async def _workload(self) -> None:
        """The guest's processor: reads its pages in no order, and checks each."""
        order = list(range(WORKLOAD, WORKLOAD + (PAGES - WORKLOAD) // 2))
        random.Random(SEED).shuffle(order)
        for page in order[:2000]:
            bad, _ = await self.ram["pc.ram"].verify(SEED, page, 1)
            self.result.bad_pages += bad

    async def _verify(self) -> None:
        """All of the memory that no device writes to, and the sums."""
        r, half = self.result, (PAGES - WORKLOAD) // 2
        bad, _ = await self.ram["pc.ram"].verify(SEED, WORKLOAD, half)
        rest = (WORKLOAD + half) * PAGE
        if any(await self.ram["pc.ram"].read(rest, MEMORY - rest)):
            bad += 1
        r.bad_pages += bad
        checks = [
            (r.sent == r.received, f"{r.sent} frames sent and {r.received} received back"),
            (r.far_frames == r.sent, f"{r.far_frames} of {r.sent} frames came out of the bridge"),
            (len(r.phases) == 3 and all(p.received for p in r.phases), "a phase without traffic"),
            (r.damaged == 0, f"{r.damaged} damaged frames"),
            (r.duplicates == 0, f"{r.duplicates} frames came twice"),
            (r.placed == r.pages, f"{r.placed} of {r.pages} pages were placed"),
            (r.bad_pages == 0, f"{r.bad_pages} pages are not what they were"),
            (r.withheld_pages > 0, "no page was asked for while it was withheld"),
            (r.answered_meanwhile > 0, "the bridge answered nothing while pages were withheld"),
        ]
        for client in (r.bridge, r.guest):
            if client is None or not client.faults:
                r.problems.append("a client without faults")
                continue
            checks.append((client.found_nothing == 0, f"{client.found_nothing} faults found no page"))
            checks.append((client.wakes == client.faults, f"{client.faults} faults, {client.wakes} wakes"))
        r.problems += [text for good, text in checks if not good]
