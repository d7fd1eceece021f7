"""F2: a fault served remotely, touch to return. ``python -m bench.f2``.

A vhost-user back-end (``native/vhost_touch.c``, the same program for both sides) touches pages of guest memory that
another process on this machine still holds, in a fixed random order, one every 300 microseconds and more, and times
each touch. 512 MiB; pages that have come unasked are passed over.

Ours: two ``vhostpc endpoint`` with a machine of our own, migrating by postcopy, with postcopy-preempt and without; the
toucher is the back-end of the destination's network device, the vCPU does nothing. Peers: a pair of QEMU 10.0, the
toucher being the destination's vhost-user-net; their guest halts at its first instruction, the device is started by a
few port writes over QEMU's test socket at the source. And what the machine adds: our front-end with its fault service
in one process, our page source in another, and nothing else. With postcopy-preempt a QEMU answers the faults of a
back-end, but then never ends its migration: with back-ends it must be off. So both are measured while pages flow, and
the goal is held against preempt.

*Idle*: next to nothing is sent unasked (QEMU: ``max-postcopy-bandwidth`` 4096). Without preempt a QEMU has no such
state: its limit holds up the pages that were asked for as well, for a tenth of a second and more.
*Background pages flowing*: as many as the socket takes. Pages that arrived unasked are skipped, so the touches end with
the flow. *At 32 MiB/s*: the background has a limit, which no request waits for. *Spinning*: ours against itself with
``--spin-us`` longer than the gap between touches; and what that costs the destination in processor time a touch, user
and system, all of its threads.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import trio

from tests.peers.child import Child, open_child

from . import ROOT
from .d1 import cpu_seconds
from .ends import BLOCK, OURS, End, end, memory_file, qemu_argv
from .f1_service import write_pages
from .f2_service import COUNT, FIRST, MIB
from .native import tool
from .rows import REPETITIONS, Goal, Row, Sample, at_most, in_turn, print_rows, stated

PAIR, BARE = "vhostpc endpoints, preempt", "vhostpc, front-end and page source only"
ALONE = "vhostpc endpoints, no preempt"
PREEMPT, PLAIN = "QEMU 10.0 pair, preempt", "QEMU 10.0 pair, no preempt"
WITH_PREEMPT, WITHOUT = ("postcopy-ram", "postcopy-preempt"), ("postcopy-ram",)
SPIN_US = 500
TOUCHES, GAP_US, ENOUGH = 1500, 300, 150
UNLIMITED = (1 << 64) - 1
IDLE, FLOWING, LIMITED = "idle", "background pages flowing", "background at 32 MiB/s"
WAYS = {
    IDLE: (0, [PREEMPT, ALONE, BARE]),
    FLOWING: (UNLIMITED, [PREEMPT, PLAIN, ALONE, BARE]),
    LIMITED: (32 << 20, [PREEMPT, ALONE]),
}
GOALS = {(IDLE, "p50"): 0.8, (IDLE, "p99"): 1.0, (FLOWING, "p50"): 0.7, (FLOWING, "p99"): 1.0}
OWN_IDLE = 1.25
"""The goal for the median while pages flow, against that of idle."""
HALT = bytes.fromhex("fa f4 eb fd")  # cli, hlt, again; 16 bytes before the end, where a processor begins
PORTS, SLOT = 0xC000, 0x10  # of the virtio device: where its legacy registers are put, its place on the bus


@dataclass(frozen=True)
class Touched:
    """Microseconds. ``processor``: of our destination, a touch."""

    p50: float
    p99: float
    count: int
    processor: float = 0


@contextlib.asynccontextmanager
async def toucher(path: Path, touches: int = TOUCHES) -> AsyncIterator[Child]:
    argv: list[str | Path] = [tool("vhost_touch"), path, str(FIRST), str(COUNT), str(touches), str(GAP_US)]
    async with open_child(argv) as child:
        await child.until("ready\n")
        yield child


async def result(child: Child) -> Touched:
    said = json.loads((await child.until(r"\{.*?\}", 0, 60))[0])
    if said["bad"] or said["touched"] < ENOUGH:
        raise RuntimeError(f"touches: {said}")
    return Touched(said["p50_ns"] / 1000, said["p99_ns"] / 1000, said["touched"])


async def bare(rate: int) -> Touched:
    """Our front-end and our page source."""
    with tempfile.TemporaryDirectory(prefix="vpc-bench-") as folder:
        path = Path(folder) / "sock"
        argv = [sys.executable, "-m", "bench.f2_service", str(path), "--rate", str(rate)]
        async with toucher(path) as child, open_child(argv, name=BARE, cwd=ROOT):
            return await result(child)


@contextlib.asynccontextmanager
async def qemu(folder: Path, name: str, *more: str) -> AsyncIterator[End]:
    monitor = folder / f"{name}.qmp"
    (folder / "bios").write_bytes(HALT.rjust((1 << 16) - 16 + len(HALT), b"\xff").ljust(1 << 16, b"\xff"))
    argv = [
        *qemu_argv(MIB),
        *("-bios", str(folder / "bios")),
        *(
            "-qmp",
            f"unix:{monitor},server=on,wait=off",
            "-qtest",
            f"unix:{folder / name}.qtest,server=on,wait=off",
        ),
        *("-chardev", f"socket,id=vu,path={folder / name}.vu", "-netdev", "vhost-user,id=n0,chardev=vu"),
        *("-device", f"virtio-net-pci,netdev=n0,addr={SLOT:#x},romfile=,vectors=0"),
    ]
    async with end(name, [*argv, *more], monitor) as it:
        yield it


async def start_device(path: Path) -> None:
    """What a driver of the guest would do: place the registers, give both rings a page, say DRIVER_OK."""
    bus = 0x80000000 | SLOT << 11
    commands = [
        *(f"outl 0xcf8 {bus | 0x10:#x}", f"outl 0xcfc {PORTS | 1:#x}"),
        *(f"outl 0xcf8 {bus | 0x04:#x}", "outw 0xcfc 5"),
        *(f"outb {PORTS + 18:#x} 3", f"outl {PORTS + 4:#x} 0"),
        *(f"outw {PORTS + 14:#x} 0", f"outl {PORTS + 8:#x} 0x200"),
        *(f"outw {PORTS + 14:#x} 1", f"outl {PORTS + 8:#x} 0x210"),
        f"outb {PORTS + 18:#x} 7",
    ]
    async with await trio.open_unix_socket(str(path)) as stream:
        for command in commands:
            await stream.send_all(command.encode() + b"\n")
            answer = b""
            while not answer.endswith(b"\n"):
                answer += bytes(await stream.receive_some(4096))
            if not answer.startswith(b"OK"):
                raise RuntimeError(f"{command}: {answer!r}")


async def theirs(preempt: bool, rate: int) -> Touched:
    names = WITH_PREEMPT if preempt else WITHOUT
    with tempfile.TemporaryDirectory(prefix="vpc-bench-") as text:
        folder = Path(text)
        async with contextlib.AsyncExitStack() as stack:
            await stack.enter_async_context(toucher(folder / "source.vu"))
            source = await stack.enter_async_context(qemu(folder, "source"))
            child = await stack.enter_async_context(toucher(folder / "target.vu"))
            target = await stack.enter_async_context(qemu(folder, "target", "-incoming", "defer"))
            fill(source)
            await start_device(folder / "source.qtest")
            touched = await switch(source, target, folder, child, names, rate)
    return touched


def fill(source: End) -> None:
    """Give the machine's memory what the toucher expects."""
    memfd = memory_file(source.pid, MIB << 20)
    write_pages(memfd, FIRST, COUNT)
    os.close(memfd)


