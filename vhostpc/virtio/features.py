"""Feature bits of devices (virtio 1.2), and which need which; those of the transport are in ``wire.vhost_user``."""

from __future__ import annotations

import enum

from vhostpc.enums import NamedFlag, SpecEnum


class NetFeature(NamedFlag, boundary=enum.KEEP):
    """virtio 1.2, 5.1.3."""

    CSUM = 1 << 0
    GUEST_CSUM = 1 << 1
    CTRL_GUEST_OFFLOADS = 1 << 2
    MTU = 1 << 3
    MAC = 1 << 5
    GUEST_TSO4 = 1 << 7
    GUEST_TSO6 = 1 << 8
    GUEST_ECN = 1 << 9
    GUEST_UFO = 1 << 10
    HOST_TSO4 = 1 << 11
    HOST_TSO6 = 1 << 12
    HOST_ECN = 1 << 13
    HOST_UFO = 1 << 14
    MRG_RXBUF = 1 << 15
    STATUS = 1 << 16
    CTRL_VQ = 1 << 17
    CTRL_RX = 1 << 18
    CTRL_VLAN = 1 << 19
    GUEST_ANNOUNCE = 1 << 21
    MQ = 1 << 22
    CTRL_MAC_ADDR = 1 << 23
    NOTF_COAL = 1 << 53
    GUEST_USO4 = 1 << 54
    GUEST_USO6 = 1 << 55
    HOST_USO = 1 << 56
    HASH_REPORT = 1 << 57
    RSS = 1 << 60
    RSC_EXT = 1 << 61


class DeviceId(SpecEnum):
    """virtio 1.2, section 5."""

    NET = 1
    BLOCK = 2
    CONSOLE = 3
    RNG = 4


_N = NetFeature
_GUEST_TSO, _HOST_TSO = _N.GUEST_TSO4 | _N.GUEST_TSO6, _N.HOST_TSO4 | _N.HOST_TSO6
#: By device: a bit, and those of which it needs one. virtio 1.2, 5.1.3.1 (segmentation of UDP: 1.3), and 5.2.5.2.
REQUIRES: dict[int, dict[int, int]] = {
    DeviceId.NET: {
        **dict.fromkeys(
            (_N.GUEST_TSO4, _N.GUEST_TSO6, _N.GUEST_UFO, _N.GUEST_USO4, _N.GUEST_USO6), _N.GUEST_CSUM
        ),
        **dict.fromkeys((_N.HOST_TSO4, _N.HOST_TSO6, _N.HOST_UFO, _N.HOST_USO), _N.CSUM),
        _N.GUEST_ECN: _GUEST_TSO,
        _N.HOST_ECN: _HOST_TSO,
        _N.RSC_EXT: _HOST_TSO,
        **dict.fromkeys(
            (
                _N.CTRL_GUEST_OFFLOADS,
                _N.CTRL_RX,
                _N.CTRL_VLAN,
                _N.GUEST_ANNOUNCE,
                _N.MQ,
                _N.CTRL_MAC_ADDR,
                _N.NOTF_COAL,
                _N.HASH_REPORT,
                _N.RSS,
            ),
            _N.CTRL_VQ,
        ),
    },
    DeviceId.BLOCK: {1 << 11: 1 << 9},  # CONFIG_WCE: FLUSH
}


def closed(features: int, device_id: int) -> int:
    """``features`` without those whose requirements are not among them: a driver may refuse a device with one."""
    while True:
        lacking = 0
        for bit, needs in REQUIRES.get(device_id, {}).items():
            if features & bit and not features & needs:
                lacking |= int(bit)
        if not lacking:
            return features
        features &= ~lacking
