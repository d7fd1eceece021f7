"""The codec of the migration stream: known bytes, any cut, any break."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.kit import streams
from tests.kit.streams import encode, h, read
from vhostpc.errors import LocalProtocolError, StreamError
from vhostpc.wire.migration import elements as el
from vhostpc.wire.migration import vmdesc
from vhostpc.wire.migration.elements import BadStream, RunKind
from vhostpc.wire.migration.ramrec import EndOfSection, RamDecoder, RamPage
from vhostpc.wire.migration.split import read_package, split
from vhostpc.wire.migration.stream import RamMode, StreamReader

BLOCKS = (el.BlockInfo("ram0", 0x3000), el.BlockInfo("rom0", 0x1000))
CLOCK = el.DeviceSection(9, "clk", 0, 1, h("deadbeef"))
TOY: list[el.StreamEvent] = [el.Header(), el.Configuration("toyvm")]
SETUP: list[el.StreamEvent] = [el.SectionStart(7), el.RamBlocks(BLOCKS), el.Footer(7)]
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
    """In precopy more could be a description that is the true one, until the stream is closed."""
    data, expected = STREAMS[name]
    reader = StreamReader()
    found = list(reader.feed(data + b"QEVMmore"))
    assert reader.may_end == (name == "precopy")
    assert [*found, *reader.eof()] == expected
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


# --- what is wrong, and where -----------------------------------------------------------------------

P, Q = streams.PRECOPY, streams.POSTCOPY
LISTEN, RUN, PING = h("08 0004 0000"), h("08 0005 0000"), h("08 0002 0004 00000003")


def patch(data: bytes, at: int, new: str | bytes, old: int | None = None) -> bytes:
    """``data`` with ``new`` in the place of ``old`` bytes (as many as are new, unless told) at ``at``."""
    raw = h(new) if isinstance(new, str) else new
    return data[:at] + raw + data[at + (len(raw) if old is None else old) :]


def packaged(blob: bytes) -> bytes:
    return patch(Q, 4318, h("08 0007 0004") + len(blob).to_bytes(4, "big") + blob, 54)


WRONG = {
    "not a stream": (patch(P, 0, "52"), 0, "does not begin with QEVM"),
    "old version": (patch(P, 7, "02"), 4, "version 2, not 3"),
    "no configuration": (patch(P, 8, "02"), 8, "no configuration behind the header"),
    "a machine type of 2.3": (patch(P, 8, "01"), 8, "a machine type of QEMU 2.3 or before, which is not accepted"),
    "configuration twice": (patch(P, 18, streams.CONFIGURATION, 0), 18, "a second configuration"),
    "machine without a name": (patch(P, 9, "00000000"), 9, "a machine type of 0 bytes"),
    "machine of any length": (patch(P, 9, "ffffffff"), 9, "a machine type of 4294967295 bytes"),
    "unknown configuration": (patch(P, 18, "05 01 78 00000001", 0), 18, "configuration 'x', which is unknown"),
    "too many capabilities": (
        patch(P, 18, b"\x05\x1aconfiguration/capabilities" + h("00000001 00010000"), 0), 18, "65536 capabilities",
    ),
    "mapped-ram": (
        patch(P, 18, b"\x05\x1aconfiguration/capabilities" + h("00000001 00000001 0a") + b"mapped-ram", 0),
        65, "RAM in the mapped-ram format",
    ),
    "unknown element": (patch(P, 18, "09"), 18, "0x09, which begins no element"),
    "footer alone": (patch(P, 18, "7e"), 18, "a footer without its section"),
    "description too early": (patch(P, 18, "06"), 18, "a description before the end"),
    "RAM of version 3": (patch(P, 34, "03"), 18, "instance 0 and version 3"),
    "RAM of instance 1": (patch(P, 30, "01"), 18, "instance 1 and version 4"),
    "another that comes in parts": (patch(P, 24, b"rom"), 18, "section 'rom' comes in parts"),
    "a section without a name": (patch(P, 23, "00"), 23, "name is empty"),
    "RAM starts twice": (patch(P, 82, streams.SETUP, 0), 82, "RAM starts a second time"),
    "no list of blocks": (patch(P, 42, "08"), 35, "flags 0x8, not with its list"),
    "a block without a name": (patch(P, 43, "00"), 43, "a RAM block without a name"),
    "a block twice": (patch(P, 57, b"ram0"), 56, "RAM block 'ram0' is listed twice"),
    "blocks longer than all": (patch(P, 54, "50"), 48, "of 20 KiB, where 16 KiB of 16 KiB"),
    "half a page": (patch(P, 55, "01"), 48, "of 12289 bytes"),
    "pages in the list": (patch(P, 76, "08"), 69, "word 0x8 behind the list"),
    "no footer": (patch(P, 77, "04"), 77, "0x04, where the footer of section 7 belongs"),
    "footer of another": (patch(P, 81, "08"), 77, "the footer of section 8, not of 7"),
    "part of another": (patch(P, 86, "08"), 82, "a part of section 8, which never started"),
    "unknown flags": (patch(P, 94, "04"), 87, "a RAM record with flags 0x4"),
    "two kinds": (patch(P, 94, "0a"), 87, "a RAM record with flags 0xa"),
    "end with an address": (patch(P, 93, "10 10"), 87, "a RAM record with flags 0x10"),
    "a page of no block": (patch(P, 94, "28"), 87, "none was named before"),
    "a page of another block": (patch(P, 96, b"ramX"), 87, "block 'ramX', which was not listed"),
    "a page behind the block": (patch(P, 93, "30"), 87, "at 0x3000 of block 'ram0', which has 0x3000"),
    "XBZRLE of another kind": (patch(P, 87, "0000000000000040 04 72616d30 02 0001", 13), 87, "of encoding 2"),
    "XBZRLE too long": (patch(P, 87, "0000000000000040 04 72616d30 01 1001", 13), 87, "'xbzrle' of 4097 bytes"),
    "compressed too long": (
        patch(P, 87, "0000000000000100 04 72616d30 0000100f", 13), 87, "'compressed' of 4111 bytes",
    ),
    "device of another name": (patch(P, 8360, b"clX"), 8354, "section 'clX' instance 0, where"),
    "device of another version": (patch(P, 8370, "02"), 8354, "of version 2, of 1 by the description"),
    "device one byte short": (patch(P, 8371, b"", 1), 8375 - 1 + 1, "no footer behind the 4 bytes"),
    "device's footer": (patch(P, 8379, "08"), 8375, "no footer behind the 4 bytes"),
    "a description that does not come": (patch(P, 8382, "7fffffff"), 8543, "ends inside the description"),
    "half of a description": (P[:8383], 8383, "ends inside the description"),
    "RAM among the devices": (patch(P, 8380, "02 00000007", 0), 8354, "has no footer that"),
    "command 0": (patch(Q, 20, "00"), 18, "command 0 is unknown"),
    "command 12": (patch(Q, 20, "0c"), 18, "command 12 is unknown"),
    "a longer command": (patch(Q, 22, "01 00", 1), 18, "OPEN_RETURN_PATH with 1 bytes"),
    "a short ping": (patch(Q, 27, "03", 2), 23, "PING with 3 bytes"),
    "ping before the return path": (patch(Q, 18, b"", 5), 18, "a PING before OPEN_RETURN_PATH"),
    "half an advice": (patch(Q, 36, "08", 9), 32, "POSTCOPY_ADVISE with 8 bytes"),
    "advised twice": (patch(Q, 53, Q[32:53], 0), 53, "POSTCOPY_ADVISE again"),
    "advised late": (patch(P, 82, Q[32:53], 0), 82, "POSTCOPY_ADVISE behind the start of RAM"),
    "discard of version 1": (patch(Q, 4258, "01"), 4253, "in an unknown version"),
    "discard without a block": (patch(Q, 4259, "00"), 4253, "without the name of a block"),
    "discard without a terminator": (patch(Q, 4264, "01"), 4253, "without the name of a block"),
    "discard of nothing": (patch(Q, 4257, "07", 24 - 16 + 16), 4253, "POSTCOPY_RAM_DISCARD"),
    "discard of another block": (patch(Q, 4260, b"ramX"), 4253, "'ramX', which was not listed"),
    "discard of a part of a page": (patch(Q, 4272, "01"), 4253, "not whole pages"),
    "discard of no bytes": (patch(Q, 4279, "00"), 4253, "not whole pages"),
    "discard behind the block": (patch(Q, 4279, "30"), 4253, "0x3000 bytes at 0x1000 of 'ram0', which has"),
    "discard unadvised": (patch(P, 82, Q[4253:4281], 0), 82, "POSTCOPY_RAM_DISCARD without ADVISE"),
    "discard behind the package": (patch(Q, 4372, Q[4253:4281], 0), 4372, "behind the package"),
    "listen outside": (patch(Q, 4318, LISTEN, 0), 4318, "POSTCOPY_LISTEN outside a package"),
    "run outside": (patch(Q, 4318, RUN, 0), 4318, "POSTCOPY_RUN outside a package"),
    "package unadvised": (patch(P, 82, Q[4318:4372], 0), 82, "a package without ADVISE"),
    "package twice": (patch(Q, 4372, Q[4318:4372], 0), 4372, "a second package"),
    "package of wrong length": (patch(Q, 4322, "05"), 4318, "PACKAGED with 5 bytes"),
    "device behind the package": (patch(Q, 4372, streams.CLOCK, 0), 4372, "a device section behind the package"),
    "delta in postcopy": (patch(Q, 4393, "40"), 4386, "flags 0x40 in postcopy"),
    "package without LISTEN": (packaged(streams.CLOCK + RUN), 4353, "POSTCOPY_RUN without POSTCOPY_LISTEN"),
    "LISTEN twice": (packaged(LISTEN + LISTEN + RUN), 4332, "POSTCOPY_LISTEN again"),
    "advised in a package": (packaged(LISTEN + Q[32:53] + RUN), 4332, "PostcopyAdvise, which is not allowed"),
    "discard in a package": (packaged(LISTEN + Q[4253:4281] + RUN), 4332, "RamDiscard, which is not allowed"),
    "colo in a package": (packaged(LISTEN + h("08 0008 0000") + RUN), 4332, "EnableColo, which is not allowed"),
    "an end in a package": (packaged(LISTEN + streams.CLOCK + b"\0"), 4358, "the end of the stream inside a package"),
    "package without RUN": (packaged(LISTEN + streams.CLOCK), 4358, "ends without POSTCOPY_RUN"),
    "package in a package": (packaged(LISTEN + h("08 0007 0004 00000000")), 4332, "where none is allowed"),
    "no footer in a package": (packaged(LISTEN + streams.CLOCK[:-1] + b"\x08" + RUN), 4332, "has no footer"),
    "unknown in a package": (packaged(LISTEN + h("08 000c 0000") + RUN), 4332, "command 12 is unknown"),
}  # fmt: skip


def read_all(data: bytes, reader: StreamReader | None = None, cuts: range | tuple[int, ...] = ()) -> None:
    for event in read(data, reader, cuts):
        if isinstance(event, el.Package):
            read_package(event)
        elif isinstance(event, el.VmDescription) and event.disagrees is not None:
            raise event.disagrees


def test_a_limit_that_is_given() -> None:
    with pytest.raises(BadStream, match="a package of 67108865 bytes, at most 67108864") as caught:
        read_all(patch(Q, 4323, "04000001"), StreamReader(limit=64 << 20))
    assert caught.value.offset == 4318


@pytest.mark.parametrize("name", WRONG)
def test_the_first_wrong_byte_is_named(name: str) -> None:
    data, offset, text = WRONG[name]
    with pytest.raises(BadStream, match=re.escape(text)) as whole:
        read_all(data)
    with pytest.raises(BadStream) as bytewise:
        read_all(data, cuts=range(len(data)))
    assert str(bytewise.value) == str(whole.value)
    if offset is not None:
        assert whole.value.offset == offset
    assert f"byte {whole.value.offset} " in str(whole.value)


@pytest.mark.parametrize("name", STREAMS)
def test_cut_anywhere_it_says_where(name: str) -> None:
    data, expected = STREAMS[name]
    whole = {"precopy": {8381, 8543}, "postcopy": {12645}}[name]
    # Inside pages one place is as good as another.
    cuts = [i for i in range(len(data)) if i < 110 or i > len(data) - 260 or i % 97 == 0 or 4190 < i < 4400]
    for cut in [*cuts, len(data)]:
        if cut in whole:
            read_all(data[:cut])
            continue
        with pytest.raises(BadStream) as wrong:
            read_all(data[:cut])
        assert wrong.value.offset <= cut
        assert wrong.value.offset in (cut, 8354)


def test_an_error_is_final() -> None:
    reader = StreamReader()
    for _ in range(2):
        with pytest.raises(BadStream, match="QEVM"):
            list(reader.feed(b"QEMU"))


def test_a_body_that_looks_like_footers() -> None:
    """Bytes of a body that look like its end are none if what follows cannot be read."""
    body = h("7e 00000009 04 00000009 03") + b"clk\xff"
    tricky = el.DeviceSection(9, "clk", 0, 1, body).encode()
    found = split(tricky + b"\0", 0)
    assert found.elements == [el.DeviceSection(9, "clk", 0, 1, body), el.EndOfStream()]
    assert (found.end, found.doubt) == (38, None)


def test_a_description_that_does_not_fit_is_not_needed() -> None:
    data = P.replace(b'"size": 4', b'"size": 5')
    events = read(data)
    assert events[:-1] == PRECOPY[:-1]
    assert isinstance(events[-1], el.VmDescription)
    assert events[-1].disagrees is not None
    assert events[-1].disagrees.offset == 8376


@pytest.mark.parametrize(
    ("fields", "size"),
    [
        ('"fields": [{"size": 2, "array_len": 3}, {"size": 1}]', 7),
        ('"size": 12, "fields": []', 12),
        ('"fields": [{"size": 2, "struct": {"fields": [{"size": 2}]}}]', 2),
        ('"fields": [], "subsections": [{"vmsd_name": "clk/more", "fields": [{"size": 3}]}]', 17),
    ],
)
def test_lengths_in_a_description(fields: str, size: int) -> None:
    body = bytes(size)
    text = f'{{"devices": [{{"name": "clk", "instance_id": 0, "version": 1, {fields}}}]}}'.encode()
    section = el.DeviceSection(9, "clk", 0, 1, body)
    data = P[:8354] + section.encode() + b"\0" + el.VmDescription(text).encode()
    events = read(data)
    assert events[-3] == section
    assert isinstance(events[-1], el.VmDescription)
    assert events[-1].disagrees is None


DEEP = '{"name": "clk", "fields": [], "subsections": [' + '{"vmsd_name": "x", "subsections": [' * 40


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{]}", "the description is not JSON"),
        ('{"devices": ' + "[" * 100_000 + "}", "the description is not JSON"),
        ('{"devices": [' + "9" * 100_000 + "]}", "the description is not JSON"),
        ('{"page_size": 4096}', "lists no devices"),
        ('{"devices": {}}', "'devices' is not a list of objects"),
        ('{"devices": [{"name": 1}]}', "no 'name' where one belongs"),
        ('{"devices": [{"name": "clk", "fields": [{"size": -1}]}]}', "no sensible 'size'"),
        ('{"devices": [{"name": "clk", "fields": [{"size": true}]}]}', "no sensible 'size'"),
        ('{"devices": [{"name": "clk", "fields": [{}]}]}', "no sensible 'size'"),
        ('{"devices": [{"name": "clk", "size": 1e9}]}', "no sensible 'size'"),
        ('{"devices": [{"name": "clk", "size": 10000000000000}]}', "no sensible 'size'"),
        ('{"devices": [{"name": "clk", "instance_id": "0", "size": 4}]}', "no sensible 'instance_id'"),
        ('{"devices": [' + DEEP + "]}" * 41 + "]}", "nested too deeply"),
    ],
)
def test_a_description_that_is_none(text: str, reason: str) -> None:
    """The sections are found without it, and what is wrong with it is told."""
    with pytest.raises(StreamError, match=reason):
        vmdesc.parse(text.encode())
    events = read(P[:8381] + el.VmDescription(text.encode()).encode())
    assert events[:-1] == PRECOPY[:-1]
    assert isinstance(events[-1], el.VmDescription)
    assert events[-1].disagrees is not None
    assert events[-1].disagrees.offset == 8381
    assert reason in events[-1].disagrees.reason


@pytest.mark.parametrize("size", [None, 0x200000])
@pytest.mark.parametrize("last", [False, True])
def test_blocks_that_name_their_page_size(size: int | None, last: bool) -> None:
    big = el.BlockInfo("mem", 0x400000, size)
    blocks = (el.BlockInfo("rom", 0x1000), big) if last else (big, el.BlockInfo("rom", 0x1000))
    wanted: list[el.StreamEvent] = [
        *TOY, el.PostcopyAdvise(0x201000, 0x1000), el.SectionStart(1), el.RamBlocks(blocks, True), el.Footer(1),
    ]  # fmt: skip
    data = encode(wanted)
    for step in (1, len(data)):
        reader = StreamReader()
        assert [e for i in range(0, len(data), step) for e in reader.feed(data[i : i + step])] == wanted


def test_shared_blocks_that_stay() -> None:
    wanted: list[el.StreamEvent] = [
        el.Header(), el.Configuration("toyvm", 12, ("x-ignore-shared",), bytes(range(16))), el.SectionStart(1),
        el.RamBlocks((el.BlockInfo("mem", 0x1000, None, 1 << 32),)), el.Footer(1), el.SwitchoverStart(),
        el.EnableColo(),
    ]  # fmt: skip
    assert list(StreamReader().feed(encode(wanted))) == wanted


def test_device_sections_are_bounded() -> None:
    """Nothing is kept beyond the limit, however long a source goes on."""
    reader = StreamReader(limit=1 << 20)
    list(reader.feed(P[:8354]))
    head, fed = h("04 00000009 03636c6b 00000000 00000001"), 0

    def feed(data: bytes) -> bool:
        try:
            list(reader.feed(data))
        except BadStream:
            return False
        return True

    while feed(head + bytes(1 << 16)):
        fed += 1 << 16
    with pytest.raises(BadStream, match="more than 1048576 bytes of device sections"):
        list(reader.feed(b""))
    assert fed <= (1 << 20) + vmdesc.MAX_DESCRIPTION + (1 << 17)


def zeros(*words: int, fills: bytes) -> bytes:
    """The toy machine's stream with one last part of ZERO records in ram0 instead of the others."""
    first, *more = words
    records = (first | 0x02).to_bytes(8, "big") + h("04 72616d30") + fills[:1]
    for word, fill in zip(more, fills[1:], strict=True):
        records += (word | 0x22).to_bytes(8, "big") + bytes([fill])
    return P[:82] + h("03 00000007") + records + streams.END_OF_PART + P[8354:]


