"""userfaultfd for Python: open it, place pages, wake waiters, read events, know what the machine allows.

Usable alone. Nothing in this package touches the memory that it serves. What stands on it is looked up when asked for:
the fault service, RAM records in and out, which pages were written.
"""

from typing import TYPE_CHECKING

from vhostpc.lazy import exports
from vhostpc.ufd.events import Event, Fork, PageFault, Remap, Remove, UnknownEvent, Unmap
from vhostpc.ufd.flags import FaultFlags, Features, Ioctls, RegisterMode, Way, names
from vhostpc.ufd.probe import MINIMUM_KERNEL, POSTCOPY_FEATURES, Probe, WayResult, kernel_version, probe
from vhostpc.ufd.uffd import Userfaultfd, is_userfaultfd

if TYPE_CHECKING:
    from vhostpc.ufd.client import Client, ClientNumbers, ClientRange, Served
    from vhostpc.ufd.dirty import DirtyNumbers, DirtyTracker, DirtyWay, probe_dirty
    from vhostpc.ufd.pagesource import UNLIMITED, Ended, PageSource, SourceNumbers
    from vhostpc.ufd.ramchannel import LoadNumbers, RamChannel
    from vhostpc.ufd.service import FaultService, ServiceNumbers, Waiter
    from vhostpc.ufd.trace import Traced

__all__ = [
    "MINIMUM_KERNEL",
    "POSTCOPY_FEATURES",
    "UNLIMITED",
    "Client",
    "ClientNumbers",
    "ClientRange",
    "DirtyNumbers",
    "DirtyTracker",
    "DirtyWay",
    "Ended",
    "Event",
    "FaultFlags",
    "FaultService",
    "Features",
    "Fork",
    "Ioctls",
    "LoadNumbers",
    "PageFault",
    "PageSource",
    "Probe",
    "RamChannel",
    "RegisterMode",
    "Remap",
    "Remove",
    "Served",
    "ServiceNumbers",
    "SourceNumbers",
    "Traced",
    "UnknownEvent",
    "Unmap",
    "Userfaultfd",
    "Waiter",
    "Way",
    "WayResult",
    "is_userfaultfd",
    "kernel_version",
    "names",
    "probe",
    "probe_dirty",
]

if not TYPE_CHECKING:  # for a type checker it would stand for every name
    __getattr__ = exports(
        __name__,
        {
            "vhostpc.ufd.client": "Client ClientNumbers ClientRange Served",
            "vhostpc.ufd.dirty": "DirtyNumbers DirtyTracker DirtyWay probe_dirty",
            "vhostpc.ufd.pagesource": "UNLIMITED Ended PageSource SourceNumbers",
            "vhostpc.ufd.ramchannel": "LoadNumbers RamChannel",
            "vhostpc.ufd.service": "FaultService ServiceNumbers Waiter",
            "vhostpc.ufd.trace": "Traced",
        },
    )
