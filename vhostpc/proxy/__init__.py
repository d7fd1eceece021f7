"""A proxy between the two ends of a QEMU migration that knows the protocol, and breaks it where it is told to."""

from typing import TYPE_CHECKING

from vhostpc.lazy import exports

if TYPE_CHECKING:
    from vhostpc.proxy.between import Proxy, open_proxy
    from vhostpc.proxy.faults import BadFault, Fault, parse_fault
    from vhostpc.proxy.timeline import Event

__all__ = ["BadFault", "Event", "Fault", "Proxy", "open_proxy", "parse_fault"]

if not TYPE_CHECKING:  # for a type checker it would stand for every name
    __getattr__ = exports(
        __name__,
        {
            "vhostpc.proxy.between": "Proxy open_proxy",
            "vhostpc.proxy.faults": "BadFault Fault parse_fault",
            "vhostpc.proxy.timeline": "Event",
        },
    )
