"""The page path: RAM blocks and their bitmaps, the fault service and its clients, RAM records in, pages out, and which
pages were written.
"""

from typing import TYPE_CHECKING

from vhostpc.lazy import exports

if TYPE_CHECKING:
    from vhostpc.pages.dirty import DirtyNumbers, DirtyTracker, DirtyWay, probe_dirty
    from vhostpc.pages.faultclient import Client, ClientNumbers, ClientRange, Served
    from vhostpc.pages.pagesource import UNLIMITED, Ended, PageSource, SourceNumbers
    from vhostpc.pages.ramblock import Bits, RamBlock, RamSet, make_memfd, total_pages
    from vhostpc.pages.ramchannel import LoadNumbers, RamChannel
    from vhostpc.pages.service import FaultService, ServiceNumbers, Waiter
    from vhostpc.pages.trace import Traced
    from vhostpc.units import TARGET_PAGE

__all__ = [
    "TARGET_PAGE",
    "UNLIMITED",
    "Bits",
    "Client",
    "ClientNumbers",
    "ClientRange",
    "DirtyNumbers",
    "DirtyTracker",
    "DirtyWay",
    "Ended",
    "FaultService",
    "LoadNumbers",
    "PageSource",
    "RamBlock",
    "RamChannel",
    "RamSet",
    "Served",
    "ServiceNumbers",
    "SourceNumbers",
    "Traced",
    "Waiter",
    "make_memfd",
    "probe_dirty",
    "total_pages",
]

if not TYPE_CHECKING:  # for a type checker it would stand for every name
    __getattr__ = exports(
        __name__,
        {
            "vhostpc.pages.dirty": "DirtyNumbers DirtyTracker DirtyWay probe_dirty",
            "vhostpc.pages.faultclient": "Client ClientNumbers ClientRange Served",
            "vhostpc.pages.pagesource": "UNLIMITED Ended PageSource SourceNumbers",
            "vhostpc.pages.ramblock": "Bits RamBlock RamSet make_memfd total_pages",
            "vhostpc.pages.ramchannel": "LoadNumbers RamChannel",
            "vhostpc.pages.service": "FaultService ServiceNumbers Waiter",
            "vhostpc.pages.trace": "Traced",
            "vhostpc.units": "TARGET_PAGE",
        },
    )
