"""What a front-end has told us so far, and what we offer it. No loop: see ``session``."""

from __future__ import annotations

import logging
import os
from collections.abc import Awaitable, Callable
from functools import partial

import trio

from vhostpc.backend.channel import BackendChannel
from vhostpc.backend.device import Device
from vhostpc.backend.options import Options
from vhostpc.backend.postcopy import Postcopy
from vhostpc.backend.vring import Vring
from vhostpc.errors import RemoteProtocolError, RequestFailed
from vhostpc.memory.gate import Gate
from vhostpc.memory.log import DirtyLog
from vhostpc.memory.mapping import Mapping, Supply
from vhostpc.memory.table import GuestMemory
from vhostpc.transport import signal_event
from vhostpc.wire.vhost_user import Feature, ProtocolFeature

log = logging.getLogger(__name__)

#: A ring whose front-end gave no kick descriptor is looked at this often (s).
POLL_INTERVAL = 0.001


class SessionState:
    """One front-end's session as the request handlers see it."""

    def __init__(self, device: Device, options: Options, *, pagefault: bool, name: str) -> None:
        self.device = device
        self.options = options
        self.name = name
        self.supply = Supply()
        self.gate = Gate(self.supply, device.num_queues + 2)
        self.gate.slow = options.slow
        self.pump_limiter = trio.CapacityLimiter(device.num_queues)
        self.postcopy = Postcopy(self.supply, name)
        self.pagefault = pagefault
        self.nursery: trio.Nursery
        #: Negotiated by SET_FEATURES and SET_PROTOCOL_FEATURES.
        self.features = 0
        self.protocol_features = ProtocolFeature(0)
        self.features_set = False
        self.memory: GuestMemory | None = None
        #: In postcopy: the next table, until the front-end has stored our addresses of it.
        self.pending_memory: GuestMemory | None = None
        #: Rings touch nothing between our answer to a table in postcopy and the front-end's word for it.
        self.held = False
        #: All that are mapped, in force or not.
        self.mappings: set[Mapping] = set()
        self.dirty_log: DirtyLog | None = None
        self.channel: BackendChannel | None = None
        self.status = 0
        self.owned = False
        self._forwarders: dict[int, trio.CancelScope] = {}
        self.vrings = [Vring(self, i) for i in range(device.num_queues)]

    # --- what is offered ---

    @property
    def offered_features(self) -> int:
        """GET_FEATURES: the device's bits and the framework's, less those hidden."""
        framework = (
            Feature.LOG_ALL
            | Feature.INDIRECT_DESC
            | Feature.EVENT_IDX
            | Feature.PROTOCOL_FEATURES
            | Feature.VERSION_1
        )
        # As plain integers: the complement of a flag holds only the bits that have names.
        return (int(self.device.features) | int(framework)) & ~int(self.options.hide_features)

    @property
    def offered_protocol_features(self) -> ProtocolFeature:
        """GET_PROTOCOL_FEATURES."""
        P, device = ProtocolFeature, self.device
        kind = type(device)
        bits = (
            P.MQ
            | P.LOG_SHMFD
            | P.REPLY_ACK
            | P.BACKEND_REQ
            | P.RESET_DEVICE
            | P.CONFIGURE_MEM_SLOTS
            | P.STATUS
        )
        if kind.send_rarp is not Device.send_rarp:
            bits |= P.RARP
        if kind.set_mtu is not Device.set_mtu:
            bits |= P.MTU
        if device.config_size:
            bits |= P.CONFIG
        if self.pagefault:
            bits |= P.PAGEFAULT
        if self.options.inband:
            bits |= P.INBAND_NOTIFICATIONS
        return bits & ~ProtocolFeature(self.options.hide_protocol_features)

    # --- what rings ask ---

    @property
    def log_all(self) -> bool:
        return bool(self.features & Feature.LOG_ALL)

    @property
    def may_run(self) -> bool:
        """May rings run? Not before features are known, nor while writes should be logged and can not be."""
        if not self.features_set:
            return False
        waits_for_log = (
            self.log_all and self.dirty_log is None and ProtocolFeature.LOG_SHMFD in self.protocol_features
        )
        return not waits_for_log

    async def update_vrings(self) -> None:
        """Start and stop handlers after something changed that concerns all rings."""
        for vring in self.vrings:
            await vring.update()

    async def hold_vrings(self) -> None:
        """Let no ring touch memory until :meth:`release_vrings`; return when none does. Waits for pages in hand."""
        if not self.held:
            self.held = True
            for vring in self.vrings:
                await vring.queue.pause()

    def release_vrings(self) -> None:
        if self.held:
            self.held = False
            for vring in self.vrings:
                vring.queue.resume()

    # --- notification without the front-end's descriptors ---

    @property
    def inband(self) -> bool:
        return ProtocolFeature.INBAND_NOTIFICATIONS in self.protocol_features

    def own_kick(self) -> tuple[int, trio.CancelScope | None]:
        """A kick eventfd of our own: written by VRING_KICK, or at intervals where the front-end wants polling.

        The scope, if any, is round the task that writes it, which must be cancelled before the eventfd is closed.
        """
        fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        if self.inband:
            return fd, None
        scope = trio.CancelScope()
        self.nursery.start_soon(self._poll_ring, fd, scope)
        return fd, scope

    async def _poll_ring(self, fd: int, scope: trio.CancelScope) -> None:
        with scope:
            while True:
                await trio.sleep(POLL_INTERVAL)
                signal_event(fd)

    def own_call(self, index: int) -> int:
        """In-band: an eventfd whose signals go out as VRING_CALL. Else -1: the driver is not called."""
        if not self.inband:
            return -1
        if index in self._forwarders:
            self._forwarders[index].cancel()
        self._forwarders[index] = scope = trio.CancelScope()
        fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.nursery.start_soon(self._forward_calls, os.dup(fd), index, scope)
        return fd

    async def _forward_calls(self, fd: int, index: int, scope: trio.CancelScope) -> None:
        try:
            with scope:
                while self.channel is not None:
                    await trio.lowlevel.wait_readable(fd)
                    os.eventfd_read(fd)
                    await self._tell(partial(self.channel.vring_call, index))
        finally:
            os.close(fd)

    async def _tell(self, request: Callable[[], Awaitable[None]]) -> None:
        try:
            await request()
        except (RequestFailed, RemoteProtocolError, OSError, trio.ClosedResourceError) as e:
            log.warning("%s: back-end channel: %s", self.name, e)

    def ring_failed(self, index: int) -> None:
        """Tell the front-end that a ring is broken, in the way that was agreed."""
        vring = self.vrings[index]
        if vring.err >= 0:
            signal_event(vring.err)
        if self.inband and self.channel is not None:
            self.nursery.start_soon(self._tell, partial(self.channel.vring_error, index))

    async def config_changed(self) -> None:
        """For devices: tell the driver that config space changed. Nothing happens without a back-end channel."""
        if self.channel is not None:
            await self._tell(self.channel.config_changed)

    def close(self) -> None:
        """Close descriptors and let go of memory; no handler runs any more."""
        if self.channel is not None:
            self.channel.close()
            self.channel = None
        for vring in self.vrings:
            vring.close()
        self.postcopy.close()
        # Not left to the garbage collector: the front-end may want its memory back.
        for memory in (self.memory, self.pending_memory):
            if memory is not None:
                memory.close()
        for mapping in self.mappings:
            mapping.close()
        self.mappings.clear()
        if self.dirty_log is not None:
            self.dirty_log.close()
        self.memory = self.pending_memory = self.dirty_log = None
        self.supply.close()
