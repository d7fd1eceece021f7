"""userfaultfd for Python: open it, place pages, wake waiters, read events, find out what the system allows.

Usable alone. Nothing in this package touches the memory that it serves.
"""

from vhostpc.ufd.flags import FaultFlags, Features, Ioctls, RegisterMode, Way, names
from vhostpc.ufd.probe import MINIMUM_KERNEL, POSTCOPY_FEATURES, Probe, WayResult, kernel_version, probe
from vhostpc.ufd.ufd_events import Event, Fork, PageFault, Remap, Remove, UnknownEvent, Unmap
from vhostpc.ufd.uffd import Userfaultfd, is_userfaultfd

__all__ = [
    "MINIMUM_KERNEL",
    "POSTCOPY_FEATURES",
    "Event",
    "FaultFlags",
    "Features",
    "Fork",
    "Ioctls",
    "PageFault",
    "Probe",
    "RegisterMode",
    "Remap",
    "Remove",
    "UnknownEvent",
    "Unmap",
    "Userfaultfd",
    "Way",
    "WayResult",
    "is_userfaultfd",
    "kernel_version",
    "names",
    "probe",
]