def test_runs_end_where_pages_differ() -> None:
    events = read(zeros(0, 0x1000, 0x2000, 0x1000, fills=bytes([0, 0, 7, 7])))
    assert [e for e in events if isinstance(e, el.RamRun)] == [
        el.RamRun("ram0", 0, 2, RunKind.ZERO),
        el.RamRun("ram0", 0x2000, 1, RunKind.ZERO, 7),
        el.RamRun("ram0", 0x1000, 1, RunKind.ZERO, 7),
    ]


@pytest.mark.parametrize("step", [1, 7, 1 << 20])
def test_each_page_by_itself(step: int) -> None:
    """With the byte where it begins, and at that moment the byte where it ends."""
    reader = StreamReader(RamMode.EACH)
    found = []
    for at in range(0, len(streams.POSTCOPY), step):
        for event in reader.feed(streams.POSTCOPY[at : at + step]):
            if isinstance(event, el.RamRun):
                found.append((event.block, event.start, event.pages, event.offset, reader.offset))
    assert found == [
        ("ram0", 0, 1, 122, 4231),
        ("ram0", 0x1000, 1, 4231, 4240),
        ("ram0", 0x2000, 1, 4386, 8495),
        ("ram0", 0x1000, 1, 8513, 12617),
        ("rom0", 0, 1, 12617, 12631),
    ]


