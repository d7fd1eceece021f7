"""Sharing memory with a back-end, as one table or by slots; in postcopy the exchange of addresses.

Specification: SET_MEM_TABLE, ADD_MEM_REG, REM_MEM_REG, SET_LOG_BASE. In postcopy each memory message has three
steps: we send regions, the back-end answers with its own addresses of them, we say that we have stored them
and can translate its faults. The order of messages is QEMU's.
"""

from __future__ import annotations

import enum
import fcntl
import itertools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vhostpc.errors import LocalProtocolError, PostcopyRefused, RemoteProtocolError, naming
from vhostpc.frontend.client import FrontEnd
from vhostpc.pages.ramblock import RamBlock
from vhostpc.units import TARGET_PAGE, in_units
from vhostpc.wire.vhost_user import (
    LogArea,
    MemoryRegion,
    ProtocolFeature,
    Request,
    pack_single_region,
    pack_table,
    pack_u64,
    unpack_single_region,
    unpack_table,
)

"""Bytes of guest memory per bit of the dirty log."""


class Mode(enum.Enum):
    """The ways of sending memory."""

    TABLE = "table"
    SLOTS = "slots"


@dataclass(frozen=True, slots=True)
class GuestRegion:
    """``size`` bytes of guest memory from ``guest_addr`` are ``block`` from ``offset``; all in bytes."""

    guest_addr: int
    size: int
    block: RamBlock
    offset: int = 0

    @property
    def user_addr(self) -> int:
        """The address in our own process."""
        return self.block.base + self.offset

    @property
    def wire(self) -> MemoryRegion:
        return MemoryRegion(self.guest_addr, self.size, self.user_addr, self.block.fd_offset + self.offset)


@dataclass(frozen=True, slots=True)
class BackendRegion:
    """A region and the address at which the back-end mapped its first byte."""

    region: GuestRegion
    base: int


#: Called with all regions whose addresses are known, before the back-end may fault.
StoreBases = Callable[[Sequence[BackendRegion]], None]


class MemoryShare:
    """The memory that one back-end was given."""

    def __init__(self, front: FrontEnd, regions: Sequence[GuestRegion], mode: Mode | None = None) -> None:
        """``mode`` None: slots where they were negotiated, as QEMU does."""
        slots = ProtocolFeature.CONFIGURE_MEM_SLOTS in front.protocol_features
        self.front = front
        self.regions = list(regions)
        self.mode = mode or (Mode.SLOTS if slots else Mode.TABLE)
        if self.mode is Mode.SLOTS and not slots:
            raise LocalProtocolError("memory slots were not negotiated")
        self.sent: list[GuestRegion] = []
        """The regions that the back-end has now."""
        self.bases: list[BackendRegion] = []
        self.log: SharedLog | None = None

    def user_addr(self, guest_addr: int, size: int = 1) -> int:
        """Our address of guest memory. Raises LocalProtocolError for memory in no region."""
        for r in self.regions:
            if guest_addr - r.guest_addr >= 0 and guest_addr + size <= r.guest_addr + r.size:
                return r.user_addr + guest_addr - r.guest_addr
        raise LocalProtocolError(f"{size} bytes at guest address {guest_addr:#x} are in no region")

    # --- outside postcopy ---

    async def share(self) -> None:
        """Send the regions that the back-end does not have yet, and remove those that no longer exist.

        Raises RequestFailed, RemoteProtocolError (too few memory slots) and PeerClosed.
        """
        check_mode(self)
        if self.mode is Mode.TABLE:
            payload = pack_table([r.wire for r in self.regions])
            await self.front.tell(Request.SET_MEM_TABLE, payload, [r.block.fd for r in self.regions])
        else:
            for r in self._gone():
                await self.front.tell(Request.REM_MEM_REG, self._removal(r))
            for r in self._new():
                await self.front.tell(Request.ADD_MEM_REG, pack_single_region(r.wire), [r.block.fd])
        self.sent = list(self.regions)

    # --- in postcopy, after LISTEN ---

    async def share_postcopy(self, store: StoreBases, *, ack: Request | None = None) -> list[BackendRegion]:
        """The three steps. ``store`` is called with verified addresses before the last of them.

        ``ack``: the number of the last message; None takes QEMU's rule (the last message that was built, 0 if
        there was none). Raises PostcopyRefused, before the ack, when the addresses cannot be right.
        """
        if self.mode is Mode.TABLE:
            built = Request.SET_MEM_TABLE
            self.bases = await self._exchange_table()
        else:
            built, self.bases = await self._exchange_slots()
        self.sent = list(self.regions)
        store(self.bases)
        # No descriptor, eight bytes of zero: so it differs from a table.
        await self.front.send(built if ack is None else ack, pack_u64(0))
        return self.bases

    async def _exchange_table(self) -> list[BackendRegion]:
        payload = pack_table([r.wire for r in self.regions])
        fds = [r.block.fd for r in self.regions]
        frame = await self.front.request(Request.SET_MEM_TABLE, payload, fds)
        frame.close_fds()
        if len(frame.payload) != len(payload):
            raise PostcopyRefused(
                f"postcopy refused: SET_MEM_TABLE was answered with {len(frame.payload)} bytes in place of "
                f"{len(payload)}: this back-end does not know the exchange of addresses"
            )
        try:
            answers = unpack_table(frame.payload)
        except LocalProtocolError as e:
            raise PostcopyRefused(f"postcopy refused: SET_MEM_TABLE was answered with a {e}") from None
        if len(answers) != len(self.regions):
            raise PostcopyRefused(
                f"postcopy refused: SET_MEM_TABLE was answered with {len(answers)} regions in place of"
                f" {len(self.regions)}"
            )
        bases = [BackendRegion(r, a.user_addr) for r, a in zip(self.regions, answers, strict=True)]
        return verified(bases, answers)

    async def _exchange_slots(self) -> tuple[Request, list[BackendRegion]]:
        built = Request.NONE
        for r in self._gone():
            await self.front.send(Request.REM_MEM_REG, self._removal(r))
            built = Request.REM_MEM_REG
        bases = [b for b in self.bases if b.region in self.regions]
        answers = [MemoryRegion(b.region.guest_addr, b.region.size, b.base, 0) for b in bases]
        for r in self._new():
            payload = pack_single_region(r.wire)
            frame = await self.front.request(Request.ADD_MEM_REG, payload, [r.block.fd])
            frame.close_fds()
            if len(frame.payload) != len(payload):
                raise PostcopyRefused(
                    f"postcopy refused: ADD_MEM_REG was answered with {len(frame.payload)} bytes in place of "
                    f"{len(payload)}: this back-end does not know the exchange of addresses"
                )
            answers.append(unpack_single_region(frame.payload))
            bases.append(BackendRegion(r, answers[-1].user_addr))
            built = Request.ADD_MEM_REG
        return built, verified(bases, answers)

    def _gone(self) -> list[GuestRegion]:
        return [r for r in self.sent if r not in self.regions]

    def _new(self) -> list[GuestRegion]:
        return [r for r in self.regions if r not in self.sent]

    @staticmethod
    def _removal(r: GuestRegion) -> bytes:
        # QEMU names the region by its addresses and size, with an offset of 0.
        return pack_single_region(MemoryRegion(r.guest_addr, r.size, r.user_addr, 0))

    # --- dirty log ---

    async def set_log(self, log: SharedLog) -> None:
        """SET_LOG_BASE: from now on the back-end may mark what it writes (once LOG_ALL is acknowledged)."""
        payload = LogArea(log.size, 0).pack()
        frame = await self.front.request(Request.SET_LOG_BASE, payload, [log.fd])
        frame.close_fds()
        self.log = log


