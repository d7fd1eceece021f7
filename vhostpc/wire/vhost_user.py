"""The vhost-user protocol as bytes and values: requests, payloads, framing. No I/O.

Source: the vhost-user specification (QEMU, docs/interop/vhost-user.rst). Integers are in host byte order.
A message is a header of 12 bytes (request u32, flags u32, size u32) and ``size`` bytes of payload;
descriptors ride on the first byte of the header.
"""

from __future__ import annotations

import enum
import os
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from vhostpc.enums import NamedFlag, SpecEnum
from vhostpc.errors import LocalProtocolError

HEADER = struct.Struct("=III")
HEADER_SIZE = 12
MAX_PAYLOAD = 4096
MAX_FDS = 32
#: One SET_MEM_TABLE carries at most this many regions (specification: 8; some peers send up to 32).
MAX_TABLE_REGIONS = 32
#: Memory slots we offer in GET_MAX_MEM_SLOTS.
MAX_MEM_SLOTS = 509
MAX_CONFIG = 256

VERSION = 1
FLAG_REPLY = 0x4
FLAG_NEED_REPLY = 0x8
VERSION_MASK = 0x3
#: KICK, CALL and ERR carry the ring's index in bits 0-7 and "no descriptor" in bit 8.
VRING_INDEX_MASK = 0xFF
VRING_NOFD = 0x100


class Request(SpecEnum):
    """Front-end to back-end (specification, "Front-end message types")."""

    NONE = 0
    GET_FEATURES = 1
    SET_FEATURES = 2
    SET_OWNER = 3
    RESET_OWNER = 4
    SET_MEM_TABLE = 5
    SET_LOG_BASE = 6
    SET_LOG_FD = 7
    SET_VRING_NUM = 8
    SET_VRING_ADDR = 9
    SET_VRING_BASE = 10
    GET_VRING_BASE = 11
    SET_VRING_KICK = 12
    SET_VRING_CALL = 13
    SET_VRING_ERR = 14
    GET_PROTOCOL_FEATURES = 15
    SET_PROTOCOL_FEATURES = 16
    GET_QUEUE_NUM = 17
    SET_VRING_ENABLE = 18
    SEND_RARP = 19
    NET_SET_MTU = 20
    SET_BACKEND_REQ_FD = 21
    IOTLB_MSG = 22
    SET_VRING_ENDIAN = 23
    GET_CONFIG = 24
    SET_CONFIG = 25
    CREATE_CRYPTO_SESSION = 26
    CLOSE_CRYPTO_SESSION = 27
    POSTCOPY_ADVISE = 28
    POSTCOPY_LISTEN = 29
    POSTCOPY_END = 30
    GET_INFLIGHT_FD = 31
    SET_INFLIGHT_FD = 32
    GPU_SET_SOCKET = 33
    RESET_DEVICE = 34
    VRING_KICK = 35
    GET_MAX_MEM_SLOTS = 36
    ADD_MEM_REG = 37
    REM_MEM_REG = 38
    SET_STATUS = 39
    GET_STATUS = 40
    GET_SHARED_OBJECT = 41
    SET_DEVICE_STATE_FD = 42
    CHECK_DEVICE_STATE = 43


class BackendRequest(SpecEnum):
    """Back-end to front-end, on the socket of SET_BACKEND_REQ_FD."""

    IOTLB_MSG = 1
    CONFIG_CHANGE_MSG = 2
    VRING_HOST_NOTIFIER_MSG = 3
    VRING_CALL = 4
    VRING_ERR = 5
    SHARED_OBJECT_ADD = 6
    SHARED_OBJECT_REMOVE = 7
    SHARED_OBJECT_LOOKUP = 8


class PostcopyPhase(enum.Enum):
    """The state of a connection in a postcopy, at both its ends: the requests between which it is."""

    OFF = enum.auto()
    ADVISED = enum.auto()
    LISTENING = enum.auto()
    ENDED = enum.auto()


