"""One small handler per request. They check, translate and store; none touches guest memory.

Sizes and numbers of descriptors were checked against the request table. A handler returns None for success,
or a :class:`Answer`.
"""

from __future__ import annotations

import socket

from vhostpc.backend.answer import FAILED, Answer, handles
from vhostpc.backend.descriptors import event_descriptor, only_written
from vhostpc.backend.memory_requests import drop_pending
from vhostpc.backend.state import SessionState
from vhostpc.backend.vring import Vring
from vhostpc.errors import LocalProtocolError, PostcopyRefused, RemoteProtocolError, UfdError
from vhostpc.logs import rationed_logger
from vhostpc.virtio.event import EventKind, signal_event
from vhostpc.wire.vhost_user import (
    VRING_INDEX_MASK,
    VRING_NOFD,
    ConfigSpace,
    Feature,
    Frame,
    ProtocolFeature,
    Request,
    VringAddr,
    VringState,
    pack_u64,
    request_name,
    unpack_u64,
)

log = rationed_logger(__name__)

#: virtio 1.2, 5.1.4: 16 bits.
MAX_MTU = 0xFFFF


# --- features ---------------------------------------------------------------------------------------


@handles(Request.GET_FEATURES)
async def get_features(session: SessionState, frame: Frame) -> Answer:
    return Answer(pack_u64(session.offered_features))


@handles(Request.SET_FEATURES)
async def set_features(session: SessionState, frame: Frame) -> None:
    wanted = unpack_u64(frame.payload)
    if extra := wanted & ~session.offered_features:
        raise RemoteProtocolError(f"SET_FEATURES with bits that were not offered: {extra:#x}")
    if session.features_set and (session.features ^ wanted) & ~int(Feature.LOG_ALL):
        for vring in session.vrings:
            if vring.running and vring.enabled:
                raise RemoteProtocolError("SET_FEATURES changes more than LOG_ALL while rings run")
            await vring.set_up_anew()
    old, session.features = session.features, wanted
    first = not session.features_set
    session.features_set = True
    if not wanted & Feature.PROTOCOL_FEATURES:
        # Specification, "Ring states": without the bit there is no SET_VRING_ENABLE.
        for vring in session.vrings:
            vring.enabled = True
    if not first and old != wanted:
        for vring in session.vrings:
            await vring.changed(vring.set_log)
    await session.update_vrings()


@handles(Request.GET_PROTOCOL_FEATURES)
async def get_protocol_features(session: SessionState, frame: Frame) -> Answer:
    return Answer(pack_u64(session.offered_protocol_features))


@handles(Request.SET_PROTOCOL_FEATURES)
async def set_protocol_features(session: SessionState, frame: Frame) -> None:
    P = ProtocolFeature
    wanted = P(unpack_u64(frame.payload))
    # QEMU acknowledges every bit whose number it knows; bits that were not offered have no effect.
    wanted &= session.offered_protocol_features
    if P.INBAND_NOTIFICATIONS in wanted and not (P.REPLY_ACK in wanted and P.BACKEND_REQ in wanted):
        raise RemoteProtocolError("INBAND_NOTIFICATIONS without REPLY_ACK and BACKEND_REQ")
    session.protocol_features = wanted


@handles(Request.SET_OWNER)
async def set_owner(session: SessionState, frame: Frame) -> None:
    session.owned = True


@handles(Request.RESET_OWNER)
async def reset_owner(session: SessionState, frame: Frame) -> None:
    """Deprecated: rings are stopped and disabled, the connection and other settings stay."""
    for vring in session.vrings:
        vring.enabled = False
        await vring.set_up_anew()


@handles(Request.RESET_DEVICE)
async def reset_device(session: SessionState, frame: Frame) -> None:
    for vring in session.vrings:
        vring.enabled = False
        vring.started = False
        await vring.update()
        vring.ring.set_base(0)
        vring.work.forget_frames()
        vring.broken = False
    session.status = 0
    session.device.reset()


@handles(Request.GET_QUEUE_NUM)
async def get_queue_num(session: SessionState, frame: Frame) -> Answer:
    """The number of queues. Front-ends that read it as pairs compare it with the most pairs that they want."""
    return Answer(pack_u64(len(session.vrings)))


@handles(Request.SET_STATUS)
async def set_status(session: SessionState, frame: Frame) -> None:
    session.status = unpack_u64(frame.payload) & 0xFF
    session.device.set_status(session.status)


@handles(Request.GET_STATUS)
async def get_status(session: SessionState, frame: Frame) -> Answer:
    return Answer(pack_u64(session.status))


# --- rings ------------------------------------------------------------------------------------------


