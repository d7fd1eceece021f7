"""``vhostpc endpoint`` with a machine of its own, as a process; bridges as others; and what must be true of both ends.

The far side of every bridge is here: a socket that sends each frame back to where it came from.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import trio

from tests.qemu.proc import Child, child
from tests.qemu.qmp import Qmp
from vhostpc.frontend import FarSide

WAIT = 60.0
STEP = 0.02  # seconds between two looks
MIB = 1 << 20


class End:
    """One endpoint: its process, its monitor, the processes of its bridges."""

    def __init__(self, process: Child, qmp: Qmp) -> None:
        self.process = process
        self.qmp = qmp
        self.bridges: list[Child] = []

    async def report(self) -> dict[str, Any]:
        found: dict[str, Any] = await self.qmp.command("x-vhostpc-report")
        return found

    async def set(self, *capabilities: str, **parameters: Any) -> None:
        if capabilities:
            wanted = [{"capability": name, "state": True} for name in ("events", *capabilities)]
            await self.qmp.command("migrate-set-capabilities", capabilities=wanted)
        if parameters:
            await self.qmp.command("migrate-set-parameters", **parameters)

    async def migration(self) -> dict[str, Any]:
        found: dict[str, Any] = await self.qmp.command("query-migrate")
        return found

    async def until_status(self, *wanted: str, not_these: Sequence[str] = ()) -> dict[str, Any]:
        """Look until the migration has one of these statuses; the migration."""
        with trio.fail_after(WAIT):
            while True:
                found = await self.migration()
                status = found.get("status", "none")
                if status in wanted:
                    return found
                assert status not in not_these, found
                await trio.sleep(STEP)

    async def state(self) -> str:
        return str((await self.qmp.command("query-status"))["status"])

    async def until_works(self, frames: int = 200, checks: int = 500) -> dict[str, Any]:
        """Until so many more frames came back on each device, and each vCPU read so many more pages."""
        first = await self.report()
        with trio.fail_after(WAIT):
            while True:
                now = await self.report()
                assert not now["problems"], now["problems"]
                if all(
                    b["received"] >= a["received"] + frames
                    for a, b in zip(first["devices"], now["devices"], strict=True)
                ) and all(
                    b["reads"] >= a["reads"] + checks for a, b in zip(first["vcpus"], now["vcpus"], strict=True)
                ):
                    return now
                await trio.sleep(STEP)

    def held(self) -> dict[str, int]:
        """Descriptors (userfaultfds by themselves), maps of memfds and threads of the process."""
        folder = Path(f"/proc/{self.process.pid}")
        targets = []
        for fd in (folder / "fd").iterdir():
            with contextlib.suppress(FileNotFoundError):
                targets.append(os.readlink(fd))
        return {
            "fds": len(targets),
            "ufds": sum("userfaultfd" in target for target in targets),
            "maps": sum("memfd:" in line for line in (folder / "maps").read_text().splitlines()),
        }


@contextlib.asynccontextmanager
async def end(name: str, folder: Path, *arguments: str) -> AsyncIterator[End]:
    """Run it; ``arguments`` besides those of its monitor."""
    path = folder / f"{name}.qmp"
    argv = [sys.executable, "-m", "vhostpc", "endpoint", "--qmp", f"unix:{path}", *arguments]
    async with child(name, argv) as process:
        await process.err.find("ready on")
        async with await trio.open_unix_socket(path) as stream, trio.open_nursery() as nursery:
            qmp = Qmp(stream, name)
            nursery.start_soon(qmp.run)
            await qmp.handshake()
            yield End(process, qmp)
            nursery.cancel_scope.cancel()


Address = tuple[str, int]


@contextlib.asynccontextmanager
async def far_side() -> AsyncIterator[Address]:
    """Where a socket sends each whole frame back."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
        sock.bind(("127.0.0.1", 0))
        with FarSide(sock, echo=True) as far:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(far.run)
                yield sock.getsockname()
                nursery.cancel_scope.cancel()


@contextlib.asynccontextmanager
async def bridge(path: Path, far: Address) -> AsyncIterator[Child]:
    argv = [sys.executable, "-m", "vhostpc.cli.demo_bridge", str(path), far[0], str(far[1])]
    async with child(path.stem, argv) as process:
        await process.out.find("ready")
        yield process


@contextlib.asynccontextmanager
async def pair(
    folder: Path,
    *,
    ram: Sequence[str] = ("pc.ram=64M",),
    vcpus: int = 1,
    devices: int = 1,
    source: Sequence[str] = (),
    destination: Sequence[str] = (),
    both: Sequence[str] = (),
) -> AsyncIterator[tuple[End, End]]:
    """A source that runs and a destination that waits, each with bridges of its own."""
    machine = [part for block in ram for part in ("--ram", block)] + ["--vcpus", str(vcpus), *both]
    async with contextlib.AsyncExitStack() as stack:
        far = await stack.enter_async_context(far_side())
        ends: list[End] = []
        for name, more in (("source", source), ("destination", (*destination, "--incoming", "defer"))):
            paths = [folder / f"{name}-bridge{i}" for i in range(devices)]
            bridges = [await stack.enter_async_context(bridge(path, far)) for path in paths]
            sockets = [part for path in paths for part in ("--backend", str(path))]
            made = await stack.enter_async_context(end(name, folder, *machine, *sockets, *more))
            made.bridges = bridges
            ends.append(made)
        yield ends[0], ends[1]


async def migrate(source: End, destination: End, folder: Path) -> None:
    uri = f"unix:{folder / 'migration'}"
    await destination.qmp.command("migrate-incoming", uri=uri)
    await source.qmp.command("migrate", uri=uri)


def check(report: dict[str, Any], *, moves: int = 1) -> None:
    """Memory and books of a machine are as they should be."""
    assert report["problems"] == []
    for vcpu in report["vcpus"]:
        assert vcpu["bad"] == 0, vcpu
    for device in report["devices"]:
        assert device["works"]
        assert device["sent"] == sum(device[k] for k in ("received", "lost-at-switch", "lost", "flying"))
        assert (device["lost"], device["damaged"], device["doubled"]) == (0, 0, 0), device
        assert device["lost-at-switch"] <= 64 * moves, device
