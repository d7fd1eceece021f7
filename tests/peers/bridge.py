"""Our bridge as a program, and the far end of its UDP pair."""

from __future__ import annotations

import socket
import struct
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from .child import Child, open_child

ROOT = Path(__file__).resolve().parents[2]
SO_RCVBUFFORCE, SO_MEMINFO, DROPS = 33, 55, 8
UDP_SEGMENT = 103  # linux/udp.h
LARGE = 32 << 20


class FarEnd:
    """A UDP socket on loopback that the bridge sends to; ``there`` is where the bridge listens."""

    def __init__(self, sock: trio.socket.SocketType, there: tuple[str, int]) -> None:
        self.sock = sock
        self.there = there

    @property
    def here(self) -> str:
        host, port = self.sock.getsockname()
        return f"{host}:{port}"

    @property
    def drops(self) -> int:
        """Datagrams that the kernel dropped because this socket was full."""
        info = self.sock.getsockopt(socket.SOL_SOCKET, SO_MEMINFO, 4 * (DROPS + 1))
        return int.from_bytes(info[4 * DROPS : 4 * (DROPS + 1)], sys.byteorder)

    async def send(self, frame: bytes) -> None:
        await self.sock.sendto(frame, self.there)

    async def send_joined(self, frames: Sequence[bytes]) -> None:
        """Send frames of one length (the last may be shorter) in one call, as UDP_SEGMENT does it."""
        size = struct.pack("=H", len(frames[0]))
        await self.sock.sendmsg([b"".join(frames)], [(socket.IPPROTO_UDP, UDP_SEGMENT, size)], 0, self.there)

    async def receive(self) -> bytes:
        return await self.sock.recv(65536)

    async def receive_now(self) -> bytes | None:
        """The next frame if one comes within 200 ms, else None: for what has been sent already."""
        with trio.move_on_after(0.2):
            return await self.receive()
        return None


def free_port() -> int:
    """A UDP port on loopback that nobody has right now."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


@asynccontextmanager
async def open_far_end() -> AsyncIterator[FarEnd]:
    """A far end with room for some ten thousand frames, so that a slow reader loses none."""
    with trio.socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, LARGE)
        except PermissionError:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, LARGE)
        await sock.bind(("127.0.0.1", 0))
        yield FarEnd(sock, ("127.0.0.1", free_port()))


@asynccontextmanager
async def open_bridge(path: Path, far: FarEnd, args: Sequence[str] = ()) -> AsyncIterator[Child]:
    """Run ``examples/bridge`` listening at ``path`` (with ``-c`` in ``args``: connecting to it)."""
    host, port = far.there
    argv: list[str | Path] = [sys.executable, ROOT / "examples" / "bridge", "--socket-path", path]
    argv += ["-l", f"{host}:{port}", "-r", far.here, *args]
    async with open_child(argv, name="bridge") as bridge:
        if "-c" not in args:
            await bridge.until("ready on")
        yield bridge
        assert not bridge.ended.is_set(), f"the bridge ended before the test did:\n{bridge.last_words()}"
