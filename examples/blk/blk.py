"""A disk (virtio-blk, virtio 1.2, 5.2) in plain Python.

    python examples/blk --socket-path /tmp/blk.sock --blk-file disk.img

In QEMU: -chardev socket,id=blk,path=/tmp/blk.sock -device vhost-user-blk-pci,chardev=blk,num-queues=2
"""

from __future__ import annotations

import enum
import logging
import struct

import trio
from disk import SECTOR, Disk

from vhostpc.backend import Chain, Device, Queue
from vhostpc.errors import BrokenQueue, VhostpcError

log = logging.getLogger(__name__)

HEADER = struct.Struct("<IIQ")  # type, reserved, sector
#: Segments of a request, and bytes of one that we take.
MOST_SEGMENTS, MOST_BYTES = 126, 32 << 20
#: Requests of one queue that are at work at a time.
AT_WORK = 64
UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


class BlkFeature(enum.IntFlag, boundary=enum.KEEP):
    """virtio 1.2, 5.2.3."""

    SEG_MAX = 1 << 2
    RO = 1 << 5
    BLK_SIZE = 1 << 6
    FLUSH = 1 << 9
    MQ = 1 << 12


class Type(enum.IntEnum):
    """Request types, virtio 1.2, 5.2.6."""

    IN = 0
    OUT = 1
    FLUSH = 4
    GET_ID = 8


class Status(enum.IntEnum):
    """The last byte of every request."""

    OK = 0
    IOERR = 1
    UNSUPP = 2


class Blk(Device):
    """``blk_file``: a file or block device; or ``memory``: the size of a disk that is gone with the process.

    ``read_only``: the guest can't write. ``queues``: how many. Texts, as options give them, will do.
    """

    device_id = 2
    config_size = 60
    capabilities = ("read-only", "blk-file")

    def __init__(
        self, blk_file: str = "", memory: str = "", read_only: str | bool = False, queues: str | int = 2
    ) -> None:
        if bool(blk_file) == bool(memory):
            raise VhostpcError("give one of --blk-file and --memory")
        read_only = read_only in (True, "yes", "on", "true", "1")
        if blk_file:
            self.disk = Disk.from_file(blk_file, read_only=read_only)
        else:
            self.disk = Disk.from_memory(size_of(memory), read_only=read_only)
        self.num_queues = int(queues)
        features = BlkFeature.SEG_MAX | BlkFeature.BLK_SIZE | BlkFeature.FLUSH
        features |= BlkFeature.RO if read_only else BlkFeature(0)
        features |= BlkFeature.MQ if self.num_queues > 1 else BlkFeature(0)
        self.features = int(features)

    def read_config(self, offset: int, size: int) -> bytes:
        config = bytearray(self.config_size)
        struct.pack_into("<QII", config, 0, self.disk.size // SECTOR, 0, MOST_SEGMENTS)
        struct.pack_into("<I", config, 20, SECTOR)
        struct.pack_into("<H", config, 34, self.num_queues)
        return bytes(config[offset : offset + size])

    async def handle_queue(self, queue: Queue) -> None:
        slots = trio.CapacityLimiter(AT_WORK)
        async with trio.open_nursery() as nursery:
            # A disk's requests may be done in any order; a driver that minds waits for one before the next.
            async for chain in queue.unordered():
                if not self.do_now(chain):
                    chain.keep()
                    await slots.acquire_on_behalf_of(chain)
                    nursery.start_soon(self.do, chain, slots, bool(queue.features & BlkFeature.FLUSH))

    def parse(self, chain: Chain) -> tuple[int, int, memoryview, int] | Status:
        """Type, byte offset, data to write and length to read of a request; or what is wrong with it."""
        if not chain.writable:
            raise BrokenQueue("a request has no room for its status")
        if chain.readable > MOST_BYTES or chain.writable > MOST_BYTES:
            raise BrokenQueue(f"a request of {chain.readable} and {chain.writable} bytes")
        request = memoryview(chain.read())
        if len(request) < HEADER.size:
            return Status.IOERR
        kind, _, sector = HEADER.unpack_from(request)
        data, length = request[HEADER.size :], chain.writable - 1
        if kind not in (Type.IN, Type.OUT):
            return (kind, 0, data, length)
        size = len(data) if kind == Type.OUT else length
        if size % SECTOR or sector * SECTOR + size > self.disk.size:
            return Status.IOERR
        if kind == Type.OUT and self.disk.read_only:
            return Status.IOERR
        return (kind, sector * SECTOR, data, length)

    def do_now(self, chain: Chain) -> bool:
        """Answer what needs not wait for a medium."""
        request = self.parse(chain)
        if isinstance(request, Status):
            answer(chain, request)
            return True
        kind, offset, data, length = request
        if kind == Type.IN:
            found = self.disk.read_now(offset, length)
            if found is None:
                return False
            answer(chain, Status.OK, found)
        elif kind == Type.OUT:
            if not self.disk.write_now(offset, data):
                return False
            answer(chain, Status.OK)
        elif kind == Type.GET_ID:
            answer(chain, Status.OK, b"vhostpc".ljust(20, b"\0")[:length])
        elif kind == Type.FLUSH:
            return False
        else:
            answer(chain, Status.UNSUPP)
        return True

    async def do(self, chain: Chain, slots: trio.CapacityLimiter, flushes: bool) -> None:
        """Do what waits for the medium. Not cancelled: what has been written has to be answered."""
        with trio.CancelScope(shield=True):
            request = self.parse(chain)
            assert not isinstance(request, Status)
            kind, offset, data, length = request
            found = b""
            try:
                if kind == Type.IN:
                    found = await self.disk.read(offset, length)
                elif kind == Type.OUT:
                    await self.disk.write(offset, data, through=not flushes)
                else:
                    await self.disk.flush()
            except OSError as e:
                log.error(
                    "%s of %d bytes at %d: %s", Type(kind).name, len(data) or length, offset, e.strerror
                )
                answer(chain, Status.IOERR)
            else:
                answer(chain, Status.OK, found)
            chain.complete()
            slots.release_on_behalf_of(chain)


def answer(chain: Chain, status: Status, data: bytes = b"") -> None:
    """``data``, zeros up to the last byte, and the status there."""
    chain.write(data.ljust(chain.writable - 1, b"\0") + bytes([status]))


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
