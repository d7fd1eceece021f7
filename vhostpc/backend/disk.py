"""A disk (virtio-blk, virtio 1.2, 5.2) in plain Python; ``vhostpc blk`` is the program around it.

    vhostpc blk --socket-path /tmp/blk.sock --blk-file disk.img

In QEMU: -chardev socket,id=blk,path=/tmp/blk.sock -device vhost-user-blk-pci,chardev=blk,num-queues=2
"""

from __future__ import annotations

import enum
import struct
from typing import NamedTuple

import trio

from vhostpc.backend.device import Device, FrontEnd
from vhostpc.backend.medium import SECTOR, Medium
from vhostpc.enums import NamedFlag, SpecEnum
from vhostpc.errors import BrokenQueue, VhostpcError
from vhostpc.logs import rationed_logger
from vhostpc.virtio.chain import Chain
from vhostpc.virtio.queue import Queue
from vhostpc.wire.vhost_user import Feature

log = rationed_logger(__name__)

HEADER = struct.Struct("<IIQ")  # type, reserved, sector
#: Most segments of a request, unless the ring allows fewer.
MOST_SEGMENTS = 126
#: Requests of one queue that are served at the same time; one of up to SHORT bytes is in memory as a whole.
AT_WORK = 64
SHORT = (256 << 10) - HEADER.size
#: Longer requests are served in pieces of this many bytes, and this many of one queue at the same time.
PIECE, PIECES = 1 << 20, 8
#: Seconds between two looks at the medium's size.
LOOK_INTERVAL = 1.0
UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


class BlkFeature(NamedFlag, boundary=enum.KEEP):
    """virtio 1.2, 5.2.3."""

    SEG_MAX = 1 << 2
    RO = 1 << 5
    BLK_SIZE = 1 << 6
    FLUSH = 1 << 9
    MQ = 1 << 12


class Type(SpecEnum):
    """Request types, virtio 1.2, 5.2.6."""

    IN = 0
    OUT = 1
    FLUSH = 4
    GET_ID = 8


class Status(SpecEnum):
    """The last byte of every request."""

    OK = 0
    IOERR = 1
    UNSUPP = 2


class Request(NamedTuple):
    """``kind`` is a Type that we know; ``offset`` and ``size`` are bytes of the disk."""

    kind: int
    offset: int
    size: int


