"""The wire between the two endpoints of a demonstration: it is lost where it is told to be, and can damage one byte.

The damaged byte is a test of the demonstration's own checks.
"""

from __future__ import annotations

import re
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from vhostpc.units import TARGET_PAGE

CHUNK = 64 << 10
# A record of a page with its content, of the block of the record before (PAGE | CONTINUE): its first eight bytes.
_RECORD = re.compile(
    rb"(?=(\0\0\0[\0-\xff]{3}[\x00\x10\x20\x30\x40\x50\x60\x70\x80\x90\xa0\xb0\xc0\xd0\xe0\xf0]\x28))"
)


def find_page(data: bytes, first: int) -> int | None:
    """The index in ``data`` where the content of a page at or behind offset ``first`` of its block begins."""
    for match in _RECORD.finditer(data):
        begin = match.start() + 8
        end = begin + TARGET_PAGE
        if int.from_bytes(match[1], "big") & ~(TARGET_PAGE - 1) < first or end > len(data):
            continue
        behind = data[end : end + 8]
        if not behind or (len(behind) == 8 and behind[:3] == b"\0\0\0" and behind[7] in (0x28, 0x22, 0x10)):
            return begin
    return None


class Relay:
    """``harm``: damage the next page at or behind offset ``first``."""

    def __init__(self, first: int) -> None:
        self.first = first
        self.harm = False
        self.harmed = False
        self.carried = 0
        """Bytes of the source that the destination's end has taken, over all connections."""
        self.begun_ns = 0
        """When the last connection was carried to the destination (CLOCK_MONOTONIC)."""
        self._left: int | None = None
        self._lost_ns = 0
        self._lost = trio.Event()
        self._mended = trio.Event()

    async def lose_after(self, count: int) -> int:
        """Lose the link behind so many more bytes of the source, both ways and at once, until :meth:`mend`.

        Meanwhile nobody can connect. When it was lost (CLOCK_MONOTONIC in nanoseconds).
        """
        self._left, self._lost, self._mended = count, trio.Event(), trio.Event()
        await self._lost.wait()
        return self._lost_ns

    def mend(self) -> None:
        """One can connect again."""
        self._mended.set()

    def pass_on(self, data: bytes) -> bytes:
        if not self.harm or self.harmed or (at := find_page(data, self.first)) is None:
            return data
        self.harmed = True
        changed = bytearray(data)
        changed[at + TARGET_PAGE // 2] ^= 1
        return bytes(changed)

    async def serve(
        self, path: Path, target: Path, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Connect one connection to ``path`` after the other to ``target``, until cancelled."""
        while True:
            path.unlink(missing_ok=True)
            with trio.socket.socket(trio.socket.AF_UNIX, trio.socket.SOCK_STREAM) as listener:
                await listener.bind(str(path))
                listener.listen(1)
                task_status.started()
                task_status = trio.TASK_STATUS_IGNORED
                near, _ = await listener.accept()
            with near, trio.socket.socket(trio.socket.AF_UNIX, trio.socket.SOCK_STREAM) as far:
                try:
                    await far.connect(str(target))
                except OSError:
                    continue  # nobody listens there yet
                self.begun_ns = time.monotonic_ns()
                await self._connect(near, far)
            if self._left == 0:
                self._left = None
                self._lost.set()
                await self._mended.wait()

    async def _connect(self, near: trio.socket.SocketType, far: trio.socket.SocketType) -> None:
        """Until both sides have ended, or the link is lost."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._forward, near, far, nursery.cancel_scope)
            nursery.start_soon(self._back, far, near)

    async def _forward(
        self, near: trio.socket.SocketType, far: trio.socket.SocketType, link: trio.CancelScope
    ) -> None:
        try:
            while data := await near.recv(CHUNK):
                data = self.pass_on(data)
                while data:
                    sent = await far.send(data if self._left is None else data[: self._left])
                    self.carried += sent
                    data = data[sent:]
                    if self._left is not None:
                        self._left = max(0, self._left - sent)
                        if not self._left:
                            self._lost_ns = time.monotonic_ns()
                            link.cancel()
                            return
            far.shutdown(trio.socket.SHUT_WR)
        except OSError:
            pass  # the remaining side notices

    @staticmethod
    async def _back(far: trio.socket.SocketType, near: trio.socket.SocketType) -> None:
        try:
            while data := await far.recv(CHUNK):
                while data:
                    data = data[await near.send(data) :]
            near.shutdown(trio.socket.SHUT_WR)
        except OSError:
            pass  # the remaining side notices


@asynccontextmanager
async def open_relay(path: Path, target: Path, first: int) -> AsyncIterator[Relay]:
    """Listen at ``path``, and pass on to ``target``."""
    relay = Relay(first)
    async with trio.open_nursery() as nursery:
        await nursery.start(relay.serve, path, target)
        yield relay
        nursery.cancel_scope.cancel()
