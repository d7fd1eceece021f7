"""The other end of a fault service: serves the pages of RAM blocks on a socket, each once.

Requested pages go first, those near them next, and the background scan continues behind them. The blocks are this
process's own memory, complete and never armed.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import reduce
from operator import or_
from typing import Any

import trio

from vhostpc._native import check, ffi, lib
from vhostpc._native.entries import Thread
from vhostpc._native.handles import Handle, Owner, made
from vhostpc._native.loop import run_loop
from vhostpc._native.numbers import numbers_of
from vhostpc._native.threads import KeptThread, keeping
from vhostpc.enums import WordEnum
from vhostpc.errors import StreamError
from vhostpc.pages.ramblock import Bits, RamBlock, RamSet
from vhostpc.wire.migration.ramrec import REASONS, BadRecord

UNLIMITED = lib.VPC_RATE_UNLIMITED
"""Background rate: as fast as the socket accepts data."""


class Ended(WordEnum):
    """Why :meth:`PageSource.serve` returned."""

    PEER_CLOSED = 2
    SHUT = 3
    STOPPED = 4
    SENT = 6
    """Of the bulk, where requested pages have a connection of their own."""


@dataclass(frozen=True, slots=True)
class SourceNumbers:
    """Counts of a source so far. Host pages unless said otherwise."""

    bytes: int
    urgent_bytes: int
    """Of them, on a connection of their own."""
    data_pages: int
    """Target pages (4096 bytes) sent with their content."""
    zero_pages: int
    """Target pages sent as a zero record."""
    requests: int
    """Request messages read."""
    requested_pages: int
    background_pages: int
    useless: int
    """Requested, but sent before."""
    withheld: int
    """Requested and currently withheld."""
    withheld_ever: int
    dirty_left: int
    eos_sent: bool
    pongs: int
    """A bit for each PONG value below 32 that arrived."""
    shut: int
    """The value of the destination's SHUT; 0, success, also before it arrives."""
    heard: bool
    """Whether the PONG of MUST_HEAR arrived."""

    @classmethod
    def nothing(cls) -> SourceNumbers:
        """Of a source that has sent nothing."""
        return cls(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, False, 0, 0, False)


def over_links(numbers: list[SourceNumbers]) -> SourceNumbers:
    """What was sent over several links, one after the other. Pages are counted over all of them anyway."""
    last = numbers[-1]
    return replace(
        last,
        bytes=sum(link.bytes for link in numbers),
        urgent_bytes=sum(link.urgent_bytes for link in numbers),
        requests=sum(link.requests for link in numbers),
        useless=sum(link.useless for link in numbers),
        withheld_ever=sum(link.withheld_ever for link in numbers),
        pongs=reduce(or_, (link.pongs for link in numbers)),
        heard=any(link.heard for link in numbers),
    )


class UrgentSource(Owner):
    """Requested pages on a connection beside the one of ``main``, on a thread of their own."""

    def __init__(self, main: Any, fd: int, *, closing_word: bool) -> None:
        with keeping(Thread.URGENT, "requested pages") as self.thread:
            raw = made("save", "urgent page source", lib.vpc_save_new_urgent, main, fd, closing_word)
        self._native = Handle(raw, lib.vpc_save_free, "this page source is closed", needs=[main])

    def close(self, *, idle: bool = False) -> None:
        if not self.closed:
            lib.vpc_save_stop(self.handle)
            self._native.close(idle=idle)
            self.thread.close()


async def _serve(handle: Any, thread: KeptThread, heard: Callable[[], None] | None) -> int:
    while True:
        rc = await run_loop(lambda: lib.vpc_save_run(handle), lambda: lib.vpc_save_stop(handle), thread)
        if rc != lib.VPC_SAVE_HEARD:
            return rc
        if heard is not None:
            heard()


def _raw(handle: Any) -> Any:
    raw = ffi.new("struct vpc_save_stats *")
    lib.vpc_save_stats(handle, raw)
    return raw


class PageScan(Owner):
    """The order in which pages of ``ram`` are sent, for the life of a migration, over all its connections.

    The DIRTY bits of its blocks mark the pages to send. ``background_rate`` is in bytes a second besides requested
    pages; 0 sends only those.
    """

    def __init__(self, ram: RamSet, background_rate: int = 0) -> None:
        self.ram = ram
        raw = made("scan", "page scan", lib.vpc_scan_new, ram.handle, background_rate)
        self._native = Handle(raw, lib.vpc_scan_free, "this page scan is closed", needs=[ram.handle])

    def set_rate(self, background_rate: int) -> None:
        """As :meth:`PageSource.set_rate`, while no source of this scan runs."""
        lib.vpc_scan_set_rate(self.handle, background_rate)


