"""The two ends of a migration that the bench drives, a QEMU or ours: one process each, by the same commands of QMP."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import trio

from tests.peers.child import Child, open_child
from tests.qemu import peers
from tests.qemu.qmp import Qmp

from . import ROOT
from .native import tool

OURS, PEER = "vhostpc endpoint", "QEMU 10.0"
BLOCK = "mem"  # the memory object gives the RAM block its name
LIMIT = 240  # seconds for one migration
LATE = ("failed", "cancelled", "postcopy-paused")


@dataclass
class End:
    """A running end and its monitor."""

    child: Child
    qmp: Qmp

    @property
    def pid(self) -> int:
        return self.child.pid

    async def allow(self, *capabilities: str) -> None:
        wanted = [{"capability": name, "state": True} for name in ("events", *capabilities)]
        await self.qmp.command("migrate-set-capabilities", capabilities=wanted)

    async def reaches(self, wanted: str, since: int = 0) -> int:
        """Wait for a status; the time at which its event was here, in nanoseconds of CLOCK_MONOTONIC."""
        while True:
            event = await self.qmp.event("MIGRATION", since, LIMIT)
            since = self.qmp.events.index(event, since) + 1
            status = event["data"]["status"]
            if status == wanted:
                return time.monotonic_ns()
            if status in LATE:
                info = await self.qmp.command("query-migrate")
                raise RuntimeError(f"{self.child.name}: {status}: {info}\n{self.child.last_words()}")


def qemu_argv(mib: int) -> list[str]:
    """A machine ``pc`` of that size without anything that it need not have."""
    memory = f"memory-backend-memfd,id={BLOCK},size={mib}M,share=on"
    return [
        *peers.qemu("10.0").argv,
        *("-nodefaults", "-no-user-config", "-display", "none", "-accel", "tcg"),
        *("-object", memory, "-M", f"pc,memory-backend={BLOCK}", "-m", f"{mib}M"),
    ]


async def _connect(child: Child, path: Path) -> trio.SocketStream:
    with trio.fail_after(30):
        while True:
            # The file is there a moment before somebody listens.
            with suppress(OSError):
                return await trio.open_unix_socket(str(path))
            if child.ended.is_set():
                raise RuntimeError(f"{child.name} ended: {child.last_words()}")
            await trio.sleep(0.01)


@asynccontextmanager
async def end(name: str, argv: Sequence[str | Path], monitor: Path) -> AsyncIterator[End]:
    """Start a program whose monitor listens at ``monitor``."""
    env = peers.qemu("10.0").env if name != OURS else {}
    async with open_child(argv, name=name, cwd=ROOT, env=env) as child:
        async with await _connect(child, monitor) as stream, trio.open_nursery() as nursery:
            qmp = Qmp(stream, name)
            nursery.start_soon(qmp.run)
            await qmp.handshake()
            try:
                yield End(child, qmp)
            except Exception as error:
                error.add_note(f"{name} said:\n{child.last_words()}")
                raise
            nursery.cancel_scope.cancel()


@asynccontextmanager
async def destination(name: str, folder: Path, mib: int) -> AsyncIterator[End]:
    """Either side, waiting for ``migrate-incoming``; the machine will not run there."""
    monitor = folder / "destination.qmp"
    argv: list[str | Path] = [sys.executable, "-m", "vhostpc", "endpoint", "--qmp", f"unix:{monitor}"]
    if name == PEER:
        argv = [*qemu_argv(mib), "-S", "-qmp", f"unix:{monitor},server=on,wait=off"]
    async with end(name, [*argv, "-incoming" if name == PEER else "--incoming", "defer"], monitor) as it:
        await it.allow()
        yield it


@dataclass(frozen=True)
class Played:
    """``seconds`` from a migration's begin to its end, ``bytes`` of stream."""

    seconds: float
    bytes: int


async def play(it: End, folder: Path, stream: Path, pages: int, content: str) -> Played:
    """RAM in: from the first byte to the event that says ``completed``."""
    socket = folder / "in"
    since = len(it.qmp.events)
    await it.qmp.command("migrate-incoming", uri=f"unix:{socket}")
    head, tail = stream / "head", stream / "tail"
    argv: list[str | Path] = [tool("stream_play"), socket, head, tail, BLOCK, str(pages), content]
    async with open_child(argv) as player:
        done = await it.reaches("completed", since)
        said = json.loads((await player.until(r"\{.*?\}", 0, 10))[0])
    return Played((done - said["first_ns"]) / 1e9, said["bytes"])


async def drain(it: End, folder: Path) -> Played:
    """RAM out: from the command ``migrate`` to the event that says ``completed``."""
    socket = folder / "out"
    since = len(it.qmp.events)
    await it.qmp.command("migrate-set-parameters", max_bandwidth=0)
    async with open_child([tool("stream_sink"), socket]) as sink:
        await sink.until("ready\n")
        begin = time.monotonic_ns()
        await it.qmp.command("migrate", uri=f"unix:{socket}")
        done = await it.reaches("completed", since)
        if await sink.wait(10):
            raise RuntimeError(f"the sink failed: {sink.last_words()}")
        said = json.loads(sink.said.partition("\n")[2])
    if not said["whole"]:
        raise RuntimeError(f"{it.child.name} sent {said['bytes']} bytes that do not end as a stream does")
    return Played((done - begin) / 1e9, said["bytes"])


def memory_path(pid: int, length: int) -> Path:
    """Where the memfd of that length that a process has open can be opened, while it lives."""
    for link in Path(f"/proc/{pid}/fd").iterdir():
        if os.readlink(link).startswith("/memfd:") and link.stat().st_size == length:
            return link
    raise RuntimeError(f"process {pid} has no memfd of {length} bytes")


def memory_file(pid: int, length: int) -> int:
    """A descriptor of the memfd of that length that a process has open, for pread and pwrite."""
    return os.open(memory_path(pid, length), os.O_RDWR | os.O_CLOEXEC)


def own_bytes(pid: int) -> int:
    """A process's anonymous memory that is resident: what it keeps beside shared blocks and files."""
    found = re.search(r"^RssAnon:\s*(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    assert found
    return int(found[1]) << 10
