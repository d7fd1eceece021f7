"""docs/threads.md and the table behind it, against the C sources, the calls in Python, and running processes."""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trio

from tests.kit.c_calls import CallGraph, arguments, c_files, closing
from tests.kit.rig import Guest, backend_child, far_side, moving
from tests.kit.thread_names import thread_names
from tests.kit.until import until
from vhostpc._native.entries import ENTRIES, Thread, Use, use_of
from vhostpc.frontend import Driver
from vhostpc.guest.vcpu import Area, VCpu
from vhostpc.pages.dirty import DirtyTracker, DirtyWay
from vhostpc.pages.ramblock import RamSet
from vhostpc.units import TARGET_PAGE

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "vhostpc"
PAGE = (ROOT / "docs" / "threads.md").read_text()

# --- the table against C -----------------------------------------------------------------------------

#: What a pointer into guest memory is called: a mapping, a region's first byte, the parts of a ring, a RAM block.
GUEST_POINTER = re.compile(
    r"\bm->base\b|->own\b|\bvq->(?:desc|avail|used)\b|\bb->map\b|\bblock->map\b|blocks\[[^]]+\]->map\b"
)
#: Functions that handle such a pointer and touch nothing, each looked at by hand: they map, register, unmap, compare,
#: or hand an address to an ioctl that places pages.
ADDRESS_ONLY = {
    ("gm.c", "vpc_map_new"),
    ("gm.c", "map_free"),
    ("gm.c", "retire"),
    ("gm.c", "vpc_map_address"),
    ("gm.c", "vpc_gm_add"),
    ("touch.c", "vpc_request"),
    ("touch.c", "vpc_gm_request"),
    ("touch.c", "absent"),
    ("supply.c", "vpc_map_register"),
    ("supply.c", "vpc_supply_disarm"),
    ("supply.c", "vpc_supply_fail"),
    ("vq.c", "vpc_vq_set_memory"),
    ("vq.c", "vpc_vq_set_ring"),
    ("ram.c", "block_free"),
    ("ram.c", "vpc_ram_add"),
    ("ram.c", "vpc_ram_base"),
    ("ram.c", "vpc_ram_give_up"),
    ("ramplace.c", "place_some"),
    ("local.c", "vpc_local_place"),
}
#: In the front-end's process a RAM block that is armed makes a thread that touches it wait; these touch calm ones only.
CALM_BLOCKS = {"vpc_save_run", "vpc_save_round", "vpc_load_run"}


@pytest.fixture(scope="module")
def graph() -> CallGraph:
    return CallGraph(c_files())


def pointer_users(graph: CallGraph) -> set[tuple[str, str]]:
    return {(f.file, f.name) for f in graph.functions if GUEST_POINTER.search(f.body)}


def declared() -> set[str]:
    """What Python can call: the names between the markers of the headers."""
    found: set[str] = set()
    for header in c_files("vpc_*.h"):
        text = header.read_text().split("/* cdef begin */", 1)[1].split("/* cdef end */", 1)[0]
        found |= set(re.findall(r"\b(vpc_\w+)\(", re.sub(r"/\*.*?\*/", " ", text, flags=re.DOTALL)))
    return found


def entries(which: Callable[[Use], bool]) -> set[str]:
    """What the table says of all that Python can call."""
    return {name for name in declared() if which(use_of(name))}


def test_the_table_names_what_there_is(graph: CallGraph) -> None:
    assert set(ENTRIES) <= declared()
    assert Use.PLAIN not in ENTRIES.values(), "what is not named is that"
    assert all(graph.find(name) for name in declared()), "an entry whose body the scan does not find"


def test_what_touches_guest_memory(graph: CallGraph) -> None:
    users = pointer_users(graph)
    assert users >= ADDRESS_ONLY, "the list names functions that handle no guest pointer any more"
    touching = users - ADDRESS_ONLY
    seeds = {name for _, name in touching}
    assert {"vpc_touch_slow", "vpc_vq_ready", "vpc_vq_publish", "vpc_ram_verify", "driver_at"} <= seeds
    reaching = {name for _, name in graph.reaching(seeds)} & declared()
    assert reaching == entries(lambda use: use.touches)