def test_the_form_of_pages_may_be_changed() -> None:
    """From the next section on."""
    reader = StreamReader()
    pages = h("0000000000000022 00") + h("0000000000001022 00")
    first = h("02 00000007 0000000000002002 04 72616d30 00") + pages + streams.END_OF_PART
    second = h("02 00000007") + pages + streams.END_OF_PART
    list(reader.feed(streams.HEADER + streams.CONFIGURATION + streams.SETUP))
    runs = [event.pages for event in reader.feed(first) if isinstance(event, el.RamRun)]
    reader.ram = RamMode.EACH
    each = [event.pages for event in reader.feed(second) if isinstance(event, el.RamRun)]
    assert (runs, each) == ([1, 2], [1, 1])


def test_a_run_ends_with_its_block() -> None:
    data = zeros(0, 0x1000, 0x2000, 0x3000, fills=bytes(4))
    with pytest.raises(BadStream, match="at 0x3000 of block 'ram0', which has 0x3000 bytes") as wrong:
        read(data)
    assert wrong.value.offset == 87 + 14 + 2 * 9
    # Elements before the wrong byte are reported.
    assert seen(data)[-1] == el.RamRun("ram0", 0, 3, RunKind.ZERO)


def seen(data: bytes) -> list[el.StreamEvent]:
    """The events before the wrong byte."""
    found: list[el.StreamEvent] = []
    reader = StreamReader()
    with contextlib.suppress(BadStream):
        for event in reader.feed(data):
            found.append(event)
    return found


