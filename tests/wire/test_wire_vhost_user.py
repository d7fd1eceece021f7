"""The vhost-user codec: golden bytes, round trips, framing of any stream cut anywhere."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vhostpc.errors import LocalProtocolError
from vhostpc.wire import vhost_user as vu
from vhostpc.wire.vhost_user import Feature, Frame, FrameReader, ProtocolFeature, Request

U32 = st.integers(0, 2**32 - 1)
U64 = st.integers(0, 2**64 - 1)
REGIONS = st.builds(vu.MemoryRegion, U64, U64, U64, U64)


def test_golden_bytes() -> None:
    """Offsets and sizes as the specification's "Message Specification" has them, native endian."""
    assert vu.encode(Request.GET_FEATURES) == struct.pack("=III", 1, 0x1, 0)
    assert vu.encode(Request.SET_FEATURES, vu.pack_u64(7), flags=vu.FLAG_NEED_REPLY) == struct.pack(
        "=IIIQ", 2, 0x9, 8, 7
    )
    assert vu.VringState(3, 0x80008000).pack() == struct.pack("=II", 3, 0x80008000)
    # desc, used, avail: in this order
    addr = vu.VringAddr(1, 1, 0x1000, 0x2000, 0x3000, 0x4000)
    assert addr.pack() == struct.pack("=IIQQQQ", 1, 1, addr.desc, addr.used, addr.avail, addr.log)
    region = vu.MemoryRegion(0x100000, 0x200000, 0x7F0000000000, 0x1000)
    assert region.pack() == struct.pack("=QQQQ", 0x100000, 0x200000, 0x7F0000000000, 0x1000)
    assert vu.pack_table([region, region]) == struct.pack("=II", 2, 0) + region.pack() * 2
    assert vu.pack_single_region(region) == bytes(8) + region.pack()
    assert vu.LogArea(0xC00, 0x10).pack() == struct.pack("=QQ", 0xC00, 0x10)
    assert vu.ConfigSpace(32, 0, b"\1").pack() == struct.pack("=III", 32, 1, 0) + b"\1"


@pytest.mark.parametrize(
    ("member", "bit"),
    [
        (ProtocolFeature.MQ, 0),
        (ProtocolFeature.REPLY_ACK, 3),
        (ProtocolFeature.PAGEFAULT, 8),
        (ProtocolFeature.CONFIGURE_MEM_SLOTS, 15),
        (ProtocolFeature.STATUS, 16),
        (Feature.LOG_ALL, 26),
        (Feature.INDIRECT_DESC, 28),
        (Feature.EVENT_IDX, 29),
        (Feature.PROTOCOL_FEATURES, 30),
        (Feature.VERSION_1, 32),
    ],
)
def test_bits(member: int, bit: int) -> None:
    assert member == 1 << bit


def test_numbers_of_requests() -> None:
    numbers = {
        "SET_MEM_TABLE": 5,
        "GET_VRING_BASE": 11,
        "POSTCOPY_ADVISE": 28,
        "ADD_MEM_REG": 37,
        "GET_STATUS": 40,
    }
    for name, number in numbers.items():
        assert Request[name] == number
        assert vu.request_name(number) == name
    assert vu.request_name(999) == "request 999"


def test_the_table_has_each_request_that_is_ours() -> None:
    wanted = {*range(1, 22), 24, 25, *range(28, 33), *range(34, 41)}
    assert set(vu.REQUESTS) == wanted


ROUND_TRIPS: list[tuple[st.SearchStrategy[Any], Callable[[Any], bytes], Callable[[bytes], Any]]] = [
    (U64, vu.pack_u64, vu.unpack_u64),
    (st.builds(vu.VringState, U32, U32), lambda v: v.pack(), vu.VringState.unpack),
    (st.builds(vu.VringAddr, U32, U32, U64, U64, U64, U64), lambda v: v.pack(), vu.VringAddr.unpack),
    (REGIONS, lambda v: v.pack(), vu.MemoryRegion.unpack),
    (REGIONS, vu.pack_single_region, vu.unpack_single_region),
    (st.lists(REGIONS, max_size=vu.MAX_TABLE_REGIONS), vu.pack_table, vu.unpack_table),
    (st.builds(vu.LogArea, U64, U64), lambda v: v.pack(), vu.LogArea.unpack),
    (
        st.binary(max_size=100).flatmap(
            lambda d: st.builds(vu.ConfigSpace, st.integers(0, 100), U32, st.just(d))
        ),
        lambda v: v.pack(),
        vu.ConfigSpace.unpack,
    ),
]


