"""A front-end made by hand: any message, well or badly formed, and a guest whose rings Python writes.

Its memory is calm (never missing), so that Python may touch it here. Only for tests.
"""

from __future__ import annotations

import array
import contextlib
import mmap
import os
import socket
import struct
from collections.abc import AsyncIterator, Sequence

import trio

from vhostpc.backend import Device, Options, serve_connection
from vhostpc.wire import vhost_user as vu
from vhostpc.wire.vhost_user import Feature, ProtocolFeature, Request

NEXT, WRITE, INDIRECT = 1, 2, 4
GUEST_BASE = 0x10000  # guest address of the first byte of memory
USER_BASE = 0x7F0000000000  # the same in the "front-end's process"


class RawFrontEnd:
    """One end of a unix socket; sends what it is told and reads replies."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = trio.socket.from_stdlib_socket(sock)
        self.reader = vu.FrameReader()

    async def send(self, request: int, payload: bytes = b"", fds: Sequence[int] = (), flags: int = 0) -> None:
        await self.send_bytes(vu.encode(request, payload, flags=flags), fds)

    async def send_bytes(self, data: bytes, fds: Sequence[int] = ()) -> None:
        control = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds).tobytes())] if fds else []
        sent = await self.sock.sendmsg([data], control)
        assert sent == len(data)

    async def receive(self) -> vu.Frame | None:
        """The next message, None at the end of the connection."""
        with trio.fail_after(10):
            while True:
                try:
                    data, control, _, _ = await self.sock.recvmsg(
                        self.reader.want, socket.CMSG_SPACE(128), socket.MSG_CMSG_CLOEXEC
                    )
                except ConnectionResetError:
                    return None
                fds = array.array("i")
                for _, _, value in control:
                    fds.frombytes(value)
                frame = self.reader.feed(data, fds)
                if frame is not None:
                    return frame
                if not data:
                    return None

    async def ask(
        self, request: int, payload: bytes = b"", fds: Sequence[int] = (), flags: int = 0
    ) -> vu.Frame:
        """Send and return the reply, which must be one."""
        await self.send(request, payload, fds, flags)
        frame = await self.receive()
        assert frame is not None, f"no reply to {vu.request_name(request)}: the session ended"
        assert frame.request == request
        assert frame.flags == 0x5
        return frame

    async def ack(self, request: int, payload: bytes = b"", fds: Sequence[int] = ()) -> int:
        """Send with NEED_REPLY and return the status."""
        return vu.unpack_u64((await self.ask(request, payload, fds, vu.FLAG_NEED_REPLY)).payload)

    async def barrier(self) -> None:
        """Return when everything sent before has taken effect."""
        (await self.ask(Request.GET_FEATURES)).close_fds()

    async def negotiate(
        self, features: int | None = None, protocol: ProtocolFeature | None = None, hide: int = 0
    ) -> tuple[int, ProtocolFeature]:
        """QEMU's opening; accepts what is offered, or just these bits."""
        offered = vu.unpack_u64((await self.ask(Request.GET_FEATURES)).payload)
        bits = ProtocolFeature(vu.unpack_u64((await self.ask(Request.GET_PROTOCOL_FEATURES)).payload))
        bits = bits if protocol is None else protocol
        await self.send(Request.SET_PROTOCOL_FEATURES, vu.pack_u64(bits))
        await self.send(Request.SET_OWNER)
        wanted = (offered & ~int(Feature.LOG_ALL) if features is None else features) & ~int(hide)
        await self.send(Request.SET_FEATURES, vu.pack_u64(wanted))
        return wanted, bits

    async def ended(self) -> bool:
        """True when the back-end closes the connection; replies that come first are passed over."""
        while True:
            frame = await self.receive()
            if frame is None:
                return True
            frame.close_fds()

    def close(self) -> None:
        self.reader.close()
        self.sock.close()


