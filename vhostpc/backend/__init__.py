"""The back-end framework: write a :class:`Device`, :func:`serve` it.

The two devices of the commands are here, too: :class:`Bridge` and :class:`Disk`.
"""

from typing import TYPE_CHECKING

from vhostpc.lazy import exports

if TYPE_CHECKING:
    from vhostpc.backend.device import Device, FrontEnd
    from vhostpc.backend.disk import Disk
    from vhostpc.backend.net import Bridge
    from vhostpc.backend.serve_options import Options
    from vhostpc.backend.server import serve, serve_connection, serve_listener
    from vhostpc.backend.tap import attach_queue, open_tap
    from vhostpc.listener import bind
    from vhostpc.virtio.chain import Chain
    from vhostpc.virtio.features import DeviceId, NetFeature
    from vhostpc.virtio.pump import PumpStats
    from vhostpc.virtio.queue import Queue

__all__ = [
    "Bridge",
    "Chain",
    "Device",
    "DeviceId",
    "Disk",
    "FrontEnd",
    "NetFeature",
    "Options",
    "PumpStats",
    "Queue",
    "attach_queue",
    "bind",
    "open_tap",
    "serve",
    "serve_connection",
    "serve_listener",
]

if not TYPE_CHECKING:  # for a type checker it would stand for every name
    __getattr__ = exports(
        __name__,
        {
            "vhostpc.backend.device": "Device FrontEnd",
            "vhostpc.backend.disk": "Disk",
            "vhostpc.backend.net": "Bridge",
            "vhostpc.backend.serve_options": "Options",
            "vhostpc.backend.server": "serve serve_connection serve_listener",
            "vhostpc.backend.tap": "attach_queue open_tap",
            "vhostpc.listener": "bind",
            "vhostpc.virtio.chain": "Chain",
            "vhostpc.virtio.features": "DeviceId NetFeature",
            "vhostpc.virtio.pump": "PumpStats",
            "vhostpc.virtio.queue": "Queue",
        },
    )
