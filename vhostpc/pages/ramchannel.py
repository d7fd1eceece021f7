"""Incoming RAM records: from a socket into RAM blocks, in C."""

from __future__ import annotations

import errno
import os
from dataclasses import astuple, dataclass
from typing import Any, Literal, Protocol

import trio

from vhostpc._native import check, ffi, lib
from vhostpc._native.entries import Thread
from vhostpc._native.handles import Handle, Owner, made
from vhostpc._native.loop import run_loop
from vhostpc._native.numbers import numbers_of
from vhostpc._native.threads import keeping
from vhostpc.errors import ChannelLost, MemoryLost, PageBorn
from vhostpc.pages.loops import Loops
from vhostpc.pages.ramblock import RamSet
from vhostpc.wire.migration.ramrec import BadRamStream, BadRecord

_LOST = (errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ENETDOWN, errno.ECONNABORTED)
"""What a socket says of a peer that is gone, besides a reset (tcp(7)); placing a page says none of them."""
Share = Literal["all", "urgent", "bulk"]
"""The pages that a channel brings: all, or only requested ones, or all others, in bulk, beside such a one."""
INPUT_ROOM = 256 << 10
"""Bytes that a channel reads ahead, at most (ramload.c)."""


@dataclass(frozen=True, slots=True)
class LoadNumbers:
    """Counts of one channel. Pages are target pages (4096 bytes) unless said otherwise."""

    bytes: int
    data_pages: int
    zero_pages: int
    placed: int
    """Host pages that this channel created."""
    already: int
    """Host pages that had arrived before: skipped, never overwritten."""
    runs: int
    """Placing calls."""
    reads: int
    sections: int
    """RAM sections read to their end, where their frames are read too."""
    ended: bool
    """The last of them was the END."""
    shortages: int
    """Host pages for which there was no memory at once: they were waited for."""
    short: bool
    """There is no memory now: the page is tried again until there is."""

    def __add__(self, later: LoadNumbers) -> LoadNumbers:
        """Of two channels, one after the other; flags are the later one's."""
        mine, more = astuple(self), astuple(later)
        return LoadNumbers(*(b if isinstance(b, bool) else a + b for a, b in zip(mine, more, strict=True)))


class Service(Protocol):
    """The interface of the fault service that a channel uses."""

    ram: RamSet
    loops: Loops

    @property
    def handle(self) -> Any: ...
    @property
    def spin_ns(self) -> int: ...
    def born(self, block: int, page: int, what: str, then: str = "") -> PageBorn: ...
    def place_fd(self, ahead: bool = False) -> int: ...
    def missing(self) -> int: ...


