"""A connection through the proxy: two pumps, one a direction, that pass bytes and stop exactly where a fault is due."""

from __future__ import annotations

import math
import time
from collections import deque
from contextlib import suppress
from typing import Any, Protocol

import trio

from vhostpc.proxy.faults import ON_ALL, Fault, Plan
from vhostpc.proxy.points import Way
from vhostpc.proxy.side import Side
from vhostpc.proxy.timeline import Event
from vhostpc.proxy.watch import KINDS, PreemptWatch, ReturnPathWatch, Seen, StreamWatch, Watch
from vhostpc.wire.migration.stream import StreamReader

CHUNK = 256 << 10
SMALL = 4096
"""Bytes that are read at once of a direction in which each byte is delayed."""
QUIET = 1.0
"""Seconds that an incomplete element waits for its rest before it is passed as it is."""
MOST_LAGGING = 64 << 20
"""Bytes that lag at a time; then the sender waits."""
_BYTES = {"byte": Way.FORWARD, "postcopy-byte": Way.FORWARD, "back-byte": Way.BACK}


class Home(Protocol):
    """What the connections of a proxy have in common."""

    plan: Plan
    last_stream: StreamReader | None
    """The reader of the newest stream whose blocks are known."""
    open: list[Relay]
    recoveries: int

    def tell(self, event: Event) -> None: ...