NAMES = st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), min_size=1, max_size=20)
OFFSETS = st.integers(0, 2).map(lambda page: page * 4096)
RECORDS = st.one_of(
    st.builds(RamPage, st.just("ram0"), OFFSETS, st.sampled_from([streams.A, streams.B])),
    st.builds(RamPage, st.sampled_from(["ram0", "rom0"]), st.just(0), st.none()),
    st.builds(RamPage, st.just("rom0"), st.just(0), st.none(), st.integers(0, 255)),
)
PARTS = st.lists(RECORDS, max_size=4)
SECTIONS = st.lists(
    st.builds(
        el.DeviceSection, st.integers(8, 1 << 20), NAMES, st.integers(0, 3), st.integers(0, 9), st.binary(max_size=99)
    ),
    min_size=1, max_size=5, unique_by=(lambda s: s.section_id, lambda s: (s.idstr, s.instance)),
)  # fmt: skip


BREAK = st.tuples(st.integers(0, 60_000), st.binary(max_size=4), st.integers(0, 4))


def wrong_at(data: bytes, reader: StreamReader) -> int:
    """Where it is wrong, 0 if it is not; any other exception than BadStream is a failure."""
    try:
        read_all(data, reader)
    except BadStream as wrong:
        return wrong.offset
    return 0


