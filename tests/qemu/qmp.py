"""A small QMP client on trio: commands in order, events kept and waited for."""

from __future__ import annotations

import json
from typing import Any

import trio

from tests.qemu.proc import WAIT


class QmpError(Exception):
    """QEMU refused a command; the message is QEMU's."""


class QmpClosed(Exception):
    """QEMU closed the connection: it ended."""


class Qmp:
    """One connection; ``run`` must be running in a nursery before anything else is called."""

    def __init__(self, stream: trio.abc.Stream, name: str) -> None:
        self.name = name
        self.events: list[dict[str, Any]] = []
        self._stream = stream
        self._changed = trio.Event()
        self._replies: dict[int, dict[str, Any]] = {}
        self._count = 0
        self._greeted = False
        self._closed = False
        self._sending = trio.Lock()

    async def run(self) -> None:
        rest = b""
        try:
            async for data in self._stream:
                *whole, rest = (rest + data).split(b"\n")
                for line in whole:
                    self._take(json.loads(line))
                self._wake()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        finally:
            self._closed = True
            self._wake()

    def _take(self, message: dict[str, Any]) -> None:
        if "QMP" in message:
            self._greeted = True
        elif "event" in message:
            self.events.append(message)
        else:
            self._replies[message["id"]] = message

    def _wake(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    async def _changed_or_closed(self) -> None:
        if self._closed:
            raise QmpClosed(f"{self.name} closed its monitor")
        await self._changed.wait()

    async def handshake(self, *, oob: bool = False) -> None:
        """``oob``: commands may then be given out of band."""
        with trio.fail_after(WAIT):
            while not self._greeted:
                await self._changed_or_closed()
        enable = ["oob"] if oob else []
        await self.command("qmp_capabilities", enable=enable)

    @property
    def closed(self) -> bool:
        return self._closed

    async def command(self, name: str, limit: float = WAIT, **arguments: Any) -> Any:
        """Execute a command; underscores in argument names become dashes. Raises QmpError."""
        return self._result(name, await self.reply(name, limit, **arguments))

    async def out_of_band(self, name: str, limit: float = WAIT, **arguments: Any) -> Any:
        """The same, executed at once by QEMU, also while its main loop waits for a page. Raises QmpError."""
        return self._result(name, await self.reply(name, limit, execute="exec-oob", **arguments))

    def _result(self, name: str, reply: dict[str, Any]) -> Any:
        if "error" in reply:
            raise QmpError(f"{self.name}: {name}: {reply['error']['desc']}")
        return reply["return"]

    async def reply(
        self, name: str, limit: float = WAIT, *, execute: str = "execute", **arguments: Any
    ) -> dict[str, Any]:
        """The whole reply to a command, be it an error."""
        self._count += 1
        number = self._count
        text = {
            execute: name,
            "id": number,
            "arguments": {k.replace("_", "-"): v for k, v in arguments.items()},
        }
        with trio.move_on_after(limit):
            async with self._sending:
                await self._stream.send_all(json.dumps(text).encode() + b"\n")
            while number not in self._replies:
                await self._changed_or_closed()
            return self._replies.pop(number)
        raise AssertionError(f"{self.name}: no answer to {name} in {limit:g} s")

    async def hmp(self, line: str, limit: float = WAIT) -> str:
        """A command of the human monitor."""
        return str(await self.command("human-monitor-command", limit, command_line=line))

    async def event(self, name: str, since: int = 0, limit: float = WAIT, **data: Any) -> dict[str, Any]:
        """The first event of that name and data at or after event number ``since``."""
        at = since
        with trio.move_on_after(limit):
            while True:
                for event in self.events[at:]:
                    at += 1
                    if event["event"] == name and data.items() <= event.get("data", {}).items():
                        return event
                await self._changed_or_closed()
        seen = [(e["event"], e.get("data")) for e in self.events]
        raise AssertionError(f"{self.name}: no event {name} {data} in {limit:g} s; seen: {seen}")
