"""The back-end framework: write a :class:`Device`, :func:`serve` it."""

from typing import TYPE_CHECKING

from vhostpc.lazy import exports

if TYPE_CHECKING:
    from vhostpc.backend.device import Device, FrontEnd
    from vhostpc.backend.options import Options
    from vhostpc.backend.server import serve, serve_connection, serve_listener
    from vhostpc.listener import bind
    from vhostpc.virtio.chain import Chain
    from vhostpc.virtio.pump import PumpStats
    from vhostpc.virtio.queue import Queue

__all__ = [
    "Chain",
    "Device",
    "FrontEnd",
    "Options",
    "PumpStats",
    "Queue",
    "bind",
    "serve",
    "serve_connection",
    "serve_listener",
]

__getattr__ = exports(
    __name__,
    {
        "vhostpc.backend.device": "Device FrontEnd",
        "vhostpc.backend.options": "Options",
        "vhostpc.backend.server": "serve serve_connection serve_listener",
        "vhostpc.listener": "bind",
        "vhostpc.virtio.chain": "Chain",
        "vhostpc.virtio.pump": "PumpStats",
        "vhostpc.virtio.queue": "Queue",
    },
)
