"""The migration endpoint: what plays QEMU's part with a machine, driven by its monitor."""

from vhostpc.endpoint.endpoint import Endpoint, Listener

__all__ = ["Endpoint", "Listener"]