class ProtocolFeature(NamedFlag, boundary=enum.KEEP):
    """Bits of GET_PROTOCOL_FEATURES."""

    MQ = 1 << 0
    LOG_SHMFD = 1 << 1
    RARP = 1 << 2
    REPLY_ACK = 1 << 3
    MTU = 1 << 4
    BACKEND_REQ = 1 << 5
    CROSS_ENDIAN = 1 << 6
    CRYPTO_SESSION = 1 << 7
    PAGEFAULT = 1 << 8
    CONFIG = 1 << 9
    BACKEND_SEND_FD = 1 << 10
    HOST_NOTIFIER = 1 << 11
    INFLIGHT_SHMFD = 1 << 12
    RESET_DEVICE = 1 << 13
    INBAND_NOTIFICATIONS = 1 << 14
    CONFIGURE_MEM_SLOTS = 1 << 15
    STATUS = 1 << 16
    XEN_MMAP = 1 << 17
    SHARED_OBJECT = 1 << 18
    DEVICE_STATE = 1 << 19


class Feature(NamedFlag, boundary=enum.KEEP):
    """The vhost and transport bits of GET_FEATURES that the framework itself cares about."""

    NOTIFY_ON_EMPTY = 1 << 24
    LOG_ALL = 1 << 26
    ANY_LAYOUT = 1 << 27
    INDIRECT_DESC = 1 << 28
    EVENT_IDX = 1 << 29
    PROTOCOL_FEATURES = 1 << 30
    VERSION_1 = 1 << 32
    ACCESS_PLATFORM = 1 << 33
    RING_PACKED = 1 << 34
    IN_ORDER = 1 << 35


# --- payloads ---------------------------------------------------------------------------------------

_U64 = struct.Struct("=Q")
_STATE = struct.Struct("=II")
_ADDR = struct.Struct("=IIQQQQ")
_REGION = struct.Struct("=QQQQ")
_TABLE_HEAD = struct.Struct("=II")
_LOG = struct.Struct("=QQ")
_CONFIG_HEAD = struct.Struct("=III")
_INFLIGHT = struct.Struct("=QQHH")


def pack_u64(value: int) -> bytes:
    """8 bytes: u64."""
    return _U64.pack(value)


def unpack_u64(payload: bytes) -> int:
    """Inverse of :func:`pack_u64`."""
    return int(_U64.unpack(payload)[0])


@dataclass(frozen=True, slots=True)
class VringState:
    """8 bytes: u32 index, u32 num."""

    index: int
    num: int

    def pack(self) -> bytes:
        return _STATE.pack(self.index, self.num)

    @classmethod
    def unpack(cls, payload: bytes) -> VringState:
        return cls(*_STATE.unpack(payload))


@dataclass(frozen=True, slots=True)
class VringAddr:
    """40 bytes: u32 index, u32 flags (bit 0: log the used ring), u64 desc, used, avail, log.

    ``desc``, ``used`` and ``avail`` are addresses of the front-end's process; ``log`` is a guest address.
    """

    index: int
    flags: int
    desc: int
    used: int
    avail: int
    log: int

    def pack(self) -> bytes:
        return _ADDR.pack(self.index, self.flags, self.desc, self.used, self.avail, self.log)

    @classmethod
    def unpack(cls, payload: bytes) -> VringAddr:
        return cls(*_ADDR.unpack(payload))


@dataclass(frozen=True, slots=True)
class MemoryRegion:
    """32 bytes: u64 guest address, size in bytes, address in the front-end's process, offset in the fd."""

    guest_addr: int
    size: int
    user_addr: int
    mmap_offset: int

    def pack(self) -> bytes:
        return _REGION.pack(self.guest_addr, self.size, self.user_addr, self.mmap_offset)

    @classmethod
    def unpack(cls, payload: bytes) -> MemoryRegion:
        return cls(*_REGION.unpack(payload))


def pack_table(regions: Sequence[MemoryRegion]) -> bytes:
    """8 + 32 n bytes: u32 n, u32 padding, n regions."""
    return _TABLE_HEAD.pack(len(regions), 0) + b"".join(r.pack() for r in regions)


