"""The guest's side of virtqueues: a driver per queue in C, and the far side that receives its frames.

A driver touches guest memory like a guest's processor: each call here is one C call on a thread of its own and
may wait for a page. Frames carry a stream, a number and a CRC-32, so that a lost, doubled or damaged one is
found and counted.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import trio

from vhostpc._native import check, ffi, lib
from vhostpc._native.entries import Thread
from vhostpc._native.handles import Handle, Owner, made
from vhostpc._native.loop import run_loop
from vhostpc._native.numbers import numbers_of
from vhostpc._native.threads import KeptThread, keeping
from vhostpc.errors import StreamError, naming
from vhostpc.frontend.share import GuestRegion
from vhostpc.pages.ramblock import RamSet, touched
from vhostpc.units import TARGET_PAGE


def _pages(length: int) -> int:
    """Bytes, to the end of the last page."""
    return (length + TARGET_PAGE - 1) & -TARGET_PAGE


@dataclass(frozen=True, slots=True)
class RingLayout:
    """The place of a queue, in guest addresses.

    ``buffers`` + i * ``buffer_stride`` is slot i's buffer, and the same with ``tables`` its indirect
    descriptor table (0: descriptors in the ring). ``slots`` chains of ``parts`` descriptors are in flight at
    most; without tables their descriptors must fit into the ``num`` entries of the ring. ``answer_len``
    bytes at the end of each buffer are for the device to write, in one more descriptor of the chain.
    """

    desc: int
    avail: int
    used: int
    buffers: int
    buffer_stride: int = 2048
    tables: int = 0
    table_stride: int = 256
    num: int = 256
    slots: int = 256
    parts: int = 1
    buffer_len: int = 2048
    answer_len: int = 0

    @classmethod
    def contiguous_at(cls, start: int, num: int = 256, **more: int) -> RingLayout:
        """Everything one after the other from ``start``, each part on pages of its own."""

        slots = more.pop("slots", num)
        avail = start + _pages(16 * num)
        used = avail + _pages(6 + 2 * num)
        buffers = used + _pages(6 + 8 * num)
        return cls(start, avail, used, buffers, num=num, slots=slots, **more)

    @property
    def end(self) -> int:
        """First guest address behind the ring's parts, buffers and tables."""
        ends = [
            self.desc + 16 * self.num,
            self.avail + 6 + 2 * self.num,
            self.used + 6 + 8 * self.num,
            self.buffers + self.slots * self.buffer_stride,
            self.tables + self.slots * self.table_stride if self.tables else 0,
        ]
        return _pages(max(ends))


@dataclass(frozen=True, slots=True)
class FrameNumbers:
    """Frames received and checked."""

    frames: int
    """Complete ones, each counted once."""
    bytes: int
    bad: int
    """Not ours, cut short or with a wrong CRC."""
    duplicates: int
    reordered: int
    next: int
    """Highest number received, plus 1."""


@dataclass(frozen=True, slots=True)
class DriverNumbers:
    """Counts of a queue."""

    posted: int
    completed: int
    kicks: int
    calls: int
    bad_used: int
    """Used entries that name no chain in flight, or too many bytes."""
    in_flight: int
    avail_index: int
    """Free running, 16 bits. SET_VRING_BASE continues from the device's own index."""
    used_index: int
    received: FrameNumbers


def _eventfd(stack: ExitStack) -> int:
    """A non-blocking one, closed by ``stack``."""
    with naming("eventfd of a ring"):
        fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    stack.callback(os.close, fd)
    return fd