class Disk(Device):
    """``blk_file``: a file or block device; or ``memory``: the size of a disk that vanishes with the process.

    ``read_only``: the guest cannot write. ``queues``: how many. ``ring_size``: entries of the smallest ring without
    indirect descriptors, for front-ends that read the configuration before they set up a ring. Each may be a string, as
    on a command line.
    """

    device_id = 2
    config_size = 60
    capabilities = ("read-only", "blk-file")

    def __init__(
        self,
        blk_file: str = "",
        memory: str = "",
        read_only: str | bool = False,
        queues: str | int = 2,
        ring_size: str | int = 64,
    ) -> None:
        if bool(blk_file) == bool(memory):
            raise VhostpcError("give one of --blk-file and --memory")
        read_only = read_only in (True, "yes", "on", "true", "1")
        if blk_file:
            self.medium = Medium.from_file(blk_file, read_only=read_only)
        else:
            self.medium = Medium.from_memory(size_of(memory), read_only=read_only)
        self.num_queues, self.ring_size = int(queues), int(ring_size)
        features = BlkFeature.SEG_MAX | BlkFeature.BLK_SIZE | BlkFeature.FLUSH
        features |= BlkFeature.RO if read_only else BlkFeature(0)
        features |= BlkFeature.MQ if self.num_queues > 1 else BlkFeature(0)
        self.features = int(features)

    def config_for(self, front_end: FrontEnd, offset: int, size: int) -> bytes:
        config = bytearray(self.config_size)
        most = MOST_SEGMENTS
        if not front_end.features & Feature.INDIRECT_DESC:
            # Or it is not known yet. A request takes two more descriptors; one that never fits hangs its guest.
            most = max(1, min(most, (front_end.smallest_ring or self.ring_size) - 2))
        struct.pack_into("<QII", config, 0, self.medium.size // SECTOR, 0, most)
        struct.pack_into("<I", config, 20, SECTOR)
        struct.pack_into("<H", config, 34, self.num_queues)
        return bytes(config[offset : offset + size])

    async def handle_session(self, front_end: FrontEnd) -> None:
        """Tell the driver of a disk that has grown or shrunk."""
        known = self.medium.size
        while True:
            await trio.sleep(LOOK_INTERVAL)
            if self.medium.look() != known:
                known = self.medium.size
                log.info("%s: the disk now has %d bytes", front_end.name, known)
                await front_end.config_changed()

    async def handle_queue(self, queue: Queue) -> None:
        # Without a region only the ring tells the next process which requests were done: those up to the used index.
        queue.in_order = not queue.inflight
        slots, pieces = trio.CapacityLimiter(AT_WORK), trio.CapacityLimiter(PIECES)
        flushes = bool(queue.features & BlkFeature.FLUSH)
        async with trio.open_nursery() as nursery:
            # A disk's requests may be served in any order; a driver that needs an order waits between them.
            async for chain in queue.unordered():
                request = self.parse(chain)
                if isinstance(request, Status):
                    answer(chain, request)
                elif not self.do_now(chain, request):
                    chain.keep()
                    await slots.acquire_on_behalf_of(chain)
                    nursery.start_soon(self.do, chain, request, slots, pieces, flushes)

    def parse(self, chain: Chain) -> Request | Status:
        """The parsed request, or the error in it."""
        if not chain.writable:
            raise BrokenQueue("a request has no room for its status")
        if chain.readable < HEADER.size:
            return Status.IOERR
        kind, _, sector = HEADER.unpack(chain.peek(HEADER.size))
        if kind not in (Type.IN, Type.OUT):
            return Request(kind, 0, 0) if kind in (Type.FLUSH, Type.GET_ID) else Status.UNSUPP
        size = chain.readable - HEADER.size if kind == Type.OUT else chain.writable - 1
        if size % SECTOR or sector * SECTOR + size > self.medium.size:
            return Status.IOERR
        if kind == Type.OUT and self.medium.read_only:
            return Status.IOERR
        return Request(kind, sector * SECTOR, size)

    def do_now(self, chain: Chain, request: Request) -> bool:
        """Answer a request that need not wait for the medium."""
        if request.kind == Type.GET_ID:
            room = chain.writable - 1
            answer(chain, Status.IOERR if room > SHORT else Status.OK, b"vhostpc".ljust(20, b"\0")[:room])
            return True
        if request.kind == Type.FLUSH or request.size > SHORT:
            return False
        if request.kind == Type.IN:
            found = self.medium.read_now(request.offset, request.size)
            if found is not None:
                answer(chain, Status.OK, found)
            return found is not None
        if not self.medium.write_now(request.offset, memoryview(chain.read())[HEADER.size :]):
            return False
        answer(chain, Status.OK)
        return True

    async def do(
        self,
        chain: Chain,
        request: Request,
        slots: trio.CapacityLimiter,
        pieces: trio.CapacityLimiter,
        flushes: bool,
    ) -> None:
        """Do the part that waits for the medium, and answer."""
        try:
            if request.size <= SHORT:
                with trio.CancelScope(shield=True):
                    answer(chain, Status.OK, await self.do_whole(chain, request, flushes))
            else:
                await self.do_in_pieces(chain, request, pieces, flushes)
                answer(chain, Status.OK)
        except OSError as e:
            log.error(
                "%s of %d bytes at %d: %s", Type(request.kind).name, request.size, request.offset, e.strerror
            )
            answer(chain, Status.IOERR)
        finally:
            slots.release_on_behalf_of(chain)
        chain.complete()

    async def do_whole(self, chain: Chain, request: Request, flushes: bool) -> bytes:
        """Serve a short request; the result is the data read. Raises OSError."""
        if request.kind == Type.IN:
            return await self.medium.read(request.offset, request.size)
        if request.kind == Type.OUT:
            data = memoryview(chain.read())[HEADER.size :]
            await self.medium.write(request.offset, data, through=not flushes)
        else:
            await self.medium.flush()
        return b""

    async def do_in_pieces(
        self, chain: Chain, request: Request, pieces: trio.CapacityLimiter, flushes: bool
    ) -> None:
        """Serve a long request, of which one piece at a time is in memory. Raises OSError.

        Between two pieces it may be cancelled, and is given back whole: a read or a write can be repeated. After the
        last piece it is not cancelled, so work that was done is answered.
        """
        kind, offset, size = request
        for done in range(0, size, PIECE):
            async with pieces:
                with trio.CancelScope(shield=True):
                    length = min(PIECE, size - done)
                    if kind == Type.IN:
                        await chain.write_at(done, await self.medium.read(offset + done, length))
                    else:
                        data = memoryview(await chain.read_at(HEADER.size + done, length))
                        through = not flushes and done + length == size
                        await self.medium.write(offset + done, data, through=through)


def answer(chain: Chain, status: Status, data: bytes = b"") -> None:
    """``data``, zeros up to the last byte, and the status there; of a long request the last byte alone."""
    if chain.writable - chain.begun > SHORT + 1:
        chain.seek(chain.writable - 1)
        data = b""
    chain.write(data.ljust(chain.writable - 1 - chain.begun, b"\0") + bytes([status]))


def size_of(text: str) -> int:
    """Bytes of a size such as 64M. Raises VhostpcError."""
    number, unit = (text[:-1], UNITS[text[-1].upper()]) if text[-1].upper() in UNITS else (text, 1)
    try:
        size = int(number) * unit
    except ValueError:
        size = 0
    if not SECTOR <= size <= 1 << 50:
        raise VhostpcError(f"{text!r} is not the size of a disk, such as 64M")
    return size