async def switch(
    source: End, target: End, folder: Path, child: Child, names: Sequence[str], rate: int
) -> Touched:
    """Postcopy before precopy has brought anything; what the toucher says."""
    for side in (source, target):
        await side.allow(*names)
    await target.qmp.command("migrate-incoming", uri=f"unix:{folder}/in")
    # Next to nothing before the switch.
    most = 0 if rate == UNLIMITED else max(rate, 4096)
    await source.qmp.command("migrate-set-parameters", max_bandwidth=1 << 20, max_postcopy_bandwidth=most)
    await source.qmp.command("migrate", uri=f"unix:{folder}/in")
    await source.reaches("active")
    await source.qmp.command("migrate-start-postcopy")
    return await result(child)


@contextlib.asynccontextmanager
async def endpoint(
    folder: Path, name: str, *more: str, program: Sequence[str] = (sys.executable, "-m", "vhostpc")
) -> AsyncIterator[End]:
    """A machine of our own, whose vCPU leaves the memory alone."""
    monitor = folder / f"{name}.qmp"
    argv = [*program, "endpoint", "--qmp", f"unix:{monitor}", "--ram", f"{BLOCK}={MIB}M"]
    argv += ["--vcpus", "1", "--vcpu-writes", "0", "--vcpu-checks", "0", "--backend", f"{folder / name}.vu"]
    async with end(OURS, [*argv, *more], monitor) as it:
        yield it


