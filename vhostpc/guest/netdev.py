"""A virtio-net device of our own machine: its driver, a back-end, and traffic whose counts must agree.

The driver sends frames that name themselves; the far side of the back-end sends each of them back. A frame is in
flight, or has returned, or is lost. When the machine moves, the network drops frames that return while neither end has
a ring. Of the frames that were in flight then, or were sent before the first one returned to the destination, those
that never return count as lost at the switch. A frame lost at any other time is a failure.

Frames keep their order: once a frame has returned, earlier ones that have not are lost.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import trio

from vhostpc.errors import MemoryLost, Shortage, StreamError, sentence
from vhostpc.frontend import Driver, GuestRegion, RingLayout
from vhostpc.guest.backends import BackEnd
from vhostpc.guest.sections import NET, name_of
from vhostpc.guest.side_by_side import side_by_side
from vhostpc.logs import rationed_logger
from vhostpc.pages.ramblock import RamBlock, RamSet
from vhostpc.units import TARGET_PAGE
from vhostpc.virtio.event import signal_event
from vhostpc.wire.migration.elements import DeviceSection
from vhostpc.wire.vhost_user import Feature

log = rationed_logger(__name__)

RX, TX = 0, 1
AREA = 4 << 20
"""Bytes of guest memory for a device's rings and buffers: whole huge pages."""
FRAME = 1400
WINDOW = 64
"""Most frames in flight, so that no socket's buffer can overflow."""
BATCH = 32
TICK = 0.01  # seconds between two batches
PROBE, MOST = 4, 1.0
"""Frames per burst until one has returned to the destination; seconds between two bursts, at most."""
_SLOTS = 256


def layouts(start: int) -> list[RingLayout]:
    """Both rings in the area from guest address ``start``; each buffer on a page of its own."""
    rx = RingLayout.contiguous_at(start, _SLOTS, buffer_stride=TARGET_PAGE)
    tx = RingLayout.contiguous_at(rx.end, _SLOTS, buffer_stride=TARGET_PAGE)
    assert tx.end <= start + AREA
    return [rx, tx]


@dataclass(frozen=True, slots=True)
class Books:
    """Frames. ``sent`` = ``received`` + ``lost_at_switch`` + ``lost`` + ``flying``."""

    sent: int
    received: int
    lost_at_switch: int
    lost: int
    """At any other time."""
    flying: int
    damaged: int
    doubled: int