@st.composite
def whole_streams(draw: st.DrawFn) -> list[el.StreamEvent]:
    events: list[el.StreamEvent] = [el.Header(), el.Configuration(draw(NAMES))]
    postcopy = draw(st.booleans())
    if postcopy or draw(st.booleans()):
        events += [el.OpenReturnPath(), el.Ping(draw(st.integers(0, 0xFFFFFFFF)))]
    if postcopy:
        events.append(el.PostcopyAdvise(0x1000, 0x1000))
    events += SETUP

    def parts() -> None:
        for records in draw(st.lists(PARTS, max_size=2)):
            events.extend([el.SectionPart(7), *records, EndOfSection(), el.Footer(7)])

    parts()
    sections = draw(SECTIONS)
    if postcopy:
        events.append(el.RamDiscard("ram0", ((0, 0x1000),)))
        inner = b"".join(s.encode() for s in sections)
        events.append(el.Package(LISTEN + inner + PING + RUN))
        parts()
    events += [el.SectionEnd(7), *draw(PARTS), EndOfSection(), el.Footer(7)]
    if not postcopy:
        events += sections
    events.append(el.EndOfStream())
    if not postcopy and draw(st.booleans()):
        devices = [{"name": s.idstr, "instance_id": s.instance, "size": len(s.body)} for s in sections]
        events.append(el.VmDescription(json.dumps({"devices": devices}).encode()))
    return events


