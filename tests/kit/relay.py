"""A unix socket in front of another one, which a test breaks: cut, swallow, or let nothing back."""

from __future__ import annotations

import contextlib
from pathlib import Path

import trio

PIECE = 4096


class Relay:
    """Carries every connection to ``path`` on to ``target``; a command holds for the connections of its time."""

    def __init__(self, path: Path, target: Path) -> None:
        self._path = path
        self._target = target
        self._scopes: dict[trio.CancelScope, None] = {}
        self._left: int | None = None
        self._swallows = self._holds_back = self._deaf = self._refuses = False
        self.cuts = 0

    def cut(self) -> None:
        """Break the connections that there are, both ways; later ones are carried again."""
        self.cuts += 1
        self._left = None
        self._swallows = self._holds_back = self._deaf = self._refuses = False
        for scope in list(self._scopes):
            scope.cancel()

    def cut_one(self, number: int) -> None:
        """Break one of the connections that there are, in the order in which they came."""
        list(self._scopes)[number].cancel()

    @property
    def count(self) -> int:
        """Connections that there are."""
        return len(self._scopes)

    def refuse(self) -> None:
        """:meth:`cut`; and connections that come are broken at once, until the next cut."""
        self.cut()
        self._refuses = True

    def cut_after(self, count: int) -> None:
        """:meth:`cut` behind so many more bytes, of both directions."""
        self._left = count

    def swallow(self) -> None:
        """Nothing arrives any more; until a connection ends."""
        self._swallows = True

    def hold_back(self) -> None:
        """Nothing returns from the target any more."""
        self._holds_back = True

    def stop_reading(self) -> None:
        self._deaf = True

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        listener = trio.socket.socket(trio.socket.AF_UNIX)
        with listener:
            await listener.bind(str(self._path))
            listener.listen(8)
            task_status.started()
            async with trio.open_nursery() as nursery:
                while True:
                    sock, _ = await listener.accept()
                    if self._refuses:
                        sock.close()
                        continue
                    nursery.start_soon(self._carry, trio.SocketStream(sock))

    async def _carry(self, near: trio.SocketStream) -> None:
        with contextlib.suppress(OSError), trio.CancelScope() as scope:
            self._scopes[scope] = None
            async with (
                near,
                await trio.open_unix_socket(str(self._target)) as far,
                trio.open_nursery() as both,
            ):
                both.start_soon(self._move, near, far, False, both.cancel_scope)
                both.start_soon(self._move, far, near, True, both.cancel_scope)
        self._scopes.pop(scope, None)
        self._swallows = False

    async def _move(
        self, source: trio.SocketStream, to: trio.SocketStream, back: bool, both: trio.CancelScope
    ) -> None:
        with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            while not self._deaf:
                data = await source.receive_some(PIECE)
                if not data:
                    break
                if self._swallows or (back and self._holds_back):
                    continue
                if self._left is not None and len(data) >= self._left:
                    data = data[: self._left]
                    self._left = None
                    await to.send_all(data)
                    self.cut()
                elif self._left is not None:
                    self._left -= len(data)
                await to.send_all(data)
            if self._deaf:
                await trio.sleep_forever()
        both.cancel()
