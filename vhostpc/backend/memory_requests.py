"""Handlers of the requests about memory: the table, slots, the exchange of addresses in postcopy, the dirty log."""

from __future__ import annotations

import trio

from vhostpc.backend.answer import FAILED, Answer, handles
from vhostpc.backend.state import SessionState
from vhostpc.errors import LocalProtocolError, RemoteProtocolError
from vhostpc.logs import rationed_logger
from vhostpc.memory.addr import FrontAddr, GuestAddr
from vhostpc.memory.log import DirtyLog
from vhostpc.memory.mapping import Mapping
from vhostpc.memory.table import GuestMemory, Region
from vhostpc.wire.vhost_user import (
    MAX_MEM_SLOTS,
    Frame,
    LogArea,
    MemoryRegion,
    Request,
    pack_single_region,
    pack_table,
    pack_u64,
    unpack_single_region,
    unpack_table,
)

log = rationed_logger(__name__)

#: How long (s) a message that removes memory waits for chains in flight.
TAKE_AWAY_LIMIT = 10.0


def map_region(session: SessionState, region: MemoryRegion, fd: int, *, armed: bool) -> Region:
    mapping = Mapping(session.supply, fd, region.mmap_offset, region.size, armed=armed)
    session.mappings.add(mapping)
    return Region(GuestAddr(region.guest_addr), region.size, FrontAddr(region.user_addr), mapping)


async def use_memory(session: SessionState, memory: GuestMemory) -> None:
    """Make rings use another table; return when the old one has no users left."""
    old, session.memory = session.memory, memory
    session.gate.slow = session.options.slow or memory.slow
    try:
        for vring in session.vrings:
            if not vring.running:
                vring.work.set_memory(None)
                continue
            await vring.changed(vring.configure)
        await session.update_vrings()
    except BaseException:
        # The session ends, and knows only the new table; the old one is not left to the garbage collector.
        if old is not None:
            old.close()
        raise
    if old is None:
        return
    gone = old.mappings - memory.mappings
    if gone:
        # Memory is removed: answer when no chain in flight uses it. Chains that a device keeps for long (while it
        # waits for input, say) keep the mapping alive; the front-end must not wait for ever for them.
        with trio.move_on_after(TAKE_AWAY_LIMIT):
            while old.users:
                await trio.sleep(0.005)
        if old.users:
            log.warning(
                "%s: %d chains still in use refer to memory that was removed", session.name, old.users
            )
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
    # Postcopy: our addresses first; nothing is registered or touched before the front-end has stored them. When it
    # stores them it forgets those of the table before, so a fault in progress there must be served first.
    await session.pause_vrings()
    await_exchange(session, memory)
    own = [
        MemoryRegion(r.guest_addr, r.size, region.mapping.address, r.mmap_offset)
        for r, region in zip(table, regions, strict=True)
    ]
    answer = pack_table(own).ljust(len(frame.payload), b"\0")  # as long as the request
    session.postcopy.await_ack([r.mapping for r in regions], frame.request, answer)
    return Answer(answer, always=True)


def await_exchange(session: SessionState, memory: GuestMemory) -> None:
    """Let a table take effect when the front-end has stored our addresses. Regions of the last one alone are unmapped.

    A front-end that sends table after table without an acknowledgement must not make us keep them all.
    """
    drop_pending(session, memory.mappings)
    session.pending_memory = memory


def drop_pending(session: SessionState, keep: frozenset[Mapping] = frozenset()) -> None:
    """Forget the table of an unfinished exchange, and unmap the regions that only it has."""
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
    """The front-end has stored our addresses: the table of the last exchange takes effect."""
    memory, session.pending_memory = session.pending_memory, None
    if memory is not None:
        await use_memory(session, memory)
    session.resume_vrings()


@handles(Request.GET_MAX_MEM_SLOTS)
async def get_max_mem_slots(session: SessionState, frame: Frame) -> Answer:
    return Answer(pack_u64(MAX_MEM_SLOTS))


def current_regions(session: SessionState) -> tuple[Region, ...]:
    """The regions that the next change is made to: those of an unfinished exchange, otherwise those in effect."""
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
    new: list[Mapping] = []
    if region is None:
        if len(regions) >= MAX_MEM_SLOTS:
            raise RemoteProtocolError(f"ADD_MEM_REG: all {MAX_MEM_SLOTS} memory slots are taken")
        if not armed:
            session.postcopy.without_listen()
        region = map_region(session, wanted, frame.fds[0], armed=armed)
        memory = GuestMemory(session.supply, (*regions, region))
        if armed:
            await_exchange(session, memory)
            new = [region.mapping]
        else:
            await use_memory(session, memory)
    if not armed:
        return None
    # QEMU 7.2 adds a region once per queue pair: the same answer each time.
    own = MemoryRegion(wanted.guest_addr, wanted.size, region.mapping.address, wanted.mmap_offset)
    answer = pack_single_region(own)
    session.postcopy.await_ack(new, frame.request, answer)
    return Answer(answer, always=True)


@handles(Request.REM_MEM_REG)
async def rem_mem_reg(session: SessionState, frame: Frame) -> Answer | None:
    if len(frame.payload) != 40:
        raise RemoteProtocolError(f"REM_MEM_REG: {len(frame.payload)} bytes, expected 40")
    wanted = unpack_single_region(frame.payload)
    armed = session.postcopy.listening
    regions = current_regions(session)
    gone = [r for r in regions if same(r, wanted)]
    if not gone:
        log.error("%s: REM_MEM_REG of a region that does not exist", session.name)
        return None if armed else FAILED
    memory = GuestMemory(session.supply, [r for r in regions if r not in gone])
    if armed:
        await session.pause_vrings()
        await_exchange(session, memory)
    else:
        await use_memory(session, memory)
    return None


@handles(Request.SET_LOG_BASE)
async def set_log_base(session: SessionState, frame: Frame) -> Answer:
    area = LogArea.unpack(frame.payload)
    session.dirty_log = DirtyLog(session.supply, frame.fds[0], area.offset, area.size)
    for vring in session.vrings:
        await vring.changed(vring.set_log)
    await session.update_vrings()
    # Front-ends expect 0, 8 or 16 bytes; QEMU ignores them, others want the request's echo.
    return Answer(frame.payload)


@handles(Request.SET_LOG_FD)
async def set_log_fd(session: SessionState, frame: Frame) -> None:
    """An eventfd to signal on log writes; no front-end sends it, and no signal is needed."""
