"""A wire between two endpoints that damages one byte of one page: the test of the demonstration's own checks."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from vhostpc.errors import VhostpcError
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

    def pass_on(self, data: bytes) -> bytes:
        if not self.harm or self.harmed or (at := find_page(data, self.first)) is None:
            return data
        self.harmed = True
        changed = bytearray(data)
        changed[at + TARGET_PAGE // 2] ^= 1
        return bytes(changed)

    async def serve(self, listener: trio.SocketListener, target: Path) -> None:
        """Connect one connection to ``target``, until both sides have ended."""
        async with await listener.accept() as near, await trio.open_unix_socket(str(target)) as far:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._pump, near, far, True)
                nursery.start_soon(self._pump, far, near, False)

    async def _pump(self, source: trio.SocketStream, to: trio.SocketStream, pages: bool) -> None:
        try:
            async for data in source:
                await to.send_all(self.pass_on(bytes(data)) if pages else data)
            await to.send_eof()
        except trio.BrokenResourceError:
            pass  # the remaining side notices


@asynccontextmanager
async def open_relay(path: Path, target: Path, first: int) -> AsyncIterator[Relay]:
    """Listen at ``path``, and pass on to ``target``."""
    relay = Relay(first)
    sock = trio.socket.socket(trio.socket.AF_UNIX, trio.socket.SOCK_STREAM)
    await sock.bind(str(path))
    sock.listen(1)
    async with trio.SocketListener(sock) as listener, trio.open_nursery() as nursery:
        nursery.start_soon(relay.serve, listener, target)
        yield relay
        nursery.cancel_scope.cancel()
    if not relay.harmed:
        raise VhostpcError("a byte was to be damaged in transit, but no page passed")
