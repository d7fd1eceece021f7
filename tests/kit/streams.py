"""Migration streams of a toy machine, written byte by byte: what the codecs are held against.

Machine ``toyvm``: blocks ram0 (3 pages) and rom0 (1 page), RAM is section 7; device ``clk`` is section 9.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Protocol

from vhostpc.wire.migration.elements import StreamEvent
from vhostpc.wire.migration.ramrec import EndOfSection, RamEncoder, RamPage
from vhostpc.wire.migration.stream import StreamReader

A, B, C = (bytes([byte]) * 4096 for byte in (0xAA, 0xBB, 0xCC))
JSON = (
    b'{"page_size": 4096, "devices": [{"name": "clk", "instance_id": 0, "vmsd_name": "clk", '
    b'"version": 1, "fields": [{"name": "v", "type": "uint32", "size": 4}]}]}'
)


class Encoded(Protocol):
    """An element of a stream that has a form of its own."""

    def encode(self) -> bytes: ...


def h(text: str) -> bytes:
    return bytes.fromhex(text)


HEADER = h("5145564d 00000003")
CONFIGURATION = h("07 00000005 746f79766d")  # u32 length, "toyvm"
SETUP = (
    h("01 00000007 0372616d 00000000 00000004")  # START, id 7, "ram", instance 0, version 4
    + h("0000000000004004")  # MEM_SIZE, 0x4000 in all
    + h("04 72616d30 0000000000003000")  # ram0
    + h("04 726f6d30 0000000000001000")  # rom0
    + h("0000000000000010 7e 00000007")  # EOS, footer
)
END_OF_PART = h("0000000000000010 7e 00000007")
FIRST_PART = (
    h("02 00000007 0000000000000008 04 72616d30") + A  # ram0+0 PAGE
    + h("0000000000001022 00")  # ram0+0x1000 ZERO CONTINUE
    + END_OF_PART
)  # fmt: skip
CLOCK = h("04 00000009 03636c6b 00000000 00000001 deadbeef 7e 00000009")

PRECOPY = (
    HEADER + CONFIGURATION + SETUP + FIRST_PART
    + h("03 00000007 0000000000002028") + B  # END; the block of CONTINUE outlives the section
    + h("0000000000000002 04 726f6d30 00")  # rom0+0 ZERO
    + END_OF_PART + CLOCK
    + h("00 06 0000009d") + JSON
)  # fmt: skip
PRECOPY_SHA = "c2ac9cb9cf77a73a7404f50b707c9bff090490fd001b1d74d7772211d25b43a1"

BLOB = h("08 0004 0000") + CLOCK + h("08 0002 0004 00000003  08 0005 0000")  # LISTEN, clk, PING 3, RUN
POSTCOPY = (
    HEADER + CONFIGURATION
    + h("08 0001 0000  08 0002 0004 00000001")  # OPEN_RETURN_PATH, PING 1
    + h("08 0003 0010 0000000000001000 0000000000001000")  # ADVISE
    + SETUP + FIRST_PART
    + h("08 0006 0017 00 04 72616d30 00 0000000000001000 0000000000002000")  # DISCARD ram0
    + h("08 0006 0017 00 04 726f6d30 00 0000000000000000 0000000000001000")  # DISCARD rom0
    + h("08 0002 0004 00000002  08 0007 0004 0000002d") + BLOB  # PING 2, PACKAGED
    + h("08 0002 0004 00000004")  # PING 4
    + h("02 00000007 0000000000002008 04 72616d30") + B + END_OF_PART  # named again
    + h("03 00000007 0000000000001028") + C
    + h("0000000000000002 04 726f6d30 00") + END_OF_PART
    + h("00")
)  # fmt: skip
POSTCOPY_SHA = "4f3673591328ae0b88608a4de2352ccdf864746b79ea367fec9b80f0ff69ea4d"

RECOVERY = (
    h("08 000a 0005 04 72616d30  08 000a 0005 04 726f6d30  08 0009 0000")  # RECV_BITMAP twice, RESUME
    + h("02 00000007 0000000000001008 04 72616d30") + C + END_OF_PART
    + h("03 00000007 0000000000000002 04 726f6d30 00") + END_OF_PART
    + h("00")
)  # fmt: skip
RECOVERY_SHA = "2665232e14d461707c2620d173eaaca16a12e41b630d9f3ade7c9586ff23f6e7"


def read(data: bytes, reader: StreamReader | None = None, cuts: Iterable[int] = ()) -> list[StreamEvent]:
    """All events of a whole stream, fed in the pieces between ``cuts``."""
    reader = reader or StreamReader()
    events: list[StreamEvent] = []
    places = [0, *sorted({min(cut, len(data)) for cut in cuts}), len(data)]
    for begin, end in itertools.pairwise(places):
        events += reader.feed(data[begin:end])
    events += reader.eof()
    return events


def encode(events: Iterable[StreamEvent]) -> bytes:
    """The bytes of events that were read with :attr:`RamMode.PAGES`."""
    from vhostpc.wire.migration.elements import Package

    ram, out = RamEncoder(), bytearray()
    for event in events:
        if isinstance(event, RamPage):
            if event.data is None:
                out += ram.zero(event.block, event.offset, event.fill)
            else:
                out += ram.page(event.block, event.offset, event.data)
        elif isinstance(event, EndOfSection):
            out += ram.end()
        else:
            if isinstance(event, Package):
                ram.forget()
            out += event.encode()  # type: ignore[union-attr]
    return bytes(out)
