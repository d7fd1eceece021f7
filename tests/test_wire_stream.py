"""The codec of the migration stream: known bytes, any cut, any break."""

from __future__ import annotations

import hashlib

import pytest

from tests import streams
from tests.streams import encode, h, read
from vhostpc.errors import LocalProtocolError
from vhostpc.wire import elements as el
from vhostpc.wire.elements import RunKind
from vhostpc.wire.ramrec import EndOfSection, RamDecoder, RamPage
from vhostpc.wire.split import read_package
from vhostpc.wire.stream import RamMode, StreamReader

BLOCKS = (el.BlockInfo("ram0", 0x3000), el.BlockInfo("rom0", 0x1000))
CLOCK = el.DeviceSection(9, "clk", 0, 1, h("deadbeef"))
TOY = [el.Header(), el.Configuration("toyvm")]
SETUP = [el.SectionStart(7), el.RamBlocks(BLOCKS), el.Footer(7)]
RUNS = [
    el.SectionPart(7),
    el.RamRun("ram0", 0, 1, RunKind.DATA),
    el.RamRun("ram0", 0x1000, 1, RunKind.ZERO),
    EndOfSection(),
    el.Footer(7),
]
PRECOPY = [
    *TOY, *SETUP, *RUNS,
    el.SectionEnd(7),
    el.RamRun("ram0", 0x2000, 1, RunKind.DATA),
    el.RamRun("rom0", 0, 1, RunKind.ZERO),
    EndOfSection(),
    el.Footer(7),
    CLOCK, el.EndOfStream(), el.VmDescription(streams.JSON),
]  # fmt: skip
POSTCOPY = [
    *TOY, el.OpenReturnPath(), el.Ping(1), el.PostcopyAdvise(0x1000, 0x1000), *SETUP, *RUNS,
    el.RamDiscard("ram0", ((0x1000, 0x2000),)), el.RamDiscard("rom0", ((0, 0x1000),)),
    el.Ping(2), el.Package(streams.BLOB), el.Ping(4),
    el.SectionPart(7), el.RamRun("ram0", 0x2000, 1, RunKind.DATA), EndOfSection(), el.Footer(7),
    el.SectionEnd(7), el.RamRun("ram0", 0x1000, 1, RunKind.DATA), el.RamRun("rom0", 0, 1, RunKind.ZERO),
    EndOfSection(), el.Footer(7), el.EndOfStream(),
]  # fmt: skip
STREAMS = {"precopy": (streams.PRECOPY, PRECOPY), "postcopy": (streams.POSTCOPY, POSTCOPY)}


def test_the_vectors_are_what_they_were() -> None:
    for data, digest in (
        (streams.PRECOPY, streams.PRECOPY_SHA),
        (streams.POSTCOPY, streams.POSTCOPY_SHA),
        (streams.RECOVERY, streams.RECOVERY_SHA),
    ):
        assert hashlib.sha256(data).hexdigest() == digest
    assert [len(s) for s in (streams.PRECOPY, streams.POSTCOPY, streams.RECOVERY)] == [8543, 12645, 4185]


@pytest.mark.parametrize("name", STREAMS)
def test_known_bytes_whole_and_byte_by_byte(name: str) -> None:
    data, expected = STREAMS[name]
    assert read(data) == expected
    assert read(data, cuts=range(len(data))) == expected


@pytest.mark.parametrize("name", STREAMS)
def test_bytes_behind_the_end_are_not_the_streams(name: str) -> None:
    data, expected = STREAMS[name]
    reader = StreamReader()
    assert list(reader.feed(data + b"QEVMmore")) == expected
    assert (reader.ended, reader.unread, reader.offset) == (True, 8, len(data))


def test_places() -> None:
    at = {type(e): e.offset for e in read(streams.POSTCOPY) if isinstance(e, el.At)}
    assert at[el.Configuration] == 8
    assert at[el.PostcopyAdvise] == 32
    assert at[el.RamBlocks] == 70
    assert at[el.Package] == 4318
    assert at[el.EndOfStream] == 12644
    at = {type(e): e.offset for e in read(streams.PRECOPY) if isinstance(e, el.At)}
    assert (at[el.DeviceSection], at[el.EndOfStream], at[el.VmDescription]) == (8354, 8380, 8381)


@pytest.mark.parametrize("name", STREAMS)
def test_encoded_again_it_is_the_same(name: str) -> None:
    data, _ = STREAMS[name]
    assert encode(read(data, StreamReader(RamMode.PAGES))) == data