def ring(session: SessionState, index: int, request: int) -> Vring:
    if index >= len(session.vrings):
        raise RemoteProtocolError(
            f"{request_name(request)}: ring {index}, but there are {len(session.vrings)}: the front-end is configured"
            " for more queues than this device has"
        )
    return session.vrings[index]


@handles(Request.SET_VRING_NUM)
async def set_vring_num(session: SessionState, frame: Frame) -> None:
    state = VringState.unpack(frame.payload)
    vring = ring(session, state.index, frame.request)
    if state.num == 0 or state.num > session.device.queue_size or state.num & (state.num - 1):
        raise RemoteProtocolError(
            f"SET_VRING_NUM: {state.num} entries for ring {state.index}; a power of two up to"
            f" {session.device.queue_size} is allowed"
        )
    if vring.running:
        await vring.set_up_anew()
    vring.size = state.num
    await vring.update()  # it may be the last setting that was missing


@handles(Request.SET_VRING_ADDR)
async def set_vring_addr(session: SessionState, frame: Frame) -> None:
    addr = VringAddr.unpack(frame.payload)
    vring = ring(session, addr.index, frame.request)
    old, vring.addr = vring.addr, addr
    if vring.running and old is not None:
        # On a running ring: logging goes on or off, indices stay.
        moved = (old.desc, old.avail, old.used) != (addr.desc, addr.avail, addr.used)
        await vring.changed(vring.configure if moved else vring.set_log)
    await vring.update()


@handles(Request.SET_VRING_BASE)
async def set_vring_base(session: SessionState, frame: Frame) -> None:
    state = VringState.unpack(frame.payload)
    vring = ring(session, state.index, frame.request)
    if state.num > 0xFFFF:
        raise RemoteProtocolError(f"SET_VRING_BASE: {state.num:#x} is not an index of a split ring")
    if vring.running:
        await vring.set_up_anew()
    vring.ring.set_base(state.num)


@handles(Request.GET_VRING_BASE)
async def get_vring_base(session: SessionState, frame: Frame) -> Answer:
    state = VringState.unpack(frame.payload)
    base = await ring(session, state.index, frame.request).stop()
    return Answer(VringState(state.index, base).pack())


def ring_and_fd(session: SessionState, frame: Frame) -> tuple[Vring, int, EventKind]:
    """The ring of a KICK, CALL or ERR message and its descriptor, now ours; -1 for none."""
    value = unpack_u64(frame.payload)
    name = request_name(frame.request)
    vring = ring(session, value & VRING_INDEX_MASK, frame.request)
    without = bool(value & VRING_NOFD)
    if without != (not frame.fds):
        raise RemoteProtocolError(f"{name}: the no-descriptor bit, but {len(frame.fds)} descriptors")
    if without:
        return vring, -1, EventKind.NONE
    kind = event_descriptor(frame.fds[0], name)
    return vring, frame.take_fd(), kind


def is_of_no_ring(session: SessionState, request: int, index: int) -> bool:
    """Whether a descriptor, or a disable request, is for a ring that does not exist: that does no harm yet.

    QEMU sends these for all queues of its command line, also for those that it will not use with the features offered.
    """
    if index < len(session.vrings):
        return False
    log.warning("%s: %s: there is no ring %d", session.name, request_name(request), index)
    return True


@handles(Request.SET_VRING_KICK)
async def set_vring_kick(session: SessionState, frame: Frame) -> None:
    vring, fd, kind = ring_and_fd(session, frame)
    poller = None
    if kind is EventKind.NONE:
        fd, poller = session.own_kick()
    elif kind is EventKind.STREAM:
        fd, poller = session.kick_from(fd, vring.index)
    await vring.changed(lambda: vring.set_kick(fd, poller))
    vring.started = True
    await vring.update()


@handles(Request.SET_VRING_CALL)
async def set_vring_call(session: SessionState, frame: Frame) -> None:
    if is_of_no_ring(session, frame.request, unpack_u64(frame.payload) & VRING_INDEX_MASK):
        return
    vring, fd, kind = ring_and_fd(session, frame)
    only_written(fd, kind)
    vring.set_call(fd)


@handles(Request.SET_VRING_ERR)
async def set_vring_err(session: SessionState, frame: Frame) -> None:
    if is_of_no_ring(session, frame.request, unpack_u64(frame.payload) & VRING_INDEX_MASK):
        return
    vring, fd, kind = ring_and_fd(session, frame)
    only_written(fd, kind)
    vring.set_err(fd)


