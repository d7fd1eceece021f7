"""A person at a text monitor: lines in, texts out, ours or a QEMU's."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import trio

from tests.kit.fake_endpoint import FakeEndpoint
from tests.kit.until import until
from tests.qemu import peers
from tests.qemu.proc import child, unwrapped
from vhostpc.dialect import Compat
from vhostpc.qmp import TextMonitor

WAIT = 30
PROMPT = b"(qemu) "


class Terminal:
    """One connection. ``echoes``: the other side repeats what is typed, before the first end of a line."""

    def __init__(self, path: Path, *, echoes: bool = False) -> None:
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(str(path))
        sock.setblocking(False)
        self.sock = trio.socket.from_stdlib_socket(sock)
        self.echoes = echoes
        self._rest = b""

    async def text(self) -> str:
        """The output up to the next prompt, without it, or to the end."""
        with trio.fail_after(WAIT):
            while PROMPT not in self._rest:
                data = await self.sock.recv(65536)
                if not data:
                    break
                self._rest += data
        found, _, self._rest = self._rest.partition(PROMPT)
        return found.decode(errors="surrogateescape")

    async def send(self, data: bytes) -> None:
        with trio.fail_after(WAIT):
            while data:
                data = data[await self.sock.send(data) :]

    async def ask(self, line: str | bytes) -> str:
        await self.send((line if isinstance(line, bytes) else line.encode()) + b"\n")
        found = await self.text()
        return found.partition("\r\n")[2] if self.echoes else found


@contextlib.asynccontextmanager
async def ours(endpoint: FakeEndpoint, tmp_path: Path) -> AsyncIterator[TextMonitor]:
    """A text monitor that listens at ``tmp_path/text``."""
    monitor = TextMonitor(endpoint, endpoint.events)
    with unwrapped():
        async with monitor.listening(tmp_path / "text"):
            yield monitor


@contextlib.asynccontextmanager
async def client(tmp_path: Path) -> AsyncIterator[Terminal]:
    """A client of the one at ``tmp_path/text``, which has its greeting behind it."""
    terminal = Terminal(tmp_path / "text")
    with terminal.sock:
        await terminal.text()
        yield terminal


@contextlib.asynccontextmanager
async def qemu(version: Compat, tmp_path: Path, *more: str) -> AsyncIterator[Terminal]:
    """The text monitor of a QEMU that holds a machine without a guest."""
    program, path = peers.qemu(version), tmp_path / f"qemu-{version}"
    argv = [*program.argv, "-nodefaults", "-no-user-config", "-display", "none", "-accel", "tcg"]
    argv += ["-M", "pc", "-m", "16", "-S", "-monitor", f"unix:{path},server=on,wait=off", *more]
    async with child("qemu", argv, env=program.env):
        await until(lambda: listens(path), what="QEMU's monitor")
        terminal = Terminal(path, echoes=True)
        with terminal.sock:
            yield terminal


def listens(path: Path) -> bool:
    """Told without connecting: a monitor takes one client at a time."""
    rows = Path("/proc/net/unix").read_text().splitlines()
    return any(row.endswith(f" {path}") and row.split()[3] == "00010000" for row in rows)
