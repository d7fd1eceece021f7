"""Feature bits of devices (virtio 1.2); transport bits are in ``vhostpc.wire.vhost_user.Feature``."""

from __future__ import annotations

import enum


class NetFeature(enum.IntFlag, boundary=enum.KEEP):
    """virtio 1.2, 5.1.3."""

    CSUM = 1 << 0
    GUEST_CSUM = 1 << 1
    MTU = 1 << 3
    MRG_RXBUF = 1 << 15
    GUEST_ANNOUNCE = 1 << 21
    MQ = 1 << 22


class DeviceId(enum.IntEnum):
    """virtio 1.2, section 5."""

    NET = 1
    BLOCK = 2
    CONSOLE = 3
    RNG = 4
