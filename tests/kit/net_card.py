"""A guest's network card over rings that Python writes: frames out, frames in, buffers that come again.

Its memory is calm. Nothing here waits: the test decides when to look again.
"""

from __future__ import annotations

import socket
import struct
from collections import deque

from tests.kit.raw_front_end import GUEST_BASE, NEXT, WRITE, Guest, Ring

RX, TX = 0, 1
HEADER = 12
STRIDE = 16384  # between buffers
TX_AT, LONG_AT, RX_AT = 0x200000, 0x2A0000, 0x300000
MEMORY = 4 << 20
PATTERN = bytes(range(256)) * 280


def frame(number: int, length: int) -> bytes:
    """``length`` bytes that name themselves."""
    at = number * 7 & 0xFF
    return (b"%08d" % number + PATTERN[at : at + length])[:length]


class Card:
    """A queue pair of 64 entries each in a guest of MEMORY bytes."""

    def __init__(self, guest: Guest, *, rx_size: int = 2048, rx_count: int = 64, rx_ring: int = 64) -> None:
        """``rx_size``: bytes of each of the ``rx_count`` receive buffers, all offered at once."""
        self.guest = guest
        self.rx, self.tx = guest.ring(RX, rx_ring), guest.ring(TX, 64)
        self.rx_size = rx_size
        self._free = deque(range(32))  # transmit slots: two descriptors each
        self._out: set[int] = set()
        self._tx_seen = self._rx_seen = 0
        self._in: set[int] = set()
        self.offer_more(rx_count)

    @property
    def free(self) -> int:
        """Frames that can be sent now."""
        self._reclaim()
        return len(self._free)

    def send(self, *frames: bytes) -> None:
        """Put frames into the transmit ring, each cut in two descriptors inside the frame, and kick once."""
        self._reclaim()
        heads = []
        for data in frames:
            slot = self._free.popleft()
            where = self.guest.put(TX_AT + slot * STRIDE, bytes(HEADER) + data)
            cut = HEADER + len(data) // 2
            self.tx.set_desc(2 * slot, where, cut, NEXT, 2 * slot + 1)
            self.tx.set_desc(2 * slot + 1, where + cut, HEADER + len(data) - cut)
            self._out.add(2 * slot)
            heads.append(2 * slot)
        self.tx.offer(*heads)

    def send_long(self, length: int) -> None:
        """One frame of ``length`` zeros, however long."""
        self._reclaim()
        slot = self._free.popleft()
        self.tx.set_desc(2 * slot, GUEST_BASE + LONG_AT, HEADER + length)
        self._out.add(2 * slot)
        self.tx.offer(2 * slot)

    def _reclaim(self) -> None:
        while self._tx_seen != self.tx.used_idx:
            head, length = self.tx.used_element(self._tx_seen)
            assert head in self._out, f"buffer {head} came back twice"
            assert length == 0, "bytes written into a buffer that is to be read"
            self._out.remove(head)
            self._free.append(head // 2)
            self._tx_seen = (self._tx_seen + 1) & 0xFFFF

    def take(self) -> list[bytes]:
        """The frames that have come since the last call; their buffers are offered again."""
        frames, used = [], self.rx.used_idx
        while self._rx_seen != used:
            data, buffers = self._next()
            header, data = data[:HEADER], data[HEADER:]
            assert header[:10] == bytes(10)
            (count,) = struct.unpack("<H", header[10:])
            for _ in range(count - 1):
                assert self._rx_seen != used, "a frame was published in pieces"
                more, its = self._next()
                data += more
                buffers += its
            frames.append(data)
            self._in.update(buffers)
            self.rx.offer(*buffers)
        return frames

    def offer_more(self, count: int) -> None:
        """So many receive buffers besides those that are there."""
        first = len(self._in)
        for i in range(first, first + count):
            self.rx.set_desc(i, GUEST_BASE + RX_AT + i * STRIDE, self.rx_size, WRITE)
            self._in.add(i)
        self.rx.offer(*range(first, first + count))

    def _next(self) -> tuple[bytes, list[int]]:
        head, length = self.rx.used_element(self._rx_seen)
        assert head in self._in, f"buffer {head} came back twice"
        assert 0 < length <= self.rx_size
        self._in.remove(head)
        self._rx_seen = (self._rx_seen + 1) & 0xFFFF
        at = RX_AT + head * STRIDE
        return bytes(self.guest.mem[at : at + length]), [head]

    def move(self, ring: Ring, at: int) -> None:
        """Lay a stopped ring out at another offset of memory, with all that it holds."""
        old = (ring.desc, ring.avail, ring.used)
        sizes = (16 * ring.size, 6 + 2 * ring.size, 6 + 8 * ring.size)
        parts = [bytes(self.guest.mem[a : a + n]) for a, n in zip(old, sizes, strict=True)]
        for a, n in zip(old, sizes, strict=True):
            self.guest.mem[a : a + n] = b"\xee" * n  # a reader that still looks here breaks its ring
        delta = at - ring.desc
        ring.desc, ring.avail, ring.used = (a + delta for a in old)
        for a, part in zip((ring.desc, ring.avail, ring.used), parts, strict=True):
            self.guest.mem[a : a + len(part)] = part


def udp() -> socket.socket:
    """A socket on loopback that does not block, with room for a burst."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
    sock.bind(("127.0.0.1", 0))
    sock.setblocking(False)
    return sock
