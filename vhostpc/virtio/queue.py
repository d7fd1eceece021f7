"""A virtqueue as a device sees it: iterate over chains, or pump a file descriptor."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Generic, TypeVar

from vhostpc.virtio.chain import Chain
from vhostpc.virtio.pump import PumpStats
from vhostpc.virtio.work import Work

T = TypeVar("T")


class Steps(Generic[T]):
    """Iterates until a step gives None. No generator: a handler may leave its loop at any place."""

    def __init__(self, step: Callable[[], Awaitable[T | None]]) -> None:
        self._step = step

    def __aiter__(self) -> Steps[T]:
        return self

    async def __anext__(self) -> T:
        found = await self._step()
        if found is None:
            raise StopAsyncIteration
        return found


class Queue:
    """One ring of one session, for ``Device.handle_queue``.

    One task works a queue, with one C call at a time. ``async for chain in queue`` and the pumps end when the
    ring stops; they pause by themselves while the front-end changes memory, addresses or descriptors. After the end
    of the session every method raises QueueEnded.
    """

    def __init__(self, work: Work) -> None:
        self._work = work
        self._ring = work.ring

    @property
    def index(self) -> int:
        """Its number among the device's queues."""
        return self._ring.index

    @property
    def size(self) -> int:
        """Entries of the ring."""
        return self._ring.size

    @property
    def features(self) -> int:
        """Feature bits that driver and device agreed on."""
        return self._ring.features

    @property
    def inflight(self) -> bool:
        """Whether the front-end keeps an inflight region of this ring: a restart repeats only unanswered chains."""
        return self._ring.inflight

    @property
    def in_order(self) -> bool:
        """Set by the device: answers reach the driver in the order in which their chains were taken, each after those
        before it. Then, even without an inflight region, no answered request is lost or served twice."""
        return self._work.ledger.in_order

    @in_order.setter
    def in_order(self, value: bool) -> None:
        self._work.ledger.in_order = value

    @property
    def stopping(self) -> bool:
        """Whether the ring is stopping: iterators end, and pumps return."""
        return self._ring.stopping

    @property
    def closed(self) -> bool:
        """Whether the session has ended."""
        return self._ring.closed

    def __aiter__(self) -> AsyncIterator[Chain]:
        return Steps(self._work.next_chain)

    def unordered(self) -> AsyncIterator[Chain]:
        """Iterate over chains as their pages arrive: none waits for another's missing page.

        For devices whose requests may be done in any order (virtio-blk is one). Each chain whose pages are
        absent waits by itself, up to 64 of a queue at the same time, and so does each answer. When no page is
        missing, the order is the driver's.
        """
        self._work.apart = True
        return Steps(self._work.next_chain)

    def batches(self) -> AsyncIterator[list[Chain]]:
        """Iterate over lists of up to 64 chains; those not kept are completed when the next list is taken."""
        return Steps(self._work.next_batch)

    async def pump_out(
        self,
        fd: int,
        *,
        to: tuple[Any, ...] | None = None,
        header: int = 0,
        discard: bool = False,
        batch: int = 64,
    ) -> None:
        """Send every chain's readable bytes behind ``header`` to ``fd`` as one frame, until the ring stops.

        ``fd`` is a datagram socket (``to`` is an address as ``socket.sendto`` takes it, IPv4 or IPv6; without
        it the socket must be connected) or a tap device. A pump never waits for the far side: frames that it does
        not accept are dropped and counted. ``discard``: consume and drop. ``batch``: frames at a time, 1 to 64.

        One long C call on a thread of its own, which may wait for pages there. Raises BrokenQueue,
        MemoryLost, and OSError when ``fd`` is dead.
        """
        await self._work.run_pump(False, fd, to, header, False, discard, batch)

    async def pump_in(
        self, fd: int, *, header: int = 0, mergeable: bool = False, keep_stale: bool = False, batch: int = 64
    ) -> None:
        """Put every frame of ``fd`` into the next chain behind a zeroed header, until the ring stops.

        ``mergeable``: a frame may go to several chains, whose number stands in the header's last two bytes
        (VIRTIO_NET_F_MRG_RXBUF); otherwise a frame that is longer than its chain is dropped and counted. Frames
        that arrived before the session's first run of the ring are dropped unless ``keep_stale``; those that arrive
        while a ring is stopped and started again, or disabled, wait. Otherwise as :meth:`pump_out`.
        """
        await self._work.run_pump(True, fd, None, header, mergeable, not keep_stale, batch)

    @property
    def pump_stats(self) -> PumpStats:
        """Frames that the pumps of this session have moved and dropped."""
        return self._work.pump_stats