@given(st.data())
def test_round_trips(data: st.DataObject) -> None:
    values, pack, unpack = data.draw(st.sampled_from(ROUND_TRIPS))
    value = data.draw(values)
    assert unpack(pack(value)) == value


@given(st.binary(max_size=200))
def test_a_table_is_read_or_refused(payload: bytes) -> None:
    for unpack in (vu.unpack_table, vu.ConfigSpace.unpack):
        try:
            unpack(payload)
        except LocalProtocolError:
            continue


MESSAGES = st.lists(
    st.tuples(
        st.integers(0, 50), st.binary(max_size=120), st.sampled_from([0, vu.FLAG_NEED_REPLY, vu.FLAG_REPLY])
    ),
    max_size=8,
)


def feed(stream: bytes, sizes: list[int]) -> list[Frame]:
    """Feed as a socket would: at most what is wanted, in pieces of the sizes given."""
    reader, frames, at, turn = FrameReader(), [], 0, 0
    while at < len(stream):
        size = sizes[turn % len(sizes)] if sizes else 1 << 20
        piece = stream[at : at + min(reader.want, size)]
        at, turn = at + len(piece), turn + 1
        if (frame := reader.feed(piece)) is not None:
            frames.append(frame)
    assert reader.started == bool(reader.want != vu.HEADER_SIZE)
    return frames


@given(MESSAGES, st.lists(st.integers(1, 40), min_size=1, max_size=6))
def test_frames_however_they_are_cut(messages: list[tuple[int, bytes, int]], sizes: list[int]) -> None:
    stream = b"".join(vu.encode(number, payload, flags=flags) for number, payload, flags in messages)
    for cut in (sizes, [1], [1 << 20]):
        frames = feed(stream, cut)
        assert [(f.request, f.payload, f.flags) for f in frames] == [(n, p, f | 1) for n, p, f in messages]
        for frame, (_, _, flags) in zip(frames, messages, strict=True):
            assert frame.need_reply == bool(flags & vu.FLAG_NEED_REPLY)
            assert frame.is_reply == bool(flags & vu.FLAG_REPLY)


@given(st.binary(min_size=vu.HEADER_SIZE, max_size=vu.HEADER_SIZE))
def test_any_header_is_read_or_refused(header: bytes) -> None:
    reader = FrameReader()
    _, flags, size = vu.HEADER.unpack(header)
    try:
        reader.feed(header)
    except LocalProtocolError:
        assert flags & 3 != 1 or size > vu.MAX_PAYLOAD
    else:
        assert flags & 3 == 1
        assert size <= vu.MAX_PAYLOAD


def test_the_reader_owns_descriptors_until_they_are_taken() -> None:
    reader = FrameReader()
    first, second, third = (os.eventfd(0) for _ in range(3))
    message = vu.encode(Request.SET_VRING_KICK, vu.pack_u64(0))
    assert reader.feed(message[:12], [first, second]) is None
    frame = reader.feed(message[12:])
    assert frame is not None
    assert frame.take_fd() == first
    os.close(first)
    frame.close_fds()
    frame.close_fds()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(second)
    reader.feed(message[:3], [third])
    reader.close()
    reader.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(third)


def test_limits() -> None:
    with pytest.raises(LocalProtocolError, match="at most"):
        vu.encode(Request.SET_CONFIG, bytes(vu.MAX_PAYLOAD + 1))
    with pytest.raises(LocalProtocolError, match="wanted 12"):
        FrameReader().feed(bytes(13))
