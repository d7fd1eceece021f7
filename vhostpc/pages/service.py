"""The fault service: serves the faults of any number of clients from a source of pages behind a socket.

The whole path of a page is in C, on threads of its own without the GIL: fault, request, records, placing, wake.
Each page is placed once, through our own ufd into our own mapping; every waiter is woken.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from dataclasses import dataclass

import trio

from vhostpc._native import check, ffi, lib
from vhostpc._native.entries import Thread
from vhostpc._native.handles import Handle, Owner, made
from vhostpc._native.loop import run_loop
from vhostpc._native.numbers import numbers_of
from vhostpc._native.threads import keeping
from vhostpc.errors import PageBorn
from vhostpc.logs import rationed_logger
from vhostpc.pages.blocktime import Blocktime, Blocktimes
from vhostpc.pages.faultclient import Client, ClientRange
from vhostpc.pages.loops import Loops
from vhostpc.pages.ramblock import Bits, RamBlock, RamSet
from vhostpc.pages.ramchannel import LoadNumbers, RamChannel, Share
from vhostpc.pages.trace import Trace, Traced
from vhostpc.ufd.flags import Features
from vhostpc.ufd.uffd import Userfaultfd

log = rationed_logger(__name__)

OWN = "own mapping"
_KEPT: list[Userfaultfd] = []
"""Userfaultfds of memory that could not be replaced: closing them would release its waiters."""


@dataclass(frozen=True, slots=True)
class ServiceNumbers:
    """Counts of the fault loop so far, all clients together."""

    events: int
    requests: int
    """Page requests made: distinct host pages."""
    asked_again: int
    """Requests over another link, for pages that were asked for before, or noted in a pause, and had not come."""
    batches: int
    """Sends on the return path."""
    bytes_sent: int
    wakes: int
    outbox_bytes: int
    waiting_now: int
    shortages: int
    """Faults that could not be answered here at once, for lack of memory."""
    short_now: int
    """Faults that are being tried again."""
    send_errno: int
    """errno of the broken return path, 0 while it works."""


@dataclass(frozen=True, slots=True)
class Waiter:
    """A waiting thread: ``block`` is None for an address of no range; ``since_ns`` is CLOCK_MONOTONIC."""

    client: int
    thread: int
    address: int
    block: str | None
    page: int
    since_ns: int


class FaultService(Owner):
    """Faults in, requests out, pages placed, waiters woken.

    Use::

        async with trio.open_nursery() as nursery:
            with FaultService(ram) as service:
                service.arm()                       # our own mapping may be missing pages from now on
                service.set_return_path(sock)
                nursery.start_soon(service.run)     # the fault loop, until cancelled
                client = service.add_client(ufd, "bridge")
                await service.load(sock)            # records until the end of the section

    ``spin_us`` keeps both loops polling so many microseconds after their last event instead of sleeping: faults
    are answered faster, at the cost of a core. ``trace``: how many answered faults to remember one by one, the last
    ones (:meth:`traced`); 0 for none. Closing it ends its loops. Raises Shortage, OSError.
    """

    def __init__(self, ram: RamSet, *, spin_us: int = 0, trace: int = 0) -> None:
        self.ram = ram
        # Allocated at once: the loop begins before the point of no return, and may serve faults behind it.
        with keeping(Thread.FAULT, "the fault loop") as self._thread:
            raw = made("fault", "fault service", lib.vpc_fault_new, ram.handle)
        self._native = Handle(raw, lib.vpc_fault_free, "this fault service is closed", needs=[ram.handle])
        self.loops = Loops()
        self._spin_ns = spin_us * 1000
        self._ufd: Userfaultfd | None = None
        self._ahead: Userfaultfd | None = None
        """What :meth:`arm` will register with."""
        self._own: Client | None = None
        self._names: dict[int, str] = {}
        self._stays = False
        self._blocktimes = Blocktimes(raw)
        self._trace: Trace | None = None
        if trace:
            try:
                self._trace = Trace(self.handle, trace)
            except BaseException:
                self.close()
                raise

    @property
    def armed(self) -> bool:
        return self._ufd is not None

    @property
    def own(self) -> Client:
        """Our own mapping as a client; only while armed."""
        if self._own is None:
            raise ValueError("the fault service is not armed")
        return self._own

    def make_ready(self) -> None:
        """Open the ufd that :meth:`arm` registers with, so that it takes less time. Raises UfdError."""
        if self._ahead is None:
            self._ahead = Userfaultfd.open(optional=Features.THREAD_ID)

    def arm(self) -> None:
        """Register all RAM blocks: from now on our own touches of missing pages are faults like any other.

        Opens our own ufd, through which pages are placed. Raises UfdError where that is not possible, and PageBorn
        where there is a page that was not received: the expected page could not be placed, or would never be missed.
        """
        self.make_ready()
        ufd, self._ahead = self._ahead, None
        assert ufd is not None
        own: Client | None = None
        try:
            for block in self.ram.blocks:
                ufd.register(block.base, block.length)
            for block in self.ram.blocks:
                if (page := block.born()) is not None:
                    raise self.born(block.index, page, "has not arrived, but a page is there")
            own = self.add_client(ufd, OWN)
            self._blocktimes.armed(own.number, Features.THREAD_ID in ufd.features)
            own.set_ranges(ClientRange(b.base, b.length, b, 0) for b in self.ram.blocks)
        except BaseException:
            if own is not None:
                own.remove()
            ufd.close()
            raise
        self._ufd, self._own = ufd, own

    def answer_from(self, block: RamBlock, fd: int, offset: int = 0) -> None:
        """Answer the block's faults from ``fd`` (its bytes from ``offset``), without requests.

        After :meth:`arm` and before :meth:`run`. The file is read in now, which takes as long as reading it does;
        from then on it may not change. Raises OSError: ERANGE when it is shorter than the block.
        """
        rc = lib.vpc_ram_set_local(self.ram.handle, block.index, fd, offset, self.place_fd())
        check(rc, f"pages of {block.name}")

    def disarm(self) -> None:
        """Every page has arrived: unregister. If some have not, our mapping is given up instead."""
        self.give_up()
        if self._ufd is None:
            return
        self.own.remove()
        if not self.ram.lost:
            for block in self.ram.blocks:
                self._ufd.unregister(block.base, block.length)
        self._close_ufd()

    def born(self, block: int, page: int, what: str, then: str = "") -> PageBorn:
        """The error for a page that nobody sent (numbers of block and host page), with its possible makers."""
        name = self.ram.blocks[block].name
        who = "it was created in this process"
        if others := self.others():
            who += f" or by {others}, which touched or locked (mlockall) memory before its userfaultfd was registered"
        return PageBorn(f"host page {page} of {name!r} {what}: {who}{then}", name, page)

    def add_client(self, ufd: Userfaultfd | int, name: str) -> Client:
        """Read the faults of ``ufd`` from now on; we keep a copy of the descriptor.

        The ufd must be non-blocking (a blocking one is not read: ``ClientNumbers.error``). Set its ranges with
        ``Client.set_ranges``.
        """
        fd = ufd if isinstance(ufd, int) else ufd.fileno()
        number = check(lib.vpc_fault_add_client(self.handle, fd), f"fault client {name}")
        self._names[number] = name
        return Client(self, number, name)

    def name_of(self, client: int) -> str:
        """The name of the client of this number, also of one that was removed. Raises KeyError."""
        return self._names[client]

    def others(self) -> str:
        """The names of all clients so far except our own mapping: ``a or b``, or nothing."""
        return " or ".join(dict.fromkeys(name for name in self._names.values() if name != OWN))

    def set_return_path(self, sock: trio.SocketStream | int | None) -> None:
        """Set where page requests go; None: they wait until there is a return path.

        When it is set again there is another source: requested pages that have not arrived are requested again.
        """
        fd = -1 if sock is None else sock if isinstance(sock, int) else sock.socket.fileno()
        check(lib.vpc_fault_set_return_path(self.handle, fd), "return path")

    def mute(self, sock: trio.SocketStream | int | None) -> None:
        """Send only the messages given to :meth:`send`, over another return path; None: nothing at all.

        Unsent messages are dropped, and requests are only noted, until :meth:`resume`. Raises OSError, with nothing
        changed.
        """
        fd = -1 if sock is None else sock if isinstance(sock, int) else sock.socket.fileno()
        check(lib.vpc_fault_mute(self.handle, fd), "return path")

    def resume(self, message: bytes) -> None:
        """Append ``message`` and then a request for each requested page that has not arrived. Then continue.

        Never waits. Raises OSError where the return path is broken.
        """
        check(lib.vpc_fault_resume(self.handle, message, len(message)), "return path")

    def send(self, message: bytes) -> None:
        """Append one whole return-path message to the requests. Never waits."""
        check(lib.vpc_fault_send(self.handle, message, len(message)), "return path")

    async def run(self) -> None:
        """The fault loop: one C call on its thread until cancelled.

        Cancelled while pages are missing, it gives our own mapping up (:meth:`give_up`): nobody serves its
        faults any more, and a touch that waits in it could not end. Earlier faults whose pages have arrived are
        answered first. Raises PageBorn where somebody else made a page that lies ready here (:meth:`answer_from`).
        """
        handle = self.handle
        try:
            with self.loops.running(lambda: lib.vpc_fault_stop(handle)):
                rc = await run_loop(
                    lambda: lib.vpc_fault_run(handle, self._spin_ns),
                    lambda: lib.vpc_fault_stop(handle),
                    self._thread,
                )
                raw = ffi.new("struct vpc_fault_stats *")
                lib.vpc_fault_stats(handle, raw)
        finally:  # whatever has ended it
            self.give_up()
        if rc == -errno.EEXIST:
            raise self.born(raw.born_block, raw.born_page, "lies ready here, but a page is there already")
        check(rc, "fault loop")

    def give_up(self) -> None:
        """Missing pages will never come. Does nothing if none is missing, or before :meth:`arm`.

        Every touch of our own mapping that waits returns and raises MemoryLost, as do all later ones. No page
        is made in the files: missing pages stay missing, for later users of the files. Where no other memory can be
        mapped in the mapping's place, waiters go on waiting, and the log says so; another call tries again.
        """
        if self._ufd is None or not (self._stays or (not self.ram.lost and self.missing())):
            return
        rc = lib.vpc_ram_give_up(self.ram.handle, self._ufd.fileno())
        if rc < 0 and not self._stays:
            log.error(
                "memory that is given up cannot be replaced (%s): threads that wait for a page of it wait on",
                os.strerror(-rc),
            )
        self._stays = rc < 0
        if rc == 0:
            self.own.remove()  # nobody waits in it any more

    def _close_ufd(self) -> None:
        if self._ufd is not None:
            if self._stays:
                _KEPT.append(self._ufd)
            else:
                self._ufd.close()
        self._ufd = None

    def open_channel(
        self,
        sock: trio.SocketStream | int,
        *,
        holes: bool = False,
        ahead: bool = False,
        share: Share = "all",
    ) -> RamChannel:
        """A channel that delivers RAM records; it keeps bytes read too far from one section to the next.

        ``ahead``: made behind :meth:`make_ready`, to be used once this is armed. ``share``: the pages that it brings.
        """
        return RamChannel(self, sock, holes=holes, ahead=ahead, share=share)

    async def load(self, sock: trio.SocketStream | int) -> LoadNumbers:
        """Load the records of ``sock`` to the end of the section; see :meth:`RamChannel.load`."""
        with self.open_channel(sock) as channel:
            return await channel.load()

    def numbers(self) -> ServiceNumbers:
        raw = ffi.new("struct vpc_fault_stats *")
        lib.vpc_fault_stats(self.handle, raw)
        return numbers_of(ServiceNumbers, raw)

    def waiting(self, most: int = 256) -> list[Waiter]:
        """The waiting threads, longest first: for diagnostics."""
        raw = ffi.new("struct vpc_waiter[]", most)
        count = lib.vpc_fault_waiting(self.handle, raw, most)
        return [
            numbers_of(Waiter, w, block=None if w.block < 0 else self.ram.blocks[w.block].name)
            for w in raw[0:count]
        ]

    def traced(self, start: int = 0, most: int = 4096) -> tuple[int, list[Traced]]:
        """Answered faults from number ``start`` on that are still recorded, and the number of the next one.

        Also after :meth:`close`. Nothing where nothing is traced.
        """
        return (start, []) if self._trace is None else self._trace.read(start, most)

    def set_vcpus(self, threads: Sequence[int]) -> None:
        """Which threads of this process are vCPUs: their kernel thread ids, 0 for one that has none now.

        Told before or after :meth:`arm`, and again when threads have come or gone: then a thread with the id of an
        earlier one is not taken for it. Raises ValueError for another number of vCPUs than before, Shortage.
        """
        self._blocktimes.set_vcpus(threads)

    def blocktime(self) -> Blocktime | None:
        """How long vCPUs and all others waited for pages until now, or until :meth:`close`.

        None where vCPUs are not known (:meth:`set_vcpus`), or faults do not name their threads. What a client waited
        is among its numbers.
        """
        return self._blocktimes.read()

    def missing(self) -> int:
        """Host pages that were not received."""
        return sum(block.pages - block.count_bits(Bits.RECEIVED) for block in self.ram.blocks)

    def awaited(self) -> int:
        """Host pages that were requested, and that the source owes."""
        return sum(block.count_awaited() for block in self.ram.blocks)

    def owed(self) -> int:
        """Missing host pages that the source has to send: they were discarded for it, or arrived in part."""
        return sum(block.count_owed() for block in self.ram.blocks)

    def settle(self) -> int:
        """The source has sent everything: pages still missing are zero, and count as received. Returns their number.

        They stay holes of the files. A thread that touches one before :meth:`disarm`, or waits for it already, gets a
        page of zeros. Raises OSError.
        """
        missing = self.missing()
        if missing:
            check(lib.vpc_fault_settle(self.handle), "pages of zeros")
        return missing

    def place_fd(self, ahead: bool = False) -> int:
        """The ufd that pages are placed through, or -1 when not armed. ``ahead``: will be placed through."""
        ufd = self._ahead if ahead else self._ufd
        return -1 if ufd is None else ufd.fileno()

    @property
    def spin_ns(self) -> int:
        return self._spin_ns

    def close(self) -> None:
        """Free everything; with pages missing, :meth:`give_up` comes first. Loops that still run are ended."""
        self.give_up()
        self._close_ufd()
        self._blocktimes.keep()
        if self._ahead is not None:
            self._ahead.close()
        if self._trace is not None:
            self._trace.keep()
        self._native.close(idle=self.loops.idle)
        self.loops.close()
        self._thread.close()
