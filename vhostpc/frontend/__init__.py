"""Our own front-end: drives any vhost-user back-end without a virtual machine, through postcopy too."""

from vhostpc.frontend.client import FrontEnd, connect, listen, over
from vhostpc.frontend.driver import Driver, FarSide, RingLayout
from vhostpc.frontend.postcopy import BackendPostcopy
from vhostpc.frontend.rings import start_ring, stop_ring
from vhostpc.frontend.share import DirtyLog, GuestRegion, MemoryShare, Mode

__all__ = [
    "BackendPostcopy",
    "DirtyLog",
    "Driver",
    "FarSide",
    "FrontEnd",
    "GuestRegion",
    "MemoryShare",
    "Mode",
    "RingLayout",
    "connect",
    "listen",
    "over",
    "start_ring",
    "stop_ring",
]