def unpack_table(payload: bytes) -> list[MemoryRegion]:
    """Inverse of :func:`pack_table`; raises LocalProtocolError for more regions than are allowed, or than there are.

    What follows the last region is padding: User-Mode Linux always sends room for two.
    """
    if len(payload) < 8:
        raise LocalProtocolError(f"memory table of {len(payload)} bytes, at least 8 needed")
    count = _TABLE_HEAD.unpack_from(payload)[0]
    if count > MAX_TABLE_REGIONS or len(payload) < 8 + 32 * count:
        raise LocalProtocolError(f"memory table lists {count} regions in {len(payload)} bytes")
    return [MemoryRegion(*_REGION.unpack_from(payload, 8 + 32 * i)) for i in range(count)]


def pack_single_region(region: MemoryRegion) -> bytes:
    """40 bytes: u64 padding, region."""
    return bytes(8) + region.pack()


def unpack_single_region(payload: bytes) -> MemoryRegion:
    """Inverse of :func:`pack_single_region`."""
    return MemoryRegion.unpack(payload[8:40])


@dataclass(frozen=True, slots=True)
class LogArea:
    """16 bytes: u64 size, u64 offset of the dirty log in its fd."""

    size: int
    offset: int

    def pack(self) -> bytes:
        return _LOG.pack(self.size, self.offset)

    @classmethod
    def unpack(cls, payload: bytes) -> LogArea:
        return cls(*_LOG.unpack(payload))


@dataclass(frozen=True, slots=True)
class ConfigSpace:
    """12 + n bytes: u32 offset, u32 size (= n), u32 flags (0 by the driver, 1 by migration), n bytes."""

    offset: int
    flags: int
    data: bytes

    def pack(self) -> bytes:
        return _CONFIG_HEAD.pack(self.offset, len(self.data), self.flags) + self.data

    @classmethod
    def unpack(cls, payload: bytes) -> ConfigSpace:
        if len(payload) < 12:
            raise LocalProtocolError(f"config payload of {len(payload)} bytes, at least 12 needed")
        offset, size, flags = _CONFIG_HEAD.unpack_from(payload)
        if (
            size != len(payload) - 12
            or size > MAX_CONFIG
            or offset > MAX_CONFIG
            or offset + size > MAX_CONFIG
        ):
            raise LocalProtocolError(
                f"config space of {size} bytes at {offset} in a payload of {len(payload)}"
            )
        return cls(offset, flags, payload[12:])


@dataclass(frozen=True, slots=True)
class Inflight:
    """24 bytes: u64 size and offset of the inflight region in its fd, u16 queues, u16 entries of each, 4 of padding.

    Size 0: there is none. Some peers leave the padding out.
    """

    size: int
    offset: int
    queues: int
    queue_size: int

    def pack(self) -> bytes:
        return _INFLIGHT.pack(self.size, self.offset, self.queues, self.queue_size) + bytes(4)

    @classmethod
    def unpack(cls, payload: bytes) -> Inflight:
        return cls(*_INFLIGHT.unpack_from(payload))


# --- the request table ------------------------------------------------------------------------------


class Reply(enum.Enum):
    """How a request is answered."""

    ACK = enum.auto()  # u64 status, only if NEED_REPLY is set and REPLY_ACK was negotiated
    VALUE = enum.auto()  # always, by the handler
    U64 = enum.auto()  # always a u64 status (the front-end sets NEED_REPLY without negotiation)


@dataclass(frozen=True, slots=True)
class RequestSpec:
    """One row: sizes in bytes, descriptors, reply, and the protocol feature that must be negotiated.

    ``padded``: bytes beyond ``max_size`` are ignored, as in libvhost-user; otherwise such a payload is refused.
    """

    request: Request
    min_size: int
    max_size: int
    min_fds: int
    max_fds: int
    reply: Reply
    gate: ProtocolFeature | None = None
    padded: bool = True