class Pump:
    """One direction. ``received``: bytes that came; ``sent``: that were passed on or lost; ``passed``: that were passed
    on."""

    def __init__(self, relay: Relay, way: Way, source: Side, to: Side) -> None:
        self.relay, self.way = relay, way
        self.source, self.to = source, to
        self.watch = Watch()
        self.received = self.sent = self.passed = 0
        self._here = bytearray()
        """Received and not passed on: from byte ``sent`` to ``received``."""
        self._lost = False
        self._silent = False
        self._held_until = -math.inf
        self._slow = (0.0, -math.inf)
        self._lag = (0.0, -math.inf)
        self._late: deque[tuple[float, bytes]] | None = None
        self._late_bytes = 0
        self._changed = trio.Event()
        self._sending = trio.CancelScope()

    # --- what is done to it

    def end_here(self) -> None:
        """FIN to the receiver; the rest is lost."""
        self._lose()
        self.to.finish()

    def swallow(self) -> None:
        """From here on all is lost, also the end."""
        self._silent = True
        self._lose()

    def _lose(self) -> None:
        self._lost = True
        self._sending.cancel()  # its receiver may not read
        self._wake()

    def hold(self, seconds: float) -> None:
        self._held_until = trio.current_time() + seconds
        self._wake()

    def slow_down(self, seconds: float, lasting: float) -> None:
        self._slow = (seconds, trio.current_time() + lasting)

    def lag(self, seconds: float, lasting: float) -> None:
        self._lag = (seconds, trio.current_time() + lasting)
        if self._late is None:
            self._late = deque()
            self.relay.start(self._send_late, self._late)

    def corrupt(self, at: int, data: bytes) -> None:
        """Replace bytes that came and were not passed on, from byte ``at`` of the direction on."""
        index = at - self.sent
        self._here[index : index + len(data)] = data

    def bytes_here(self, begin: int, end: int) -> bytes:
        """Bytes that came and were not passed on."""
        return bytes(self._here[max(0, begin - self.sent) : end - self.sent])

    def _wake(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    # --- passing

    async def run(self) -> None:
        """To the end of the direction."""
        try:
            broke = await self._pass_all()
        except OSError as error:
            broke = error
        if broke is not None:
            self.relay.lost(self, broke, silent=self._silent)
            return
        self.relay.tell("closed", self.way)
        if not self._lost:
            self.to.finish()

    async def _pass_all(self) -> OSError | None:
        """Until the source's end; why it is not one in order. Raises OSError: the other end is lost."""
        broke: OSError | None = None
        while True:
            data = b""
            try:
                with trio.move_on_after(QUIET if self._here else math.inf) as patience:
                    data = await self.source.receive(CHUNK if self._slow[1] < trio.current_time() else SMALL)
            except OSError as error:
                broke = error
                break
            if data:
                await self._take(data)
            elif patience.cancelled_caught:
                await self._pass(self.received)
            else:
                break
        for seen in self.watch.eof():
            await self._meet(seen)
        await self._pass(self.received)
        await self.all_late_sent()
        return broke

    async def _take(self, data: bytes) -> None:
        if not self.received:
            self.relay.begins(self, data)
        self.received += len(data)
        self._here += data
        self.watch.each = self.relay.home.plan.wants_pages
        for seen in self.watch.feed(data):
            await self._meet(seen)
        await self._pass(self.watch.parsed if self._keeps_back() else self.received)

    def _keeps_back(self) -> bool:
        """Whether an incomplete element must wait for its rest: a fault's place in it is not known before."""
        fault = self.relay.home.plan.at(self.relay)
        if fault is None or self.watch.blind:
            return False
        if fault.point.name == "postcopy-byte":
            return self.way is Way.FORWARD and self.relay.postcopy_from is None and not self.watch.tail
        wanted = fault.point.way is self.way and (fault.whole or self._is_early(fault))
        # Where the device sections of a precopy end is known only when all have come.
        return wanted and (not self.watch.tail or fault.point.name == "eof")

    @staticmethod
    def _is_early(fault: Fault) -> bool:
        """Whether its element is inside one that is read as a whole."""
        return fault.point.name in ("package", "listen", "section", "ping", "run", "eof")

    async def _meet(self, seen: Seen) -> None:
        """An element is complete: tell of it, and do what is due there."""
        relay, plan = self.relay, self.relay.home.plan
        if seen.name == "package":
            relay.postcopy_from = seen.begin
        if seen.name == "blocks" and isinstance(self.watch, StreamWatch):
            relay.home.last_stream = self.watch.reader
        if seen.name:
            lost = {"lost": True} if self._lost else {}
            relay.tell(seen.name, self.way, seen.begin, {**seen.details, **lost})
        if self._lost:
            return
        while (due := self._due(seen.end)) is not None:
            await self._stop_at(*due)
        while (fault := plan.at(relay)) is not None:
            if fault.point.way is not self.way or (fault.point.name, fault.value) not in seen.points:
                return
            place = fault.place(seen.begin, seen.inner if seen.inner >= 0 else seen.begin, seen.end)
            late = place < self.sent
            await self._pass(place)
            if plan.at(relay) is fault:
                await relay.do(fault, self, seen, late=late)

    def _due(self, upto: int) -> tuple[Fault, int] | None:
        """A fault at a byte of this direction up to ``upto``, and that byte."""
        fault = self.relay.home.plan.at(self.relay)
        if fault is None or self._lost or _BYTES.get(fault.point.name) is not self.way:
            return None
        begin = self.relay.postcopy_from if fault.point.name == "postcopy-byte" else 0
        if begin is None:
            return None
        assert isinstance(fault.value, int)
        at = begin + fault.value
        last = upto - 1 if fault.action == "corrupt" else upto
        return (fault, at) if self.sent <= at <= last else None

    async def _pass(self, upto: int) -> None:
        """Pass on up to byte ``upto`` of the direction; do what is due at a byte before."""
        while (due := self._due(upto)) is not None:
            await self._stop_at(*due)
        await self._forward(upto)

    async def _stop_at(self, fault: Fault, at: int) -> None:
        await self._forward(at)
        if self.relay.home.plan.at(self.relay) is fault:
            await self.relay.do(fault, self)

    async def _forward(self, upto: int) -> None:
        count = upto - self.sent
        if count <= 0:
            return
        data = bytes(self._here[:count])
        del self._here[:count]
        self.sent = upto
        while not self._lost and trio.current_time() < self._held_until:
            with trio.move_on_at(self._held_until):
                await self._changed.wait()
        if self._late is not None:
            await self._queue(data)
        elif trio.current_time() < self._slow[1]:
            await self._send_slowly(data)
        else:
            await self._send(data)

    async def _send(self, data: bytes) -> None:
        view = memoryview(data)
        while view and not self._lost:
            count = 0
            try:
                with trio.CancelScope() as self._sending:
                    count = await self.to.send(view)
            except OSError:
                if self._lost:  # ended here meanwhile
                    return
                raise
            self.passed += count
            view = view[count:]

    async def _send_slowly(self, data: bytes) -> None:
        for at in range(len(data)):
            seconds, until = self._slow
            if self._lost or trio.current_time() >= until:
                await self._send(data[at:])
                return
            await trio.sleep(seconds)
            await self._send(data[at : at + 1])

    async def _queue(self, data: bytes) -> None:
        assert self._late is not None
        while self._late_bytes >= MOST_LAGGING:
            await self._changed.wait()
        now = trio.current_time()
        due = now + self._lag[0] if now < self._lag[1] else now
        self._late.append((max(due, self._late[-1][0]) if self._late else due, data))
        self._late_bytes += len(data)
        self._wake()

    async def _send_late(self, late: deque[tuple[float, bytes]]) -> None:
        while True:
            while not late:
                await self._changed.wait()
            due, data = late[0]
            await trio.sleep_until(due)
            try:
                await self._send(data)
            except OSError as error:
                self.relay.lost(self, error, silent=self._silent)
                return
            late.popleft()
            self._late_bytes -= len(data)
            self._wake()

    async def all_late_sent(self) -> None:
        """Wait until nothing lags."""
        while self._late:
            await self._changed.wait()


class Relay:
    """A connection, its ``number`` from 1, its ``kind``, and which ``recovery`` it is (0: none)."""

    def __init__(self, home: Home, number: int, near: Side, far: Side) -> None:
        self.home, self.number = home, number
        self.kind = ""
        self.recovery = 0
        self.postcopy_from: int | None = None
        self.forward = Pump(self, Way.FORWARD, near, far)
        self.back = Pump(self, Way.BACK, far, near)
        self._sides = (near, far)
        self._how = ""
        self._ended = False
        self._opened = trio.current_time()
        self._nursery: trio.Nursery | None = None

    def tell(
        self, name: str, way: Way | None = None, offset: int = -1, details: dict[str, Any] | None = None
    ) -> None:
        direction = "" if way is None else str(way)
        self.home.tell(Event(time.monotonic(), name, self.number, direction, offset, details or {}))

    def start(self, task: Any, *arguments: Any) -> None:
        """A task for as long as the connection lasts."""
        assert self._nursery is not None
        self._nursery.start_soon(task, *arguments)

    async def run(self) -> None:
        """Until both directions have ended, or it is cut; then nothing of it is left."""
        try:
            async with trio.open_nursery() as self._nursery:
                if self._how:  # cut before it began
                    self._nursery.cancel_scope.cancel()
                self.start(self._clock)
                async with trio.open_nursery() as pumps:
                    pumps.start_soon(self.forward.run)
                    pumps.start_soon(self.back.run)
                self._ended = True
                self._nursery.cancel_scope.cancel()
        finally:
            with trio.CancelScope(shield=True):
                await self._leave()

    async def _leave(self) -> None:
        details: dict[str, Any] = {"how": self._how or ("closed" if self._ended else "left")}
        if self._how:
            async with trio.open_nursery() as both:
                for side in self._sides:
                    both.start_soon(side.deliver)
            if not all(side.delivered for side in self._sides):
                details["undelivered"] = True
        for side in self._sides:
            side.end(abruptly=bool(self._how))
        with suppress(ValueError):
            self.home.open.remove(self)
        details |= {"forward": self.forward.passed, "back": self.back.passed}
        self.tell("end", details=details)

    def begins(self, pump: Pump, data: bytes) -> None:
        """The first bytes of a direction: what the connection is."""
        if pump is self.back:
            if self.kind in ("main", "recovery"):
                pump.watch = ReturnPathWatch()
            return
        self.kind = KINDS.get(data[:1], "unknown")
        before = self.home.last_stream
        if self.kind == "recovery":
            self.home.recoveries += 1
            self.recovery, self.postcopy_from = self.home.recoveries, 0
        if self.kind in ("main", "recovery"):
            pump.watch = StreamWatch(recovery=self.kind == "recovery", before=before)
        elif self.kind == "preempt" and before is not None:
            self.postcopy_from = 0
            pump.watch = PreemptWatch(before.blocks)
        self.tell(
            "kind", details={"kind": self.kind} | ({"recovery": self.recovery} if self.recovery else {})
        )
        self.home.plan.look_again()

    def lost(self, pump: Pump, error: OSError, *, silent: bool) -> None:
        """An end was lost while a pump read from it or wrote to it: the other one is lost, too."""
        if silent:
            return
        self.tell("reset", pump.way, details={"reason": error.strerror or str(error)})
        self.tear("reset")

    def tear(self, how: str) -> None:
        """End it abruptly."""
        self._how = self._how or how
        if self._nursery is not None:
            self._nursery.cancel_scope.cancel()

    # --- faults

    def _pumps(self, way: Way) -> list[Pump]:
        return [pump for pump in (self.forward, self.back) if way in (Way.BOTH, pump.way)]

    async def do(
        self, fault: Fault, pump: Pump | None, seen: Seen | None = None, *, late: bool = False
    ) -> None:
        """Do it, at the byte up to which the pump has passed."""
        await trio.lowlevel.checkpoint_if_cancelled()
        self.home.plan.take(self)
        if pump is not None:
            await pump.all_late_sent()
        details: dict[str, Any] = {"fault": str(fault), "action": fault.action}
        if pump is not None:
            details["byte"] = pump.sent
        if late:
            details["late"] = True
        if fault.action == "corrupt":
            assert pump is not None
            details |= _corrupt(fault, pump, seen)
        self.tell("fault", None if pump is None else pump.way, details=details)
        everywhere = fault.action in ON_ALL and not fault.alone
        others = [relay for relay in self.home.open if relay is not self] if everywhere else []
        for relay in (*others, self):
            relay._suffer(fault)
        if fault.action == "cut" and fault.way is Way.BOTH:
            await trio.sleep_forever()  # this task is cancelled

    def _suffer(self, fault: Fault) -> None:
        if fault.action == "cut" and fault.way is Way.BOTH:
            self.tear("cut")
            return
        for pump in self._pumps(fault.way):
            match fault.action:
                case "cut" | "fin":
                    pump.end_here()
                case "drop":
                    pump.swallow()
                case "hold":
                    pump.hold(fault.amount)
                case "delay":
                    pump.slow_down(fault.amount, fault.lasting)
                case "lag":
                    pump.lag(fault.amount, fault.lasting)

    async def _clock(self) -> None:
        """Do what is due at a time."""
        plan = self.home.plan
        while True:
            fault, changed = plan.at(self), plan.changed
            due = math.inf
            if fault is not None and fault.point.name == "time":
                assert isinstance(fault.value, float)
                due = self._opened + fault.value
            with trio.move_on_at(due) as patience:
                await changed.wait()
            if patience.cancelled_caught and fault is not None and plan.at(self) is fault:
                await self.do(fault, None)


def _corrupt(fault: Fault, pump: Pump, seen: Seen | None) -> dict[str, Any]:
    """Change it in the pump; what was changed, or why not."""
    if seen is None:
        begin, old = pump.sent, pump.bytes_here(pump.sent, pump.sent + 1)
        new = bytes([int(fault.to) if fault.to else old[0] ^ 1])
    else:
        element = pump.bytes_here(seen.begin, seen.end)
        if len(element) < seen.end - seen.begin:
            return {"failed": "a part of it had been passed before it was complete"}
        first, length = fault.part.span(element)
        at = fault.at if isinstance(fault.at, int) else length - 1
        if not length or at >= length:
            return {"failed": f"it has no {fault.field}" + (f" with a byte {at}" if length else "")}
        begin, old = seen.begin + first, element[first : first + length]
        if not fault.to:
            begin, old = begin + at, old[at : at + 1]
            new = bytes([old[0] ^ fault.part.bit])
        elif fault.to.isdecimal() and not fault.is_text:
            if int(fault.to) >> 8 * length:
                return {"failed": f"{fault.to} does not fit into {length} bytes"}
            new = int(fault.to).to_bytes(length, "big")
        else:
            new = fault.to.encode()
            if len(new) != length:
                return {"failed": f"its {fault.field} has {length} bytes, {fault.to!r} has {len(new)}"}
    pump.corrupt(begin, new)
    return {"changed": begin, "from": old.hex(), "to": new.hex()}
