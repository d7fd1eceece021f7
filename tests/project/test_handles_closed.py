"""Objects of Python that stand for one of C: what is closed raises, and C never gets a freed pointer."""

from __future__ import annotations

import ast
import os
import re
import socket
import threading
import weakref
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from tests.kit.until import until
from vhostpc._native import lib
from vhostpc._native.handles import Handle, made
from vhostpc.errors import VhostpcError
from vhostpc.frontend import Driver, FarSide, GuestRegion, RingLayout
from vhostpc.guest.vcpu import Area, VCpu
from vhostpc.memory.inflight import InflightRegion
from vhostpc.memory.log import DirtyLog
from vhostpc.memory.mapping import Mapping, Supply
from vhostpc.memory.table import GuestMemory, Region
from vhostpc.pages.dirty import DirtyTracker
from vhostpc.pages.pagesource import PageScan, PageSource
from vhostpc.pages.ramblock import Bits, RamSet
from vhostpc.pages.ramchannel import RamChannel
from vhostpc.pages.service import FaultService
from vhostpc.ufd import Userfaultfd
from vhostpc.virtio.pump import Pump

PACKAGE = Path(__file__).resolve().parents[2] / "vhostpc"
PAGE = 4096
pytestmark = pytest.mark.ufd


@dataclass
class Things:
    """One of each, and what they stand on."""

    stack: ExitStack
    ram: RamSet = field(init=False)
    made: dict[type, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.ram = RamSet()
        block = self.ram.create("ram", 64 * PAGE)
        regions = [GuestRegion(0, block.length, block)]
        near, far = socket.socketpair()
        udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        for sock in (near, far, udp):
            self.stack.enter_context(sock)
        supply = Supply()
        mapping = Mapping(supply, block.fd, 0, block.length)
        service = FaultService(self.ram, trace=4)
        vq = self._queue()
        log = os.memfd_create("log")
        os.ftruncate(log, PAGE)
        for thing in (
            supply,
            mapping,
            GuestMemory(supply, [Region(0, block.length, 0, mapping)]),  # type: ignore[arg-type]
            DirtyLog(supply, log, 0, PAGE),
            InflightRegion(supply, log, 0, PAGE, 1, 128),
            self.ram,
            VCpu(self.ram, [Area(block, 32, 16)]),
            service,
            service.open_channel(near.fileno()),
            PageScan(self.ram),
            PageSource(self.ram, far.fileno()),
            DirtyTracker(self.ram),
            Driver(self.ram, regions, RingLayout.contiguous_at(0, 16, slots=8)),
            FarSide(udp),
            Pump(vq.raw, 0),
        ):
            self.made[type(thing)] = thing
        os.close(log)
        self.far = far

    @staticmethod
    def _queue() -> Handle:
        return Handle(made("vq", "virtqueue", lib.vpc_vq_new), lib.vpc_vq_free, "a queue that is closed")

    def close(self) -> None:
        for thing in reversed(self.made.values()):
            thing.close()


@contextmanager
def things() -> Iterator[Things]:
    with ExitStack() as stack:
        found = Things(stack)
        try:
            yield found
        finally:
            found.close()


#: What to do with each when it is closed. A name alone: a property, or a method without arguments.
CALLS: dict[type, list[str | tuple[str, Any]]] = {
    Supply: ["handle", ("arm", 0), "disarm", "fail", "stats"],
    Mapping: ["handle", "address", "backing", "register"],
    GuestMemory: ["handle", "users", "end"],
    DirtyLog: ["handle"],
    RamSet: ["handle", "lost", ("create", ("more", PAGE)), ("add", ("more", 0, PAGE))],
    VCpu: ["handle", "fill", "run", "sweep", "numbers", "save", ("set_rates", (1, 1))],
    FaultService: [
        *("handle", "arm", ("add_client", (0, "late")), ("set_return_path", 0), ("send", b"x")),
        *("run", "numbers", "waiting", ("open_channel", 0), ("load", 0)),
    ],
    RamChannel: ["handle", ("feed", b"x"), "take", "block", "load", "finish", "numbers"],
    PageScan: ["handle", ("set_rate", 1)],
    PageSource: [
        *(
            "handle",
            "serve",
            "wait",
            ("round", 1),
            "switch",
            ("keep_zeros", True),
            "stop",
            ("set_tail", b"x"),
            ("hear", (1, 1.0)),
        ),
        *(("set_rate", 1), "withhold_all", "changed", "numbers", ("release", "ram")),
    ],
    DirtyTracker: ["handle", "sync", "numbers"],
    Driver: [
        *("handle", "reset", "post", "reap", "run", "look", ("unseen", (0, 1)), "save", ("load", b"x")),
        "numbers",
    ],
    FarSide: ["handle", "run", "numbers", "echoed"],
    InflightRegion: ["handle"],
    Pump: ["stop", "clear", "stats", ("run", (False, None))],
}
#: In tests/backend/test_backend_ended.py; a part of a PageSource, which is closed with it.
ELSEWHERE = {"Ring", "UrgentSource"}


def owners() -> tuple[set[str], set[str]]:
    """Classes of the package that make a handle, and those that are an Owner."""
    makes, owns = set(), set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                calls = (n for n in ast.walk(node) if isinstance(n, ast.Call))
                if any(ast.unparse(call.func) == "Handle" for call in calls):
                    makes.add(node.name)
                if "Owner" in map(ast.unparse, node.bases):
                    owns.add(node.name)
    return makes, owns


def test_every_class_that_owns_an_object_of_c_is_here() -> None:
    makes, owns = owners()
    assert makes <= owns
    assert owns == {kind.__name__ for kind in CALLS} | ELSEWHERE


def test_nobody_owns_one_in_another_way() -> None:
    """No pointer of an object is kept without its handle, but by a trace, which the service tells of its end."""
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text()
        if path.name != "handles.py":
            assert "ffi.gc" not in text, path
            assert "ffi.release" not in text or path.name == "uffd.py", path
        freed = set(re.findall(r"\blib\.vpc_(\w+)_(?:free|unref)\(", text))
        assert freed <= {"chain"}, f"{path}: only chains, which a queue keeps, are not freed by a handle"


async def use(thing: Any, call: str | tuple[str, Any]) -> None:
    name, args = call if isinstance(call, tuple) else (call, ())
    found = getattr(thing, name)
    if callable(found):
        found = found(*(args if isinstance(args, tuple) else (args,)))
    if isinstance(found, Awaitable):
        await found


@pytest.mark.parametrize("kind", CALLS, ids=lambda kind: kind.__name__)
async def test_a_closed_one_raises(kind: type) -> None:
    with things() as made:
        thing = made.made[kind]
        blocks = list(made.ram.blocks)
        thing.close()
        thing.close()
        for call in CALLS[kind]:
            with pytest.raises((ValueError, VhostpcError)):
                await use(thing, call)
        if kind is RamSet:
            for do in ("base", "count_bits", "holes"):
                with pytest.raises((ValueError, OSError)):
                    await use(blocks[0], (do, Bits.DIRTY) if do == "count_bits" else do)
            with pytest.raises(ValueError, match="closed"):
                await blocks[0].read(0, 1)
        if kind is FaultService:
            assert thing.closed
            assert thing.traced() == (0, [])
        if kind is Supply:
            assert thing.lost


async def test_a_client_of_a_closed_fault_service_raises() -> None:
    with things() as made, Userfaultfd.open() as ufd:
        service = made.made[FaultService]
        client = service.add_client(ufd, "client")
        service.close()
        calls: list[str | tuple[str, Any]] = [("set_ranges", ([],)), "numbers"]
        for call in calls:
            with pytest.raises(ValueError, match="closed"):
                await use(client, call)
        client.remove()


ON_RAM = (VCpu, FaultService, RamChannel, PageSource, DirtyTracker, Driver)
#: What touches RAM, or asks about its pages.
WORK: dict[type, str | tuple[str, Any]] = {
    VCpu: "fill",
    FaultService: "numbers",
    RamChannel: ("feed", b"\0" * 8),
    PageSource: "numbers",
    DirtyTracker: "numbers",
    Driver: "reset",
}


@pytest.mark.parametrize("kind", ON_RAM, ids=lambda kind: kind.__name__)
async def test_what_stands_on_a_closed_ram_set_keeps_it(kind: type) -> None:
    """In whatever order they are closed."""
    with things() as made:
        thing = made.made[kind]
        raw = weakref.ref(made.ram.handle)
        for other in reversed(made.made.values()):
            if other is not thing:
                if isinstance(other, FaultService) and kind is RamChannel:
                    other.loops.close()
                other.close()
        assert raw() is not None
        await use(thing, WORK[kind])
        thing.close()
        assert raw() is None


async def test_nothing_goes_while_a_thread_works_on_it() -> None:
    """Closed in the middle of a call: it ends as if it were not, and then it is freed."""
    entered, go = threading.Event(), threading.Event()
    with RamSet() as ram:
        block = ram.create("ram", 16 * PAGE)
        raw = weakref.ref(ram.handle)

        def slow(handle: Any, *args: Any) -> int:
            entered.set()
            go.wait(20)
            return lib.vpc_ram_fill(handle, *args)

        async def work() -> None:
            await block._hop(slow, 0, 16, 1)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(work)
            await until(entered.is_set)
            ram.close()
            assert raw() is not None
            go.set()
        await until(lambda: raw() is None)


@pytest.mark.parametrize("kind", [PageSource, FarSide, Driver], ids=lambda kind: kind.__name__)
async def test_a_loop_of_a_closed_one_can_still_be_stopped(kind: type) -> None:
    with things() as made:
        thing = made.made[kind]
        raw = weakref.ref(thing.handle)
        loop: dict[type, Callable[[], Awaitable[Any]]] = {
            PageSource: lambda: thing.serve(),
            FarSide: lambda: thing.run(),
            Driver: lambda: thing.run(),
        }
        if kind is Driver:
            await thing.reset()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(loop[kind])
            await trio.testing.wait_all_tasks_blocked()
            thing.close()
            nursery.cancel_scope.cancel()
        await until(lambda: raw() is None)