def verified(bases: list[BackendRegion], answers: Sequence[MemoryRegion]) -> list[BackendRegion]:
    """Check a back-end's answer. Raises PostcopyRefused naming the region and what is wrong."""
    for b, answer in zip(bases, answers, strict=True):
        r = b.region
        where = f"postcopy refused: the back-end's answer for the region at {r.guest_addr:#x}"
        if answer.guest_addr != r.guest_addr or answer.size != r.size:
            raise PostcopyRefused(
                f"{where} is for {in_units(answer.size)} at {answer.guest_addr:#x}: regions must be answered "
                f"in the order and size they were sent"
            )
        if b.base == r.user_addr:
            raise PostcopyRefused(
                f"{where} repeats our own address {b.base:#x}: this back-end (as QEMU's libvhost-user does in "
                f"table mode) does not report where it mapped the memory, so its faults could not be served"
            )
        if b.base == 0 or b.base + r.size > 1 << 64:
            raise PostcopyRefused(f"{where} is the address {b.base:#x}, which leaves no room for it")
        # Addresses are congruent with offsets, so that pages of the one are pages of the other.
        if (b.base - (r.block.fd_offset + r.offset)) % r.block.page_size:
            raise PostcopyRefused(f"{where}, {b.base:#x}, is not aligned to its pages")
    ordered = sorted(bases, key=lambda b: b.base)
    for low, high in itertools.pairwise(ordered):
        if low.base + low.region.size > high.base:
            raise PostcopyRefused(
                f"postcopy refused: the back-end's addresses {low.base:#x} and {high.base:#x} overlap"
            )
    return bases


class SharedLog:
    """The dirty log: a memfd with a bit for each 4096 bytes of guest memory, set by back-ends."""

    def __init__(self, regions: Sequence[GuestRegion]) -> None:
        end = max(r.guest_addr + r.size for r in regions)
        self.size = (end // TARGET_PAGE + 63) // 64 * 8
        with naming("dirty log"):
            self.fd = os.memfd_create("vhostpc-log", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self.fd, self.size)
            # If a back-end could truncate it, our next access would be fatal.
            fcntl.fcntl(
                self.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
            )
        except BaseException:
            self.close()
            raise

    def merge(self, regions: Sequence[GuestRegion]) -> int:
        """Move the marks to the DIRTY bits of the regions' blocks; how many of those were not set before.

        Each region is a whole block. The next call finds marks that back-ends set meanwhile.
        """
        return sum(r.block.merge_log(self.fd, self.size, r.guest_addr) for r in regions)

    def dirty_pages(self) -> set[int]:
        """Numbers of the guest's 4096-byte pages that are marked. Reads the file, clears nothing."""
        data = os.pread(self.fd, self.size, 0)
        return {8 * i + bit for i, byte in enumerate(data) if byte for bit in range(8) if byte >> bit & 1}

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def set_nonblocking(fd: int) -> None:
    """Set a back-end's ufd up as QEMU does: reading it must never wait."""
    fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_NONBLOCK)


def check_mode(share: MemoryShare) -> None:
    """Raises RemoteProtocolError when the back-end accepts fewer slots than we have regions."""
    if share.mode is Mode.SLOTS and len(share.regions) > share.front.memory_slots:
        raise RemoteProtocolError(
            f"{len(share.regions)} regions, but the back-end has {share.front.memory_slots} memory slots"
        )