def _rows() -> Iterable[RequestSpec]:
    R, P = Request, ProtocolFeature
    ack, value, u64 = Reply.ACK, Reply.VALUE, Reply.U64

    def row(
        request: Request,
        size: int | tuple[int, int] = 0,
        fds: int | tuple[int, int] = 0,
        reply: Reply = ack,
        gate: ProtocolFeature | None = None,
        padded: bool = True,
    ) -> RequestSpec:
        low, high = size if isinstance(size, tuple) else (size, size)
        few, many = fds if isinstance(fds, tuple) else (fds, fds)
        return RequestSpec(request, low, high, few, many, reply, gate, padded)

    table = (8, 8 + 32 * MAX_TABLE_REGIONS)
    yield row(R.GET_FEATURES, reply=value)
    yield row(R.SET_FEATURES, 8)
    yield row(R.SET_OWNER)
    yield row(R.RESET_OWNER)
    yield row(R.SET_MEM_TABLE, table, (0, MAX_TABLE_REGIONS))
    yield row(R.SET_LOG_BASE, 16, 1, reply=value, gate=P.LOG_SHMFD, padded=False)
    yield row(R.SET_LOG_FD, 0, 1)
    yield row(R.SET_VRING_NUM, 8)
    yield row(R.SET_VRING_ADDR, 40)
    yield row(R.SET_VRING_BASE, 8)
    yield row(R.GET_VRING_BASE, 8, reply=value)
    yield row(R.SET_VRING_KICK, 8, (0, 1))
    yield row(R.SET_VRING_CALL, 8, (0, 1))
    yield row(R.SET_VRING_ERR, 8, (0, 1))
    yield row(R.GET_PROTOCOL_FEATURES, reply=value)
    yield row(R.SET_PROTOCOL_FEATURES, 8)
    yield row(R.GET_QUEUE_NUM, reply=value)
    yield row(R.SET_VRING_ENABLE, 8)
    yield row(R.SEND_RARP, 8, gate=P.RARP)
    yield row(R.NET_SET_MTU, 8, gate=P.MTU)
    yield row(R.SET_BACKEND_REQ_FD, 0, 1, gate=P.BACKEND_REQ)
    yield row(R.GET_CONFIG, (12, 12 + MAX_CONFIG), reply=value, gate=P.CONFIG, padded=False)
    yield row(R.SET_CONFIG, (12, 12 + MAX_CONFIG), gate=P.CONFIG, padded=False)
    yield row(R.POSTCOPY_ADVISE, reply=value, gate=P.PAGEFAULT)
    yield row(R.POSTCOPY_LISTEN, reply=u64, gate=P.PAGEFAULT)
    yield row(R.POSTCOPY_END, reply=u64, gate=P.PAGEFAULT)
    yield row(R.GET_INFLIGHT_FD, (20, 24), reply=value, gate=P.INFLIGHT_SHMFD, padded=False)
    yield row(R.SET_INFLIGHT_FD, (20, 24), 1, gate=P.INFLIGHT_SHMFD, padded=False)
    yield row(R.RESET_DEVICE, gate=P.RESET_DEVICE)
    yield row(R.VRING_KICK, 8, gate=P.INBAND_NOTIFICATIONS)
    yield row(R.GET_MAX_MEM_SLOTS, reply=value, gate=P.CONFIGURE_MEM_SLOTS)
    yield row(R.ADD_MEM_REG, (8, 40), (0, 1), gate=P.CONFIGURE_MEM_SLOTS)
    yield row(R.REM_MEM_REG, (8, 40), (0, 1), gate=P.CONFIGURE_MEM_SLOTS)
    yield row(R.SET_STATUS, 8, gate=P.STATUS)
    yield row(R.GET_STATUS, reply=value, gate=P.STATUS)


#: The requests that our back-ends answer; a request without a row is declined.
REQUESTS: dict[int, RequestSpec] = {spec.request: spec for spec in _rows()}