@handles(Request.SET_VRING_ENABLE)
async def set_vring_enable(session: SessionState, frame: Frame) -> None:
    state = VringState.unpack(frame.payload)
    if not state.num and is_of_no_ring(session, frame.request, state.index):
        return
    vring = ring(session, state.index, frame.request)
    if not session.offered_features & Feature.PROTOCOL_FEATURES:
        raise RemoteProtocolError("SET_VRING_ENABLE without PROTOCOL_FEATURES")
    if state.num > 1:
        raise RemoteProtocolError(f"SET_VRING_ENABLE: {state.num}, expected 0 or 1")
    vring.enabled = bool(state.num)
    await vring.update()


@handles(Request.VRING_KICK)
async def vring_kick(session: SessionState, frame: Frame) -> None:
    """In-band kick: it also starts the ring."""
    state = VringState.unpack(frame.payload)
    vring = ring(session, state.index, frame.request)
    if vring.kick < 0:
        fd, poller = session.own_kick()
        await vring.changed(lambda: vring.set_kick(fd, poller))
    vring.started = True
    await vring.update()
    signal_event(vring.kick)


# --- the rest ---------------------------------------------------------------------------------------


@handles(Request.SEND_RARP)
async def send_rarp(session: SessionState, frame: Frame) -> None:
    session.device.send_rarp(frame.payload[:6])


@handles(Request.NET_SET_MTU)
async def net_set_mtu(session: SessionState, frame: Frame) -> Answer | None:
    mtu = unpack_u64(frame.payload)
    try:
        if mtu > MAX_MTU:
            raise ValueError(f"an MTU of {mtu} bytes")
        session.device.set_mtu(mtu)
    except ValueError as e:
        log.error("%s: NET_SET_MTU refused: %s", session.name, e)
        return FAILED
    return None


@handles(Request.SET_BACKEND_REQ_FD)
async def set_backend_req_fd(session: SessionState, frame: Frame) -> None:
    fd = frame.fds[0]
    try:
        sock = socket.socket(fileno=fd)
    except OSError:
        raise RemoteProtocolError("SET_BACKEND_REQ_FD: the descriptor is not a socket") from None
    frame.take_fd()
    if sock.family != socket.AF_UNIX or sock.type != socket.SOCK_STREAM:
        sock.close()
        raise RemoteProtocolError("SET_BACKEND_REQ_FD: the descriptor is not a unix stream socket")
    session.set_channel(sock)


def config_of(session: SessionState, frame: Frame) -> ConfigSpace:
    try:
        config = ConfigSpace.unpack(frame.payload)
    except LocalProtocolError as e:
        raise RemoteProtocolError(f"{request_name(frame.request)}: {e}") from None
    return config


@handles(Request.GET_CONFIG)
async def get_config(session: SessionState, frame: Frame) -> Answer:
    asked = config_of(session, frame)
    size = session.device.config_size
    if asked.offset >= size:
        return Answer(b"")  # specification: an empty payload is the error
    # A driver of a newer specification reads more than there is: the rest is zeros.
    there = min(len(asked.data), size - asked.offset)
    data = session.device.config_for(session, asked.offset, there)
    return Answer(ConfigSpace(asked.offset, asked.flags, data.ljust(len(asked.data), b"\0")).pack())


@handles(Request.SET_CONFIG)
async def set_config(session: SessionState, frame: Frame) -> Answer | None:
    config = config_of(session, frame)
    try:
        if config.offset + len(config.data) > session.device.config_size:
            raise ValueError(f"{len(config.data)} bytes at {config.offset} are outside config space")
        session.device.write_config(config.offset, config.data, migration=bool(config.flags & 1))
    except ValueError as e:
        log.error("%s: SET_CONFIG refused: %s", session.name, e)
        return FAILED
    return None


# --- postcopy ---------------------------------------------------------------------------------------


@handles(Request.POSTCOPY_ADVISE)
async def postcopy_advise(session: SessionState, frame: Frame) -> Answer:
    try:
        return Answer(fds=(session.postcopy.advise(),))
    except (PostcopyRefused, UfdError) as e:
        # A reply without a descriptor: the front-end fails the migration before anything has moved.
        log.error("%s: POSTCOPY_ADVISE refused: %s", session.name, e)
        return Answer()


@handles(Request.POSTCOPY_LISTEN)
async def postcopy_listen(session: SessionState, frame: Frame) -> Answer | None:
    return None if session.postcopy.listen(session.memory is not None) else FAILED


@handles(Request.POSTCOPY_END)
async def postcopy_end(session: SessionState, frame: Frame) -> None:
    session.postcopy.end()
    # If the last table was never acknowledged: its mappings allow no access, and no acknowledgement is expected.
    drop_pending(session)
    session.resume_vrings()
