"""A guest whose pages are still elsewhere, and a resolver that places them as the test says."""

from __future__ import annotations

import os

import trio

from tests.kit.raw_front_end import GUEST_BASE, NEXT, WRITE, Guest, RawFrontEnd
from vhostpc.memory.mapping import Mapping, Supply
from vhostpc.ufd import PageFault, Userfaultfd
from vhostpc.wire import vhost_user as vu
from vhostpc.wire.vhost_user import Request

PAGE = 4096
LISTEN_FLAGS = vu.FLAG_NEED_REPLY


class AbsentGuest(Guest):
    """A guest whose memory is still at the source: ``image`` holds it, the memfd is one hole.

    Python writes the image; pages reach the memfd by UFFDIO_COPY through a mapping of our own.
    """

    def __init__(self, size: int = 1 << 20) -> None:
        super().__init__(size)
        self.mem.close()
        self.image = bytearray(size)
        self.mem = self.image  # type: ignore[assignment]
        self._own = Mapping(Supply(), self.fd, 0, size)
        self.ufd = Userfaultfd.open()
        self.ufd.register(self._own.address, size)
        self.clients: list[tuple[Userfaultfd, int]] = []
        self._bases: list[int] = []  # of the client, the latest last: an event may be older than a new table
        self.requested: list[int] = []

    def holes(self) -> set[int]:
        """Page numbers that are not in the file."""
        absent = set()
        at = 0
        while at < self.size:
            try:
                data = os.lseek(self.fd, at, os.SEEK_DATA)
            except OSError:
                data = self.size
            absent |= set(range(at // PAGE, data // PAGE))
            at = os.lseek(self.fd, data, os.SEEK_HOLE) if data < self.size else data
        return absent

    def place(self, page: int) -> None:
        """UFFDIO_COPY, then wake every client: QEMU's order."""
        at = page * PAGE
        assert self.ufd.copy(self._own.address + at, bytes(self.image[at : at + PAGE])) == PAGE
        for ufd, base in self.clients:
            ufd.wake(base + at, PAGE)

    async def next_fault(self) -> int:
        """The page that a client waits for next; not placed yet."""
        with trio.fail_after(10):
            return await self.next_fault_forever()

    async def serve(self) -> None:
        """Place each page that is asked for."""
        while True:
            page = await self.next_fault_forever()
            if page in self.holes():
                self.place(page)
            else:
                for ufd, base in self.clients:
                    ufd.wake(base + page * PAGE, PAGE)

    async def next_fault_forever(self) -> int:
        ufd, _ = self.clients[-1]
        while True:
            await trio.lowlevel.wait_readable(ufd)
            for event in ufd.events(1):
                assert isinstance(event, PageFault)
                base = next(b for b in reversed(self._bases) if 0 <= event.address - b < self.size)
                self.requested.append((event.address - base) // PAGE)
                return self.requested[-1]

    def place_rest(self) -> None:
        for page in self.holes():
            self.place(page)

    def memory(self) -> bytes:
        """All of the file, read without touching a mapping."""
        return os.pread(self.fd, self.size, 0)

    # --- messages ---

    async def advise(self, front: RawFrontEnd) -> None:
        reply = await front.ask(Request.POSTCOPY_ADVISE)
        assert reply.payload == b""
        (fd,) = reply.take_fds()
        self.clients.append((Userfaultfd.from_fd(fd), 0))

    async def listen(self, front: RawFrontEnd) -> int:
        reply = await front.ask(Request.POSTCOPY_LISTEN, flags=LISTEN_FLAGS)
        return vu.unpack_u64(reply.payload)

    async def end(self, front: RawFrontEnd) -> int:
        reply = await front.ask(Request.POSTCOPY_END, flags=LISTEN_FLAGS)
        return vu.unpack_u64(reply.payload)

    def store_base(self, region: vu.MemoryRegion) -> None:
        assert (region.guest_addr, region.size) == (GUEST_BASE, self.size)
        assert region.user_addr != self.region.user_addr
        assert region.user_addr % PAGE == 0
        self.clients = [(ufd, region.user_addr) for ufd, _ in self.clients]
        self._bases.append(region.user_addr)

    async def share_table(self, front: RawFrontEnd, ack: int = Request.SET_MEM_TABLE) -> None:
        sent = vu.pack_table([self.region])
        reply = await front.ask(Request.SET_MEM_TABLE, sent, [self.fd])
        assert len(reply.payload) == len(sent)
        assert not reply.fds
        (region,) = vu.unpack_table(reply.payload)
        self.store_base(region)
        await front.send(ack, vu.pack_u64(0))

    async def share_slots(self, front: RawFrontEnd, ack: int = Request.ADD_MEM_REG) -> None:
        reply = await front.ask(Request.ADD_MEM_REG, vu.pack_single_region(self.region), [self.fd])
        assert len(reply.payload) == 40
        self.store_base(vu.unpack_single_region(reply.payload))
        await front.send(ack, vu.pack_u64(0))

    def close(self) -> None:
        for ring in self.rings:
            ring.close()
        for ufd, _ in self.clients:
            ufd.close()
        self.ufd.close()
        self._own.close()
        os.close(self.fd)


def prepare(guest: AbsentGuest, index: int, count: int = 3) -> list[bytes]:
    """A ring as a migrated guest has it: ``count`` chains wait, each text and answer on pages of their own."""
    ring = guest.ring(index, 64)
    texts = []
    for i in range(count):
        text = b"chain %d of ring %d" % (i, index)
        at = 0x40000 + index * 0x40000 + i * 2 * PAGE
        ring.set_desc(2 * i, guest.put(at, text), len(text), NEXT, 2 * i + 1)
        ring.set_desc(2 * i + 1, GUEST_BASE + at + PAGE, 64, WRITE)
        texts.append(text)
    ring.offer(*[2 * i for i in range(count)])
    return texts


def answer_of(guest: AbsentGuest, index: int, i: int, length: int) -> bytes:
    return os.pread(guest.fd, length, 0x40000 + index * 0x40000 + i * 2 * PAGE + PAGE)
