"""A client of a QMP monitor on a unix socket: commands of several tasks, events with their arrival times."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import trio

from vhostpc.errors import PeerClosed, RequestFailed
from vhostpc.listener import connect

TIMEOUT = 30.0


class QmpClient:
    """Made by :func:`open_monitor`. ``events``: (CLOCK_MONOTONIC in nanoseconds, event), in order of arrival."""

    def __init__(self, stream: trio.SocketStream, name: str) -> None:
        self.name = name
        self.events: list[tuple[int, dict[str, Any]]] = []
        self._stream = stream
        self._replies: dict[int, dict[str, Any]] = {}
        self._greeted = False
        self._ended = False
        self._changed = trio.Event()
        self._count = 0
        self._sending = trio.Lock()

    async def command(self, command: str, timeout: float = TIMEOUT, **arguments: Any) -> Any:
        """The result of a command; underscores in the names of arguments become dashes.

        Raises RequestFailed with the monitor's sentence, or when it takes too long; PeerClosed.
        """
        self._count += 1
        number = self._count
        told = {name.rstrip("_").replace("_", "-"): value for name, value in arguments.items()}
        line = json.dumps({"execute": command, "arguments": told, "id": number}) + "\n"
        with trio.move_on_after(timeout):
            try:
                async with self._sending:
                    await self._stream.send_all(line.encode())
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                raise PeerClosed(f"{self.name} closed its monitor") from None
            await self._until(lambda: number in self._replies)
            reply = self._replies.pop(number)
            if "error" in reply:
                raise RequestFailed(f"{self.name}: {command}: {reply['error']['desc']}")
            return reply["return"]
        raise RequestFailed(f"{self.name} did not answer {command} within {timeout:g} s")

    async def _until(self, condition: Any) -> None:
        while not condition():
            if self._ended:
                raise PeerClosed(f"{self.name} closed its monitor")
            await self._changed.wait()

    async def _greet(self) -> None:
        with trio.move_on_after(TIMEOUT):
            await self._until(lambda: self._greeted)
            await self.command("qmp_capabilities")
            return
        raise RequestFailed(f"{self.name} did not greet within {TIMEOUT:g} s")

    async def _run(self) -> None:
        rest = b""
        try:
            async for data in self._stream:
                *lines, rest = (rest + data).split(b"\n")
                for line in filter(None, lines):
                    self._take(json.loads(line))
                self._wake()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        self._ended = True
        self._wake()

    def _take(self, message: dict[str, Any]) -> None:
        if "event" in message:
            self.events.append((time.monotonic_ns(), message))
        elif "QMP" in message:
            self._greeted = True
        elif "id" in message:
            self._replies[message["id"]] = message

    def _wake(self) -> None:
        self._changed.set()
        self._changed = trio.Event()


@asynccontextmanager
async def open_monitor(path: str, name: str) -> AsyncIterator[QmpClient]:
    """Connect to the monitor at ``path`` and negotiate. Raises OSError, PeerClosed, RequestFailed."""
    async with trio.SocketStream(await connect(path)) as stream, trio.open_nursery() as nursery:
        client = QmpClient(stream, name)
        nursery.start_soon(client._run)
        await client._greet()
        yield client
        nursery.cancel_scope.cancel()