async def pair(
    rate: int, *, spin_us: int = 0, module: str = "vhostpc", names: Sequence[str] = WITH_PREEMPT
) -> Touched:
    """Ours. ``module``: what the destination runs."""
    with tempfile.TemporaryDirectory(prefix="vpc-bench-") as text:
        folder = Path(text)
        async with contextlib.AsyncExitStack() as stack:
            await stack.enter_async_context(toucher(folder / "source.vu"))
            source = await stack.enter_async_context(endpoint(folder, "source"))
            child = await stack.enter_async_context(toucher(folder / "target.vu"))
            more = ("--spin-us", str(spin_us), "--incoming", "defer")
            program = (sys.executable, "-m", module)
            target = await stack.enter_async_context(endpoint(folder, "target", *more, program=program))
            fill(source)
            before = cpu_seconds(target.pid)
            touched = await switch(source, target, folder, child, names, rate)
            used = cpu_seconds(target.pid) - before
    return replace(touched, processor=used * 1e6 / touched.count)


def compare(
    what: str, mine: list[Touched], other: list[Touched], peer: str, goal: Callable[[str], Goal]
) -> list[Row]:
    """A row each for p50 and p99."""
    return [
        Row(
            "F2",
            f"fault served remotely, {what}, {part}",
            "us",
            peer,
            goal(part),
            *([Sample(getattr(t, part)) for t in side] for side in (mine, other)),
        )
        for part in ("p50", "p99")
    ]


async def spinning(repetitions: int) -> list[Row]:
    """Ours against itself, only what is asked for."""
    sides = {"spins": partial(pair, 0, spin_us=SPIN_US), "sleeps": partial(pair, 0)}
    got = await in_turn(sides, repetitions, f"F2 spinning {SPIN_US} us")
    what, peer = f"{IDLE}, spinning {SPIN_US} us", f"{PAIR}, not spinning"
    cost = [[Sample(t.processor) for t in got[name]] for name in sides]
    row = f"processor of the destination, {what}"
    return [
        *compare(what, got["spins"], got["sleeps"], peer, lambda _: stated()),
        Row("F2", row, "us/touch", peer, stated(), *cost),
    ]


async def rows(repetitions: int = REPETITIONS) -> list[Row]:
    table, mine = [], {}
    for how, (rate, others) in WAYS.items():
        makes: dict[str, Callable[[], Awaitable[Touched]]] = {
            PAIR: partial(pair, rate),
            ALONE: partial(pair, rate, names=WITHOUT),
            BARE: partial(bare, rate),
            PREEMPT: partial(theirs, True, rate),
            PLAIN: partial(theirs, False, rate),
        }
        got = await in_turn({name: makes[name] for name in (PAIR, *others)}, repetitions, f"F2 {how}")
        mine[how] = got[PAIR]
        for peer in others:

            def goal(part: str, peer: str = peer, how: str = how) -> Goal:
                most = GOALS.get((how, part)) if peer == PREEMPT else None
                return stated() if most is None else at_most(most)

            table += compare(how, got[PAIR], got[peer], peer, goal)
    table += compare(
        FLOWING,
        mine[FLOWING],
        mine[IDLE],
        f"{PAIR}, idle",
        lambda part: at_most(OWN_IDLE) if part == "p50" else stated(),
    )
    return table + await spinning(repetitions)


if __name__ == "__main__":
    print_rows(trio.run(rows))
