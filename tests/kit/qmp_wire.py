"""A QMP client that hides nothing: raw bytes out, every message in, also from a QEMU that runs no guest."""

from __future__ import annotations

import array
import contextlib
import json
import os
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import trio

from tests.kit.fake_endpoint import FakeEndpoint
from tests.qemu import peers
from tests.qemu.proc import child, unwrapped
from vhostpc.dialect import Compat
from vhostpc.qmp import Monitor

WAIT = 30


class Wire:
    """One connection: ``send`` bytes, ``next`` message, ``ask`` for a reply (events are kept apart)."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.sock = trio.socket.from_stdlib_socket(sock)
        self.events: list[dict[str, Any]] = []
        self._rest = b""

    async def send(self, data: bytes, fds: list[int] | None = None) -> None:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        with trio.fail_after(WAIT):
            sent = await self.sock.sendmsg([data], rights)
            while sent < len(data):
                sent += await self.sock.send(data[sent:])

    async def message(self) -> dict[str, Any] | None:
        """The next message, None at the end."""
        with trio.fail_after(WAIT):
            while b"\n" not in self._rest:
                data = await self.sock.recv(65536)
                if not data:
                    return None
                self._rest += data
        line, self._rest = self._rest.split(b"\n", 1)
        found: dict[str, Any] = json.loads(line)
        return found

    async def reply(self) -> dict[str, Any]:
        while True:
            found = await self.message()
            assert found is not None, "the monitor closed"
            if "event" not in found:
                return found
            self.events.append(found)

    async def ask(self, data: bytes | str) -> dict[str, Any]:
        await self.send(data if isinstance(data, bytes) else data.encode())
        return await self.reply()

    async def command(self, name: str, **arguments: Any) -> dict[str, Any]:
        named = {key.replace("_", "-"): value for key, value in arguments.items()}
        return await self.ask(json.dumps({"execute": name, "arguments": named}))

    async def hmp(self, line: str) -> str:
        found = await self.command("human-monitor-command", command_line=line)
        return str(found["return"])

    async def ready(self, *, oob: bool = False) -> None:
        """The greeting and the agreement."""
        assert "QMP" in await self.reply()
        assert await self.command("qmp_capabilities", enable=["oob"] if oob else []) == {"return": {}}


@contextlib.asynccontextmanager
async def ours(endpoint: FakeEndpoint, tmp_path: Path) -> AsyncIterator[Monitor]:
    """A monitor that listens at ``tmp_path/qmp``."""
    monitor = Monitor(endpoint, endpoint.events)
    with unwrapped():
        async with monitor.listening(tmp_path / "qmp"):
            yield monitor


@contextlib.asynccontextmanager
async def client(tmp_path: Path) -> AsyncIterator[Wire]:
    """A client of the monitor at ``tmp_path/qmp``."""
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(os.fspath(tmp_path / "qmp"))
    wire = Wire(sock)
    try:
        yield wire
    finally:
        wire.sock.close()


@contextlib.asynccontextmanager
async def qemu(version: Compat, *more: str) -> AsyncIterator[Wire]:
    """The monitor of a QEMU that holds a machine without a guest."""
    program = peers.qemu(version)
    here, there = socket.socketpair()
    argv = [*program.argv, "-nodefaults", "-no-user-config", "-display", "none", "-accel", "tcg"]
    argv += ["-M", "pc", "-m", "16", "-S", "-chardev", f"socket,id=q,fd={there.fileno()}"]
    argv += ["-qmp", "chardev:q", *more]
    async with child("qemu", argv, env=program.env, pass_fds=[there.fileno()]):
        there.close()
        wire = Wire(here)
        try:
            yield wire
        finally:
            wire.sock.close()
