"""A session as a state machine: requests right and slightly wrong in any order, and a model that knows what must come.

After each message the model says one of three things: an answer with this content, silence, or the end with one
line. ``make fuzz`` runs many more of them than ``make test``.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import trio
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tests.kit.hostile import Net, guest_mappings, open_fds, state
from tests.kit.raw_front_end import GUEST_BASE, USER_BASE
from vhostpc.backend import Options, serve_connection
from vhostpc.logs import ration
from vhostpc.wire import vhost_user as vu
from vhostpc.wire.vhost_user import Feature, ProtocolFeature, Request

SIZE = 1 << 20
NEAR = vu.MemoryRegion(GUEST_BASE, SIZE, USER_BASE, 0)
FAR = vu.MemoryRegion(1 << 40, 4096, 1 << 45, 0)  # beyond what the larger log has bits for
WHERE = {  # desc, used, avail
    "here": (USER_BASE + 0x1000, USER_BASE + 0x10000, USER_BASE + 0x8000),
    "there": (USER_BASE + 0x21000, USER_BASE + 0x30000, USER_BASE + 0x28000),
    "outside": (USER_BASE + SIZE - 16, USER_BASE + 0x10000, USER_BASE + 0x8000),
    "misaligned": (USER_BASE + 0x1008, USER_BASE + 0x10000, USER_BASE + 0x8000),
}
OFFERED = (
    Feature.LOG_ALL
    | Feature.INDIRECT_DESC
    | Feature.EVENT_IDX
    | Feature.PROTOCOL_FEATURES
    | Feature.VERSION_1
)
P = ProtocolFeature
NOTHING = ProtocolFeature(0)
PROTOCOL = [P.REPLY_ACK, P.LOG_SHMFD, P.CONFIGURE_MEM_SLOTS, P.CONFIG, P.STATUS, P.RESET_DEVICE, P.MTU]
T = TypeVar("T")


def usually(good: list[T], wrong: list[T]) -> st.SearchStrategy[T]:
    """One in twenty is wrong: sessions shall last long enough to get somewhere."""
    return st.integers(0, 19).flatmap(lambda n: st.sampled_from(wrong if n == 19 else good))


RING = usually([0, 1], [2])
ACK = st.booleans()


class Ended(Exception):
    """The model: this message ends the session."""


@dataclass
class RingModel:
    size: int = 0
    where: str | None = None
    started: bool = False
    enabled: bool = False
    running: bool = False
    base: int = 0
    ran: bool = False


@dataclass
class Model:
    """What the back-end has been told, and what follows from it (specification, and docs/back-end.md)."""

    features: int = 0
    features_set: bool = False
    protocol: ProtocolFeature = NOTHING
    regions: list[vu.MemoryRegion] | None = None
    log: int | None = None  # bytes
    rings: list[RingModel] = field(default_factory=lambda: [RingModel(), RingModel()])

    def ring(self, index: int) -> RingModel:
        if index >= 2:
            raise Ended
        return self.rings[index]

    def check_log(self) -> None:
        if self.features & Feature.LOG_ALL and self.log is not None and self.regions is not None:
            end = max((r.guest_addr + r.size for r in self.regions), default=0)
            if self.log * 8 * 4096 < end:
                raise Ended

    def configure(self, ring: RingModel) -> None:
        if ring.where in ("outside", "misaligned") or NEAR not in (self.regions or []):
            raise Ended
        self.check_log()

    def update(self, ring: RingModel) -> None:
        waits = self.features & Feature.LOG_ALL and self.log is None and P.LOG_SHMFD in self.protocol
        wanted = ring.started and ring.where and ring.size and self.features_set and not waits
        if wanted and not ring.running:
            self.configure(ring)
            ring.ran = True
        ring.running = bool(wanted)

    def update_all(self) -> None:
        for ring in self.rings:
            self.update(ring)

    def use(self, regions: list[vu.MemoryRegion]) -> None:
        self.regions = regions
        for ring in self.rings:
            if ring.running:
                self.configure(ring)
        self.update_all()


class Session(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.before = (open_fds(), guest_mappings())
        self.lines: list[str] = []
        ration.forget()
        self.handler = logging.Handler(logging.ERROR)
        self.handler.emit = lambda record: self.lines.append(logging.Formatter().format(record))  # type: ignore[method-assign]
        logging.getLogger("vhostpc").addHandler(self.handler)
        self.memory = os.memfd_create("machine", os.MFD_CLOEXEC)
        os.ftruncate(self.memory, SIZE)
        self.event = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.connect()

    def connect(self) -> None:
        self.sock, theirs = socket.socketpair()
        self.sock.settimeout(20)
        self.reader = vu.FrameReader()
        self.model = Model()
        self.ended = False

        async def serve() -> None:
            await serve_connection(Net(), trio.socket.from_stdlib_socket(theirs), Options())

        self.thread = threading.Thread(target=trio.run, args=(serve,))
        self.thread.start()
        self.doomed = False

    # --- one message ---

    def receive(self) -> vu.Frame | None:
        while True:
            try:
                data = self.sock.recv(self.reader.want)
            except ConnectionResetError:
                return None
            if not data:
                return None
            if (frame := self.reader.feed(data)) is not None:
                return frame

    def send(self, request: int, payload: bytes, fds: list[int], flags: int = 0) -> None:
        try:
            socket.send_fds(self.sock, [vu.encode(request, payload, flags=flags)], fds)
        except BrokenPipeError:
            assert self.ended

    def tell(
        self, request: Request, payload: bytes = b"", fds: list[int] | None = None, *, ack: bool = False
    ) -> vu.Frame | None:
        """Send; returns the answer that the request table promises, which must come."""
        spec = vu.REQUESTS.get(request)
        declined = spec is None or (spec.gate is not None and spec.gate not in self.model.protocol)
        self.send(request, payload, fds or [], vu.FLAG_NEED_REPLY if ack else 0)
        acked = ack and P.REPLY_ACK in self.model.protocol
        if declined:
            if acked:
                assert self.status(request) == 1
            return None
        assert spec is not None
        if spec.reply is vu.Reply.VALUE:
            frame = self.receive()
            assert frame is not None, self.lines
            assert frame.request == request
            return frame
        if acked:
            assert self.status(request) == 0
        return None

    def status(self, request: Request) -> int:
        frame = self.receive()
        assert frame is not None, self.lines
        assert (frame.request, frame.flags) == (request, 0x5)
        return vu.unpack_u64(frame.payload)

    def offered(self, gate: ProtocolFeature) -> bool:
        return gate in self.model.protocol

    def last(
        self, request: Request, payload: bytes = b"", fds: list[int] | None = None, ack: bool = False
    ) -> None:
        """Send a message that ends the session, with one line, and without an answer."""
        self.send(request, payload, fds or [], vu.FLAG_NEED_REPLY if ack else 0)
        self.ended = True
        self.send(Request.GET_FEATURES, b"", [])  # a session that goes on answers this
        frame = self.receive()
        assert frame is None, f"{request.name} was answered, the model expects the end"
        self.thread.join(20)
        assert len(self.lines) == 1, self.lines
        assert "Traceback" not in self.lines[0]

    def play(
        self, request: Request, payload: bytes = b"", fds: list[int] | None = None, *, ack: bool = False
    ) -> vu.Frame | None:
        """``tell``, if the model has not said before that this is the end."""
        if self.doomed:
            self.last(request, payload, fds, ack)
            return None
        return self.tell(request, payload, fds, ack=ack)

    def expect(self, change: object) -> None:
        """Run a change of the model; note whether it ends the session."""
        assert callable(change)
        try:
            change()
        except Ended:
            self.doomed = True

    # --- rules ---

    @precondition(lambda self: self.ended)
    @rule()
    def another_session(self) -> None:
        self.sock.close()
        self.lines.clear()
        self.connect()

    @precondition(lambda self: not self.ended)
    @rule(index=st.sampled_from([0, 1]), protocol=st.booleans())
    def set_up(self, index: int, protocol: bool) -> None:
        """As a front-end does that knows its business."""
        if protocol:
            self.set_protocol_features(wanted=set(PROTOCOL))
        steps: list[Callable[[], object]] = [
            lambda: self.model.features_set
            or self.set_features(wanted={Feature.VERSION_1}, odd=False, ack=False),
            lambda: self.model.regions or self.set_mem_table(kind="near", ack=False),
            lambda: self.model.rings[index].running or self.set_vring_num(index=index, num=16, ack=False),
            lambda: self.set_vring_addr(index=index, where="here", ack=False),
            lambda: self.set_vring_kick(index=index, how="event", ack=False),
        ]
        for step in steps:
            if not self.ended:
                step()

    @precondition(lambda self: not self.ended)
    @rule(extra=usually([False], [True]))
    def get_features(self, extra: bool) -> None:
        if extra:
            self.last(Request.GET_FEATURES, b"", [self.event])
        else:
            frame = self.tell(Request.GET_FEATURES)
            assert frame is not None
            assert vu.unpack_u64(frame.payload) == OFFERED

    @precondition(lambda self: not self.ended)
    @rule(wanted=st.sets(st.sampled_from(sorted(OFFERED))), odd=usually([False], [True]), ack=ACK)
    def set_features(self, wanted: set[Feature], odd: bool, ack: bool) -> None:
        bits = sum(wanted) | (1 << 34 if odd else 0)
        model = self.model

        def change() -> None:
            if bits & ~OFFERED:
                raise Ended
            old, model.features = model.features, bits
            first, model.features_set = not model.features_set, True
            if not first and old != bits:
                for ring in model.rings:
                    if (old ^ bits) & ~Feature.LOG_ALL:
                        if ring.running and ring.enabled:
                            raise Ended
                        ring.started = ring.running = False
                for _ in model.rings:
                    model.check_log()
            for ring in model.rings:
                ring.enabled |= not bits & Feature.PROTOCOL_FEATURES
            model.update_all()

        self.expect(change)
        self.play(Request.SET_FEATURES, vu.pack_u64(bits), ack=ack)

    @precondition(lambda self: not self.ended)
    @rule(on=st.booleans(), ack=ACK)
    def log_all(self, on: bool, ack: bool) -> None:
        """What a migration does: this bit alone."""
        bits = {f for f in OFFERED if self.model.features & f and f != Feature.LOG_ALL}
        self.set_features(wanted=bits | ({Feature.LOG_ALL} if on else set()), odd=False, ack=ack)

    @precondition(lambda self: not self.ended)
    @rule(wanted=st.sets(st.sampled_from(PROTOCOL)))
    def set_protocol_features(self, wanted: set[ProtocolFeature]) -> None:
        bits = P(0)
        for bit in wanted:
            bits |= bit
        self.tell(Request.SET_PROTOCOL_FEATURES, vu.pack_u64(bits | 1 << 17 | 1 << 63))
        self.model.protocol = bits

    @precondition(lambda self: not self.ended)
    @rule(kind=usually(["near", "both"], ["none", "overlapping", "too long"]), ack=ACK)
    def set_mem_table(self, kind: str, ack: bool) -> None:
        table = {
            "near": [NEAR],
            "both": [FAR, NEAR],
            "none": [],
            "overlapping": [NEAR, vu.MemoryRegion(GUEST_BASE + 4096, 4096, 1 << 45, 0)],
            "too long": [vu.MemoryRegion(GUEST_BASE, SIZE + 4096, USER_BASE, 0)],
        }[kind]

        def change() -> None:
            if kind in ("overlapping", "too long"):
                raise Ended
            self.model.use(table)

        self.expect(change)
        self.play(Request.SET_MEM_TABLE, vu.pack_table(table), [self.memory] * len(table), ack=ack)

    @precondition(lambda self: not self.ended)
    @rule(region=st.sampled_from([NEAR, FAR]), ack=ACK)
    def add_mem_reg(self, region: vu.MemoryRegion, ack: bool) -> None:
        there = self.model.regions or []
        if self.offered(P.CONFIGURE_MEM_SLOTS) and region not in there:
            self.expect(lambda: self.model.use([*there, region]))
        self.play(Request.ADD_MEM_REG, vu.pack_single_region(region), [self.memory], ack=ack)

    @precondition(lambda self: not self.ended)
    @rule(region=st.sampled_from([NEAR, FAR]), ack=ACK)
    def rem_mem_reg(self, region: vu.MemoryRegion, ack: bool) -> None:
        there = self.model.regions or []
        payload = vu.pack_single_region(region)
        if self.offered(P.CONFIGURE_MEM_SLOTS) and region not in there:
            # It fails; without an ack that can only be told by hanging up.
            if ack and self.offered(P.REPLY_ACK):
                self.send(Request.REM_MEM_REG, payload, [], vu.FLAG_NEED_REPLY)
                assert self.status(Request.REM_MEM_REG) == 1
                self.lines.clear()
            else:
                self.send(Request.REM_MEM_REG, payload, [], vu.FLAG_NEED_REPLY if ack else 0)
                self.ended = True
                assert self.receive() is None
                self.thread.join(20)
                assert len(self.lines) == 2  # what failed, and that it ends the session
            return
        if self.offered(P.CONFIGURE_MEM_SLOTS):
            self.expect(lambda: self.model.use([r for r in there if r != region]))
        self.play(Request.REM_MEM_REG, payload, ack=ack)

    @precondition(lambda self: not self.ended)
    @rule(size=usually([4096], [1, 8192]))
    def set_log_base(self, size: int) -> None:
        fd = os.memfd_create("log", os.MFD_CLOEXEC)
        os.ftruncate(fd, 4096)

        def change() -> None:
            if size > 4096:
                raise Ended
            self.model.log = size
            self.model.check_log()
            self.model.update_all()

        if self.offered(P.LOG_SHMFD):
            self.expect(change)
        frame = self.play(Request.SET_LOG_BASE, vu.LogArea(size, 0).pack(), [fd])
        os.close(fd)
        assert frame is None or frame.payload == vu.LogArea(size, 0).pack()

    @precondition(lambda self: not self.ended)
    @rule(index=RING, num=usually([16, 64, 1024], [0, 24, 2048]), ack=ACK)
    def set_vring_num(self, index: int, num: int, ack: bool) -> None:
        def change() -> None:
            ring = self.model.ring(index)
            if num not in (16, 64, 1024):
                raise Ended
            ring.started &= not ring.running
            ring.running = False
            ring.size = num
            self.model.update(ring)

        self.expect(change)
        self.play(Request.SET_VRING_NUM, state(index, num), ack=ack)

    @precondition(lambda self: not self.ended)
    @rule(index=RING, where=usually(["here", "there"], ["outside", "misaligned"]), ack=ACK)
    def set_vring_addr(self, index: int, where: str, ack: bool) -> None:
        def change() -> None:
            ring = self.model.ring(index)
            moved, ring.where = ring.where != where, where
            if ring.running and moved:
                self.model.configure(ring)
            self.model.update(ring)

        self.expect(change)
        self.play(Request.SET_VRING_ADDR, vu.VringAddr(index, 0, *WHERE[where], 0).pack(), ack=ack)

    @precondition(lambda self: not self.ended)
    @rule(index=RING, base=usually([0, 1, 0xFFFF], [0x10000]), ack=ACK)
    def set_vring_base(self, index: int, base: int, ack: bool) -> None:
        def change() -> None:
            ring = self.model.ring(index)
            if base > 0xFFFF:
                raise Ended
            ring.started &= not ring.running
            ring.running = False
            ring.base, ring.ran = base, False

        self.expect(change)
        self.play(Request.SET_VRING_BASE, state(index, base), ack=ack)

    @precondition(lambda self: not self.ended)
    @rule(index=RING, how=usually(["event", "polled"], ["memory", "nothing"]), ack=ACK)
    def set_vring_kick(self, index: int, how: str, ack: bool) -> None:
        def change() -> None:
            ring = self.model.ring(index)
            if how in ("memory", "nothing"):
                raise Ended
            ring.started = True
            self.model.update(ring)

        self.expect(change)
        fds = {"event": [self.event], "memory": [self.memory]}.get(how, [])
        value = index | (vu.VRING_NOFD if how == "polled" else 0)
        self.play(Request.SET_VRING_KICK, vu.pack_u64(value), fds, ack=ack)

    @precondition(lambda self: not self.ended)
    @rule(index=RING, value=usually([0, 1], [2]), ack=ACK)
    def set_vring_enable(self, index: int, value: int, ack: bool) -> None:
        def change() -> None:
            if value == 0 and index >= len(self.model.rings):
                return
            ring = self.model.ring(index)
            if value > 1:
                raise Ended
            ring.enabled = bool(value)
            self.model.update(ring)

        self.expect(change)
        self.play(Request.SET_VRING_ENABLE, state(index, value), ack=ack)

    @precondition(lambda self: not self.ended)
    @rule(ack=ACK)
    def reset_owner(self, ack: bool) -> None:
        for ring in self.model.rings:
            ring.started = ring.enabled = ring.running = False
        self.tell(Request.RESET_OWNER, ack=ack)

    @precondition(lambda self: not self.ended)
    @rule(index=RING)
    def get_vring_base(self, index: int) -> None:
        def change() -> None:
            ring = self.model.ring(index)
            ring.started = ring.running = False

        self.expect(change)
        frame = self.play(Request.GET_VRING_BASE, state(index, 0))
        if frame is not None:
            ring, got = self.model.rings[index], vu.VringState.unpack(frame.payload)
            assert got.index == index
            # A ring that ran may have been looked at: then its used index counts, which is 0.
            assert got.num == ring.base or (ring.ran and got.num == 0)
            ring.base = got.num

    @precondition(lambda self: not self.ended)
    @rule(
        request=st.sampled_from([Request.GET_INFLIGHT_FD, Request.IOTLB_MSG, Request.SET_VRING_ENDIAN]),
        ack=ACK,
    )
    def not_offered(self, request: Request, ack: bool) -> None:
        self.tell(request, bytes(24), [self.event], ack=ack)

    @precondition(lambda self: not self.ended)
    @rule(request=st.sampled_from([Request.SET_OWNER, Request.GET_QUEUE_NUM, Request.GET_STATUS]))
    def harmless(self, request: Request) -> None:
        self.tell(request)

    @invariant()
    def lives(self) -> None:
        """What was sent before has taken effect, nothing more was said, and the session goes on."""
        if not self.ended:
            self.tell(Request.GET_FEATURES)
            assert self.lines == []

    def teardown(self) -> None:
        self.sock.close()
        self.thread.join(20)
        assert not self.thread.is_alive()
        os.close(self.memory)
        os.close(self.event)
        logging.getLogger("vhostpc").removeHandler(self.handler)
        assert "Traceback" not in "".join(self.lines)
        fds, maps = self.before
        assert sorted(open_fds().values()) == sorted(fds.values())
        assert guest_mappings() == maps


TestSession = Session.TestCase
TestSession.settings = settings(
    stateful_step_count=40,
    suppress_health_check=list(HealthCheck),
    deadline=None,
    max_examples=max(100, settings().max_examples // 10),
)