#: After LISTEN any of these with 8 bytes of zero and no descriptor says "your addresses are stored":
#: the number is that of the last message that the front-end built, 0 if it built none.
POSTCOPY_ACKS = frozenset({Request.NONE, Request.SET_MEM_TABLE, Request.ADD_MEM_REG, Request.REM_MEM_REG})


def request_name(number: int) -> str:
    """The specification's name of a request, or ``request 99``."""
    try:
        return Request(number).name
    except ValueError:
        return f"request {number}"


# --- framing ----------------------------------------------------------------------------------------


@dataclass(slots=True)
class Frame:
    """One message with its descriptors, which it owns until they are taken.

    ``close_fds`` closes those that nobody took; a frame's handler calls it on every path.
    """

    request: int
    flags: int
    payload: bytes
    fds: list[int] = field(default_factory=list)

    @property
    def need_reply(self) -> bool:
        return bool(self.flags & FLAG_NEED_REPLY)

    @property
    def is_reply(self) -> bool:
        return bool(self.flags & FLAG_REPLY)

    def take_fd(self) -> int:
        """Return the first descriptor; the caller owns it now."""
        return self.fds.pop(0)

    def take_fds(self) -> list[int]:
        """Return all descriptors."""
        fds, self.fds = self.fds, []
        return fds

    def close_fds(self) -> None:
        """Close the descriptors that nobody took."""
        for fd in self.take_fds():
            os.close(fd)


class FrameReader:
    """Turns received bytes and descriptors into frames.

    ``want`` says how many bytes may be received next. Never receive more: a unix stream can hand over a
    message without descriptors together with the descriptors of the next one.
    """

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._fds: list[int] = []
        self._need = HEADER_SIZE

    @property
    def want(self) -> int:
        """Bytes still missing of the header, or of the payload; never 0."""
        return self._need - len(self._buffer)

    @property
    def started(self) -> bool:
        """Whether part of a message was received: an end of file now would cut it."""
        return bool(self._buffer or self._fds)

    def feed(self, data: bytes, fds: Iterable[int] = ()) -> Frame | None:
        """Take at most ``want`` bytes and any descriptors; return a frame when one is whole.

        The reader owns the descriptors from here on. Raises LocalProtocolError for a header that is not
        one, too much payload or too many descriptors; then call :meth:`close`.
        """
        self._fds.extend(fds)
        if len(data) > self.want:
            raise LocalProtocolError(f"fed {len(data)} bytes, wanted {self.want}")
        if len(self._fds) > MAX_FDS:
            raise LocalProtocolError(f"{len(self._fds)} descriptors in one message, at most {MAX_FDS}")
        self._buffer += data
        if len(self._buffer) < HEADER_SIZE:
            return None
        request, flags, size = HEADER.unpack_from(self._buffer)
        if len(self._buffer) == HEADER_SIZE:
            if flags & VERSION_MASK != VERSION:
                raise LocalProtocolError(f"{request_name(request)} with flags {flags:#x}: version is not 1")
            if size > MAX_PAYLOAD:
                raise LocalProtocolError(
                    f"{request_name(request)} announces {size} bytes, at most {MAX_PAYLOAD}"
                )
            self._need = HEADER_SIZE + size
        if len(self._buffer) < self._need:
            return None
        frame = Frame(request, flags, bytes(self._buffer[HEADER_SIZE:]), self._fds)
        self._buffer.clear()
        self._fds = []
        self._need = HEADER_SIZE
        return frame

    def close(self) -> None:
        """Close the descriptors of an incomplete message."""
        for fd in self._fds:
            os.close(fd)
        self._fds = []


def encode(request: int, payload: bytes = b"", *, flags: int = 0) -> bytes:
    """Header and payload of one message; ``flags`` besides the version (FLAG_REPLY, FLAG_NEED_REPLY)."""
    if len(payload) > MAX_PAYLOAD:
        raise LocalProtocolError(f"{request_name(request)} with {len(payload)} bytes, at most {MAX_PAYLOAD}")
    return HEADER.pack(request, VERSION | flags, len(payload)) + payload
