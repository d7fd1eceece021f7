"""Our own machine: RAM, vCPUs that check it, network devices with vhost-user back-ends; it runs and migrates.

Guest addresses: the RAM blocks one after the other, each from a multiple of 1 GiB. The devices' rings and buffers
lie at the beginning of the first block; the vCPUs work on the rest, and now and then read the devices' pages, so that
vCPUs and back-ends wait for the same pages.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any
from uuid import UUID

import trio

from vhostpc.errors import (
    GuestMemoryError,
    MemoryLost,
    MigrationRefused,
    RequestFailed,
    Shortage,
    StreamError,
    UfdError,
    sentence,
)
from vhostpc.frontend import GuestRegion, SharedLog
from vhostpc.guest.backends import TIMEOUT, BackEnd, open_backend
from vhostpc.guest.netdev import AREA, NetDevice
from vhostpc.guest.reconnect import keep_connected
from vhostpc.guest.sections import MACHINE, VCPU, description, globalstate, name_of, run_state_of
from vhostpc.guest.side_by_side import side_by_side
from vhostpc.guest.vcpu import Area, VCpu, stop_all
from vhostpc.logs import rationed_logger
from vhostpc.memory.available import available_memory
from vhostpc.migration.machine import nobody
from vhostpc.migration.runstate import RunState
from vhostpc.pages.blocktime import Blocktime, ThreadWaits
from vhostpc.pages.dirty import DirtyTracker, DirtyWay
from vhostpc.pages.faultclient import ClientNumbers
from vhostpc.pages.ramblock import Bits, RamBlock, RamSet, refusal
from vhostpc.pages.ramfiles import RamFiles
from vhostpc.pages.service import FaultService
from vhostpc.pages.waits import Waits
from vhostpc.units import TARGET_PAGE, in_units, sizes_differ
from vhostpc.wire.migration.elements import Configuration, DeviceSection, RamBlocks

log = rationed_logger(__name__)

NAME = "vhostpc-1"
RAM_SECTION = 1
RUN_STATES = (RunState.RUNNING, RunState.PAUSED, RunState.PRELAUNCH)
"""The run states in which it may be sent: prelaunch is before it first ran."""
MOST_STATE = 1 << 20
"""Bytes of a section of this machine in the stream, at most."""
GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Block:
    """A RAM block to be created: bytes, and bytes of a host page."""

    name: str
    length: int
    page_size: int = TARGET_PAGE


@dataclass(frozen=True, slots=True)
class Spec:
    """The parts of a machine. ``backends``: sockets, one network device each.

    ``writes`` and ``checks``: pages that each vCPU rewrites and reads in a second. ``tracking``: None for the best
    that the kernel has. ``timeout``: seconds that a back-end's answer may take. ``reconnect``: seconds between two
    attempts to connect to a back-end that is gone; None: there is none.
    """

    blocks: Sequence[Block]
    vcpus: int = 1
    backends: Sequence[str] = ()
    writes: int = 1000
    checks: int = 20000
    seed: int = field(default_factory=time.time_ns)
    tracking: DirtyWay | None = None
    timeout: float = TIMEOUT
    reconnect: float | None = None


@asynccontextmanager
async def open_machine(
    spec: Spec, *, empty: bool = False, files: RamFiles | None = None
) -> AsyncIterator[OwnMachine]:
    """Create the machine, stopped. ``empty``: its memory and its devices' state come from elsewhere. ``files``: where
    its memory lies.

    Raises GuestMemoryError for memory that cannot be allocated, PeerClosed and others for back-ends.
    """
    async with AsyncExitStack() as stack:
        ram = stack.enter_context(RamSet(files=files))
        regions = make_blocks(ram, spec.blocks, len(spec.backends), spec.vcpus)
        devices: list[NetDevice] = []
        for i, path in enumerate(spec.backends):
            backend = await stack.enter_async_context(
                open_backend(path, f"net{i}", regions, timeout=spec.timeout)
            )
            devices.append(NetDevice(i, ram, regions, i * AREA, backend))
            stack.callback(devices[-1].close)
        vcpus = [stack.enter_context(vcpu) for vcpu in make_vcpus(ram, spec, len(devices) * AREA)]
        dirty_log = SharedLog(regions)
        stack.callback(dirty_log.close)
        nursery = await stack.enter_async_context(trio.open_nursery())
        machine = OwnMachine(spec, ram, regions, vcpus, devices, dirty_log, nursery)
        if spec.reconnect is not None:
            for device in devices:
                keep = partial(keep_connected, pause=spec.reconnect, timeout=spec.timeout)
                nursery.start_soon(keep, device, regions, machine.reconnected)
        if not empty:
            await machine.fill()
        try:
            yield machine
        finally:
            nursery.cancel_scope.cancel()


def make_blocks(ram: RamSet, blocks: Sequence[Block], devices: int, vcpus: int) -> list[GuestRegion]:
    """Raises GuestMemoryError, one sentence."""
    if not blocks:
        raise GuestMemoryError("a machine of its own needs memory: give --ram NAME=SIZE")
    if devices and blocks[0].length < devices * AREA:
        raise GuestMemoryError(
            f"the rings of {devices} devices need {devices * AREA >> 20} MiB of the first RAM block, "
            f"{blocks[0].name!r}, which has {blocks[0].length >> 20}"
        )
    if sum(block.length for block in blocks) // TARGET_PAGE - devices * AREA // TARGET_PAGE < vcpus:
        raise GuestMemoryError(f"{vcpus} vCPUs need a page of memory each besides the devices' areas")
    regions = []
    at = 0
    for block in blocks:
        try:
            made = ram.create(block.name, block.length, block.page_size)
        except OSError as e:
            raise GuestMemoryError(
                f"RAM block {block.name!r}, {in_units(block.length)} in pages of {in_units(block.page_size)}, "
                f"cannot be created: {refusal(e, block.length, block.page_size)}"
            ) from None
        unit = max(GIB, block.page_size)
        at = (at + unit - 1) // unit * unit
        regions.append(GuestRegion(at, block.length, made))
        at += block.length
    # All of it is written: a machine that does not fit would be killed by the kernel, without a word.
    total = sum(block.length for block in blocks if block.page_size == TARGET_PAGE)
    if total > (free := available_memory()):
        raise GuestMemoryError(
            f"a machine of {in_units(total)} does not fit: this computer has only {free >> 20} MiB left"
        )
    return regions


def make_vcpus(ram: RamSet, spec: Spec, devices: int) -> Iterator[VCpu]:
    """One after the other. ``devices``: bytes of the first block that belong to devices. Raises OSError."""
    skip = devices // TARGET_PAGE
    areas = []
    for block in ram.blocks:
        pages = block.length // TARGET_PAGE
        if pages > skip:
            areas.append(Area(block, skip, pages - skip))
        skip = 0
    touch = [Area(ram.blocks[0], 0, devices // TARGET_PAGE)] if devices else []
    for i in range(spec.vcpus):
        yield VCpu(
            ram, areas, i, spec.vcpus, seed=spec.seed, touch=touch, writes=spec.writes, reads=spec.checks
        )


class Look:
    """A look for written pages that goes on while its result is not needed yet."""

    def __init__(self) -> None:
        self.done = trio.Event()
        self._count = 0
        self._error: Exception | None = None

    async def take(self, tracker: DirtyTracker) -> None:
        try:
            self._count = await tracker.sync()
        except Exception as error:  # of the one who asks for its result
            self._error = error
        finally:
            self.done.set()

    async def found(self) -> int:
        """As :meth:`DirtyTracker.sync`."""
        await self.done.wait()
        if self._error is not None:
            raise self._error
        return self._count


class OwnMachine:
    """Implements :class:`vhostpc.migration.machine.Machine`. Made by :func:`open_machine`."""

    def __init__(
        self,
        spec: Spec,
        ram: RamSet,
        regions: Sequence[GuestRegion],
        vcpus: Sequence[VCpu],
        devices: Sequence[NetDevice],
        dirty_log: SharedLog,
        nursery: trio.Nursery,
    ) -> None:
        self.spec = spec
        self.ram = ram
        self.vcpus = vcpus
        self.devices = devices
        self.configuration = Configuration(NAME)
        self.running = False
        self.came_as = RunState.PRELAUNCH
        self.tracker: DirtyTracker | None = None
        self._problems: list[str] = []
        self._regions = list(regions)
        self._log = dirty_log
        self._nursery = nursery
        self._whole = False
        """Whether there is a whole machine to run: it was filled, or it has arrived."""
        self._leaves_as = RunState.PRELAUNCH
        """Its run state before the last stop."""
        self._changing: trio.Event | None = None
        self._tracked = trio.Event()
        self._stopped_ns = 0
        self._left_ns = 0
        """When it stopped at the source that it came from."""
        self._came: set[tuple[str, int]] = set()
        self._last_look: Look | None = None
        """Nothing of ours has written since it began, or will before it is gone."""
        self._service: FaultService | None = None
        self._counted: FaultService | None = None
        """The last one: what it counted can be read for ever."""
        self._listens = False

    @property
    def runnable(self) -> bool:
        return True

    @property
    def backends(self) -> list[BackEnd]:
        return [device.backend for device in self.devices]

    @property
    def problems(self) -> list[str]:
        """Errors that did not stop the machine, one sentence each."""
        found = list(self._problems)
        for device in self.devices:
            found += device.problems
            if device.backend.problem:
                found.append(device.backend.problem)
        return found

    async def fill(self) -> None:
        """Make it a machine that never ran. Raises Shortage, OSError: it cannot run here."""
        for vcpu in self.vcpus:
            await vcpu.fill()
        for device in self.devices:
            await device.reset()
        await self._park_vcpus()
        self._whole = True

    # --- running or not

    async def _park_vcpus(self) -> None:
        """From here on each has its thread, for life: :meth:`cont` only releases them. Raises Shortage."""
        for vcpu in self.vcpus:
            if not vcpu.has_thread:
                try:
                    await self._nursery.start(self._park, vcpu)
                except Shortage as error:
                    raise Shortage(f"this machine cannot run here: {error}") from None

    async def _park(self, vcpu: VCpu, *, task_status: trio.TaskStatus[None]) -> None:
        try:
            await vcpu.park(task_status=task_status)
        except MemoryLost as error:
            self._problem(f"{vcpu.name} stopped: {error}")
        finally:
            self._tell_threads()  # its id may soon be another thread's

    def _tell_threads(self) -> None:
        if self._service is not None and not self._service.closed:
            self._service.set_vcpus([vcpu.thread for vcpu in self.vcpus])

    def _problem(self, text: str) -> None:
        self._problems.append(text)
        log.error("%s", text)

    async def cont(self, runs: Callable[[], None] = nobody) -> None:
        """Everything that running needs exists since :meth:`fill` or :meth:`loaded`: no shortage can occur here."""
        async with self._change():
            if self.running:
                return
            if not self._whole or self.ram.lost:
                why = "its memory is lost" if self.ram.lost else "nothing has come"
                raise MigrationRefused(f"The machine cannot run here: {why}")
            self.running = True
            self._last_look = None
            try:
                for vcpu in self.vcpus:
                    vcpu.go()
                runs()
                async with trio.open_nursery() as nursery:
                    for device in self.devices:
                        nursery.start_soon(device.start, self._nursery)
            except BaseException:  # it must not run in part: the caller may let it run elsewhere
                with trio.CancelScope(shield=True):
                    await self._stand()
                raise

    @asynccontextmanager
    async def _change(self) -> AsyncIterator[None]:
        """Start and stop are serialized."""
        while self._changing is not None:
            await self._changing.wait()
        self._changing = trio.Event()
        try:
            yield
        finally:
            self._changing.set()
            self._changing = None

    async def stop(self) -> None:
        async with self._change():
            if not self.running:
                if self._leaves_as is RunState.RUNNING:
                    self._leaves_as = RunState.PAUSED
                return
            self._leaves_as = RunState.RUNNING
            await self._stand()

    async def _stand(self) -> None:
        try:
            async with trio.open_nursery() as nursery:
                for device in self.devices:
                    nursery.start_soon(device.stop)
                await stop_all(self.vcpus)
                for device in self.devices:
                    await device.is_idle()
                # Back-ends' writes are in their log. Beside their answers, and beside what others do with a stop.
                if self.tracker is not None:
                    self._last_look = Look()
                    self._nursery.start_soon(self._last_look.take, self.tracker)
                    await trio.lowlevel.checkpoint()  # so that it has begun
        finally:
            self._stopped_ns = time.monotonic_ns()
            self.running = False

    async def reconnected(self, device: NetDevice, backend: BackEnd) -> None:
        """The device is served by another connection from here on, which is told what the others were told before.

        Raises PostcopyRefused, RequestFailed: the device goes on without. May wait for a page.
        """
        async with self._change():
            if not backend.acknowledge(device.backend.features):
                raise RequestFailed(f"it does not offer all of the features {device.backend.features:#x}")
            await device.stop()
            told: tuple[FaultService | None, bool] | None = None
            while told != (self._service, self._listens):  # they may come meanwhile
                told = self._service, self._listens
                if self._service is None:
                    await backend.end()
                elif backend.postcopy is None:
                    await backend.advise(self._service)
                if self._listens and not backend.listens:
                    await backend.listen()
            device.use(backend)
            await backend.set_log(self._log if self.tracker is not None else None)
            if self.running:
                await device.start(self._nursery)

    # --- leaving

    @property
    def ram_section(self) -> int:
        return RAM_SECTION

    def blocked(self) -> Sequence[str]:
        reasons = [backend.blocked() for backend in self.backends if backend.works]
        return list(dict.fromkeys(reason for reason in reasons if reason is not None))

    def postcopy_refusal(self) -> str | None:
        """Why this machine cannot arrive by postcopy, one sentence."""
        reasons = [backend.postcopy_refusal() for backend in self.backends if backend.works]
        return next((reason for reason in reasons if reason is not None), None)

    def state_size(self) -> int:
        return (len(self._expected()) + 1) * MOST_STATE

    async def save(self) -> tuple[Sequence[DeviceSection], bytes]:
        counts = {"vcpus": len(self.vcpus), "net_devices": len(self.devices), "stopped_ns": self._stopped_ns}
        number = RAM_SECTION + 1
        sections = [MACHINE.pack(number, 0, counts)]
        for device in self.devices:
            sections.append(device.save(number + len(sections)))
        for vcpu in self.vcpus:
            sections.append(VCPU.pack(number + len(sections), vcpu.index, {"state": vcpu.save()}))
        sections.append(globalstate(number + len(sections), self._leaves_as))
        return sections, description(self.configuration, sections)

    def first(self) -> Sequence[tuple[RamBlock, int]]:
        found = [where for device in self.devices for where in device.first()]
        return found + [vcpu.next_page() for vcpu in self.vcpus]

    @property
    def early(self) -> Sequence[DeviceSection]:
        return ()

    async def start_tracking(self) -> None:
        """Raises UfdError, Shortage, OSError: then nothing is tracked, and it runs on as before."""
        self.tracker = DirtyTracker(self.ram, self.spec.tracking)
        try:
            await self.tracker.start(await self._nursery.start(self._host_tracking))
            log.info("writes are tracked by %s", self.tracker.way.value)
            for backend in self.backends:
                await backend.set_log(self._log)
        except BaseException:
            with trio.CancelScope(shield=True):
                await self.stop_tracking()
            raise

    async def _host_tracking(self, *, task_status: trio.TaskStatus[trio.Nursery]) -> None:
        """A nursery for the tracker's loop: the next sync reports an error of the loop, which ends nothing else."""
        self._tracked = trio.Event()
        try:
            async with trio.open_nursery() as nursery:
                task_status.started(nursery)
                await self._tracked.wait()
                nursery.cancel_scope.cancel()
        except* UfdError as group:
            self._problem(str(group.exceptions[0]))

    async def sync_dirty(self) -> int:
        assert self.tracker is not None
        look, self._last_look = self._last_look, None
        found = await (self.tracker.sync() if look is None else look.found())
        return found + self._log.merge(self._regions)

    async def stop_tracking(self) -> None:
        try:
            if self._last_look is not None:
                await self._last_look.done.wait()
                self._last_look = None
            for backend in self.backends:
                await backend.set_log(None)
        finally:
            tracker, self.tracker = self.tracker, None
            if tracker is not None:
                with tracker:
                    await tracker.stop()
            self._tracked.set()

    # --- arriving

    def accept(self, configuration: Configuration) -> None:
        if configuration.machine != NAME:
            raise StreamError(f"Machine type received is {configuration.machine!r} and local is '{NAME}'")
        if configuration.uuid is not None:
            log.warning("UUID is received %s, but local uuid isn't set", UUID(bytes=configuration.uuid))

    async def advise(self, service: FaultService) -> None:
        self._service = self._counted = service
        await self._park_vcpus()  # before the wait for it
        self._tell_threads()
        for backend in self.backends:
            await backend.advise(service)
        for device in self.devices:
            try:
                device.make_ready()
            except (Shortage, OSError) as error:
                raise Shortage(f"this machine cannot run here: {device.name}: {sentence(error)}") from None

    def accept_blocks(self, listed: RamBlocks, *, postcopy: bool) -> None:
        if self.running or self.ram.lost:
            raise StreamError("this machine runs, or its memory is lost: it cannot receive another")
        came = {block.name: block for block in listed.blocks}
        for name in came:
            if all(block.name != name for block in self.ram.blocks):
                raise StreamError(f"RAM block {name!r} arrives, but there is none of that name here")
        for block in self.ram.blocks:
            if block.name not in came:
                raise StreamError(f"RAM block {block.name!r} of this machine does not come")
            theirs = came[block.name]
            if theirs.length != block.length:
                raise StreamError(sizes_differ(block.name, theirs.length, block.length))
            size = theirs.page_size or TARGET_PAGE
            if postcopy and size != block.page_size:
                raise StreamError(
                    f"RAM block {block.name!r} has pages of {in_units(size)} at the source, "
                    f"not of {in_units(block.page_size)}"
                )
        self._came.clear()
        self._whole = False
        for block in self.ram.blocks:
            block.discard()  # its state before it left, or the result of a migration that failed

    async def listen(self) -> None:
        self._listens = True
        await side_by_side(backend.listen for backend in self.backends)

    async def load(self, section: DeviceSection) -> None:
        key = (section.idstr, section.instance)
        if key not in self._expected():
            raise StreamError(f"{name_of(section)} arrives, but this machine has no such device")
        if key in self._came:
            log.warning("%s arrives twice: the last one counts", name_of(section))
        if section.idstr == "vhost-user-net":
            await self.devices[section.instance].load(section)
        elif section.idstr == "vcpu":
            self.vcpus[section.instance].restore(VCPU.unpack(section)["state"])
        elif section.idstr == "globalstate":
            came_as = run_state_of(section)
            if came_as not in RUN_STATES:
                raise StreamError(f"the machine arrives {came_as!r}: allowed are {', '.join(RUN_STATES)}")
            self.came_as = self._leaves_as = RunState(came_as)
        else:
            values = MACHINE.unpack(section)
            for what, name, here in (
                ("vCPUs", "vcpus", len(self.vcpus)),
                ("network devices", "net_devices", len(self.devices)),
            ):
                if values[name] != here:
                    raise StreamError(f"the incoming machine has {values[name]} {what}, this one has {here}")
            self._left_ns = values["stopped_ns"]
        self._came.add(key)

    def _expected(self) -> list[tuple[str, int]]:
        return [
            ("vhostpc-machine", 0),
            *(("vhost-user-net", i) for i in range(len(self.devices))),
            *(("vcpu", i) for i in range(len(self.vcpus))),
            ("globalstate", 0),
        ]

    async def loaded(self, description: bytes) -> None:
        for idstr, instance in self._expected():
            if (idstr, instance) not in self._came:
                raise StreamError(f"the state of {idstr!r} (instance {instance}) does not come")
        try:
            await self._park_vcpus()
        except Shortage as error:
            raise StreamError(str(error)) from None
        self._whole = True

    async def end(self) -> None:
        self._service, self._listens = None, False
        async with trio.open_nursery() as nursery:
            for backend in self.backends:
                nursery.start_soon(backend.end)

    # --- how it is

    def report(self) -> dict[str, Any]:
        """Numbers for tests: JSON's types only. Times in nanoseconds."""
        blocked = self._counted.blocktime() if self._counted is not None else None
        return {
            "running": self.running,
            "problems": self.problems,
            "left-ns": self._left_ns,
            "stopped-ns": self._stopped_ns,
            "blocks": [
                {
                    "name": block.name,
                    "length": block.length,
                    "page-size": block.page_size,
                    "received": block.count_bits(Bits.RECEIVED),
                }
                for block in self.ram.blocks
            ],
            "blocked": None if blocked is None else _together(blocked),
            "vcpus": [self._vcpu_report(vcpu, blocked) for vcpu in self.vcpus],
            "devices": [
                {**device.report(), "faults": _faults(device.backend.numbers())} for device in self.devices
            ],
        }

    async def verify(self) -> dict[str, Any]:
        """Every page that a vCPU owns, by its owner."""
        pages = sum(area.count for area in self.vcpus[0].areas)
        bad, first = 0, None
        for vcpu in self.vcpus:
            found, where = await vcpu.sweep()
            bad += found
            first = first or where
        return {"pages": pages, "bad": bad, "first-bad": str(first) if first else None}

    def _vcpu_report(self, vcpu: VCpu, blocked: Blocktime | None) -> dict[str, Any]:
        numbers = vcpu.numbers()
        faults = _thread(blocked.vcpus[vcpu.index]) if blocked is not None else None
        told: dict[str, Any] = {
            "name": vcpu.name,
            "running": vcpu.running,
            "thread": numbers.thread,
            "standstill-ns": max(0, numbers.first_beat_ns - self._left_ns) if self._left_ns else None,
            "first-bad": str(numbers.first_bad) if numbers.first_bad else None,
            "faults": faults,
            "stalls": {**_waits(numbers.stalls), "total-ns": numbers.stalled_ns},
        }
        for name in "beats reads writes checks glances touches bad step first_beat_ns last_beat_ns".split():
            told[name.replace("_", "-")] = getattr(numbers, name)
        return told


def _waits(waits: Waits) -> dict[str, int]:
    return {name.replace("_", "-"): value for name, value in asdict(waits).items()}


def _thread(found: ThreadWaits) -> dict[str, int]:
    return {**_waits(found.waits), "blocked-ns": found.blocked_ns, "waiting-now": found.waiting_now}


def _together(blocked: Blocktime) -> dict[str, Any]:
    return {
        "all-vcpus-ns": blocked.all_vcpus_ns,
        "all-ns": blocked.all_ns,
        "drivers": _thread(blocked.others),
    }


def _faults(numbers: ClientNumbers | None) -> dict[str, int]:
    told = _waits(numbers.waits if numbers else Waits(0, 0, 0, 0))
    names = "blocked_ns faults distinct found_nothing received_already requested_already waiting_now"
    for name in names.split():
        told[name.replace("_", "-")] = getattr(numbers, name) if numbers else 0
    return told