def test_what_may_wait_for_a_page(graph: CallGraph) -> None:
    """Whatever reaches the one place that waits, unless each call on the way is made with VPC_TRY."""
    waiting = graph.reaching({"vpc_touch_slow"}, passes=lambda args: "VPC_TRY" not in args)
    blocks = {f.name for f in graph.functions if re.search(r"\bb->map\b|\]->map\b", f.body)} - {
        name for _, name in ADDRESS_ONLY
    }
    waiting |= graph.reaching(blocks)
    found = {name for _, name in waiting} & declared() - CALM_BLOCKS
    assert found == entries(lambda use: use.may_wait)
    assert entries(lambda use: use is Use.CALM_LOOP) == CALM_BLOCKS


#: System calls that wait for descriptors, unless their time is 0.
WAITS = re.compile(r"\b(?:epoll_wait|epoll_pwait2?|p?poll)(?=\()")


def waits_for_descriptors(body: str) -> bool:
    calls = (arguments(body[m.end() + 1 : closing(body, m.end(), "()") - 1]) for m in WAITS.finditer(body))
    return any("0" not in args[2:] for args in calls)


def test_what_waits_for_descriptors(graph: CallGraph) -> None:
    waiting = {f.name for f in graph.functions if waits_for_descriptors(f.body)}
    assert {"vpc_pump_wait", "sleep_until", "vpc_far_run"} <= waiting
    reaching = {name for _, name in graph.reaching(waiting)} & declared()
    assert reaching == entries(lambda use: use.is_loop)


#: A look at "lost", and the functions that may take one: there it stands behind a fence, which keeps the plain loads of
#: the copy before it (an acquire load does not, and arm64 would move them).
LOOK_AT_LOST = re.compile(r"atomic_load\w*\(&(?:\w+->)*lost\b")
FENCED_LOOK = {("gm_internal.h", "vpc_supply_lost"), ("ram_internal.h", "ram_lost")}


def test_lost_is_looked_at_behind_the_copy(graph: CallGraph) -> None:
    looking = {(f.file, f.name) for f in graph.functions if LOOK_AT_LOST.search(f.body)}
    assert looking == FENCED_LOOK
    for f in graph.functions:
        if (f.file, f.name) in FENCED_LOOK:
            before = f.body[: f.body.index("lost,")]
            assert "atomic_thread_fence(memory_order_acquire);" in before, f.name


# --- the table against Python ------------------------------------------------------------------------

#: Where a function that makes a native call may be handed to.
DOORS = {
    Use.GATE: {"touch", "gate.call"},
    Use.OWN_THREAD: {"run_loop"},
    Use.LOOP: {"run_loop"},
    Use.CALM_LOOP: {"run_loop"},
    # The driver's loops belong to no session: its short calls and its long ones run on its own threads.
    Use.HOP: {"_hop"},
}
#: Methods with such a call on behalf of others: their callers must be inside a door.
HELD = {("virtio/pump.py", "run"): "pump.run"}


class Uses(ast.NodeVisitor):
    """Each ``lib.vpc_x`` of a file, with the nodes above it."""

    def __init__(self, path: Path) -> None:
        self.tree = ast.parse(path.read_text(), str(path))
        self.parents = {c: p for p in ast.walk(self.tree) for c in ast.iter_child_nodes(p)}

    def above(self, node: ast.AST) -> Iterator[ast.AST]:
        while node in self.parents:
            node = self.parents[node]
            yield node

    def function(self, node: ast.AST) -> ast.AST | None:
        kinds = (ast.Lambda, ast.FunctionDef, ast.AsyncFunctionDef)
        return next((n for n in self.above(node) if isinstance(n, kinds)), None)

    def handed_to(self, node: ast.AST) -> str:
        """The callee of the call that ``node`` is the first argument of, or nothing."""
        call = self.parents.get(node)
        if isinstance(call, ast.Call) and call.args and call.args[0] is node:
            return ast.unparse(call.func)
        return ""

    def doors_of(self, node: ast.AST) -> set[str]:
        """What the function round ``node`` is handed to, by each of its uses."""
        function = self.function(node)
        if function is None:
            return {"nothing"}
        if isinstance(function, ast.Lambda):
            return {self.handed_to(function) or "nothing"}
        name = function.name  # type: ignore[attr-defined]
        uses = [
            n
            for n in ast.walk(self.tree)
            if (isinstance(n, ast.Name) and n.id == name)
            or (isinstance(n, ast.Attribute) and n.attr == name and ast.unparse(n.value) == "self")
        ]
        return {self.handed_to(use) or "nothing" for use in uses} or {"nothing"}


