"""vhostpc: vhost-user back-ends that survive postcopy migration, and the front-end that drives them.

The names that the author of a device needs are here: ``from vhostpc import Device, serve``. They are looked up on first
use, so that ``import vhostpc`` costs nothing. The other packages, each with the names that its users need:
``vhostpc.frontend``, ``guest``, ``ufd``, ``pages``, ``wire``, ``migration``, ``endpoint`` and ``qmp``.
"""

from typing import TYPE_CHECKING

from vhostpc.lazy import exports

if TYPE_CHECKING:
    from vhostpc import errors
    from vhostpc.backend import Chain, Device, Options, Queue, serve

__version__ = "0.1.0"
__all__ = ["Chain", "Device", "Options", "Queue", "errors", "serve"]

if not TYPE_CHECKING:  # for a type checker it would stand for every name
    __getattr__ = exports(
        __name__, {"vhostpc.backend": "Chain Device Options Queue serve", "vhostpc.errors": "errors"}
    )
