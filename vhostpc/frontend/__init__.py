"""Our own front-end: drives any vhost-user back-end without a virtual machine, through postcopy too."""

from typing import TYPE_CHECKING

from vhostpc.lazy import exports

if TYPE_CHECKING:
    from vhostpc.frontend.client import FrontEnd, connect, listen, over
    from vhostpc.frontend.driver import Driver, FarSide, RingLayout
    from vhostpc.frontend.postcopy import BackendPostcopy
    from vhostpc.frontend.rings import start_ring, stop_ring
    from vhostpc.frontend.share import GuestRegion, MemoryShare, Mode, SharedLog
    from vhostpc.frontend.source import CallableSource, SourceProcess, start_source

__all__ = [
    "BackendPostcopy",
    "CallableSource",
    "Driver",
    "FarSide",
    "FrontEnd",
    "GuestRegion",
    "MemoryShare",
    "Mode",
    "RingLayout",
    "SharedLog",
    "SourceProcess",
    "connect",
    "listen",
    "over",
    "start_ring",
    "start_source",
    "stop_ring",
]

if not TYPE_CHECKING:  # for a type checker it would stand for every name
    __getattr__ = exports(
        __name__,
        {
            "vhostpc.frontend.client": "FrontEnd connect listen over",
            "vhostpc.frontend.driver": "Driver FarSide RingLayout",
            "vhostpc.frontend.postcopy": "BackendPostcopy",
            "vhostpc.frontend.rings": "start_ring stop_ring",
            "vhostpc.frontend.share": "SharedLog GuestRegion MemoryShare Mode",
            "vhostpc.frontend.source": "CallableSource SourceProcess start_source",
        },
    )
