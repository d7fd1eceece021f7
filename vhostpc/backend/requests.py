"""One small handler per request. They check, translate and store; none touches guest memory.

Sizes and numbers of descriptors were checked against the request table. A handler returns None for success,
or a :class:`Answer`.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import trio

from vhostpc.backend.channel import BackendChannel
from vhostpc.backend.state import SessionState
from vhostpc.backend.vring import Vring
from vhostpc.errors import LocalProtocolError, PostcopyRefused, RemoteProtocolError, UfdError
from vhostpc.memory.addr import FrontAddr, GuestAddr
from vhostpc.memory.log import DirtyLog
from vhostpc.memory.mapping import Mapping
from vhostpc.memory.table import GuestMemory, Region
from vhostpc.transport import is_eventfd, signal_event
from vhostpc.wire.vhost_user import (
    MAX_MEM_SLOTS,
    VRING_INDEX_MASK,
    VRING_NOFD,
    ConfigSpace,
    Feature,
    Frame,
    LogArea,
    MemoryRegion,
    ProtocolFeature,
    Request,
    VringAddr,
    VringState,
    pack_single_region,
    pack_table,
    pack_u64,
    request_name,
    unpack_single_region,
    unpack_table,
    unpack_u64,
)

log = logging.getLogger(__name__)

#: How long (s) a message that takes memory away waits for chains in hand.
TAKE_AWAY_LIMIT = 10.0


@dataclass(frozen=True)
class Answer:
    """A reply: payload and descriptors (which stay the handler's).

    ``failed``: the request could not be done. ``always``: to be sent also when no ack was asked for.
    """

    payload: bytes = b""
    fds: tuple[int, ...] = ()
    failed: bool = False
    always: bool = False


FAILED = Answer(pack_u64(1), failed=True)
Handler = Callable[[SessionState, Frame], Awaitable[Answer | None]]
HANDLERS: dict[int, Handler] = {}


def handles(request: Request) -> Callable[[Handler], Handler]:
    def note(handler: Handler) -> Handler:
        HANDLERS[request] = handler
        return handler

    return note


# --- features ---------------------------------------------------------------------------------------


@handles(Request.GET_FEATURES)
async def get_features(session: SessionState, frame: Frame) -> Answer:
    return Answer(pack_u64(session.offered_features))


@handles(Request.SET_FEATURES)
async def set_features(session: SessionState, frame: Frame) -> None:
    wanted = unpack_u64(frame.payload)
    if extra := wanted & ~session.offered_features:
        raise RemoteProtocolError(f"SET_FEATURES with bits that were not offered: {extra:#x}")
    old, session.features = session.features, wanted
    first = not session.features_set
    session.features_set = True
    if not wanted & Feature.PROTOCOL_FEATURES:
        # Specification, "Ring states": without the bit there is no SET_VRING_ENABLE.
        for vring in session.vrings:
            vring.enabled = True
    if not first and old != wanted:
        for vring in session.vrings:
            if vring.running and (old ^ wanted) & ~int(Feature.LOG_ALL):
                raise RemoteProtocolError("SET_FEATURES changes more than LOG_ALL while rings run")
            await vring.changed(vring.set_log)
    await session.update_vrings()


@handles(Request.GET_PROTOCOL_FEATURES)
async def get_protocol_features(session: SessionState, frame: Frame) -> Answer:
    return Answer(pack_u64(session.offered_protocol_features))


@handles(Request.SET_PROTOCOL_FEATURES)
async def set_protocol_features(session: SessionState, frame: Frame) -> None:
    P = ProtocolFeature
    wanted = P(unpack_u64(frame.payload))
    # QEMU acknowledges every bit whose number it knows; what is not offered is simply not in force.
    wanted &= session.offered_protocol_features
    if P.INBAND_NOTIFICATIONS in wanted and not (P.REPLY_ACK in wanted and P.BACKEND_REQ in wanted):
        raise RemoteProtocolError("INBAND_NOTIFICATIONS without REPLY_ACK and BACKEND_REQ")
    session.protocol_features = wanted


@handles(Request.SET_OWNER)
async def set_owner(session: SessionState, frame: Frame) -> None:
    session.owned = True


@handles(Request.RESET_OWNER)
async def reset_owner(session: SessionState, frame: Frame) -> None:
    """Deprecated: rings are disabled, the connection stays."""
    for vring in session.vrings:
        vring.enabled = False
        await vring.update()


@handles(Request.RESET_DEVICE)
async def reset_device(session: SessionState, frame: Frame) -> None:
    for vring in session.vrings:
        vring.enabled = False
        vring.started = False
        await vring.update()
        vring.queue.set_base(0)
        vring.broken = False
    session.status = 0
    session.device.reset()


@handles(Request.GET_QUEUE_NUM)
async def get_queue_num(session: SessionState, frame: Frame) -> Answer:
    device = session.device
    return Answer(pack_u64(device.num_queues // device.queues_per_unit))


@handles(Request.SET_STATUS)
async def set_status(session: SessionState, frame: Frame) -> None:
    session.status = unpack_u64(frame.payload) & 0xFF
    session.device.set_status(session.status)


@handles(Request.GET_STATUS)
async def get_status(session: SessionState, frame: Frame) -> Answer:
    return Answer(pack_u64(session.status))


# --- memory -----------------------------------------------------------------------------------------


def map_region(session: SessionState, region: MemoryRegion, fd: int, *, armed: bool) -> Region:
    mapping = Mapping(session.supply, fd, region.mmap_offset, region.size, armed=armed)
    session.mappings.add(mapping)
    return Region(GuestAddr(region.guest_addr), region.size, FrontAddr(region.user_addr), mapping)


async def use_memory(session: SessionState, memory: GuestMemory) -> None:
    """Make rings look things up in another table; return when the old one has no users left."""
    old, session.memory = session.memory, memory
    session.gate.slow = session.options.slow or memory.slow
    try:
        for vring in session.vrings:
            if not vring.running:
                vring.queue.set_memory(None)
                continue
            await vring.changed(vring.configure)
        await session.update_vrings()
    except BaseException:
        # The session ends, and knows only the new one; the old one is not left to the garbage collector either.
        if old is not None:
            old.close()
        raise
    if old is None:
        return
    gone = old.mappings - memory.mappings
    if gone:
        # Memory is taken away: answer when no chain in hand uses it. A device that keeps chains for long (it
        # waits for input, say) holds the mapping by them; the front-end must not wait for ever for that.
        with trio.move_on_after(TAKE_AWAY_LIMIT):
            while old.users:
                await trio.sleep(0.005)
        if old.users:
            log.warning("%s: %d chains in hand still use memory that was taken away", session.name, old.users)
    old.close()
    for mapping in gone:
        mapping.close()
        session.mappings.discard(mapping)


@handles(Request.SET_MEM_TABLE)
async def set_mem_table(session: SessionState, frame: Frame) -> Answer | None:
    try:
        table = unpack_table(frame.payload)
    except LocalProtocolError as e:
        raise RemoteProtocolError(f"SET_MEM_TABLE: {e}") from None
    if len(table) != len(frame.fds):
        raise RemoteProtocolError(f"SET_MEM_TABLE: {len(table)} regions and {len(frame.fds)} descriptors")
    armed = session.postcopy.listening
    if not armed:
        session.postcopy.without_listen()
    regions = [map_region(session, r, fd, armed=armed) for r, fd in zip(table, frame.fds, strict=True)]
    memory = GuestMemory(session.supply, regions)
    frame.close_fds()
    if not armed:
        await use_memory(session, memory)
        return None
    # Postcopy: our addresses first; nothing is registered nor touched before the front-end has stored them. With
    # them it forgets those of the table before: a fault that is under way there must be served before it does.
    await session.hold_vrings()
    await_exchange(session, memory)
    session.postcopy.await_ack([r.mapping for r in regions])
    own = [
        MemoryRegion(r.guest_addr, r.size, region.mapping.address, r.mmap_offset)
        for r, region in zip(table, regions, strict=True)
    ]
    return Answer(pack_table(own), always=True)


def await_exchange(session: SessionState, memory: GuestMemory) -> None:
    """The next table, when the front-end has stored our addresses of it. What only the last one had is unmapped.

    A front-end that never says so, but sends table after table, must not make us hold them all.
    """
    drop_pending(session, memory.mappings)
    session.pending_memory = memory


def drop_pending(session: SessionState, keep: frozenset[Mapping] = frozenset()) -> None:
    """Forget the table of an exchange under way, and unmap what only it has."""
    old, session.pending_memory = session.pending_memory, None
    if old is None:
        return
    gone = old.mappings - keep - (session.memory.mappings if session.memory else frozenset())
    session.postcopy.forget({id(m) for m in gone})
    old.close()
    for mapping in gone:
        mapping.close()
        session.mappings.discard(mapping)


async def use_pending_memory(session: SessionState) -> None:
    """The front-end has stored our addresses: the table of the last exchange comes into force."""
    memory, session.pending_memory = session.pending_memory, None
    if memory is not None:
        await use_memory(session, memory)
    session.release_vrings()


@handles(Request.GET_MAX_MEM_SLOTS)
async def get_max_mem_slots(session: SessionState, frame: Frame) -> Answer:
    return Answer(pack_u64(MAX_MEM_SLOTS))


def current_regions(session: SessionState) -> tuple[Region, ...]:
    """The regions that the next change is made to: those of an exchange under way, else those in force."""
    memory = session.pending_memory or session.memory
    return memory.regions if memory else ()


def same(region: Region, other: MemoryRegion) -> bool:
    # The offset does not count: QEMU sends 0 there in REM_MEM_REG.
    return (region.guest_addr, region.user_addr, region.size) == (
        other.guest_addr,
        other.user_addr,
        other.size,
    )


@handles(Request.ADD_MEM_REG)
async def add_mem_reg(session: SessionState, frame: Frame) -> Answer | None:
    if len(frame.payload) != 40 or len(frame.fds) != 1:
        raise RemoteProtocolError(
            f"ADD_MEM_REG: {len(frame.payload)} bytes and {len(frame.fds)} descriptors, expected 40 and 1"
        )
    wanted = unpack_single_region(frame.payload)
    armed = session.postcopy.listening
    regions = current_regions(session)
    region = next((r for r in regions if same(r, wanted)), None)
    if region is None:
        if len(regions) >= MAX_MEM_SLOTS:
            raise RemoteProtocolError(f"ADD_MEM_REG: all {MAX_MEM_SLOTS} memory slots are taken")
        if not armed:
            session.postcopy.without_listen()
        region = map_region(session, wanted, frame.fds[0], armed=armed)
        memory = GuestMemory(session.supply, (*regions, region))
        if armed:
            await_exchange(session, memory)
            session.postcopy.await_ack([region.mapping])
        else:
            await use_memory(session, memory)
    if not armed:
        return None
    # QEMU 7.2 adds a region once per queue pair: the same answer each time.
    own = MemoryRegion(wanted.guest_addr, wanted.size, region.mapping.address, wanted.mmap_offset)
    return Answer(pack_single_region(own), always=True)


@handles(Request.REM_MEM_REG)
async def rem_mem_reg(session: SessionState, frame: Frame) -> Answer | None:
    if len(frame.payload) != 40:
        raise RemoteProtocolError(f"REM_MEM_REG: {len(frame.payload)} bytes, expected 40")
    wanted = unpack_single_region(frame.payload)
    armed = session.postcopy.listening
    regions = current_regions(session)
    gone = [r for r in regions if same(r, wanted)]
    if not gone:
        log.error("%s: REM_MEM_REG of a region that is not there", session.name)
        return None if armed else FAILED
    memory = GuestMemory(session.supply, [r for r in regions if r not in gone])
    if armed:
        await session.hold_vrings()
        await_exchange(session, memory)
    else:
        await use_memory(session, memory)
    return None


@handles(Request.SET_LOG_BASE)
async def set_log_base(session: SessionState, frame: Frame) -> Answer:
    area = LogArea.unpack(frame.payload)
    session.dirty_log = DirtyLog(frame.fds[0], area.offset, area.size)
    for vring in session.vrings:
        await vring.changed(vring.set_log)
    await session.update_vrings()
    # Front-ends expect 0, 8 or 16 bytes; QEMU ignores them, others want the request's echo.
    return Answer(frame.payload)


@handles(Request.SET_LOG_FD)
async def set_log_fd(session: SessionState, frame: Frame) -> None:
    """An eventfd to signal on log writes; no front-end sends it, and nobody need be told."""


# --- rings ------------------------------------------------------------------------------------------


def ring(session: SessionState, index: int, request: int) -> Vring:
    if index >= len(session.vrings):
        raise RemoteProtocolError(f"{request_name(request)}: ring {index}, there are {len(session.vrings)}")
    return session.vrings[index]


@handles(Request.SET_VRING_NUM)
async def set_vring_num(session: SessionState, frame: Frame) -> None:
    state = VringState.unpack(frame.payload)
    vring = ring(session, state.index, frame.request)
    if vring.running:
        raise RemoteProtocolError(f"SET_VRING_NUM: ring {state.index} is running")
    if state.num == 0 or state.num > session.device.queue_size or state.num & (state.num - 1):
        raise RemoteProtocolError(
            f"SET_VRING_NUM: {state.num} entries for ring {state.index}; a power of two up to"
            f" {session.device.queue_size} is allowed"
        )
    vring.size = state.num
    await vring.update()  # it may be the last that was missing


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
    if vring.running:
        raise RemoteProtocolError(f"SET_VRING_BASE: ring {state.index} is running")
    if state.num > 0xFFFF:
        raise RemoteProtocolError(f"SET_VRING_BASE: {state.num:#x} is no index of a split ring")
    vring.queue.set_base(state.num)


@handles(Request.GET_VRING_BASE)
async def get_vring_base(session: SessionState, frame: Frame) -> Answer:
    state = VringState.unpack(frame.payload)
    base = await ring(session, state.index, frame.request).stop()
    return Answer(VringState(state.index, base).pack())


def ring_and_fd(session: SessionState, frame: Frame) -> tuple[Vring, int]:
    """The ring of a KICK, CALL or ERR message and its eventfd, now ours; -1 for none."""
    value = unpack_u64(frame.payload)
    name = request_name(frame.request)
    vring = ring(session, value & VRING_INDEX_MASK, frame.request)
    without = bool(value & VRING_NOFD)
    if without != (not frame.fds):
        raise RemoteProtocolError(f"{name}: the no-descriptor bit and {len(frame.fds)} descriptors")
    if without:
        return vring, -1
    if not is_eventfd(frame.fds[0]):
        raise RemoteProtocolError(f"{name}: the descriptor is not an eventfd")
    return vring, frame.take_fd()


@handles(Request.SET_VRING_KICK)
async def set_vring_kick(session: SessionState, frame: Frame) -> None:
    vring, fd = ring_and_fd(session, frame)
    poller = None
    if fd < 0:
        fd, poller = session.own_kick()
    await vring.changed(lambda: vring.set_kick(fd, poller))
    vring.started = True
    await vring.update()


@handles(Request.SET_VRING_CALL)
async def set_vring_call(session: SessionState, frame: Frame) -> None:
    vring, fd = ring_and_fd(session, frame)
    if fd < 0:
        fd = session.own_call(vring.index)
    vring.queue.set_call(fd)
    if fd >= 0:
        os.close(fd)
        if vring.running:
            # An interrupt may have been lost with the old descriptor.
            vring.queue.signal()


@handles(Request.SET_VRING_ERR)
async def set_vring_err(session: SessionState, frame: Frame) -> None:
    vring, fd = ring_and_fd(session, frame)
    vring.set_err(fd)


@handles(Request.SET_VRING_ENABLE)
async def set_vring_enable(session: SessionState, frame: Frame) -> None:
    state = VringState.unpack(frame.payload)
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
    try:
        session.device.set_mtu(unpack_u64(frame.payload))
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
    if session.channel is not None:
        session.channel.close()
    session.channel = BackendChannel(sock, reply_ack=ProtocolFeature.REPLY_ACK in session.protocol_features)


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
    # A driver of a newer specification asks for more than there is: the rest reads as zeros.
    there = min(len(asked.data), size - asked.offset)
    data = session.device.read_config(asked.offset, there)
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
    # If the word for the last table never came: its mappings allow no access, and no word is listened for any more.
    drop_pending(session)
    session.release_vrings()
