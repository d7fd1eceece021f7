"""A network device's control queue (virtio 1.2, 5.1.6.5), for front-ends that pass it on.

QEMU and Cloud Hypervisor answer it themselves and never set up its ring.
"""

from __future__ import annotations

import enum
import struct

from vhostpc.errors import BrokenQueue
from vhostpc.virtio.queue import Queue


class Command(enum.Enum):
    """Class and command."""

    ANNOUNCE_ACK = (3, 0)
    MQ_VQ_PAIRS_SET = (4, 0)


OK, ERR = b"\0", b"\1"


async def serve_control(queue: Queue, pairs: int) -> None:
    """Answer commands until the ring stops. Raises BrokenQueue, MemoryLost."""
    async for chain in queue:
        if not chain.writable:
            raise BrokenQueue("a command has no room for its answer")
        chain.write(OK if is_done(chain.peek(4), pairs) else ERR)


def is_done(command: bytes, pairs: int) -> bool:
    """Whether a command is done: a pair that the driver does not use has no buffers, so nothing is to be set."""
    kind = tuple(command[:2])
    if kind == Command.ANNOUNCE_ACK.value:
        return True
    if kind == Command.MQ_VQ_PAIRS_SET.value and len(command) == 4:
        return bool(1 <= struct.unpack_from("<H", command, 2)[0] <= pairs)
    return False