class Driver(Owner):
    """One queue. ``kick`` and ``call`` are its eventfds, for SET_VRING_KICK and SET_VRING_CALL.

    One call at a time; each raises MemoryLost when the RAM set was given up. ``event_idx`` says that
    VIRTIO_F_EVENT_IDX was negotiated, ``header`` how many bytes of device header precede a frame (net: 12),
    ``receive`` that the device writes. Raises ValueError for an impossible layout, Shortage, OSError.
    """

    def __init__(
        self,
        ram: RamSet,
        regions: Sequence[GuestRegion],
        layout: RingLayout,
        *,
        receive: bool = False,
        header: int = 12,
        event_idx: bool = False,
        stream: int = 0,
    ) -> None:
        self.layout = layout
        self.receive = receive
        raw = ffi.new("struct vpc_driver_config *")
        for name in RingLayout.__dataclass_fields__:
            setattr(raw, name, getattr(layout, name))
        raw.header, raw.receive, raw.event_idx, raw.stream = header, receive, event_idx, stream
        # Everything that its calls and its loop need is allocated here: they cannot fail for lack of a thread.
        with ExitStack() as stack:
            self._thread = KeptThread(Thread.DRIVER, "the driver of a ring")
            stack.callback(self._thread.close)
            self.kick, self.call = _eventfd(stack), _eventfd(stack)
            raw.kick_fd, raw.call_fd = self.kick, self.call
            try:
                new = made("driver", "driver of a ring", lib.vpc_driver_new, ram.handle, raw)
            except OSError as e:
                if e.errno == errno.EINVAL:
                    raise ValueError(f"not a possible layout of a ring: {layout}") from None
                raise
            self._native = Handle(new, lib.vpc_driver_free, "this driver is closed", needs=[ram.handle])
            stack.callback(self._native.close)
            for r in regions:
                rc = lib.vpc_driver_add_region(self.handle, r.guest_addr, r.size, r.block.index, r.offset)
                check(rc, f"region at {r.guest_addr:#x}")
            stack.pop_all()

    async def reset(self) -> None:
        """Make the ring empty. May wait for a page."""
        await self._hop(lambda: lib.vpc_driver_reset(self.handle))

    async def post(self, count: int = 1, frame_len: int = 64) -> int:
        """Make up to ``count`` chains available and kick if the device wants it; returns how many.

        They are frames of ``frame_len`` bytes, or empty buffers of a receive queue. May wait for a page.
        """
        return await self._hop(lambda: lib.vpc_driver_post(self.handle, count, frame_len))

    async def reap(self) -> int:
        """Take back the chains that the device has used; returns their number. May wait for a page."""
        return await self._hop(lambda: lib.vpc_driver_reap(self.handle))

    async def run(self, count: int = 0, frame_len: int = 64, *, per_second: float = 0) -> None:
        """Post and reap until ``count`` chains have come back (0: until cancelled).

        At most ``per_second`` chains a second if that is not 0. One C call on its thread; cancelling
        takes effect when no page is waited for.
        """
        interval = int(1e9 / per_second) if per_second else 0
        handle = self.handle
        rc = await run_loop(
            lambda: lib.vpc_driver_run(handle, count, frame_len, interval),
            lambda: lib.vpc_driver_stop(handle),
            self._thread,
        )
        touched(rc, "driver")

    async def look(self) -> int:
        """The number of entries that the device has used and nobody reaped. May wait for a page.

        Raises OSError (EBADMSG) when they are more than the chains in flight.
        """
        return await self._hop(lambda: lib.vpc_driver_look(self.handle))

    def unseen(self, first: int, end: int) -> int:
        """The number of these frame numbers that have not been received. Touches nothing."""
        return lib.vpc_driver_unseen(self.handle, first, end)

    def save(self) -> bytes:
        """The state with which a driver of the same layout continues elsewhere. Touches nothing; no call may run."""
        room = check(lib.vpc_driver_save(self.handle, ffi.NULL, 0), "state of a driver")
        buffer = ffi.new("unsigned char[]", room)
        check(lib.vpc_driver_save(self.handle, buffer, room), "state of a driver")
        return bytes(ffi.buffer(buffer, room))

    def load(self, state: bytes) -> None:
        """Continue where another driver was when it was saved. Raises StreamError, having changed nothing."""
        rc = lib.vpc_driver_load(self.handle, ffi.from_buffer(state), len(state))
        if rc == -errno.EINVAL:
            raise StreamError(
                f"the state of a queue is that of another ring than ours of {self.layout.num} entries"
            )
        if rc == -errno.EBADMSG:
            raise StreamError(f"the {len(state)} bytes of a queue's state are malformed")
        check(rc, "state of a driver")

    def move(self, ram: RamSet) -> None:
        """The guest has moved: the same addresses in another RAM set, and new eventfds. Touches nothing."""
        with ExitStack() as stack:
            kick, call = _eventfd(stack), _eventfd(stack)
            check(lib.vpc_driver_move(self.handle, ram.handle, kick, call), "moving a driver")
            stack.pop_all()
        for fd in (self.kick, self.call):
            os.close(fd)
        self.kick, self.call = kick, call
        self._native.now_needs(ram.handle)

    def numbers(self) -> DriverNumbers:
        """Touches nothing."""
        raw = ffi.new("struct vpc_driver_stats *")
        lib.vpc_driver_stats(self.handle, raw)
        return numbers_of(DriverNumbers, raw, received=numbers_of(FrameNumbers, raw.received))

    async def _hop(self, call: Any) -> int:
        return touched(await self._thread.call(call), "driver")

    def close(self) -> None:
        """Free it and close the eventfds. Not while a call runs."""
        if not self.closed:
            self._native.close(idle=self._thread.idle)
            self._thread.close()
            for fd in (self.kick, self.call):
                os.close(fd)


class FarSide(Owner):
    """The network behind a bridge: a datagram socket that checks frames, and may echo them."""

    def __init__(self, sock: socket.socket | trio.socket.SocketType, *, echo: bool = False) -> None:
        with keeping(Thread.FAR, "the far side") as self._thread:
            raw = made("far", "far side", lib.vpc_far_new, sock.fileno(), echo)
        self._native = Handle(raw, lib.vpc_far_free, "this far side is closed")

    async def run(self) -> None:
        """One C call on its thread until cancelled."""
        handle = self.handle
        rc = await run_loop(lambda: lib.vpc_far_run(handle), lambda: lib.vpc_far_stop(handle), self._thread)
        check(rc, "far side")

    def numbers(self) -> FrameNumbers:
        return self._numbers()[0]

    @property
    def echoed(self) -> int:
        """Frames sent back."""
        return self._numbers()[1]

    def _numbers(self) -> tuple[FrameNumbers, int]:
        raw, echoed = ffi.new("struct vpc_frame_stats *"), ffi.new("uint64_t *")
        lib.vpc_far_stats(self.handle, raw, echoed)
        return numbers_of(FrameNumbers, raw), echoed[0]

    def close(self) -> None:
        """Not while :meth:`run` runs. The socket stays the caller's."""
        self._native.close(idle=self._thread.idle)
        self._thread.close()
