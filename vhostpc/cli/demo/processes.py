"""The processes of ``vhostpc demo``: endpoints and bridges, started as a user would, driven by their monitors."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import trio

from vhostpc.cli.demo.bridge_process import IN_ORDER
from vhostpc.errors import VhostpcError
from vhostpc.frontend import FarSide
from vhostpc.qmp.qmp_client import QmpClient, open_monitor

STARTING = 30.0  # seconds that a process may take until it says that it is ready
ENDING = 5.0
STEP = 0.02


_libc = ctypes.CDLL(None, use_errno=True)
_PR_SET_PDEATHSIG = 1


def _end_with(parent: int) -> None:
    """In a new process: SIGTERM when ``parent`` ends, however it does (prctl(2), PR_SET_PDEATHSIG).

    To Linux the parent is the thread that made the process.
    """
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent:  # it has ended already
        os._exit(0)


class Child:
    """A process that ends when this one does. ``stdin`` and ``stdout`` are pipes; its stderr goes to ``errors``.

    Made by the thread that calls this, and not by one of trio's, as those of ``trio.lowlevel.open_process``: they end
    when they are idle for a while, and their processes would be told to end with them.
    """

    def __init__(self, argv: Sequence[str], errors: BinaryIO) -> None:
        self._process = subprocess.Popen(
            argv,
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            process_group=0,
            preexec_fn=partial(_end_with, os.getpid()),  # noqa: PLW1509 - no thread of ours holds what it needs
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with self._process.stdin as stdin, self._process.stdout as stdout:
            self.stdin = trio.lowlevel.FdStream(os.dup(stdin.fileno()))
            self.stdout = trio.lowlevel.FdStream(os.dup(stdout.fileno()))
        self.poll = self._process.poll
        self.terminate = self._process.terminate
        self.kill = self._process.kill

    async def wait(self) -> None:
        """Until it has ended."""
        if self.poll() is not None:
            return
        fd = os.pidfd_open(self._process.pid)
        try:
            await trio.lowlevel.wait_readable(fd)
        finally:
            os.close(fd)
        self._process.wait()  # at once: it has ended


@asynccontextmanager
async def child(name: str, module: str, *arguments: str, log: Path) -> AsyncIterator[Child]:
    """``python -m module``; its stderr goes to ``log``. On exit it is told to end, and killed if it does not."""
    argv = [sys.executable, "-m", module, *arguments]
    with log.open("wb") as errors:
        process = Child(argv, errors)
    try:
        yield process
    except Exception as error:
        if process.poll() is not None:
            raise VhostpcError(f"the {name} ended unexpectedly: {last_words(log)}") from error
        raise
    finally:
        with trio.CancelScope(shield=True):
            await process.stdin.aclose()
            await process.stdout.aclose()
            if process.poll() is None:
                process.terminate()
            with trio.move_on_after(ENDING):
                await process.wait()
            if process.poll() is None:
                process.kill()
                await process.wait()


def last_words(log: Path) -> str:
    """The last line that a process printed, without the program's name."""
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1].removeprefix("vhostpc: ") if lines else "it printed nothing"


@asynccontextmanager
async def bridge(name: str, folder: Path, far: tuple[str, int]) -> AsyncIterator[Path]:
    """A bridge that sends frames to ``far``; the socket it serves on."""
    path, log = folder / f"{name}.sock", folder / f"{name}.log"
    module = "vhostpc.cli.demo.bridge_process"
    async with child(name, module, str(path), far[0], str(far[1]), log=log) as process:
        said = b""
        try:
            with trio.move_on_after(STARTING):
                while not said.endswith(b"\n") and (more := await process.stdout.receive_some()):
                    said += more
            if said != b"ready\n":
                raise VhostpcError(f"the {name} did not start: {last_words(log)}")
            yield path
        finally:
            with trio.CancelScope(shield=True), suppress(trio.BrokenResourceError):
                await process.stdin.send_all(IN_ORDER)


class End:
    """An endpoint: its monitor, and the requests to it."""

    def __init__(self, name: str, monitor: QmpClient) -> None:
        self.name = name
        self.monitor = monitor
        self.command = monitor.command

    async def report(self) -> dict[str, Any]:
        found: dict[str, Any] = await self.command("x-vhostpc-report")
        return found

    async def migration(self) -> dict[str, Any]:
        found: dict[str, Any] = await self.command("query-migrate")
        return found

    async def set(self, *capabilities: str, **parameters: Any) -> None:
        wanted = [{"capability": name, "state": True} for name in capabilities]
        await self.command("migrate-set-capabilities", capabilities=wanted)
        if parameters:
            await self.command("migrate-set-parameters", **parameters)

    def events(self, name: str, since: int = 0, **data: Any) -> list[int]:
        """When the events of that name and with that data came, from number ``since`` on of all events."""
        return [
            when
            for when, event in self.monitor.events[since:]
            if event["event"] == name and data.items() <= event.get("data", {}).items()
        ]

    def event_ns(self, name: str, since: int = 0, **data: Any) -> int | None:
        """When the first of :meth:`events` came."""
        return next(iter(self.events(name, since, **data)), None)


@asynccontextmanager
async def endpoint(name: str, folder: Path, *arguments: str) -> AsyncIterator[End]:
    """``vhostpc endpoint`` with a monitor, ready."""
    path, log = folder / f"{name}.qmp", folder / f"{name}.log"
    given = ("endpoint", "--qmp", f"unix:{path}", *arguments)
    async with child(name, "vhostpc", *given, log=log) as process:
        with trio.move_on_after(STARTING) as scope:
            while process.poll() is None and b"ready on" not in log.read_bytes():
                await trio.sleep(STEP)
        if scope.cancelled_caught:
            raise VhostpcError(f"the {name} was not ready within {STARTING:g} s: {last_words(log)}")
        if process.poll() is not None:
            raise VhostpcError(f"the {name} did not start: {last_words(log)}")
        async with open_monitor(str(path), f"the {name}") as monitor:
            yield End(name, monitor)


@asynccontextmanager
async def far_side() -> AsyncIterator[tuple[FarSide, tuple[str, int]]]:
    """The network behind the bridges: a UDP socket that checks each frame and sends it back; and its address."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
        sock.bind(("127.0.0.1", 0))
        with FarSide(sock, echo=True) as far:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(far.run)
                yield far, sock.getsockname()
                nursery.cancel_scope.cancel()


def machine(size: int, vcpus: int, checks: int, *backends: Path) -> Sequence[str]:
    """Arguments of ``vhostpc endpoint`` for a machine of its own: bytes, vCPUs, pages that each reads a second."""
    made = ["--ram", f"mem={size}", "--vcpus", str(vcpus), "--vcpu-checks", str(checks)]
    for path in backends:
        made += ["--backend", str(path)]
    return made