class PageSource(Owner):
    """Serves all blocks of ``ram`` on ``sock``: give it a RamSet whose DIRTY bits mark the pages to send.

    ``background_rate`` is in bytes a second besides requested pages; 0 sends only those. A small send buffer
    keeps requested pages from waiting behind others.

    With ``scan``, that of an earlier connection, its pages, rate and numbers of pages continue; the numbers of bytes
    and requests are this connection's.
    """

    def __init__(
        self,
        ram: RamSet,
        sock: trio.SocketStream | int,
        *,
        background_rate: int = 0,
        return_path: int | None = None,
        scan: PageScan | None = None,
    ) -> None:
        """``return_path``: the descriptor to read requests from, -1 for none; None: ``sock`` itself.

        Raises Shortage, OSError: everything that sending needs is allocated here.
        """
        fd = sock if isinstance(sock, int) else sock.socket.fileno()
        self.ram = ram
        self._urgent: UrgentSource | None = None
        self._divided = False
        self._scan = scan or PageScan(ram, background_rate)
        self._own_scan = scan is None
        back = fd if return_path is None else return_path
        # Kept from the first page to the last: behind the point of no return there may be no thread to borrow.
        try:
            with keeping(Thread.SOURCE, "the page source") as self._thread:
                raw = made("save", "page source", lib.vpc_save_new, self._scan.handle, fd, back)
        except BaseException:
            self._close_scan()
            raise
        self._native = Handle(
            raw, lib.vpc_save_free, "this page source is closed", needs=[self._scan.handle, ram.handle]
        )

    async def serve(self, heard: Callable[[], None] | None = None) -> Ended:
        """One C call on its thread until the peer closes or says that it is done, or cancelled.

        ``heard`` is called on the trio thread when the PONG of MUST_HEAR comes before that; it must not raise.
        Raises :class:`~vhostpc.errors.StreamError` for a malformed request, OSError when sending fails.
        """
        if self._urgent is None or not self._divided:
            return self._ended(await _serve(self.handle, self._thread, heard))
        rc = 0
        # Held until both have ended, also if this is closed meanwhile: the bulk wakes the urgent one at its end.
        urgent, thread = self._urgent.handle, self._urgent.thread
        async with trio.open_nursery() as nursery:
            # How the bulk ends is nothing by itself: what the peer has said is read by the urgent one.
            nursery.start_soon(_serve, self.handle, self._thread, None)
            rc = await _serve(urgent, thread, heard)
            nursery.cancel_scope.cancel()
        return self._ended(rc)

    async def wait(self) -> Ended:
        """Read the peer's messages until it closes or says that it is done. Raises as :meth:`serve`."""
        handle, thread = self._reader()
        rc = await run_loop(lambda: lib.vpc_save_wait(handle), lambda: lib.vpc_save_stop(handle), thread)
        return self._ended(rc)

    def _reader(self) -> tuple[Any, KeptThread]:
        """Who reads the peer's messages."""
        if self._divided and self._urgent is not None:
            return self._urgent.handle, self._urgent.thread
        return self.handle, self._thread

    async def hear(self, pong: int, limit: float) -> Ended | None:
        """Read the peer's messages until the PONG of this value, below 32, or for ``limit`` seconds.

        Returns None then; otherwise why it ended early. Raises as :meth:`serve`.
        """
        handle, ms = self.handle, round(limit * 1000)
        rc = await run_loop(
            lambda: lib.vpc_save_hear(handle, pong, ms), lambda: lib.vpc_save_stop(handle), self._thread
        )
        return self._ended(rc) if rc else None

    async def round(self, section: int, *, last: bool = False, budget_ms: int = 50) -> bool | Ended:
        """Send one RAM section of precopy with its frames: whether pages are still dirty, or why it ended early.

        A PART takes about ``budget_ms`` milliseconds at the background rate; the END (``last``) has all dirty pages
        and no limit. ``section``: its number. One C call on its thread. Cancelled, the stream is left in the
        middle. Raises as :meth:`serve`.
        """
        handle, budget = self.handle, budget_ms * 1_000_000
        rc = await run_loop(
            lambda: lib.vpc_save_round(handle, section, last, budget),
            lambda: lib.vpc_save_stop(handle),
            self._thread,
        )
        return bool(rc) if rc in (0, 1) else self._ended(rc)

    def add_urgent(self, sock: int, *, closing_word: bool) -> None:
        """Send requested pages on a connection of their own, ``sock``, from :meth:`switch` on (postcopy-preempt).

        They do not wait there behind others, nor for the background's rate; other pages are sent in bulk, by a thread
        that gives way. ``closing_word``: the connection ends with an EOS (machine types up to 7.2). Raises Shortage,
        OSError: everything that it needs is allocated here.
        """
        self._urgent = UrgentSource(self.handle, sock, closing_word=closing_word)

    def switch(self) -> None:
        """Postcopy begins: before :meth:`serve`, where :meth:`round` was called."""
        lib.vpc_save_switch(self.handle)
        if self._urgent is not None:
            check(lib.vpc_save_divide(self._urgent.handle), "page source")
            self._divided = True

    def send_first(self, block: RamBlock, offset: int) -> None:
        """Send the host page with this byte ahead of those that nobody asks for. Before :meth:`serve`."""
        check(lib.vpc_save_first(self.handle, block.index, offset // block.page_size), "page source")

    def keep_zeros(self, on: bool) -> None:
        """Send pages of zeros as data. Before a call that sends."""
        lib.vpc_scan_keep_zeros(self._scan.handle, on)

    def stop(self) -> None:
        """End the running call, or the next one: it returns STOPPED."""
        lib.vpc_save_stop(self._reader()[0])

    def _ended(self, rc: int) -> Ended:
        if rc == -errno.EBADMSG:
            why = BadRecord(_raw(self._reader()[0]).why)
            raise StreamError(f"return path: a message with {REASONS[why]}")
        return Ended(check(rc, "page source"))

    def set_tail(self, data: bytes) -> None:
        """Set the data that follow the records: sent after the last page. Call before :meth:`serve`."""
        check(lib.vpc_save_set_tail(self.handle, data, len(data)), "page source")

    def set_rate(self, background_rate: int) -> None:
        """Set the background rate in bytes per second; 0 stops it, UNLIMITED does not limit it."""
        lib.vpc_scan_set_rate(self._scan.handle, background_rate)
        self._kick()

    def _kick(self) -> None:
        lib.vpc_save_kick(self.handle)
        if self._urgent is not None:
            lib.vpc_save_kick(self._urgent.handle)

    def withhold(self, block: str, first: int = 0, count: int | None = None) -> None:
        """Withhold host pages until :meth:`release`, even when they are requested."""
        self.ram[block].set_bits(Bits.WITHHELD, first, count)

    def release(self, block: str, first: int = 0, count: int | None = None) -> None:
        """Send them again; pages requested in the meantime go at once."""
        self.ram[block].set_bits(Bits.WITHHELD, first, count, value=False)
        self._kick()

    def withhold_all(self, on: bool = True) -> None:
        """Withhold every page requested from now on, and the background; False releases them."""
        lib.vpc_scan_withhold_all(self._scan.handle, on)
        self._kick()

    @contextmanager
    def withholding_all(self) -> Iterator[None]:
        """:meth:`withhold_all` for the time of a block."""
        self.withhold_all()
        try:
            yield
        finally:
            self.withhold_all(False)

    async def changed(self) -> None:
        """Wait until a request was withheld or the end was sent since the last call."""
        fd = lib.vpc_save_notify_fd(self.handle)
        await trio.lowlevel.wait_readable(fd)
        lib.vpc_event_clear(fd)

    def numbers(self) -> SourceNumbers:
        """Over both connections, where there are two."""
        raw, pages = _raw(self.handle), ffi.new("struct vpc_scan_stats *")
        lib.vpc_scan_stats(self._scan.handle, pages)
        urgent_bytes = 0 if self._urgent is None else _raw(self._urgent.handle).bytes
        read = _raw(self._reader()[0])
        return numbers_of(
            SourceNumbers,
            read,
            pages,
            bytes=raw.bytes + urgent_bytes,
            urgent_bytes=urgent_bytes,
            eos_sent=bool(raw.eos_sent),
            heard=bool(read.heard),
        )

    def close(self) -> None:
        """Close our copy of the socket; running calls are ended."""
        if not self.closed:
            idle = self._thread.idle and (self._urgent is None or self._urgent.thread.idle)
            lib.vpc_save_stop(self.handle)
            if self._urgent is not None:
                self._urgent.close(idle=idle)
            self._native.close(idle=idle)
            self._thread.close()
            self._close_scan()

    def _close_scan(self) -> None:
        if self._own_scan:
            self._scan.close()