def is_door(callee: str, doors: set[str]) -> bool:
    return any(callee == d or callee.endswith((f".{d}", f"_{d}")) for d in doors)


def python_files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", python_files(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_who_may_wait_comes_through_its_door(path: Path) -> None:
    found = Uses(path)
    here = str(path.relative_to(PACKAGE))
    for node in ast.walk(found.tree):
        if not (isinstance(node, ast.Attribute) and use_of(node.attr) in DOORS):
            continue
        use = use_of(node.attr)
        where = f"{here}:{node.lineno}: {node.attr}"
        call = found.parents[node]
        if not (isinstance(call, ast.Call) and call.func is node):
            assert is_door(
                found.handed_to(node), DOORS[use]
            ), f"{where} is handed on, but not to {DOORS[use]}"
            continue
        if use is Use.GATE and ast.unparse(call.args[-1]) == "lib.VPC_TRY":
            continue
        function = found.function(node)
        if (here, getattr(function, "name", "")) in HELD:
            continue
        doors = found.doors_of(node)
        assert all(
            is_door(d, DOORS[use]) for d in doors
        ), f"{where} is called by {doors}, not by {DOORS[use]}"


def test_what_is_held_is_called_inside_a_door() -> None:
    seen = 0
    for path in python_files():
        found = Uses(path)
        for node in ast.walk(found.tree):
            if isinstance(node, ast.Attribute) and ast.unparse(node) in HELD.values():
                seen += 1
                function = found.function(node)
                assert isinstance(function, ast.Lambda), f"{path}:{node.lineno}"
                assert is_door(found.handed_to(function), {"run_loop"}), f"{path}:{node.lineno}"
    assert seen == len(HELD)


#: Borrows trio's threads, as a device of a user's may: it has no way to guest memory ("Trio thread N" in the table).
OF_TRIO = {PACKAGE / "backend" / "medium.py": "trio.to_thread.run_sync"}
#: What gets a thread, and which argument is its name.
BORROWS = {"borrow": 2, "KeptThread": 0, "keeping": 0, "self.sleepers.run": 2}


def test_no_thread_without_a_name() -> None:
    """Threads come from one file; every call that gets one names it, by the table; every name of the table is used."""
    used = set()
    for path in python_files():
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or path.name in ("threads.py", "sleepers.py"):
                continue
            callee = ast.unparse(node.func)
            assert callee == OF_TRIO.get(path) or not re.search(
                r"to_thread|start_thread_soon|start_new_thread|\bthreading\b(?!\.Lock)", callee
            ), path
            if callee in BORROWS:
                name = ast.unparse(node.args[BORROWS[callee]])
                assert re.fullmatch(r"Thread\.[A-Z]+", name), f"{path}:{node.lineno}: a thread named {name}"
                used.add(Thread[name.removeprefix("Thread.")])
    assert used == set(Thread) - {Thread.IDLE, Thread.AHEAD}
    creators = {path.name for path in c_files() if "pthread_create" in path.read_text()}
    assert creators == {"ahead.c"}
    assert f'"{Thread.AHEAD}"' in (PACKAGE / "_native" / "memory" / "ahead.c").read_text()
    assert all(len(name) <= 15 for name in Thread)


# --- the page ----------------------------------------------------------------------------------------


