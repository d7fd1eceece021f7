"""A virtio-net device connected to datagrams: the core of ``vhostpc bridge``.

One frame of the guest is one datagram (or one frame of a tap) and the other way round. The frames never pass
through Python: each queue is a pump.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable, Sequence
from typing import Any

from vhostpc.backend.device import Device, FrontEnd
from vhostpc.backend.net_control import serve_control
from vhostpc.errors import LinkLost
from vhostpc.logs import rationed_logger
from vhostpc.virtio.features import DeviceId, NetFeature
from vhostpc.virtio.pump import PumpStats
from vhostpc.virtio.queue import Queue
from vhostpc.wire.vhost_user import Feature

log = rationed_logger(__name__)


class Bridge(Device):
    """Connects virtio-net queue pairs to file descriptors.

    ``links``: one datagram socket or tap queue per pair, or a single one that all pairs share; they stay the
    caller's. ``to``: where datagrams go, for a socket that is not connected. ``attach``: for the links of
    further pairs, called with one of them and whether its pair runs, so that no frame is given to a pair that
    the guest does not use (``vhostpc.backend.tap.attach_queue``).
    """

    device_id = DeviceId.NET
    # GUEST_ANNOUNCE needs the control queue. QEMU serves that itself, but relies on us to offer both bits.
    features = NetFeature.MRG_RXBUF | NetFeature.CTRL_VQ | NetFeature.GUEST_ANNOUNCE

    def __init__(
        self,
        links: Sequence[int],
        *,
        to: tuple[Any, ...] | None = None,
        pairs: int = 1,
        attach: Callable[[int, bool], None] | None = None,
    ) -> None:
        if len(links) not in (1, pairs):
            raise ValueError(f"{len(links)} links for {pairs} queue pairs: give one each, or one for all")
        self._links = [links[i % len(links)] for i in range(pairs)]
        self._to = to
        self._pairs = pairs
        self.num_queues = 2 * pairs + 1
        if pairs > 1:
            self.features = self.features | NetFeature.MQ
        self._attach = attach
        self._attached = set(links)
        self._let_go()
        self._running: dict[int, tuple[Queue, PumpStats]] = {}  # with its counts when its handler began
        self._totals = [PumpStats() for _ in range(2 * pairs)]

    def _is_control(self, queue: Queue) -> bool:
        """Whether it is the control queue: it follows the pairs, of which a driver without MQ knows one."""
        last = 2 * self._pairs if queue.features & NetFeature.MQ else 2
        return queue.index >= 2 * self._pairs or (
            bool(queue.features & NetFeature.CTRL_VQ) and queue.index == last
        )

    async def handle_queue(self, queue: Queue) -> None:
        if self._is_control(queue):
            await serve_control(queue, self._pairs)
            return
        link = self._links[queue.index // 2]
        mergeable = bool(queue.features & NetFeature.MRG_RXBUF)
        # virtio 1.2, 5.1.6.1: num_buffers is present with either of the two.
        header = 12 if mergeable or queue.features & Feature.VERSION_1 else 10
        before = queue.pump_stats
        self._running[id(queue)] = queue, before
        try:
            if queue.index % 2:
                await queue.pump_out(link, to=self._to, header=header)
            else:
                self._give(link, True)
                await queue.pump_in(link, header=header, mergeable=mergeable)
        except OSError as e:
            raise LinkLost(f"queue {queue.index}: its link is lost: {e.strerror}") from None
        finally:
            del self._running[id(queue)]
            self._totals[queue.index] = add(self._totals[queue.index], queue.pump_stats, before)

    async def handle_disabled_queue(self, queue: Queue) -> None:
        if self._is_control(queue):
            return
        if queue.index % 2:  # frames that the guest sends into a disabled queue are dropped
            await queue.pump_out(self._links[queue.index // 2], to=self._to, discard=True)
        else:
            self._give(self._links[queue.index // 2], False)

    def send_rarp(self, mac: bytes) -> None:
        """From a frame that the guest seems to have sent the network learns where it is now."""
        frame = rarp(mac)
        try:
            if self._to is None:
                os.write(self._links[0], frame)
            else:
                with socket.socket(fileno=os.dup(self._links[0])) as sock:
                    sock.sendto(frame, socket.MSG_DONTWAIT, self._to)
        except OSError as e:
            if e.errno in (errno.EBADF, errno.EBADFD):
                raise
            log.warning("RARP for %s was not sent: %s", mac.hex(":"), e)

    async def handle_session(self, front_end: FrontEnd) -> None:
        if not self._running:
            self._let_go()

    def _give(self, link: int, attached: bool) -> None:
        """Attach a further pair's link, or detach it. It stays attached while a ring is stopped and started again."""
        if self._attach is not None and link != self._links[0] and (link in self._attached) != attached:
            self._attach(link, attached)
            self._attached ^= {link}

    def _let_go(self) -> None:
        """When a front-end connects, only the first pair is enabled."""
        for link in self._links:
            self._give(link, False)

    def queue_counters(self) -> list[PumpStats]:
        """Frames and bytes of each queue, of all its runs together."""
        totals = list(self._totals)
        for queue, before in self._running.values():
            totals[queue.index] = add(totals[queue.index], queue.pump_stats, before)
        return totals

    def counters(self) -> dict[str, PumpStats]:
        """The same, summed: ``out`` of the guest and ``in`` to it."""
        totals = {"out": PumpStats(), "in": PumpStats()}
        for index, stats in enumerate(self.queue_counters()):
            way = "out" if index % 2 else "in"
            totals[way] = add(totals[way], stats, PumpStats())
        return totals


def add(total: PumpStats, now: PumpStats, before: PumpStats) -> PumpStats:
    """``total + now - before``, field by field."""
    names = PumpStats.__dataclass_fields__
    return PumpStats(**{n: getattr(total, n) + getattr(now, n) - getattr(before, n) for n in names})


def rarp(mac: bytes) -> bytes:
    """60 bytes: the broadcast "reverse ARP" frame that announces ``mac`` (RFC 903), as QEMU makes it."""
    head = b"\xff" * 6 + mac + b"\x80\x35" + b"\x00\x01\x08\x00\x06\x04\x00\x03"
    return (head + mac + bytes(4) + mac + bytes(4)).ljust(60, b"\0")
