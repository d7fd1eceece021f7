"""Drives a disk by libblkio, in a process of its own: its errors may be crashes.

``python -m tests.peers.blkio_child LIBRARY SOCKET QUEUES QUEUE_SIZE FILE``: connects to the back-end, writes what
FILE has to the disk, many requests at a time by each queue, flushes, reads it back, and prints what it was told.
"""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path
from typing import Any

BLOCK = 64 << 10
TOLD = ("max-queues", "max-queue-size", "max-segments", "request-alignment", "max-mem-regions")


class Region(ctypes.Structure):
    _fields_ = (
        ("addr", ctypes.c_void_p),
        ("len", ctypes.c_size_t),
        ("iova", ctypes.c_uint64),
        ("fd_offset", ctypes.c_int64),
        ("fd", ctypes.c_int),
        ("flags", ctypes.c_uint32),
    )


class Completion(ctypes.Structure):
    _fields_ = (
        ("user_data", ctypes.c_void_p),
        ("error", ctypes.c_char_p),
        ("ret", ctypes.c_int),
        ("reserved", ctypes.c_uint8 * 12),
    )


class Disk:
    """The library's ``struct blkio``; calls that fail end the program with its words."""

    def __init__(self, library: str) -> None:
        self.lib: Any = ctypes.CDLL(library)
        self.lib.blkio_get_error_msg.restype = ctypes.c_char_p
        self.lib.blkio_get_queue.restype = ctypes.c_void_p
        self.disk = ctypes.c_void_p()
        self.call("create", b"virtio-blk-vhost-user", ctypes.byref(self.disk), of=())

    def call(self, name: str, *args: Any, of: tuple[Any, ...] | None = None) -> None:
        rc = self.lib[f"blkio_{name}"](*((self.disk,) if of is None else of), *args)
        if rc < 0:
            sys.exit(f"{name}: {os.strerror(-rc)}: {self.lib.blkio_get_error_msg().decode()}")

    def number(self, name: str) -> int:
        value = ctypes.c_uint64(0)
        if self.lib.blkio_get_uint64(self.disk, name.encode(), ctypes.byref(value)) == 0:
            return value.value
        small = ctypes.c_int(0)
        self.call("get_int", name.encode(), ctypes.byref(small))
        return small.value

    def memory(self, size: int) -> Region:
        region = Region()
        self.call("alloc_mem_region", ctypes.byref(region), ctypes.c_size_t(size))
        self.call("map_mem_region", ctypes.byref(region))
        return region

    def transfer(self, name: str, queue: int, region: Region, blocks: range) -> None:
        """Read or write those blocks, all at a time; block i lies at the same place in memory as on the disk."""
        q = ctypes.c_void_p(self.lib.blkio_get_queue(self.disk, queue))
        for i in blocks:
            at = ctypes.c_void_p(region.addr + i * BLOCK)
            what = (ctypes.c_uint64(i * BLOCK), at, ctypes.c_size_t(BLOCK), None, ctypes.c_uint32(0))
            self.lib[f"blkioq_{name}"](q, *what)
        self.complete(q, len(blocks))

    def flush(self, queue: int) -> None:
        q = ctypes.c_void_p(self.lib.blkio_get_queue(self.disk, queue))
        self.lib.blkioq_flush(q, None, ctypes.c_uint32(0))
        self.complete(q, 1)

    def complete(self, q: ctypes.c_void_p, count: int) -> None:
        done = (Completion * count)()
        got = self.lib.blkioq_do_io(q, done, count, count, None)
        if got != count or any(one.ret for one in done):
            sys.exit(f"{got} of {count} requests are done: {[(one.ret, one.error) for one in done]}")


def main(library: str, path: str, queues: int, size: int, content: bytes) -> None:
    disk = Disk(library)
    disk.call("set_str", b"path", path.encode())
    disk.call("connect")
    disk.call("set_int", b"num-queues", queues)
    disk.call("set_int", b"queue-size", size)
    disk.call("start")
    print("capacity", disk.number("capacity"))
    for name in TOLD:
        print(name, disk.number(name))
    out, back = disk.memory(len(content)), disk.memory(len(content))
    ctypes.memmove(out.addr, content, len(content))
    parts = [range(queue, len(content) // BLOCK, queues) for queue in range(queues)]
    for queue, blocks in enumerate(parts):
        disk.transfer("write", queue, out, blocks)
        disk.flush(queue)
    for queue, blocks in enumerate(parts):
        disk.transfer("read", queue, back, blocks)
    print("same", ctypes.string_at(back.addr, len(content)) == content, flush=True)
    for region in (out, back):
        disk.lib.blkio_unmap_mem_region(disk.disk, ctypes.byref(region))
        disk.lib.blkio_free_mem_region(disk.disk, ctypes.byref(region))
    disk.lib.blkio_destroy(ctypes.byref(disk.disk))
    print("ended")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), Path(sys.argv[5]).read_bytes())