def test_the_package() -> None:
    package = next(e for e in read(streams.POSTCOPY) if isinstance(e, el.Package))
    found = read_package(package)
    assert found == [el.PostcopyListen(), CLOCK, el.Ping(3), el.PostcopyRun()]
    assert [e.offset for e in found] == [4327, 4332, 4358, 4367]
    assert b"".join(e.encode() for e in found) == streams.BLOB


def test_recovery_goes_on_with_blocks_and_section() -> None:
    first = StreamReader()
    list(first.feed(streams.POSTCOPY[:8508]))
    for cuts in ((), range(len(streams.RECOVERY))):
        reader = StreamReader(RamMode.PAGES, continues=first)
        events = read(streams.RECOVERY, reader, cuts)
        assert events[:3] == [el.BitmapRequest("ram0"), el.BitmapRequest("rom0"), el.PostcopyResume()]
        assert events[4] == RamPage("ram0", 0x1000, streams.C)
        assert events[-1] == el.EndOfStream()
        assert reader.ended


def test_preempt_channel() -> None:
    """Bare records: the decoder of RAM records reads them."""
    data = h("0000000000002008 04 72616d30") + streams.B + h("0000000000001022 00 0000000000000010")
    assert list(RamDecoder({"ram0": 0x3000}).feed(data)) == [
        RamPage("ram0", 0x2000, streams.B), RamPage("ram0", 0x1000, None), EndOfSection(),
    ]  # fmt: skip


@pytest.mark.parametrize(("machine", "section"), [("pc-i440fx-7.2", 2), ("pc-i440fx-10.0", 1)])
def test_real_prefixes(machine: str, section: int) -> None:
    data = h("5145564d 00000003 07 000000") + bytes([len(machine)]) + machine.encode()
    data += h("08 0001 0000 08 0002 0004 00000001 08 0003 0010 0000000000001000 0000000000001000 01 000000")
    data += bytes([section]) + h("0372616d 00000000 00000004 0000000001082004 06") + b"pc.ram"
    data += h("0000000001000000")
    assert list(StreamReader().feed(data)) == [
        el.Header(), el.Configuration(machine), el.OpenReturnPath(), el.Ping(1),
        el.PostcopyAdvise(0x1000, 0x1000), el.SectionStart(section),
    ]  # fmt: skip


@pytest.mark.parametrize("footer", [False, True])
@pytest.mark.parametrize("step", [1, 7, 1 << 20])
@pytest.mark.parametrize("name", STREAMS)
def test_somebody_else_reads_the_pages(name: str, step: int, footer: bool) -> None:
    """At RAM data the reader rests, and goes on where the other one stopped."""
    data, expected = STREAMS[name]
    reader = StreamReader(RamMode.PAUSE)
    decoder = RamDecoder({block.name: block.length for block in BLOCKS})
    found: list[object] = []
    pages: list[RamPage] = []
    at = 0
    while not reader.ended:
        piece, at = data[at : at + step], at + step
        for event in reader.feed(piece):
            found.append(event)
        while reader.paused:
            with pytest.raises(LocalProtocolError):
                reader.resume(0)
            got = reader.hand_over()
            with pytest.raises(LocalProtocolError):
                reader.feed(b"more")
            begin, used = decoder.consumed, 0
            whole = got
            while True:
                done = False
                for record in decoder.feed(got):
                    if isinstance(record, EndOfSection):
                        done = True
                        break
                    pages.append(record)
                if done:
                    break
                got, at = data[at : at + step], at + step
                whole += got
            used = decoder.consumed - begin
            if footer:
                while len(whole) < used + 5:
                    whole, at = whole + data[at : at + step], at + step
                used += 5
            decoder = follow(decoder)
            reader.resume(used, whole[used:], footer=footer)
            found += reader.feed(b"")
    marks = (el.RamRun, EndOfSection, *((el.Footer,) if footer else ()))
    wanted = [e for e in expected if not isinstance(e, marks)]
    assert [e for e in found if not isinstance(e, (el.RamData, *marks))] == wanted
    assert [p.offset for p in pages if p.block == "ram0"][:3] == [0, 0x1000, 0x2000]


def follow(decoder: RamDecoder) -> RamDecoder:
    """The same channel, with nothing read ahead."""
    decoder._buffer.clear()
    return decoder
