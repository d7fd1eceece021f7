"""The network between two QEMUs: a relay for the migration stream that keeps pages back until they are wanted.

How many pages are absent when a device looks for them must not depend on how fast the machine is.  So the
relay lets bytes through by what the destination asks for: each page request on the return path lets pass what
is on the way before that page, and the page.  Beside that there is a trickle, or nothing would ever end.

QEMU's own limit (max-postcopy-bandwidth) would not do: once it has spent a tenth of a second's worth it sends
no requested page either until that tenth is over, so every fault takes 100 ms.
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import AsyncIterator
from pathlib import Path

import trio

from tests.qemu.proc import unwrapped

CHUNK = 32 << 10
# What may lie between a request and its page: a unix socket's buffer and what QEMU gathers for one write.
ON_THE_WAY = 384 << 10
# Commands, discards and the package with the devices' state.
SWITCH = 1 << 20
TRICKLE = 2 << 20  # bytes a second
# Return path messages: be16 type, be16 length of what follows (QEMU, docs/devel/migration).
REQUESTS = (3, 4)  # REQ_PAGES_ID, REQ_PAGES
BITMAP = 5  # RECV_BITMAP: behind it be64 length, as many bytes, and a mark of 8


def _first(seen: bytes) -> tuple[int, int] | None:
    """The kind of the first message of the return path and its whole length; None: it has not come whole."""
    if len(seen) < 4:
        return None
    kind, length = struct.unpack_from(">HH", seen)
    length += 4
    if kind == BITMAP:
        if len(seen) < length + 8:
            return None
        length += 8 + struct.unpack_from(">Q", seen, length)[0] + 8
    return (kind, length) if len(seen) >= length else None


class Link:
    """``page``: bytes of a host page.  ``hold`` begins the holding back, ``open`` ends it.  ``lose`` breaks it; then
    the source may connect again, and reaches ``target``.

    ``record``: a folder that gets what went each way, as files ``forward`` and ``back``.
    """

    def __init__(self, source_path: Path, target: Path, page: int, record: Path | None = None) -> None:
        self.source_path = source_path
        self.target = target
        self._scope = trio.CancelScope()
        self.requests = 0
        # A page of the background may have been begun when the request comes: it is sent to its end.
        self._grant = ON_THE_WAY + (2 * page if page > 4096 else page)
        self._budget = 0
        self._open = True
        self._granted = trio.Event()
        self._record = record

    def _note(self, way: str, data: bytes) -> None:
        if self._record is not None:
            with (self._record / way).open("ab") as file:
                file.write(data)

    @property
    def uri(self) -> str:
        """Where the source of the migration connects."""
        return f"unix:{self.source_path}"

    def hold(self) -> None:
        """Just before the switch: let through what that sends, before any request, and little else."""
        self._budget = SWITCH + self._grant
        self._open = False

    def lose(self) -> None:
        """Break the connection, both ways at once."""
        self._scope.cancel()

    def open(self) -> None:
        self._open = True
        self._granted.set()

    async def _may_send(self, size: int, free_at: float) -> float:
        """Wait until so many bytes may pass; when the trickle may go on."""
        while not self._open and self._budget < size:
            self._granted = trio.Event()
            with trio.move_on_at(free_at):
                await self._granted.wait()
                continue
            return max(free_at, trio.current_time()) + size / TRICKLE
        self._budget = max(0, self._budget - size)
        return free_at

    async def _forward(self, source: trio.SocketStream, target: trio.SocketStream) -> None:
        free_at = trio.current_time()
        with contextlib.suppress(trio.BrokenResourceError):
            while data := await source.receive_some(CHUNK):
                free_at = await self._may_send(len(data), free_at)
                self._note("forward", data)
                await target.send_all(data)
            await target.send_eof()

    async def _back(self, source: trio.SocketStream, target: trio.SocketStream) -> None:
        seen = b""
        with contextlib.suppress(trio.BrokenResourceError):
            while data := await target.receive_some(CHUNK):
                self._note("back", data)
                await source.send_all(data)
                seen += data
                while (message := _first(seen)) is not None:
                    kind, length = message
                    seen = seen[length:]
                    if kind in REQUESTS:
                        self.requests += 1
                        self._budget += self._grant
                        self._granted.set()

    async def run(self, listener: trio.SocketListener) -> None:
        """One connection after the other, until cancelled."""
        async with listener:
            while True:
                async with await listener.accept() as source:
                    await self._carry(source)

    async def _carry(self, source: trio.SocketStream) -> None:
        with trio.CancelScope() as self._scope:
            async with await trio.open_unix_socket(self.target) as target, trio.open_nursery() as nursery:
                nursery.start_soon(self._forward, source, target)
                nursery.start_soon(self._back, source, target)


@contextlib.asynccontextmanager
async def link(
    source_path: Path, target_path: Path, page: int, record: Path | None = None
) -> AsyncIterator[Link]:
    """A relay that listens at ``source_path`` and connects to ``target_path``, for one migration."""
    sock = trio.socket.socket(trio.socket.AF_UNIX, trio.socket.SOCK_STREAM)
    await sock.bind(str(source_path))
    sock.listen(1)
    it = Link(source_path, target_path, page, record)
    with unwrapped():
        async with trio.open_nursery() as nursery:
            nursery.start_soon(it.run, trio.SocketListener(sock))
            yield it
            nursery.cancel_scope.cancel()
