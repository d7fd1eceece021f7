"""The inflight region: which chains of each queue are taken and not answered, in a file that outlives the back-end.

The back-end makes the file, the front-end keeps it and passes it to the next back-end. A queue's part is
``struct QueueRegionSplit`` of the vhost-user specification: 16 bytes and 16 for each entry.
"""

from __future__ import annotations

import errno
import fcntl
import os

from vhostpc._native import lib
from vhostpc._native.handles import Handle, Owner, made
from vhostpc.errors import GuestMemoryError
from vhostpc.memory.mapping import Supply
from vhostpc.units import in_units

#: libvhost-user and DPDK align each queue's part to this.
ALIGNMENT = 64


def part_size(queue_size: int) -> int:
    """Bytes of a queue's part, without the padding that aligns the next one."""
    return 16 + 16 * queue_size


def stride_of(queue_size: int) -> int:
    """Bytes from one queue's part to the next."""
    return (part_size(queue_size) + ALIGNMENT - 1) & ~(ALIGNMENT - 1)


def new_inflight_file(queues: int, queue_size: int) -> int:
    """A memfd for that many queues, all zeros, whose size nobody can change; the caller owns it. Raises OSError."""
    fd = os.memfd_create("inflight", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, queues * stride_of(queue_size))
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)
    except BaseException:
        os.close(fd)
        raise
    return fd


class InflightRegion(Owner):
    """Maps ``size`` bytes at ``offset`` of ``fd``, parts for ``queues`` rings of at most ``queue_size`` entries.

    The descriptor may be closed afterwards. A file that is shrunk ends ``supply``'s session. Nothing here touches a
    page. Raises GuestMemoryError when the parts do not fit into it, or it does not fit into its file, or when another
    process might have to deliver the file's pages.
    """

    def __init__(self, supply: Supply, fd: int, offset: int, size: int, queues: int, queue_size: int) -> None:
        self.queues = queues
        self.queue_size = queue_size
        where = (
            f"inflight region: {in_units(size)} at {offset:#x} for {queues} queues of {queue_size} entries"
        )
        self.stride = stride_of(queue_size)
        if size == queues * part_size(queue_size):
            self.stride = part_size(queue_size)  # a region of a back-end that aligns nothing
        if not queues or not queue_size or size < queues * self.stride:
            raise GuestMemoryError(f"{where} are too few")
        try:
            raw = made("inflight", where, lib.vpc_inflight_new, supply.handle, fd, offset, size)
        except OSError as e:
            outside = f"{where} are unaligned, or do not lie in a file of that size"
            why = {
                errno.EFBIG: outside,
                errno.EINVAL: outside,
                errno.EOPNOTSUPP: f"{where} are neither on tmpfs nor on hugetlbfs",
            }
            raise GuestMemoryError(why.get(e.errno or 0, e.strerror)) from None
        self._native = Handle(raw, lib.vpc_inflight_unref, "this inflight region is closed")
