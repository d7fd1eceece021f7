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

from tests.kit.thread_names import thread_names
from tests.qemu.proc import Child, child
from tests.qemu.qmp import Qmp
from vhostpc.frontend import FarSide

WAIT = 60.0
STEP = 0.02  # seconds between two looks
ROOT = Path(__file__).resolve().parents[2]


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

    async def until_works(
        self, frames: int = 200, checks: int = 500, *, without: Sequence[str] = ()
    ) -> dict[str, Any]:
        """Until so many more frames came back on each device, and each vCPU read so many more pages.

        ``without``: names of devices that need not work.
        """
        first = await self.report()
        with trio.fail_after(WAIT):
            while True:
                now = await self.report()
                assert without or not now["problems"], now["problems"]
                if all(
                    b["received"] >= a["received"] + frames or b["name"] in without
                    for a, b in zip(first["devices"], now["devices"], strict=True)
                ) and all(
                    b["reads"] >= a["reads"] + checks
                    for a, b in zip(first["vcpus"], now["vcpus"], strict=True)
                ):
                    return now
                await trio.sleep(STEP)

    def held(self) -> dict[str, Any]:
        """Descriptors (userfaultfds by themselves), maps of memfds and names of threads of the process."""
        folder = Path(f"/proc/{self.process.pid}")
        targets = []
        for fd in (folder / "fd").iterdir():
            with contextlib.suppress(FileNotFoundError):
                targets.append(os.readlink(fd))
        return {
            "fds": len(targets),
            "ufds": sum("userfaultfd" in target for target in targets),
            "threads": set(thread_names(self.process.pid).values()),
            "maps": sum("memfd:" in line for line in (folder / "maps").read_text().splitlines()),
        }


@contextlib.asynccontextmanager
async def end(name: str, folder: Path, *arguments: str, through: Sequence[str] = ()) -> AsyncIterator[End]:
    """Run it; ``arguments`` besides those of its monitor; ``through``: a command that runs it."""
    path = folder / f"{name}.qmp"
    argv = [*through, sys.executable, "-m", "vhostpc", "endpoint", "--qmp", f"unix:{path}", *arguments]
    async with child(name, argv, cwd=str(ROOT)) as process:
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
async def bridge(
    path: Path, far: Address, *, hide: str = "", more: Sequence[str] = ()
) -> AsyncIterator[Child]:
    """A bridge to the far side; ``hide``: a protocol feature that it does not offer; ``more``: arguments."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    argv = [sys.executable, "examples/bridge", "--socket-path", str(path)]
    argv += ["-l", f"127.0.0.1:{port}", "-r", f"{far[0]}:{far[1]}"]
    argv += [*(["--hide-protocol-feature", hide] if hide else []), *more]
    async with child(path.stem, argv, cwd=str(ROOT)) as process:
        await process.err.find("ready on")
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
    other: dict[str, Any] | None = None,
) -> AsyncIterator[tuple[End, End]]:
    """A source that runs and a destination that waits, each with bridges of its own.

    ``other``: ``ram``, ``vcpus`` or ``devices`` of the destination where they are not the source's.
    """
    machine: dict[str, Any] = {"ram": ram, "vcpus": vcpus, "devices": devices}
    async with contextlib.AsyncExitStack() as stack:
        far = await stack.enter_async_context(far_side())
        ends: list[End] = []
        for name, more, made_of in (
            ("source", source, machine),
            ("destination", (*destination, "--incoming", "defer"), {**machine, **(other or {})}),
        ):
            paths = [folder / f"{name}-bridge{i}" for i in range(made_of["devices"])]
            bridges = [await stack.enter_async_context(bridge(path, far)) for path in paths]
            sockets = [part for path in paths for part in ("--backend", str(path))]
            blocks = [part for block in made_of["ram"] for part in ("--ram", block)]
            arguments = (*blocks, "--vcpus", str(made_of["vcpus"]), *sockets, *both, *more)
            made = await stack.enter_async_context(end(name, folder, *arguments))
            made.bridges = bridges
            ends.append(made)
        yield ends[0], ends[1]


async def migrate(source: End, destination: End, folder: Path) -> None:
    uri = f"unix:{folder / 'migration'}"
    await destination.qmp.command("migrate-incoming", uri=uri)
    await source.qmp.command("migrate", uri=uri)


def check(report: dict[str, Any], *, moves: int = 1, without: Sequence[str] = ()) -> None:
    """Memory and books of a machine are as they should be, but for devices whose back-end is gone."""
    assert without or report["problems"] == []
    for vcpu in report["vcpus"]:
        assert vcpu["bad"] == 0, vcpu
    for device in report["devices"]:
        assert device["sent"] == sum(device[k] for k in ("received", "lost-at-switch", "lost", "flying"))
        if device["name"] in without:
            continue
        assert device["works"]
        assert (device["lost"], device["damaged"], device["doubled"]) == (0, 0, 0), device
        # The frames that may be in flight at a time, and those that look whether the new place has a ring.
        assert device["lost-at-switch"] <= (64 + 32) * (moves + 1), device
