"""A virtio-net device joined to datagrams: the heart of ``examples/bridge``.

One frame of the guest is one datagram (or one frame of a tap) and the other way round. The frames never pass
through Python: each queue is a pump.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
from collections.abc import Sequence
from typing import Any

from vhostpc.backend.device import Device
from vhostpc.virtio.features import DeviceId, NetFeature
from vhostpc.virtio.pump import PumpStats
from vhostpc.virtio.queue import Queue
from vhostpc.wire.vhost_user import Feature

log = logging.getLogger(__name__)


class Bridge(Device):
    """Joins virtio-net queue pairs to file descriptors.

    ``links``: one datagram socket or tap queue per pair, or a single one that all pairs share; they stay the
    caller's. ``to``: where datagrams go, for a socket that is not connected.
    """

    device_id = DeviceId.NET
    queues_per_unit = 2
    features = NetFeature.MRG_RXBUF | NetFeature.GUEST_ANNOUNCE

    def __init__(self, links: Sequence[int], *, to: tuple[Any, ...] | None = None, pairs: int = 1) -> None:
        if len(links) not in (1, pairs):
            raise ValueError(f"{len(links)} links for {pairs} queue pairs: one each, or one for all")
        self._links = [links[i % len(links)] for i in range(pairs)]
        self._to = to
        self.num_queues = 2 * pairs
        if pairs > 1:
            self.features = self.features | NetFeature.MQ
        self._running: dict[int, tuple[Queue, PumpStats]] = {}  # with its counts when its handler began
        self._totals: dict[str, PumpStats] = {"out": PumpStats(), "in": PumpStats()}

    async def handle_queue(self, queue: Queue) -> None:
        link = self._links[queue.index // 2]
        mergeable = bool(queue.features & NetFeature.MRG_RXBUF)
        # virtio 1.2, 5.1.6.1: num_buffers is there with either of the two.
        header = 12 if mergeable or queue.features & Feature.VERSION_1 else 10
        before = queue.pump_stats
        self._running[id(queue)] = queue, before
        try:
            if queue.index % 2:
                await queue.pump_out(link, to=self._to, header=header)
            else:
                await queue.pump_in(link, header=header, mergeable=mergeable)
        finally:
            del self._running[id(queue)]
            way = "out" if queue.index % 2 else "in"
            self._totals[way] = add(self._totals[way], queue.pump_stats, before)

    async def handle_disabled_queue(self, queue: Queue) -> None:
        if queue.index % 2:  # what the guest sends into a disabled queue is dropped
            await queue.pump_out(self._links[queue.index // 2], to=self._to, discard=True)

    def send_rarp(self, mac: bytes) -> None:
        """The network learns where the guest is now from a frame that it seems to have sent."""
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

    def counters(self) -> dict[str, PumpStats]:
        """Frames and bytes out of the guest and into it, ended and running queues together."""
        totals = dict(self._totals)
        for queue, before in self._running.values():
            way = "out" if queue.index % 2 else "in"
            totals[way] = add(totals[way], queue.pump_stats, before)
        return totals


def add(total: PumpStats, now: PumpStats, before: PumpStats) -> PumpStats:
    """``total + now - before``, field by field."""
    names = PumpStats.__dataclass_fields__
    return PumpStats(**{n: getattr(total, n) + getattr(now, n) - getattr(before, n) for n in names})


def rarp(mac: bytes) -> bytes:
    """60 bytes: the broadcast "reverse ARP" frame that announces ``mac`` (RFC 903), as QEMU makes it."""
    head = b"\xff" * 6 + mac + b"\x80\x35" + b"\x00\x01\x08\x00\x06\x04\x00\x03"
    return (head + mac + bytes(4) + mac + bytes(4)).ljust(60, b"\0")
