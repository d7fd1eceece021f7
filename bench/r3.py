"""R3: from the reconnect to the first page, behind a link that was lost in postcopy. ``python -m bench.r3``.

A machine full of data, 1 GiB and 4 GiB; both ends on this machine, a unix socket between them, no back-end, and no
limit of bandwidth in postcopy. It is switched at once, and as soon as its vCPU has moved at the destination the source
is told ``migrate-pause``: the link breaks with most pages missing. When both ends say ``postcopy-paused`` the
destination is told ``migrate-recover``, and the source ``migrate`` with ``resume``: with that command the time begins.
It ends when the vCPU at the destination goes on, which has waited for one page since the break. That is the event that
both sides have. Afterwards each migration has to complete; that is not in the figure.

When a vCPU goes on: ours reads pages in a random order without a pause; the time is in the destination's record of
answered faults, which is kept for that (``--trace-faults``). QEMU's walks through its memory page by page, from the
top, and counts up a word in memory; ``native/wait_watch.c`` sees it in the destination's memfd, late by some 20 us.

With preempt a QEMU makes its second connection again, too.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import trio

from tests.peers.child import Child, open_child

from .ends import BLOCK, LIMIT, OURS, PEER, End, end, memory_file, memory_path, qemu_argv
from .f1_service import write_pages
from .m4 import name as size_name
from .native import tool
from .rows import REPETITIONS, Row, Sample, at_most, in_turn, print_rows

SIZES = [1024, 4096]  # MiB
PRECOPY_RATE = 1 << 20
UNPACED = 10**9  # the most pages a second that a vCPU of ours can be told to check: it makes no pause
STEP = 0.002  # seconds between two looks
PREEMPT = f"{PEER}, preempt"
PEERS = {PEER: ("postcopy-ram",), PREEMPT: ("postcopy-ram", "postcopy-preempt")}
EDGE = 16
"""MiB at each end that a QEMU may use itself."""
LOW = 3072
"""MiB below 4 GiB of a QEMU that has more."""
COUNT, BIOS = 0x7000, 1 << 16
WALK_AT, TOP_AT = 0xFF00, 0x1E
WALK = bytes.fromhex(
    "2e660f01163aff 0f20c0 0c01 0f22c0 66ea17ffffff0800"  # lgdtl cs:[gdtr]; protected mode; far jump
    "66b81000 8ed8"  # mov ax,16; mov ds,ax
    "be00000000"  # again: mov esi,TOP
    "8b06 ff0500700000"  # next: mov eax,[esi]; inc dword [COUNT]
    "81ee00100000 81fe00000001 73ea ebe3"  # sub esi,4096; cmp esi,16 MiB; jae next; jmp again
    "1700 40ffffff"  # gdtr
    "0000000000000000 ffff0000009acf00 ffff00000092cf00"  # flat segments: none, code, data
)
"""A guest that never leaves its firmware; what begins at 0xFFFFFF00."""
START = bytes.fromhex("e90dff")  # jmp WALK, 16 bytes before the end, where a processor begins


def bios(mib: int) -> bytes:
    """Firmware of 64 KiB that walks through the memory of a machine of that size."""
    top = (min(mib, LOW) - EDGE << 20).to_bytes(4, "little")
    walk = WALK[:TOP_AT] + top + WALK[TOP_AT + 4 :]
    image = bytearray(b"\xff" * BIOS)
    image[WALK_AT : WALK_AT + len(walk)] = walk
    image[-16 : -16 + len(START)] = START
    return bytes(image)


@dataclass(frozen=True)
class Wait:
    """Of a vCPU for a page, in nanoseconds of CLOCK_MONOTONIC. ``end`` 0: it still waits."""

    begin: int
    end: int


class VCpu(Protocol):
    """The destination's."""

    async def first_wait(self) -> Wait:
        """The first one that ended behind the last call of this, or goes on."""
        ...


class OurVCpu:
    """By the record of the faults that the endpoint has answered, of which all are this vCPU's."""

    def __init__(self, end: End) -> None:
        self._end = end
        self._next = 0

    async def first_wait(self) -> Wait:
        report = await self._end.qmp.command("x-vhostpc-report")
        if report["problems"] or any(vcpu["bad"] for vcpu in report["vcpus"]):
            raise RuntimeError(f"{report}")
        found = Wait(0, 0)
        while True:
            told = await self._end.qmp.command("x-vhostpc-trace", **{"from": self._next})
            if not told["faults"]:
                return found
            if not found.end:
                found = Wait(*told["faults"][0][-2:])
            self._next = told["next"]


class TheirVCpu:
    """By the count that the guest keeps in its memory."""

    def __init__(self, watcher: Child) -> None:
        self._watcher = watcher

    async def first_wait(self) -> Wait:
        told = json.loads(await self._watcher.line(""))
        return Wait(told["before_ns"], told["after_ns"])