class NetDevice:
    """Device ``instance``: its area begins at guest address ``start``, in the first of ``regions``."""

    def __init__(
        self, instance: int, ram: RamSet, regions: Sequence[GuestRegion], start: int, backend: BackEnd
    ) -> None:
        self.instance = instance
        self.backend = backend
        self.problems: list[str] = []
        self._ram, self._regions = ram, regions
        self._layouts = layouts(start)
        self._drivers: list[Driver] = []
        self._bases = [0, 0]
        self._scope: trio.CancelScope | None = None
        self._idle = trio.Event()
        self._idle.set()
        # Numbers of the frames that were in flight at the last switch, and the losses of those before.
        self._flying = (0, 0)
        self._settled = False  # a frame that was sent at this end has returned to it
        self._lost_before = 0
        self._ready_for: int | None = None
        """The drivers are for these features, and nothing was loaded into them."""
        self._reconnected = 0

    @property
    def name(self) -> str:
        return f"net{self.instance}"

    # --- life

    def make_ready(self) -> None:
        """Make the drivers now that a state will be loaded into, which is waited for. Raises Shortage, OSError."""
        self.make_drivers()
        self._ready_for = self.backend.features

    def make_drivers(self) -> list[Driver]:
        """Make the drivers for the features that were acknowledged. Earlier ones are freed.

        All that they need until :meth:`close` is allocated here. Raises Shortage, OSError.
        """
        self.close()
        event_idx = bool(self.backend.features & Feature.EVENT_IDX)
        try:
            for index, layout in enumerate(self._layouts):
                self._drivers.append(
                    Driver(
                        self._ram,
                        self._regions,
                        layout,
                        receive=index == RX,
                        header=self.backend.header,
                        event_idx=event_idx,
                        stream=self.instance,
                    )
                )
        except BaseException:
            self.close()
            raise
        return self._drivers

    async def reset(self) -> None:
        """A device that never ran: rings are empty."""
        for driver in self.make_drivers():
            await driver.reset()
        self._bases = [0, 0]
        self._flying, self._settled, self._lost_before = (0, 0), False, 0

    async def start(self, nursery: trio.Nursery) -> None:
        """Start the back-end's rings and the traffic, which runs in ``nursery`` until :meth:`stop`."""
        await self.backend.start(self._drivers, self._bases)
        for driver in self._drivers:  # frames in the rings since they were stopped
            signal_event(driver.kick)
        self._idle = trio.Event()
        self._scope = trio.CancelScope()
        nursery.start_soon(self._traffic, self._scope, self._idle)

    async def stop(self) -> None:
        """Neither the driver nor the back-end writes guest memory when this returns. May wait for a page."""
        if self._scope is None:
            return
        self._scope.cancel()
        self._scope = None
        await self._idle.wait()
        bases = await self.backend.stop()
        self._bases = await side_by_side(
            partial(self._base, index, driver, None if bases is None else bases[index])
            for index, driver in enumerate(self._drivers)
        )

    async def is_idle(self) -> None:
        """Wait until the driver of a device that is being stopped writes no more."""
        await self._idle.wait()

    def use(self, backend: BackEnd) -> None:
        """Another connection serves the stopped device. Frames in flight may be lost, as at a switch."""
        self.backend = backend
        self._reconnected += 1
        if self._drivers:
            self._lost_before = self._lost_at_switch()
            came, sent = (driver.numbers() for driver in self._drivers)
            self._flying, self._settled = (min(came.received.next, sent.posted), sent.posted), False

    async def _base(self, index: int, driver: Driver, said: int | None) -> int:
        """The next index of a ring: its back-end's answer, if that is possible. May wait for a page."""
        numbers = driver.numbers()
        try:
            waiting = await driver.look()
        except MemoryLost as error:
            self._problem(f"{self.name}: the last entries that its back-end used are unknown: {error}")
            waiting = 0
        except OSError:
            self._lies(f"it has used more of ring {index} than was available")
            waiting = 0
        if said is not None:
            behind = (said - numbers.used_index) & 0xFFFF
            if waiting <= behind <= (numbers.avail_index - numbers.used_index) & 0xFFFF:
                return said
            self._lies(f"it says that ring {index} continues at {said}, which it cannot have reached")
        # As QEMU does where the back-end is gone: continue behind the entries that it has used.
        return (numbers.used_index + waiting) & 0xFFFF

    def _lies(self, what: str) -> None:
        if self.backend.works:
            self.backend.leave(what)
        else:  # entries that it left behind
            self._problem(f"{self.name}: its back-end: {what}")

    def close(self) -> None:
        for driver in self._drivers:
            driver.close()
        self._drivers = []
        self._ready_for = None

    # --- traffic

    async def _traffic(self, scope: trio.CancelScope, idle: trio.Event) -> None:
        try:
            with scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._drivers[RX].run)
                    await self._send()
        except* Exception as group:
            self._stopped(group.exceptions[0])
        finally:
            idle.set()

    def _stopped(self, error: Exception) -> None:
        if isinstance(error, OSError) and error.errno == errno.EBADMSG:
            self._lies("it has used more of a ring than was available")
        elif not isinstance(error, MemoryLost | OSError):
            log.error("%s: unexpected error", self.name, exc_info=error)
        self._problem(f"{self.name}: its driver stopped: {error}")

    async def _send(self) -> None:
        tx = self._drivers[TX]
        due, wait = trio.current_time(), 4 * TICK
        while True:
            await tx.reap()
            if self._is_settled():
                room = WINDOW - self._in_flight()
                if room > 0:
                    await tx.post(min(BATCH, room), FRAME)
            elif trio.current_time() >= due:
                await tx.post(PROBE, FRAME)
                due, wait = trio.current_time() + wait, min(2 * wait, MOST)
            await trio.sleep(TICK)

    def _is_settled(self) -> bool:
        if not self._settled:
            first, end = self._flying
            if self._drivers[RX].numbers().received.next > end:
                self._settled = True
                self._flying = first, self._drivers[TX].numbers().posted
        return self._settled

    def _problem(self, text: str) -> None:
        self.problems.append(text)
        log.error("%s", text)

    def _in_flight(self) -> int:
        """Frames in flight, except those of the last switch."""
        rx, tx = self._drivers
        return tx.numbers().posted - max(rx.numbers().received.next, self._flying[1])

    def books(self) -> Books:
        if not self._drivers:
            return Books(0, 0, 0, 0, 0, 0, 0)
        rx, tx = (driver.numbers() for driver in self._drivers)
        came = rx.received
        at_switch = self._lost_at_switch()
        return Books(
            sent=tx.posted,
            received=came.frames,
            lost_at_switch=at_switch,
            lost=came.next - came.frames - at_switch,
            flying=tx.posted - came.next,
            damaged=came.bad + rx.bad_used + tx.bad_used,
            doubled=came.duplicates,
        )

    def _lost_at_switch(self) -> int:
        rx = self._drivers[RX]
        first, end = self._flying
        return self._lost_before + rx.unseen(first, min(end, rx.numbers().received.next))

    # --- state

    def save(self, number: int) -> DeviceSection:
        """The stopped device's state; it may continue here afterwards."""
        rx, tx = self._drivers
        sent = tx.numbers().posted
        return NET.pack(
            number,
            self.instance,
            {
                "features": self.backend.features,
                "rx_base": self._bases[RX],
                "tx_base": self._bases[TX],
                "lost_at_switch": self._lost_at_switch(),
                "flying_first": min(rx.numbers().received.next, sent),
                "flying_end": sent,
                "rx_driver": rx.save(),
                "tx_driver": tx.save(),
            },
        )

    def first(self) -> Iterator[tuple[RamBlock, int]]:
        """Where the parts of its rings lie, which a load and a back-end touch first: block, and offset in bytes."""
        region = self._regions[0]
        for layout in self._layouts:
            for at in (layout.used, layout.avail, layout.desc):
                yield region.block, region.offset + at - region.guest_addr

    async def load(self, section: DeviceSection) -> None:
        """Raises StreamError. Reads the rings: may wait for a page."""
        values = NET.unpack(section)
        what = name_of(section)
        if not self.backend.acknowledge(values["features"]):
            raise StreamError(
                f"{what}: the back-end {self.backend.name} does not offer all of the features {values['features']:#x}"
            )
        try:
            drivers = self._drivers if self._ready_for == values["features"] else self.make_drivers()
        except (Shortage, OSError) as error:
            raise StreamError(f"this machine cannot run here: {self.name}: {sentence(error)}") from None
        self._ready_for = None
        for driver, key in zip(drivers, ("rx_driver", "tx_driver"), strict=True):
            driver.load(values[key])
        rx, tx = drivers
        first, end = values["flying_first"], values["flying_end"]
        if first > rx.numbers().received.next or first > end or end != tx.numbers().posted:
            raise StreamError(f"{what}: frames {first} to {end} cannot be those that were in flight")
        self._flying, self._settled = (first, end), False
        self._lost_before = values["lost_at_switch"]
        self._bases = [values["rx_base"], values["tx_base"]]
        looked = await side_by_side(partial(self._look, what, driver) for driver in drivers)
        for driver, base, waiting in zip(drivers, self._bases, looked, strict=True):
            self._check_base(what, driver.numbers().used_index, base, waiting)

    @staticmethod
    async def _look(what: str, driver: Driver) -> int:
        try:
            return await driver.look()
        except OSError:
            raise StreamError(
                f"{what}: a ring in memory says that more was used than was available"
            ) from None

    @staticmethod
    def _check_base(what: str, reaped: int, base: int, waiting: int) -> None:
        if (base - reaped) & 0xFFFF > _SLOTS or (base - reaped) & 0xFFFF < waiting:
            raise StreamError(
                f"{what}: a ring continues at {base}, but {waiting} entries behind {reaped} are used in memory"
            )

    def report(self) -> dict[str, Any]:
        books = self.books()
        return {
            "name": self.name,
            "backend": self.backend.path,
            "works": self.backend.works,
            "reconnected": self._reconnected,
            **{key.replace("_", "-"): getattr(books, key) for key in Books.__dataclass_fields__},
        }
