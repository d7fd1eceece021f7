"""Return path of recovery and XBZRLE: known bytes, any cut, what is refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.kit.streams import h
from vhostpc.errors import StreamError
from vhostpc.wire.migration import xbzrle
from vhostpc.wire.migration.return_path import (
    PageRequest,
    Pong,
    ReceivedBitmap,
    ResumeAck,
    ReturnPathDecoder,
    ReturnPathMessage,
    Shut,
    SwitchoverAck,
)

ANSWERS = h(
    "0002 0004 00000001  0002 0004 00000002  0002 0004 00000004"
    "0003 0011 0000000000002000 00001000 04 72616d30  0002 0004 00000003"
    "0004 000c 0000000000001000 00001000  0001 0004 00000000"
)
RECOVERY = h(
    "0005 0005 04 72616d30 0000000000000008 0500000000000000 0123456789abcdef"
    "0005 0005 04 726f6d30 0000000000000008 0000000000000000 0123456789abcdef"
    "0006 0004 00000001  0001 0004 00000000"
)
KNOWN: dict[str, tuple[bytes, list[ReturnPathMessage]]] = {
    "postcopy": (
        ANSWERS,
        [
            Pong(1), Pong(2), Pong(4), PageRequest("ram0", 0x2000, 0x1000), Pong(3),
            PageRequest("ram0", 0x1000, 0x1000), Shut(0),
        ],
    ),
    "recovery": (
        RECOVERY,
        [ReceivedBitmap("ram0", h("0500000000000000")), ReceivedBitmap("rom0", bytes(8)), ResumeAck(1), Shut(0)],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", KNOWN)
def test_known_bytes(name: str) -> None:
    data, expected = KNOWN[name]
    assert len(data) == {"postcopy": 77, "recovery": 82}[name]
    for step in (1, 3, len(data)):
        decoder = ReturnPathDecoder()
        assert [m for i in range(0, len(data), step) for m in decoder.feed(data[i : i + step])] == expected
    if name == "recovery":
        assert b"".join(m.encode() for m in expected) == data


@pytest.mark.parametrize("name", KNOWN)
def test_where_messages_end(name: str) -> None:
    """At the moment when one is yielded, however the bytes came."""
    data, _ = KNOWN[name]
    ends = {"postcopy": [8, 16, 24, 45, 53, 69, 77], "recovery": [33, 66, 74, 82]}[name]
    for step in (1, 3, len(data)):
        decoder = ReturnPathDecoder()
        pieces = [data[i : i + step] for i in range(0, len(data), step)]
        assert [decoder.offset for piece in pieces for _ in decoder.feed(piece)] == ends


def test_readiness_for_the_switch() -> None:
    assert list(ReturnPathDecoder().feed(SwitchoverAck().encode())) == [SwitchoverAck()]
    assert SwitchoverAck().encode() == h("0007 0000")


@pytest.mark.parametrize(
    "message",
    [
        "0005 0005 04 72616d30 0000000000000009",  # not whole words
        "0005 0005 04 72616d30 0000000100000000",  # more than is taken
        "0005 0005 04 72616d30 0000000000000008 0500000000000000 0123456789abcdee",  # end mark
        "0005 0001 00",
        "0005 0005 05 72616d30",
        "0006 0003 000001",
        "0007 0001 00",
        "0000 0000",
    ],
)
def test_what_is_no_message(message: str) -> None:
    with pytest.raises(StreamError, match="return path: "):
        list(ReturnPathDecoder().feed(h(message)))


@given(st.binary(max_size=60), st.integers(0, 80))
def test_noise(data: bytes, cut: int) -> None:
    decoder = ReturnPathDecoder()
    try:
        list(decoder.feed(RECOVERY[:cut] + data))
    except StreamError as wrong:
        assert "return path: " in str(wrong)  # noqa: PT017


def test_a_difference() -> None:
    page = bytes(4096)
    new = bytearray(page)
    new[8:12] = h("01020304")
    new[200] = 5
    assert xbzrle.apply(page, h("08 04 01020304 bc01 01 05")) == new
    assert xbzrle.apply(page, h("00 01 ff")) == b"\xff" + page[1:]
    assert xbzrle.apply(page, b"") == page


@pytest.mark.parametrize(
    "delta",
    ["08", "0804010203", "0800", "000101 0001 01", "808001 0101", "80", "ff1f 0201 02", "ff3f 0101"],
)
def test_what_is_no_difference(delta: str) -> None:
    with pytest.raises(StreamError, match="XBZRLE: "):
        xbzrle.apply(bytes(4096), h(delta))


@given(st.binary(max_size=60))
def test_any_difference_leaves_a_page(delta: bytes) -> None:
    try:
        new = xbzrle.apply(bytes(4096), delta)
    except StreamError:
        return
    assert len(new) == 4096
