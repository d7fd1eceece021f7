"""Device sections, whose ends nobody tells: all that a stock QEMU takes is read, whatever a guest wrote into them."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.kit import streams
from tests.kit.streams import h, read
from vhostpc.wire.migration import elements as el
from vhostpc.wire.migration import vmdesc
from vhostpc.wire.migration.elements import BadStream, DeviceSection
from vhostpc.wire.migration.split import Inside, read_package, split, split_package
from vhostpc.wire.migration.stream import StreamReader

CLOCK = DeviceSection(9, "clk", 0, 1, h("deadbeef"))
OTHER = DeviceSection(10, "dma", 1, 2, b"")
LISTEN, PING, RUN = el.PostcopyListen(), el.Ping(3), el.PostcopyRun()
BEFORE = streams.PRECOPY[: -len(streams.CLOCK) - 6 - len(streams.JSON)]  # up to the first device section
SETUP_ENDS = 82


def package(*elements: Inside | bytes) -> el.Package:
    return el.Package(
        b"".join(each if isinstance(each, bytes) else each.encode() for each in elements), start=100
    )


def described(sections: Sequence[DeviceSection]) -> bytes:
    """The JSON of these sections, as QEMU writes it."""
    devices = [
        {"name": s.idstr, "instance_id": s.instance, "version": s.version, "size": len(s.body)}
        for s in sections
    ]
    return json.dumps({"page_size": 4096, "devices": devices}).encode()


def precopy(sections: Sequence[DeviceSection], text: bytes | None = None, tail: bytes = b"") -> bytes:
    data = BEFORE + b"".join(section.encode() for section in sections) + b"\0"
    return data + el.VmDescription(described(sections) if text is None else text).encode() + tail


def sections_of(events: Sequence[el.StreamEvent]) -> list[DeviceSection]:
    return [event for event in events if isinstance(event, DeviceSection)]


# --- in a package


def test_a_section_may_come_twice() -> None:
    """Two network back-ends of one kind have one name and number in QEMU 7.2."""
    again = DeviceSection(11, "clk", 0, 1, b"other")
    inside: list[Inside] = [LISTEN, CLOCK, again, PING, RUN]
    found = split_package(package(*inside))
    assert found.elements == inside
    assert found.doubt is None
    assert sections_of(read(precopy([CLOCK, again]))) == [CLOCK, again]


@pytest.mark.parametrize("twice", [CLOCK, DeviceSection(9, "dma", 0, 1, b"")])
def test_an_id_may_come_twice(twice: DeviceSection) -> None:
    """No QEMU sends it: both may be taken for one, which is the same bytes."""
    whole = package(LISTEN, CLOCK, twice, PING, RUN)
    found = split_package(whole)
    assert b"".join(each.encode() for each in found.elements) == whole.blob
    assert found.doubt is not None
    assert sections_of(read(precopy([CLOCK, twice]))) == [CLOCK, twice]  # the description knows


def test_what_stands_behind_run_is_not_read() -> None:
    for tail in (PING.encode(), b"junk", b"\x04", CLOCK.encode(), b"\0"):
        whole = package(LISTEN, CLOCK, PING, RUN, tail)
        found = split_package(whole)
        assert found.elements == [LISTEN, CLOCK, PING, RUN]
        assert found.end == 100 + len(whole.blob) - len(tail)


def test_listen_may_come_later() -> None:
    inside: list[Inside] = [CLOCK, LISTEN, OTHER, PING, RUN]
    assert read_package(package(*inside)) == inside


@pytest.mark.parametrize(
    "command", [el.OpenReturnPath(), el.PostcopyResume(), el.BitmapRequest("ram0"), el.SwitchoverStart()]
)
def test_commands_that_mean_nothing_here(command: Inside) -> None:
    inside: list[Inside] = [LISTEN, CLOCK, command, PING, RUN]
    assert read_package(package(*inside)) == inside


FOOTER = el.Footer(9).encode()
FORGED = {
    "a section": DeviceSection(9, "cld", 0, 1, b"").encode()[:-5],
    "a ping": el.Ping(5).encode() + CLOCK.encode()[:-9],
    "the end of the package": RUN.encode() + CLOCK.encode()[:-9],
    "a section of another device": OTHER.encode() + CLOCK.encode()[:-9],
}


@pytest.mark.parametrize("what", FORGED)
def test_what_a_guest_writes_hides_nothing(what: str) -> None:
    """A body that goes on like the stream: the bytes that are sent on are the same, and so are the commands."""
    body = h("cafe") + FOOTER + FORGED[what] + h("deadbeef")
    whole = package(LISTEN, DeviceSection(9, "clk", 0, 1, body), OTHER, PING, RUN)
    found = split_package(whole)
    assert b"".join(each.encode() for each in found.elements) == whole.blob
    assert [each for each in found.elements if not isinstance(each, DeviceSection)] == [LISTEN, PING, RUN]
    assert found.doubt is not None  # it is told


PIECES = st.sampled_from(
    [
        *(b"", b"\0", b"\x04", b"\x7e", FOOTER, el.Footer(10).encode(), CLOCK.encode(), OTHER.encode()[:-5]),
        *(CLOCK.encode()[:-9], LISTEN.encode(), PING.encode(), RUN.encode(), h("08 000c 0000"), b"\x08\x00"),
    ]
)
BODIES = st.lists(PIECES, max_size=6).map(b"".join)


@settings(deadline=None)
@given(bodies=st.lists(BODIES, min_size=1, max_size=3))
@example(bodies=[FOOTER + CLOCK.encode() + FOOTER])
@example(bodies=[FOOTER + PING.encode() + CLOCK.encode()[:-5], FOOTER])
def test_any_body(bodies: list[bytes]) -> None:
    devices = [DeviceSection(9 + i, f"dev{i}", 0, 1, body) for i, body in enumerate(bodies)]
    whole = package(LISTEN, *devices, PING, RUN)
    found = split_package(whole)
    assert b"".join(each.encode() for each in found.elements) == whole.blob
    commands = [each for each in found.elements if not isinstance(each, DeviceSection)]
    assert commands == [LISTEN, PING, RUN]
    if found.doubt is None:
        assert found.elements == [LISTEN, *devices, PING, RUN]


def test_many_ways_are_not_many_steps() -> None:
    """Each forged section could end at each forged footer behind it."""
    inner = FOOTER + DeviceSection(9, "clk", 0, 1, b"").encode()[:-5]
    device = DeviceSection(9, "clk", 0, 1, inner * 20_000)
    whole = package(LISTEN, device, PING, RUN)
    found = split_package(whole)
    assert b"".join(each.encode() for each in found.elements) == whole.blob


# --- before the pages


EARLY = DeviceSection(60, "0000:00:02.0/virtio-mem-device-early", 0, 1, bytes(range(40)))


@pytest.mark.parametrize("step", [1, 7, 1 << 20])
@pytest.mark.parametrize("place", [18, SETUP_ENDS], ids=["before RAM", "behind its list"])
def test_sections_that_come_early(place: int, step: int) -> None:
    """A virtio-mem tells its size before its pages come; the description has it first."""
    data = precopy([CLOCK], described([EARLY, CLOCK]))
    data = data[:place] + EARLY.encode() + data[place:]
    events = read(data, cuts=range(0, len(data), step))
    assert sections_of(events) == [EARLY, CLOCK]
    assert sections_of(events)[0].offset == place
    assert isinstance(events[-1], el.VmDescription)
    assert events[-1].disagrees is None


@pytest.mark.parametrize("follows", ["part", "end", "command", "section"])
def test_an_early_section_ends_where_something_begins(follows: str) -> None:
    """Not at the first bytes that look like its footer."""
    tricky = DeviceSection(
        60, "early", 0, 1, el.Footer(60).encode() + b"\x02\0\0\0\x08" + el.Footer(60).encode()
    )
    rest = {
        "part": b"",
        "end": b"",
        "command": el.SwitchoverStart().encode(),
        "section": EARLY.encode(),
    }[follows]
    data = precopy([CLOCK])
    if follows == "end":
        data = data[:SETUP_ENDS] + data[data.index(h("03 00000007")) :]
        data = data.replace(h("0000000000002028"), h("0000000000002008 04 72616d30"))
    data = data[:SETUP_ENDS] + tricky.encode() + rest + data[SETUP_ENDS:]
    assert sections_of(read(data))[0] == tricky


def test_an_early_section_that_does_not_end() -> None:
    reader = StreamReader(limit=1 << 16)
    list(reader.feed(BEFORE[:SETUP_ENDS]))
    with pytest.raises(BadStream, match="'early' has no footer within 65536 bytes"):
        list(reader.feed(DeviceSection(60, "early", 0, 1, bytes(1 << 17)).encode()[:-5]))


def test_early_sections_that_the_description_does_not_have() -> None:
    data = precopy([CLOCK])
    events = read(data[:SETUP_ENDS] + EARLY.encode() + data[SETUP_ENDS:])
    assert sections_of(events) == [EARLY, CLOCK]
    assert isinstance(events[-1], el.VmDescription)
    assert events[-1].disagrees is not None
    assert "virtio-mem-device-early" in str(events[-1].disagrees)


# --- at the end


@pytest.mark.parametrize(
    "text", [b"", b"{nonsense", b"{]}", b"{}", b"x" * 1000, b"{" + b" " * (vmdesc.MAX_DESCRIPTION + 1) + b"}"]
)
@pytest.mark.parametrize("closed", [False, True])
def test_any_description_is_taken(text: bytes, closed: bool) -> None:
    """QEMU drops it unread; what is wrong with it is told."""
    reader = StreamReader()
    data = precopy([CLOCK], text)
    events = list(reader.feed(data))
    if closed:
        events += reader.eof()
    assert reader.ended
    assert sections_of(events) == [CLOCK]
    assert isinstance(events[-1], el.VmDescription)
    assert events[-1].text == text
    assert events[-1].disagrees is not None


@pytest.mark.parametrize("tail", [b"abc", b"\0", b"\x06", b"\x06\0\0\0\x02{}", CLOCK.encode()])
def test_bytes_behind_the_description(tail: bytes) -> None:
    """They may be more of the stream, so the end waits for what else comes, or for the stream to be closed."""
    reader = StreamReader()
    events = list(reader.feed(precopy([CLOCK], tail=tail)))
    assert not reader.ended
    assert reader.may_end
    events += reader.eof()
    assert sections_of(events) == [CLOCK]
    assert (reader.ended, reader.unread) == (True, len(tail))


@pytest.mark.parametrize("tail", [b"\x09junk", b"\0", b"\x7e"])
def test_what_is_no_description(tail: bytes) -> None:
    reader = StreamReader()
    events = list(reader.feed(BEFORE + CLOCK.encode() + b"\0" + tail))
    assert not reader.may_end
    events += reader.eof()
    assert sections_of(events) == [CLOCK]
    assert (reader.ended, reader.unread) == (True, len(tail))


@pytest.mark.parametrize("step", [1, 13, 1 << 20])
@pytest.mark.parametrize("forged", ["whole", "longer than all", "cut"])
def test_an_end_that_a_guest_has_written(forged: str, step: int) -> None:
    """The true one has nothing behind it."""
    body = b"\x2a\x2a"
    text = described([DeviceSection(9, "clk", 0, 1, body)])
    size = {"whole": len(text), "longer than all": 1 << 20, "cut": len(text) + 30}[forged]
    fake = b"\0\x06" + size.to_bytes(4, "big") + text
    device = DeviceSection(9, "clk", 0, 1, body + FOOTER + fake + bytes(100))
    data = precopy([device, OTHER])
    reader = StreamReader()
    # A piece that ends where the forged one does cannot be told from the true end.
    ends = len(BEFORE) + len(device.encode()) - 5 - 100
    events = [
        e for at in range(0, ends - 40, step) for e in reader.feed(data[at : min(at + step, ends - 40)])
    ]
    events += reader.feed(data[ends - 40 : ends + 50])
    events += [e for at in range(ends + 50, len(data), step) for e in reader.feed(data[at : at + step])]
    assert reader.ended
    assert reader.unread == 0
    assert sections_of(events) == [device, OTHER]


def test_commands_among_the_devices() -> None:
    data = BEFORE + CLOCK.encode() + el.SwitchoverStart().encode() + OTHER.encode() + b"\0"
    data += el.VmDescription(described([CLOCK, OTHER])).encode()
    events = read(data)
    assert [type(e) for e in events[-5:]] == [
        DeviceSection, el.SwitchoverStart, DeviceSection, el.EndOfStream, el.VmDescription,
    ]  # fmt: skip
    with pytest.raises(BadStream, match="PostcopyRun among the device sections"):
        read(BEFORE + CLOCK.encode() + RUN.encode() + b"\0")


@pytest.mark.parametrize("place", ["twice", "part behind it", "none"])
def test_the_end_of_ram(place: str) -> None:
    """What QEMU reads: it twice, parts behind it, none at all."""
    again = h("03 00000007" if place == "twice" else "02 00000007") + streams.END_OF_PART
    data = precopy([CLOCK])
    if place == "none":
        data = data.replace(h("03 00000007"), h("02 00000007"), 1)
    else:
        at = len(BEFORE)
        data = data[:at] + again + data[at:]
    assert sections_of(read(data)) == [CLOCK]


def test_a_forged_end_costs_little() -> None:
    """Thousands of places that look like the end, each with a text that is one."""
    fake = FOOTER + b"\0\x06\0\0\0\x02{}"
    device = DeviceSection(9, "clk", 0, 1, fake * 20_000)
    assert sections_of(read(precopy([device]))) == [device]


def test_a_machine_without_memory() -> None:
    """``-M none`` lists no block."""
    nothing = h("01 00000007 0372616d 00000000 00000004  0000000000000004 0000000000000010 7e 00000007")
    end = h("03 00000007") + streams.END_OF_PART
    data = streams.HEADER + streams.CONFIGURATION + nothing + end + CLOCK.encode() + b"\0"
    assert sections_of(read(data)) == [CLOCK]


def test_ways_are_bounded() -> None:
    with pytest.raises(BadStream, match="too many places where a section could end"):
        split(CLOCK.encode() + (FOOTER + b"\x04") * 300_000, 0)