@dataclass(frozen=True)
class Pair:
    source: End
    target: End
    vcpu: VCpu

    async def goes_on(self) -> Wait:
        """The wait that its vCPU is in, when it has ended."""
        with trio.fail_after(LIMIT):
            while not (wait := await self.vcpu.first_wait()).end:
                await trio.sleep(STEP)
        return wait


@contextlib.asynccontextmanager
async def ours(folder: Path, mib: int) -> AsyncIterator[Pair]:
    async with contextlib.AsyncExitStack() as stack:
        ends = []
        for name, more in (("source", []), ("target", ["--incoming", "defer", "--trace-faults"])):
            monitor = folder / f"{name}.qmp"
            argv = [sys.executable, "-m", "vhostpc", "endpoint", "--qmp", f"unix:{monitor}"]
            argv += ["--ram", f"{BLOCK}={mib}M", "--vcpus", "1"]
            argv += ["--vcpu-writes", "0", "--vcpu-checks", str(UNPACED), *more]
            ends.append(await stack.enter_async_context(end(OURS, argv, monitor)))
        source, target = ends
        yield Pair(source, target, OurVCpu(target))


@contextlib.asynccontextmanager
async def theirs(folder: Path, mib: int) -> AsyncIterator[Pair]:
    (folder / "bios").write_bytes(bios(mib))
    async with contextlib.AsyncExitStack() as stack:
        ends = []
        for name, more in (("source", []), ("target", ["-incoming", "defer"])):
            monitor = folder / f"{name}.qmp"
            argv = [
                *qemu_argv(mib),
                "-bios",
                str(folder / "bios"),
                "-qmp",
                f"unix:{monitor},server=on,wait=off",
            ]
            ends.append(await stack.enter_async_context(end(PEER, [*argv, *more], monitor)))
        source, target = ends
        memory = memory_file(source.pid, mib << 20)
        await trio.to_thread.run_sync(write_pages, memory, EDGE << 8, mib - 2 * EDGE << 8)
        os.close(memory)
        watch: list[str | Path] = [tool("wait_watch"), memory_path(target.pid, mib << 20), str(COUNT)]
        watcher = await stack.enter_async_context(open_child(watch))
        await watcher.until("ready\n")
        yield Pair(source, target, TheirVCpu(watcher))


async def switched(pair: Pair, folder: Path, capabilities: Sequence[str]) -> None:
    """Postcopy before precopy has brought much, until the vCPU has moved at the destination."""
    for side in (pair.source, pair.target):
        await side.allow(*capabilities)
    await pair.target.qmp.command("migrate-incoming", uri=f"unix:{folder}/in")
    await pair.source.qmp.command(
        "migrate-set-parameters", max_bandwidth=PRECOPY_RATE, max_postcopy_bandwidth=0
    )
    await pair.source.qmp.command("migrate", uri=f"unix:{folder}/in")
    await pair.source.reaches("active")
    await pair.source.qmp.command("migrate-start-postcopy")
    await pair.source.reaches("postcopy-active")
    await pair.target.qmp.event("RESUME")
    await pair.vcpu.first_wait()  # precopy may have brought a count
    await pair.goes_on()


async def recovered(pair: Pair, folder: Path) -> Sample:
    """Milliseconds from the source's command to the end of the vCPU's wait."""
    sides = (pair.source, pair.target)
    await pair.source.qmp.command("migrate-pause")
    for side in sides:
        await side.reaches("postcopy-paused")
    since = [len(side.qmp.events) for side in sides]
    await pair.target.qmp.command("migrate-recover", uri=f"unix:{folder}/again")
    await pair.vcpu.first_wait()  # behind the pause one more page may have come that was in flight
    begin = time.monotonic_ns()
    await pair.source.qmp.command("migrate", uri=f"unix:{folder}/again", resume=True)
    for side, start in zip(sides, since, strict=True):
        await side.reaches("postcopy-active", start)  # until then no end is asked anything
    wait = await pair.goes_on()
    if not wait.begin < begin < wait.end:
        raise RuntimeError(f"the vCPU's {wait} does not have the reconnect in it, at {begin}")
    for side, start in zip(sides, since, strict=True):
        await side.reaches("completed", start)
    return Sample((wait.end - begin) / 1e6)


async def measure(name: str, mib: int) -> Sample:
    with tempfile.TemporaryDirectory(prefix="vpc-bench-") as text:
        folder = Path(text)
        async with (ours if name == OURS else theirs)(folder, mib) as pair:
            await switched(pair, folder, PEERS.get(name, ("postcopy-ram",)))
            return await recovered(pair, folder)


async def rows(repetitions: int = REPETITIONS) -> list[Row]:
    table = []
    for mib in SIZES:
        what = f"reconnect to first page, {size_name(mib)}"
        got = await in_turn({n: partial(measure, n, mib) for n in (OURS, *PEERS)}, repetitions, f"R3 {what}")
        table += [Row("R3", what, "ms", peer, at_most(0.5), got[OURS], got[peer]) for peer in PEERS]
    return table


if __name__ == "__main__":
    print_rows(trio.run(rows))