def rows(heading: str) -> list[list[str]]:
    """Cells of the table under a heading of the page."""
    text = PAGE.split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0]
    lines = [line for line in text.splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_page_lists_every_entry() -> None:
    table = {}
    for names, touches, waits, how in rows("Entry points"):
        for name in re.findall(r"`(vpc_\w+)`", names):
            assert name not in table, f"{name} stands twice"
            table[name] = (touches, waits, how)
    words = {True: "yes", False: "no"}
    assert table == {n: (words[u.touches], words[u.may_wait], u.value) for n, u in ENTRIES.items()}
    assert rows("Entry points")[-1] == ["every other", "no", "no", Use.PLAIN.value]


def page_threads() -> set[str]:
    return {name for row in rows("Threads") for name in re.findall(r"`([^`]+)`", row[0])}


def test_the_page_lists_every_thread() -> None:
    assert page_threads() == {*Thread, "Trio thread N"}


def threads_of(pid: int) -> set[str]:
    """Names of a process's threads but the first, which runs the trio loop."""
    found = thread_names(pid)
    return {re.sub(r"^Trio thread \d+$", "Trio thread N", name) for tid, name in found.items() if tid != pid}


def program_name(pid: int) -> str:
    """A thread bears it too until it has taken a name of its own, right after it was made."""
    return Path(f"/proc/{pid}/comm").read_text().strip()


@pytest.mark.ufd
@pytest.mark.parametrize("device", ["bridge", "echo"])
async def test_threads_of_running_processes(tmp_path: Path, device: str) -> None:
    """Before, in and after postcopy, under load, no process has a thread that the page does not know."""
    seen: dict[str, set[str]] = {"back-end": set(), "front-end": set(), "source": set()}
    guest = Guest()
    p = guest.page_size
    async with (
        far_side(echo=True) as (far, address),
        backend_child(tmp_path, device=device, far=[address]) as b,
    ):

        def look(*pids: int) -> None:
            for who, pid in zip(seen, (b.process.pid, os.getpid(), *pids), strict=False):
                seen[who] |= threads_of(pid) - {program_name(pid)}

        def all_named() -> bool:
            pids = (
                b.process.pid,
                m.source.pid,
            )  # the front-end is this process, which has a thread of pytest's
            return not any(program_name(pid) in threads_of(pid) for pid in pids)

        await guest.fill()
        regions = guest.regions(guest.source)
        answer = {} if device == "bridge" else {"answer_len": 64}
        tx_at = guest.layout(0, slots=16, **answer)
        rx_at = guest.layout(4 * p, slots=16)
        with (
            Driver(guest.source, regions, tx_at) as tx,
            Driver(guest.source, regions, rx_at, receive=True) as rx,
        ):
            for driver in (tx, rx):
                await driver.reset()
                assert await driver.post(16, 1000) == 16
            async with moving(guest, b) as m:
                await m.start(0, rx)
                await m.start(1, tx)

                async def drive() -> None:
                    while True:
                        for driver in (tx, rx):
                            await driver.reap()
                            await driver.post(16, 1000)
                        await trio.lowlevel.checkpoint()

                def all_moved() -> bool:
                    look(m.source.pid)
                    return tx.numbers().completed >= 64

                async with trio.open_nursery() as nursery:
                    nursery.start_soon(drive)
                    await until(all_moved, 30, "64 frames")
                    await until(all_named, 10, "every thread to have a name")
                    nursery.cancel_scope.cancel()
                await m.finish()
                look(m.source.pid)
    guest.close()
    everybody = set().union(*seen.values())
    assert everybody <= page_threads(), seen
    # And these were seen at work.
    assert {Thread.FAULT, Thread.LOAD, Thread.FAR} <= seen["front-end"], seen
    assert Thread.SOURCE in seen["source"], seen
    assert (Thread.PUMP in seen["back-end"]) == (device == "bridge"), seen


@pytest.mark.ufd
async def test_threads_of_a_machine_whose_writes_are_tracked() -> None:
    """A vCPU tells the id of its thread, which bears its name; so does the tracker's."""

    def names() -> set[str]:
        return threads_of(os.getpid())

    with RamSet() as ram:
        areas = [Area(ram.create("ram", 64 * TARGET_PAGE), 0, 64)]
        with VCpu(ram, areas, writes=1000) as cpu, DirtyTracker(ram, DirtyWay.WP_SYNC) as tracker:
            await cpu.fill()
            async with trio.open_nursery() as nursery:
                await tracker.start(nursery)
                await nursery.start(cpu.run)
                await until(lambda: cpu.numbers().beats)
                comm = Path(f"/proc/{os.getpid()}/task/{cpu.numbers().thread}/comm").read_text().strip()
                assert comm == Thread.VCPU
                assert {Thread.VCPU, Thread.DIRTY} <= names()
                await cpu.stop()
                await tracker.stop()
        await until(lambda: not {Thread.VCPU, Thread.DIRTY} & names())