@contextlib.asynccontextmanager
async def connected(device: Device, options: Options = Options()) -> AsyncIterator[RawFrontEnd]:  # noqa: B008
    """A session of ``device`` in this process, and the front-end's end of its socket."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    front = RawFrontEnd(ours)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve_connection, device, trio.socket.from_stdlib_socket(theirs), options)
        try:
            yield front
        finally:
            front.close()
        # The session must end by itself, because its front-end is gone.
        nursery.cancel_scope.deadline = trio.current_time() + 30
    assert not nursery.cancel_scope.cancelled_caught, "the session did not end with its front-end"


def store16(memory: mmap.mmap | bytearray, at: int, value: int) -> None:
    """Store a word at once: ``struct.pack_into`` writes zeros first, and a device that looks just then sees them."""
    with memoryview(memory) as view, view[at : at + 2] as two, two.cast("H") as word:
        word[0] = value


class Ring:
    """A split ring in the guest's memory: descriptors at ``at``, avail and used behind them."""

    def __init__(self, guest: Guest, index: int, at: int, size: int) -> None:
        self.guest, self.index, self.size, self.desc = guest, index, size, at
        self.avail = at + 16 * size
        self.used = (self.avail + 6 + 2 * size + 3) & ~3
        self.kick = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.call = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.err = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.avail_idx = 0

    def set_desc(self, i: int, addr: int, length: int, flags: int = 0, following: int = 0) -> None:
        struct.pack_into("<QIHH", self.guest.mem, self.desc + 16 * i, addr, length, flags, following)

    def offer(self, *heads: int) -> None:
        """Put chains into the avail ring and kick."""
        for head in heads:
            struct.pack_into("<H", self.guest.mem, self.avail + 4 + 2 * (self.avail_idx % self.size), head)
            self.avail_idx = (self.avail_idx + 1) & 0xFFFF
        # used_event (with EVENT_IDX): call us at each used entry.
        store16(self.guest.mem, self.avail + 4 + 2 * self.size, self.used_idx)
        store16(self.guest.mem, self.avail + 2, self.avail_idx)
        os.eventfd_write(self.kick, 1)

    @property
    def used_idx(self) -> int:
        return int(struct.unpack_from("H", self.guest.mem, self.used + 2)[0])

    def used_element(self, i: int) -> tuple[int, int]:
        """id and len of used entry ``i`` (free running)."""
        head, length = struct.unpack_from("<II", self.guest.mem, self.used + 4 + 8 * (i % self.size))
        return head, length

    async def until_used(self, count: int) -> None:
        """Wait, by the call descriptor, until the used index is ``count``."""
        with trio.fail_after(10):
            while (used := self.used_idx) != count & 0xFFFF:
                store16(self.guest.mem, self.avail + 4 + 2 * self.size, used)
                if self.used_idx != used:
                    continue
                await trio.lowlevel.wait_readable(self.call)
                os.eventfd_read(self.call)

    async def send_setup(
        self, front: RawFrontEnd, *, base: int = 0, enable: bool = True, log: int = 0
    ) -> None:
        """QEMU's order: NUM, BASE, ADDR, KICK, CALL, ERR, ENABLE."""
        u = self.guest.user
        await front.send(Request.SET_VRING_NUM, vu.VringState(self.index, self.size).pack())
        await front.send(Request.SET_VRING_BASE, vu.VringState(self.index, base).pack())
        addr = vu.VringAddr(
            self.index, log, u(self.desc), u(self.used), u(self.avail), GUEST_BASE + self.used
        )
        await front.send(Request.SET_VRING_ADDR, addr.pack())
        await front.send(Request.SET_VRING_CALL, vu.pack_u64(self.index), [self.call])
        await front.send(Request.SET_VRING_ERR, vu.pack_u64(self.index), [self.err])
        await front.send(Request.SET_VRING_KICK, vu.pack_u64(self.index), [self.kick])
        if enable:
            await front.send(Request.SET_VRING_ENABLE, vu.VringState(self.index, 1).pack())

    def close(self) -> None:
        for fd in (self.kick, self.call, self.err):
            os.close(fd)


class Guest:
    """``size`` bytes of guest memory on a memfd, at GUEST_BASE for the guest; rings are laid out in it.

    ``fd``: another file of that size, ours from now on. ``mapped``: so many of its first bytes are touched here.
    """

    def __init__(self, size: int = 1 << 20, fd: int = -1, mapped: int = 0) -> None:
        self.size = size
        self.fd = fd if fd >= 0 else os.memfd_create("guest", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, size)
        self.mem = mmap.mmap(self.fd, mapped or size)
        self.rings: list[Ring] = []
        self._next = 0x1000

    @staticmethod
    def user(offset: int) -> int:
        return USER_BASE + offset

    def ring(self, index: int, size: int = 16) -> Ring:
        ring = Ring(self, index, self._next, size)
        self._next += 0x10000
        self.rings.append(ring)
        return ring

    @property
    def region(self) -> vu.MemoryRegion:
        return vu.MemoryRegion(GUEST_BASE, self.size, USER_BASE, 0)

    async def send_memory(self, front: RawFrontEnd) -> None:
        await front.send(Request.SET_MEM_TABLE, vu.pack_table([self.region]), [self.fd])

    def put(self, offset: int, data: bytes) -> int:
        """Write at ``offset``; returns its guest address."""
        self.mem[offset : offset + len(data)] = data
        return GUEST_BASE + offset

    def close(self) -> None:
        for ring in self.rings:
            ring.close()
        self.mem.close()
        os.close(self.fd)