@settings(deadline=None)
@given(events=whole_streams(), cuts=st.lists(st.integers(0, 60_000), max_size=8))
def test_round_trip_in_any_pieces(events: list[el.StreamEvent], cuts: list[int]) -> None:
    data = encode(events)
    found = read(data, StreamReader(RamMode.PAGES), cuts)
    assert found == events
    for event in found:
        if isinstance(event, el.Package):
            assert b"".join(e.encode() for e in read_package(event)) == event.blob


@settings(deadline=None)
@given(events=whole_streams(), cuts=st.lists(st.integers(0, 60_000), max_size=8))
def test_runs_are_the_pages_in_any_pieces(events: list[el.StreamEvent], cuts: list[int]) -> None:
    data = encode(events)
    runs = read(data, StreamReader(), cuts)
    assert runs == read(data)
    spread = [
        (run.block, run.start + i * 4096, run.kind is RunKind.DATA, run.fill)
        for run in runs
        if isinstance(run, el.RamRun)
        for i in range(run.pages)
    ]
    assert spread == [
        (p.block, p.offset, p.data is not None, p.fill) for p in events if isinstance(p, RamPage)
    ]


@settings(deadline=None)
@given(
    events=whole_streams(),
    breaks=st.lists(BREAK, min_size=1, max_size=3),
    mode=st.sampled_from([RamMode.RUNS, RamMode.PAGES]),
)  # fmt: skip
@example(events=[], breaks=[(0, b"", 0)], mode=RamMode.RUNS)
def test_whatever_is_broken_it_is_a_stream_error(
    events: list[el.StreamEvent], breaks: list[tuple[int, bytes, int]], mode: RamMode
) -> None:
    data = encode(events)
    for at, new, old in breaks:
        at %= len(data) + 1
        data = data[:at] + new + data[at + old :]
    assert wrong_at(data, StreamReader(mode)) <= len(data)


@settings(deadline=None)
@given(data=st.binary(max_size=400), begin=st.sampled_from([0, 8, 18, 82, 8354, 8381]))
def test_noise_is_a_stream_error(data: bytes, begin: int) -> None:
    assert wrong_at(P[:begin] + data, StreamReader()) <= begin + len(data)