class RamChannel(Owner):
    """One socket that delivers RAM records. Not armed: plain writes, the last copy of a page wins."""

    def __init__(
        self,
        service: Service,
        sock: trio.SocketStream | int,
        *,
        holes: bool = False,
        ahead: bool = False,
        share: Share = "all",
    ) -> None:
        """``holes``: no page will be missing later (no postcopy), so a zero page may stay a hole of the file.
        ``share``: "bulk" gives way to the thread of the urgent channel beside it.

        ``ahead``: it is for a service that will be armed with what is ready now.
        Raises Shortage, OSError: everything that loading needs is allocated here.
        """
        fd = sock if isinstance(sock, int) else sock.socket.fileno()
        self._service = service
        ram, faults = service.ram.handle, service.handle
        with (
            keeping(Thread.URGENT, "loading requested pages")
            if share == "urgent"
            else keeping(Thread.LOAD, "loading RAM")
        ) as self._thread:
            raw = made("load", "RAM channel", lib.vpc_load_new, ram, faults, fd, service.place_fd(ahead))
        self._native = Handle(raw, lib.vpc_load_free, "this RAM channel is closed", needs=[ram, faults])
        if holes:
            lib.vpc_load_keep_holes(raw)
        if share == "bulk":
            lib.vpc_load_in_bulk(raw)
        self._loops = Loops()

    def feed(self, data: bytes) -> None:
        """Pass bytes that were already read, before a :meth:`load`. Raises OSError, ENOSPC: over 256 KiB."""
        check(lib.vpc_load_feed(self.handle, data, len(data)), "RAM channel")

    def take(self) -> bytes:
        """After a :meth:`load`: the bytes that it read too far."""
        room = ffi.new("unsigned char[]", INPUT_ROOM)
        return bytes(ffi.buffer(room, lib.vpc_load_take(self.handle, room, INPUT_ROOM)))

    @property
    def block(self) -> int:
        """Index of the block that the next record may continue; -1: it has to name one."""
        return lib.vpc_load_block(self.handle)

    @block.setter
    def block(self, index: int) -> None:
        check(lib.vpc_load_set_block(self.handle, index), "RAM channel")

    async def load(self, section: int | None = None, *, last: bool = False) -> LoadNumbers:
        """Load records until the end of the section; pages are placed and waiters woken meanwhile.

        ``section``: the number of the RAM section, whose header has just been read (``last``: that of its END).
        Then its footers and the headers of its further parts are read too; loading ends before anything else, or
        behind the END's footer.

        One C call on its thread, which never waits for a page. Where there is no memory for a missing page it
        waits for memory. Raises
        :class:`~vhostpc.wire.migration.ramrec.BadRamStream` (what is malformed, and at which byte),
        :class:`~vhostpc.errors.ChannelLost` at the end of the file before the end of the section,
        :class:`~vhostpc.errors.PageBorn` when a page arrives where there is one that nobody sent, and OSError
        when a page cannot be placed. After Cancelled the channel can be used again.
        """
        handle, spin = self.handle, self._service.spin_ns
        if section is not None:
            lib.vpc_load_follow(handle, section, last)

        def stop() -> None:
            lib.vpc_load_stop(handle)

        # It works on both handles, its own and the service's.
        with self._service.loops.running(stop), self._loops.running(stop):
            rc = await run_loop(lambda: lib.vpc_load_run(handle, spin), stop, self._thread)
            raw = self._raw(handle)
        if rc == lib.VPC_LOAD_EOS:
            return self._numbers(raw)
        if rc == -errno.EBADMSG and raw.why != BadRecord.TRUNCATED:
            raise BadRamStream(BadRecord(raw.why), raw.bad_offset)
        if rc in (lib.VPC_LOAD_EOF, -errno.EBADMSG, -errno.ECONNRESET, -errno.EPIPE):
            cut = " inside a record" if rc == -errno.EBADMSG else ""
            raise ChannelLost(
                f"the source of pages closed the channel{cut}, after {raw.bytes} bytes; "
                f"{self._service.missing()} host pages are missing"
            )
        if -rc in _LOST:
            raise ChannelLost(
                f"the connection broke ({os.strerror(-rc)}), after {raw.bytes} bytes; "
                f"{self._service.missing()} host pages are missing"
            )
        if rc == -errno.EEXIST:
            raise self._service.born(
                raw.bad_block,
                raw.bad_page,
                "arrived, but a page that nobody sent is there",
                "; the page that arrived is not placed, and cannot be recovered: a recovery would end here, too",
            )
        if self._service.ram.lost:
            raise MemoryLost("the memory was given up while its pages were still arriving")
        check(rc, "placing pages")
        raise ChannelLost("loading was stopped")

    def finish(self) -> None:
        """Have :meth:`load`, also one that runs, return as soon as every requested page has arrived."""
        lib.vpc_load_finish(self.handle)

    def numbers(self) -> LoadNumbers:
        return self._numbers(self._raw(self.handle))

    @staticmethod
    def _numbers(raw: Any) -> LoadNumbers:
        return numbers_of(LoadNumbers, raw, ended=bool(raw.ended), short=bool(raw.short_now))

    @staticmethod
    def _raw(handle: Any) -> Any:
        raw = ffi.new("struct vpc_load_stats *")
        lib.vpc_load_stats(handle, raw)
        return raw

    def close(self) -> None:
        """Close our copy of the descriptor; a :meth:`load` that still runs is ended."""
        self._native.close(idle=self._loops.idle)
        self._loops.close()
        self._thread.close()
