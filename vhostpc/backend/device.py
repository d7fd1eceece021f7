"""The base class of devices."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Protocol

from vhostpc.errors import VhostpcError
from vhostpc.virtio.queue import Queue


class FrontEnd(Protocol):
    """A device's view of the session that it serves."""

    name: str
    #: Feature bits that the driver accepted (0 before SET_FEATURES).
    features: int

    @property
    def smallest_ring(self) -> int:
        """Entries of the smallest ring whose size it has sent; 0 before the first."""

    async def config_changed(self) -> None:
        """Tell the driver that config space changed; nothing happens if the front-end has no channel for it."""


class Device:
    """A virtio device behind vhost-user. Subclass it and write :meth:`handle_queue`.

    Everything runs on the trio thread. Protocol features, memory, the dirty log, postcopy and the rings' life
    are the framework's business. An exception ends the session it happened in, and no other.

    Locks: never hold one of your own across an ``await`` on a queue. That await may wait for a guest page,
    and a task that waits for your lock would wait for it too.

    One instance may serve several sessions, one after the other or at the same time. Then keep the state of a session
    in local variables of :meth:`handle_queue` and :meth:`handle_session`. Or give :func:`~vhostpc.backend.serve` the
    class, or a function, in place of an instance: then each session gets a device of its own.
    """

    #: virtio device type (virtio 1.2, section 5); shown in the log and by --print-capabilities.
    device_id: int = 0
    #: Virtqueues that the back-end serves, 1 to 256.
    num_queues: int = 1
    #: Largest ring, a power of two up to 32768.
    queue_size: int = 32768
    #: Feature bits of the device type that are offered. The framework adds the transport's, and leaves out bits that
    #: need others which are not offered.
    features: int = 0
    #: Bytes of config space; 0: none (the CONFIG protocol feature is not offered).
    config_size: int = 0
    #: What --print-capabilities lists under ``features``: names that the schema of back-end programs has for the type
    #: (QEMU, docs/interop/vhost-user.json; for a disk ``read-only`` and ``blk-file``). Looked up on the class.
    capabilities: Sequence[str] = ()

    async def handle_queue(self, queue: Queue) -> None:
        """Serve one queue: called when its ring is started and enabled, ends when the ring stops.

        Iterate over ``queue``, ``queue.unordered()`` or ``queue.batches()``, or await ``queue.pump_out`` or
        ``queue.pump_in``; all of them end by themselves when the ring stops. A handler that waits for
        something else is cancelled a short while later, and chains that it did not complete are given back to
        the driver.
        """
        raise NotImplementedError

    async def handle_disabled_queue(self, queue: Queue) -> None:
        """Serve a queue that is started but disabled: consume without side effects, or do nothing."""

    async def handle_session(self, front_end: FrontEnd) -> None:
        """Run beside the queues for the life of one front-end's session; cancelled at its end."""

    def read_config(self, offset: int, size: int) -> bytes:
        """``size`` bytes of config space at ``offset``; both were checked against ``config_size``."""
        raise NotImplementedError

    def config_for(self, front_end: FrontEnd, offset: int, size: int) -> bytes:
        """The same, for a device whose configuration depends on the front-end."""
        return self.read_config(offset, size)

    def write_config(self, offset: int, data: bytes, *, migration: bool) -> None:
        """The driver (or the migration) wrote to config space. Raise ValueError to refuse it."""
        raise ValueError("config space is read-only")

    def reset(self) -> None:
        """The device was reset (RESET_DEVICE); all rings have been stopped."""

    def set_status(self, status: int) -> None:
        """The driver's status byte (virtio 1.2, 2.1), if the front-end sends it."""

    def send_rarp(self, mac: bytes) -> None:
        """Announce the guest's address (6 bytes) to the network after a migration. Offered if overridden."""
        raise NotImplementedError

    def set_mtu(self, mtu: int) -> None:
        """The network's MTU in bytes. Offered if overridden. Raise ValueError to refuse it."""
        raise NotImplementedError


def check_device(device: object) -> None:
    """Raises VhostpcError, with the class's name, for an object that cannot serve a queue."""
    name = type(device).__name__
    if not isinstance(device, Device):
        raise VhostpcError(f"{name} is not a vhostpc.backend.Device")
    if getattr(device.handle_queue, "__func__", None) is Device.handle_queue:
        raise VhostpcError(f"{name} has no handle_queue")
    for handler in (device.handle_queue, device.handle_disabled_queue, device.handle_session):
        if not inspect.iscoroutinefunction(handler):
            raise VhostpcError(f"{name}.{getattr(handler, '__name__', handler)} is not an async function")
