"""The migration endpoint: what plays QEMU's part with a machine, driven by its monitor."""

from typing import TYPE_CHECKING

from vhostpc.lazy import exports

if TYPE_CHECKING:
    from vhostpc.endpoint.endpoint import Endpoint, Listener
    from vhostpc.endpoint.recovery import LINK_TIMEOUT, Links

__all__ = [
    "LINK_TIMEOUT",
    "Endpoint",
    "Links",
    "Listener",
]

if not TYPE_CHECKING:  # for a type checker it would stand for every name
    __getattr__ = exports(
        __name__,
        {
            "vhostpc.endpoint.endpoint": "Endpoint Listener",
            "vhostpc.endpoint.recovery": "LINK_TIMEOUT Links",
        },
    )
