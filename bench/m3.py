"""M3: how long a machine stands still in a postcopy. ``python -m bench.m3``.

256 MiB full of data; precopy for a second, far from its end, then postcopy without a limit. Both ends on this machine
and under one clock, without a back-end and with one (``examples/bridge`` at each end, the same for both sides).

*Standstill*: from the last beat of a vCPU at the source to its first at the destination, which needs a page that has
not come. Ours has two vCPUs, which note their beats; the longer one counts. QEMU's has one, that counts up a word in
memory; ``native/beat_watch.c`` sees it in the memfds of both processes, late by some 20 us.
*Reported downtime*: what ``query-migrate`` says: until the package is sent. In whole milliseconds.
*STOP to RESUME*: between the two monitors' events, by their own timestamps. Both tell STOP when vCPUs and back-ends
have stopped. QEMU tells RESUME before it starts its back-ends and its vCPUs; ours when its vCPUs have been let go,
before its back-ends have started.

A device blob of equal size it is not: that of QEMU's ``pc`` has about 13 KB, ours 1.6 KB with a device and 0.4
without. Both go over a unix socket in one piece; what matters is how long loading takes.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import trio

from tests.kit.own_machine import Address, bridge, far_side
from tests.peers.child import open_child

from .ends import BLOCK, OURS, PEER, End, end, memory_file, memory_path, qemu_argv
from .f1_service import write_pages
from .f2 import SLOT, start_device
from .native import tool
from .rows import REPETITIONS, Row, Sample, at_most, in_turn, print_rows, stated

MIB = 256
VCPUS = 2
PRECOPY_S, PRECOPY_RATE = 1.0, 16 << 20
# xor ax,ax; mov ds,ax; inc dword [COUNT]; jmp back: 16 bytes before the end, where a processor begins.
COUNT = 0x7000
BEAT = bytes.fromhex("31c0 8ed8 66ff06 0070 ebf9")
FIRST, LAST = 16 << 8, (MIB - 16) << 8
"""Pages of a QEMU that are filled: beside 16 MiB at each end, where it may have something."""


@dataclass(frozen=True)
class Stood:
    """Milliseconds."""

    standstill: float
    downtime: float
    events: float


def seconds(event: dict[str, Any]) -> float:
    """When an event was, by its monitor."""
    stamp = event["timestamp"]
    return float(stamp["seconds"] + stamp["microseconds"] / 1e6)


async def move(source: End, target: End, folder: Path) -> tuple[float, float]:
    """Precopy, then postcopy, to the end: the reported downtime, and from STOP to RESUME, in milliseconds."""
    for side in (source, target):
        await side.allow("postcopy-ram")
    await target.qmp.command("migrate-incoming", uri=f"unix:{folder}/in")
    await source.qmp.command("migrate-set-parameters", max_bandwidth=PRECOPY_RATE)
    await source.qmp.command("migrate", uri=f"unix:{folder}/in")
    await source.reaches("active")
    await trio.sleep(PRECOPY_S)
    await source.qmp.command("migrate-start-postcopy")
    for side in (source, target):
        await side.reaches("completed")
    stopped = seconds(await source.qmp.event("STOP"))
    resumed = seconds(await target.qmp.event("RESUME"))
    told = await source.qmp.command("query-migrate")
    return float(told["downtime"]), (resumed - stopped) * 1000


@contextlib.asynccontextmanager
async def bridges(folder: Path, count: int) -> AsyncIterator[list[list[Path]]]:
    """Sockets of ``count`` bridges for the source, and as many for the destination."""
    async with contextlib.AsyncExitStack() as stack:
        far: Address = await stack.enter_async_context(far_side())
        paths = [[folder / f"{side}{i}" for i in range(count)] for side in ("source", "target")]
        for path in (path for side in paths for path in side):
            await stack.enter_async_context(bridge(path, far))
        yield paths


async def ours(
    backends: int,
    program: Mapping[str, Sequence[str]] | None = None,
    reports: list[dict[str, Any]] | None = None,
) -> Stood:
    """``program``: what each end is, in place of ``vhostpc``. ``reports``: gets those of both ends."""
    with tempfile.TemporaryDirectory(prefix="vpc-bench-") as text:
        folder = Path(text)
        async with contextlib.AsyncExitStack() as stack:
            ends = []
            paths = await stack.enter_async_context(bridges(folder, backends))
            for name, sockets, more in (
                ("source", paths[0], []),
                ("target", paths[1], ["--incoming", "defer"]),
            ):
                monitor = folder / f"{name}.qmp"
                argv = [*(program[name] if program else (sys.executable, "-m", "vhostpc"))]
                argv += ["endpoint", "--qmp", f"unix:{monitor}"]
                argv += ["--ram", f"{BLOCK}={MIB}M", "--vcpus", str(VCPUS), *more]
                argv += [part for path in sockets for part in ("--backend", str(path))]
                ends.append(await stack.enter_async_context(end(OURS, argv, monitor)))
            source, target = ends
            downtime, events = await move(source, target, folder)
            there, here = [await side.qmp.command("x-vhostpc-report") for side in (source, target)]
            for side in (there, here):
                if side["problems"] or any(vcpu["bad"] for vcpu in side["vcpus"]):
                    raise RuntimeError(f"{side}")
            if reports is not None:
                reports += [there, here]
            pairs = zip(there["vcpus"], here["vcpus"], strict=True)
            stood = max(new["first-beat-ns"] - old["last-beat-ns"] for old, new in pairs)
    return Stood(stood / 1e6, downtime, events)


async def theirs(backends: int) -> Stood:
    with tempfile.TemporaryDirectory(prefix="vpc-bench-") as text:
        folder = Path(text)
        (folder / "bios").write_bytes((b"\xff" * ((1 << 16) - 16) + BEAT).ljust(1 << 16, b"\xff"))
        async with contextlib.AsyncExitStack() as stack:
            ends = []
            paths = await stack.enter_async_context(bridges(folder, backends))
            for name, sockets, more in (
                ("source", paths[0], []),
                ("target", paths[1], ["-incoming", "defer"]),
            ):
                monitor = folder / f"{name}.qmp"
                argv = [*qemu_argv(MIB), "-bios", str(folder / "bios")]
                argv += ["-qmp", f"unix:{monitor},server=on,wait=off"]
                argv += ["-qtest", f"unix:{folder / name}.qtest,server=on,wait=off"]
                for i, path in enumerate(sockets):
                    argv += [
                        "-chardev",
                        f"socket,id=vu{i},path={path}",
                        "-netdev",
                        f"vhost-user,id=n{i},chardev=vu{i}",
                    ]
                    argv += ["-device", f"virtio-net-pci,netdev=n{i},addr={SLOT + i:#x},romfile=,vectors=0"]
                ends.append(await stack.enter_async_context(end(PEER, [*argv, *more], monitor)))
            source, target = ends
            memory = memory_file(source.pid, MIB << 20)
            write_pages(memory, FIRST, LAST - FIRST)
            os.close(memory)
            if backends:
                await start_device(folder / "source.qtest")
            watch: list[str | Path] = [
                tool("beat_watch"),
                *(memory_path(side.pid, MIB << 20) for side in ends),
                str(COUNT),
            ]
            async with open_child(watch) as watcher:
                await watcher.until("ready\n")
                downtime, events = await move(source, target, folder)
                found = json.loads((await watcher.until(r"\{.*?\}", 0, 10))[0])
    return Stood((found["first_ns"] - found["last_ns"]) / 1e6, downtime, events)


async def rows(repetitions: int = REPETITIONS) -> list[Row]:
    table = []
    for count, what in ((0, "no back-end"), (1, "one bridge")):
        sides = {OURS: partial(ours, count), PEER: partial(theirs, count)}
        got = await in_turn(sides, repetitions, f"M3 {what}")
        beats = at_most(0.65 if count else 1.0)
        for name, mine, other, peer, goal in (
            ("standstill", "standstill", "standstill", f"{PEER}, seen in its memory", beats),
            ("standstill", "standstill", "downtime", f"{PEER}, its reported downtime", stated()),
            ("reported downtime", "downtime", "downtime", PEER, stated()),
            ("STOP to RESUME", "events", "events", PEER, at_most(1.2)),
        ):
            left, right = (
                [Sample(getattr(s, mine)) for s in got[OURS]],
                [Sample(getattr(s, other)) for s in got[PEER]],
            )
            table.append(Row("M3", f"{name} of a postcopy, {what}", "ms", peer, goal, left, right))
    return table


if __name__ == "__main__":
    print_rows(trio.run(rows))
