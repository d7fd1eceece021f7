"""vhostpc: vhost-user back-ends that live through postcopy migration, and the front-end that drives them.

The names of a device author are here: ``from vhostpc import Device, serve``. They are looked up when asked for, so
that ``import vhostpc`` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vhostpc import errors
    from vhostpc.backend import Chain, Device, Options, Queue, serve

__version__ = "0.1.0"
__all__ = ["Chain", "Device", "Options", "Queue", "errors", "serve"]


def __getattr__(name: str) -> Any:
    if name == "errors":
        return importlib.import_module("vhostpc.errors")
    if name in __all__:
        return getattr(importlib.import_module("vhostpc.backend"), name)
    raise AttributeError(f"module 'vhostpc' has no attribute {name!r}")
