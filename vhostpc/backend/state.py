"""The state that a front-end has set so far, and the features that we offer it. No loop: see ``session``."""

from __future__ import annotations

import os
import socket
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from functools import partial

import trio

from vhostpc.backend.backend_channel import BackendChannel
from vhostpc.backend.device import Device
from vhostpc.backend.postcopy_state import Postcopy
from vhostpc.backend.serve_options import Options
from vhostpc.backend.vring import Vring
from vhostpc.errors import RemoteProtocolError, RequestFailed
from vhostpc.logs import rationed_logger
from vhostpc.memory.gate import Gate
from vhostpc.memory.inflight import InflightRegion
from vhostpc.memory.log import DirtyLog
from vhostpc.memory.mapping import Mapping, Supply
from vhostpc.memory.table import GuestMemory, Region
from vhostpc.virtio.event import clear_event, signal_event
from vhostpc.virtio.features import closed
from vhostpc.wire.vhost_user import Feature, ProtocolFeature

log = rationed_logger(__name__)

#: A ring whose front-end gave no kick descriptor is polled this often (s).
POLL_INTERVAL = 0.001


class SessionState:
    """One front-end's session as the request handlers see it."""

    def __init__(self, device: Device, options: Options, *, pagefault: bool, name: str) -> None:
        self.device = device
        self.options = options
        self.name = name
        self.supply = Supply(options.pages_ahead)
        self.gate = Gate(self.supply, device.num_queues + 2)
        self.gate.slow = options.slow
        self.postcopy = Postcopy(
            self.supply, name, no_fault=options.no_fault, answer_each_pair=options.answer_each_pair
        )
        self.pagefault = pagefault
        self.nursery: trio.Nursery
        #: Negotiated by SET_FEATURES and SET_PROTOCOL_FEATURES.
        self.features = 0
        self.protocol_features = ProtocolFeature(0)
        self.features_set = False
        self.memory: GuestMemory | None = None
        #: In postcopy: the next table, until the front-end has stored our addresses of it.
        self.pending_memory: GuestMemory | None = None
        #: Rings touch nothing between our answer to a table in postcopy and the front-end's acknowledgement.
        self.vrings_paused = False
        #: All that are mapped, in force or not.
        self.mappings: set[Mapping] = set()
        self.dirty_log: DirtyLog | None = None
        self.inflight: InflightRegion | None = None
        self.told_no_region = False
        self._told_restart = False
        self.channel: BackendChannel | None = None
        self.channel_came = trio.Event()
        self.status = 0
        self.owned = False
        self._forwarders: dict[int, trio.CancelScope] = {}
        #: Rings whose error is being reported, and whether it is to be reported once more.
        self._errors: dict[int, bool] = {}
        self.vrings = [Vring(self, i) for i in range(device.num_queues)]

    # --- what is offered ---

    @property
    def offered_features(self) -> int:
        """GET_FEATURES: the device's bits and the framework's, less those hidden, and less what needs others."""
        framework = (
            Feature.LOG_ALL
            | Feature.INDIRECT_DESC
            | Feature.EVENT_IDX
            | Feature.PROTOCOL_FEATURES
            | Feature.VERSION_1
        )
        # As plain integers: the complement of a flag holds only the bits that have names.
        bits = (int(self.device.features) | int(framework)) & ~int(self.options.hide_features)
        return closed(bits, self.device.device_id)

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
            | P.INFLIGHT_SHMFD
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
        bits &= ~ProtocolFeature(self.options.hide_protocol_features)
        if not (P.REPLY_ACK in bits and P.BACKEND_REQ in bits):
            bits &= ~P.INBAND_NOTIFICATIONS
        return bits

    @property
    def smallest_ring(self) -> int:
        """Entries of the smallest ring whose size is known; 0: none is."""
        return min((vring.size for vring in self.vrings if vring.size), default=0)

    @property
    def regions(self) -> list[Region]:
        """All known regions, in effect or not."""
        return [r for memory in (self.memory, self.pending_memory) if memory for r in memory.regions]

    # --- what rings ask ---

    @property
    def log_all(self) -> bool:
        return bool(self.features & Feature.LOG_ALL)

    @property
    def may_run(self) -> bool:
        """Whether rings may run: not before features are known, nor while writes should be logged and cannot be."""
        if not self.features_set:
            return False
        waits_for_log = (
            self.log_all and self.dirty_log is None and ProtocolFeature.LOG_SHMFD in self.protocol_features
        )
        return not waits_for_log

    def ring_starts(self) -> None:
        """Log once what a restart of this process would mean to its front-end."""
        if self.inflight is None and not self._told_restart:
            self._told_restart = True
            log.info(
                "%s: no inflight region: if this process is restarted, requests continue at the used index",
                self.name,
            )

    async def update_vrings(self) -> None:
        """Start and stop handlers after something changed that concerns all rings."""
        for vring in self.vrings:
            await vring.update()

    async def pause_vrings(self) -> None:
        """Let no ring touch memory until :meth:`resume_vrings`; return when none does. Waits for touches in flight."""
        if not self.vrings_paused:
            self.vrings_paused = True
            for vring in self.vrings:
                await vring.ring.pause()

    def resume_vrings(self) -> None:
        if self.vrings_paused:
            self.vrings_paused = False
            for vring in self.vrings:
                vring.ring.resume()

    # --- notification without the front-end's descriptors ---

    def set_channel(self, sock: socket.socket) -> None:
        """SET_BACKEND_REQ_FD: requests go there from now on. The socket is ours."""
        if self.channel is not None:
            self.channel.close()
        self.channel = BackendChannel(
            sock, reply_ack=ProtocolFeature.REPLY_ACK in self.protocol_features, name=self.name
        )
        self.nursery.start_soon(self.channel.run)
        self.channel_came.set()

    @property
    def inband(self) -> bool:
        return ProtocolFeature.INBAND_NOTIFICATIONS in self.protocol_features

    def own_kick(self) -> tuple[int, trio.CancelScope | None]:
        """A kick eventfd of our own: written by VRING_KICK, or at intervals where the front-end wants polling.

        The scope, if any, is that of the task that writes it; cancel it before the eventfd is closed.
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

    def kick_from(self, fd: int, index: int) -> tuple[int, trio.CancelScope]:
        """A kick eventfd of our own, written for each input from a pipe or socket, which is ours from now on.

        The scope is that of the task that writes it, as above.
        """
        own = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        scope = trio.CancelScope()
        self.nursery.start_soon(self._forward_kicks, fd, own, index, scope)
        return own, scope

    async def _forward_kicks(self, fd: int, own: int, index: int, scope: trio.CancelScope) -> None:
        try:
            with scope:
                while True:
                    await trio.lowlevel.wait_readable(fd)
                    if scope.cancel_called:
                        return  # just as input arrived: the number of our own may belong to another descriptor by now
                    if not clear_event(fd):
                        # Otherwise it would be readable for ever.
                        log.warning(
                            "%s: ring %d: it gets no more kicks: its descriptor has ended",
                            self.name,
                            index,
                        )
                        return
                    signal_event(own)
        finally:
            os.close(fd)

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
                while True:
                    await trio.lowlevel.wait_readable(fd)
                    clear_event(fd)
                    await self._tell_inband(index, BackendChannel.vring_call)
        finally:
            os.close(fd)

    async def _tell_inband(
        self, index: int, request: Callable[[BackendChannel, int], Awaitable[None]]
    ) -> None:
        """Messages about a ring from before the channel exists are sent when it does: it may follow the set-up."""
        while self.channel is None:
            await self.channel_came.wait()
        await self._tell(partial(request, self.channel, index))

    async def _tell(self, request: Callable[[], Awaitable[None]]) -> None:
        try:
            await request()
        except (RequestFailed, RemoteProtocolError, OSError, trio.ClosedResourceError) as e:
            log.warning("%s: back-end channel: %s", self.name, e)

    def ring_failed(self, index: int) -> None:
        """Report a broken ring to the front-end, in the negotiated way."""
        vring = self.vrings[index]
        if vring.err >= 0:
            signal_event(vring.err)
        if self.inband and not self._errors.get(index):
            # One task for each ring: a front-end that does not answer may break its rings any number of times.
            waiting, self._errors[index] = index in self._errors, True
            if not waiting:
                self.nursery.start_soon(self._tell_errors, index)

    async def _tell_errors(self, index: int) -> None:
        while self._errors[index]:
            self._errors[index] = False
            await self._tell_inband(index, BackendChannel.vring_error)
        del self._errors[index]

    async def config_changed(self) -> None:
        """For devices: tell the driver that config space changed. Nothing happens without a back-end channel."""
        if self.channel is not None:
            await self._tell(self.channel.config_changed)

    def close(self) -> None:
        """Close descriptors and release memory; no handler runs any more. One failure does not keep the rest open."""
        with ExitStack() as last_first:
            last_first.callback(self.supply.close)
            # Not left to the garbage collector: the front-end may want its memory back.
            for thing in (self.inflight, self.dirty_log, *self.mappings, self.pending_memory, self.memory):
                if thing is not None:
                    last_first.callback(thing.close)
            last_first.callback(self.postcopy.close)
            for vring in self.vrings:
                last_first.callback(vring.close)
            if self.channel is not None:
                last_first.callback(self.channel.close)
        self.mappings.clear()
        self.channel = self.memory = self.pending_memory = self.dirty_log = self.inflight = None
