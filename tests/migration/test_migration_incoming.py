"""The destination of a migration, fed byte by byte without QEMU: what it takes, says, reports and refuses."""

from __future__ import annotations

import os
from contextlib import suppress

import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kit.hugepages import hugepages
from tests.kit.migration_ends import LIMIT, content, feed, forged, incoming_of, pair, receive, refused
from tests.kit.scripted_source import ScriptedSource
from tests.kit.streams import BLOB, JSON, POSTCOPY, PRECOPY, A, B, C, h
from tests.kit.thread_names import thread_names
from tests.kit.until import until
from vhostpc.errors import ChannelLost, MigrationRefused, StreamError, UfdError
from vhostpc.migration import link as link_module
from vhostpc.migration import postcopy_checks
from vhostpc.migration.channel import Channel
from vhostpc.migration.held import HeldMachine
from vhostpc.migration.phase import Event
from vhostpc.wire.migration.elements import BadStream, RamDiscard, name_bytes
from vhostpc.wire.migration.return_path import Pong, Shut

ZERO = bytes(4096)


@pytest.mark.parametrize("pieces", [1, 7, 4096, 1 << 20])
async def test_precopy(pieces: int) -> None:
    machine, messages = await receive(PRECOPY, pieces=pieces)
    with machine:
        assert await content(machine) == {"ram0": [A, ZERO, B], "rom0": [ZERO]}
        assert [(s.idstr, s.body) for s in machine.devices] == [("clk", h("deadbeef"))]
        assert machine.configuration.machine == "toyvm"
        assert machine.description.startswith(b"{")
    assert messages == []  # the source opened no return path


@pytest.mark.parametrize("pieces", [1, 7, 4096, 1 << 20])
async def test_postcopy(pieces: int) -> None:
    machine, messages = await receive(POSTCOPY, postcopy=True, pieces=pieces)
    with machine:
        assert await content(machine) == {"ram0": [A, C, B], "rom0": [ZERO]}
        assert machine.device("clk").body == h("deadbeef")
    assert sorted(m.value for m in messages if isinstance(m, Pong)) == [1, 2, 3, 4]
    assert messages[-1] == Shut(0)


ADVISED = POSTCOPY[: POSTCOPY.index(h("01 00000007 0372616d"))]


async def test_precopy_after_advise() -> None:
    """The source might have switched and did not."""
    machine, messages = await receive(ADVISED + PRECOPY[PRECOPY.index(h("01 00000007")) :], postcopy=True)
    with machine:
        assert await content(machine) == {"ram0": [A, ZERO, B], "rom0": [ZERO]}
    assert messages == [Pong(1), Shut(0)]


@pytest.mark.parametrize("postcopy", [False, True])
async def test_the_machine_is_started(postcopy: bool) -> None:
    """At RUN, behind the last device section; or behind the last byte, before the source is told."""
    started: list[tuple[bool, int]] = []
    with HeldMachine() as machine:

        async def run(how: bool) -> None:
            started.append((how, len(machine.devices)))

        received = await feed(POSTCOPY if postcopy else PRECOPY, machine, postcopy=postcopy, run=run)
    assert started == [(postcopy, 1)]
    assert received.events == ([Event.PACKAGE] if postcopy else []) + [Event.FINISH]


async def test_a_machine_that_cannot_run_here() -> None:
    """It has not run: the source is told so."""

    async def run(postcopy: bool) -> None:
        raise MigrationRefused("This machine does not run here")

    for data, events in ((PRECOPY, [Event.FAIL]), (POSTCOPY, [Event.PACKAGE, Event.NEVER_RAN])):
        received = await refused(data, postcopy=data is POSTCOPY, run=run)
        assert isinstance(received.error, MigrationRefused)
        assert received.events == events
        if data is POSTCOPY:
            assert received.messages[-1] == Shut(1)


TAIL = POSTCOPY[POSTCOPY.index(BLOB) + len(BLOB) :]
HEAD = POSTCOPY[: POSTCOPY.index(h("08 0007 0004"))]
CLOCK = BLOB[5 : BLOB.index(h("08 0002"))]
LISTEN, PING3, RUN = h("08 0004 0000"), h("08 0002 0004 00000003"), h("08 0005 0000")
CONFIGURATION = h("07 00000005 746f79766d")
ADVISE = h("08 0003 0010 0000000000001000 0000000000001000")


def package(*parts: bytes) -> bytes:
    blob = b"".join(parts)
    return h("08 0007 0004") + len(blob).to_bytes(4, "big") + blob


def with_package(*parts: bytes) -> bytes:
    return HEAD + package(*parts) + TAIL


# What is wrong: the stream, words of the sentence, what is reported.
BEFORE, LOADING, RUNNING = [Event.FAIL], [Event.PACKAGE, Event.NEVER_RAN], [Event.PACKAGE, Event.LOSE]
REFUSED: dict[str, tuple[bytes, str, list[Event]]] = {
    "no stream": (b"GET / HTTP/1.0\r\n\r\n", "not a migration stream", BEFORE),
    "a second configuration": (
        forged(POSTCOPY, CONFIGURATION, CONFIGURATION * 2),
        "byte 18 (0x12): a second configuration",
        BEFORE,
    ),
    "a ping without a return path": (
        forged(POSTCOPY, h("08 0001 0000"), b""),
        "a PING before OPEN_RETURN_PATH",
        BEFORE,
    ),
    "a package without a return path": (
        forged(POSTCOPY, h("08 0001 0000  08 0002 0004 00000001"), b"").replace(
            h("08 0002 0004 00000002"), b"", 1
        ),
        "no return path",
        BEFORE,
    ),
    "advise twice": (forged(POSTCOPY, ADVISE, ADVISE * 2), "POSTCOPY_ADVISE again", BEFORE),
    "a package without advise": (
        forged(POSTCOPY, ADVISE, b"").replace(h("08 0006 0017"), package(BLOB) + h("08 0006 0017"), 1),
        "a package without ADVISE",
        BEFORE,
    ),
    "advise behind RAM": (HEAD + ADVISE + TAIL, "POSTCOPY_ADVISE again", BEFORE),
    "advise behind RAM, the first": (
        forged(POSTCOPY, ADVISE, b"").replace(h("08 0006 0017"), ADVISE + h("08 0006 0017"), 1),
        "POSTCOPY_ADVISE behind the start of RAM",
        BEFORE,
    ),
    "advise of other page sizes": (
        forged(POSTCOPY, ADVISE, h("08 0003 0010 0000000000201000 0000000000001000")),
        "RAM here has pages of 4 KiB, the source advised 4 KiB and 2 MiB",
        BEFORE,
    ),
    "advise of another target page": (
        forged(POSTCOPY, ADVISE, h("08 0003 0010 0000000000001000 0000000000002000")),
        "target pages of 8192 bytes, not 4096",
        BEFORE,
    ),
    "advise without sizes": (forged(POSTCOPY, ADVISE, h("08 0003 0000")), "have 0 byte advise", BEFORE),
    "listen outside a package": (HEAD + LISTEN + TAIL, "POSTCOPY_LISTEN outside a package", BEFORE),
    "run outside a package": (HEAD + RUN + TAIL, "POSTCOPY_RUN outside a package", BEFORE),
    "discard of an unknown block": (
        forged(POSTCOPY, h("0006 0017 00 04 726f6d30"), h("0006 0017 00 04 726f6d31")),
        "was not listed",
        BEFORE,
    ),
    "discard behind its block": (
        forged(POSTCOPY, h("0000000000001000 0000000000002000"), h("0000000000001000 0000000000003000")),
        "discard of 0x3000 bytes at 0x1000 of 'ram0', which has 0x3000",
        BEFORE,
    ),
    "discard of a part of a page": (
        forged(POSTCOPY, h("0000000000001000 0000000000002000"), h("0000000000001001 0000000000001000")),
        "which are not whole pages",
        BEFORE,
    ),
    "a second RAM": (
        forged(POSTCOPY, h("02 00000007"), h("01 00000007 0372616d 00000000 00000004")),
        "RAM starts a second time",
        BEFORE,
    ),
    "a part of another section": (
        forged(POSTCOPY, h("02 00000007"), h("02 00000008")),
        "a part of section 8, which never started",
        BEFORE,
    ),
    "a package without listen": (with_package(CLOCK, RUN), "RUN without POSTCOPY_LISTEN", BEFORE),
    "listen twice": (with_package(LISTEN, LISTEN, CLOCK, RUN), "POSTCOPY_LISTEN again", BEFORE),
    "a package without run": (with_package(LISTEN, CLOCK, PING3), "without POSTCOPY_RUN", BEFORE),
    "advise in a package": (with_package(LISTEN, CLOCK, ADVISE, RUN), "not allowed in a package", BEFORE),
    "a section without a footer": (with_package(LISTEN, CLOCK[:-5], RUN), "has no footer", BEFORE),
    "a package in a package": (
        with_package(LISTEN, package(LISTEN, RUN), RUN),
        "a package where none is allowed",
        BEFORE,
    ),
    "colo": (HEAD + h("08 0008 0000"), "ENABLE_COLO command come in migration stream", BEFORE),
    "broken record": (
        forged(POSTCOPY, h("0000000000001022 00"), h("0000000000001024 00")),
        "flags that are neither",
        BEFORE,
    ),
    "offset behind the block": (
        forged(POSTCOPY, h("0000000000001022 00"), h("0000000000007022 00")),
        "behind the end of its block",
        BEFORE,
    ),
    "an unknown block": (
        forged(POSTCOPY, h("0000000000000002 04 726f6d30"), h("0000000000000002 04 726f6d31")),
        "a block name that is empty or unknown",
        RUNNING,
    ),
    "no footer": (
        forged(POSTCOPY, h("0000000000000010 7e 00000007 08"), h("0000000000000010 7e 00000008 08")),
        "no footer of the section",
        BEFORE,
    ),
    "no footer behind pages": (
        forged(POSTCOPY, h("0000000000000010 7e 00000007 03"), h("0000000000000010 7e 00000008 03")),
        "no footer of the section",
        RUNNING,
    ),
    "a package twice": (HEAD + package(BLOB) * 2 + TAIL, "a second package", RUNNING),
    "discard behind the package": (
        HEAD + package(BLOB) + HEAD[HEAD.index(h("08 0006")) :] + TAIL,
        "POSTCOPY_RAM_DISCARD behind the package",
        RUNNING,
    ),
    "a device behind the package": (
        HEAD + package(BLOB) + CLOCK + TAIL,
        "a device section behind the package",
        RUNNING,
    ),
    "a page that never comes": (
        forged(POSTCOPY, h("0000000000000002 04 726f6d30 00"), b""),
        "1 host pages never came",
        RUNNING,
    ),
}


async def test_a_package_over_a_limit_that_was_given() -> None:
    stream = HEAD + h("08 0007 0004 04000001")
    received = await refused(stream, postcopy=True, limit=64 << 20)
    assert "a package of 67108865 bytes, at most 67108864" in str(received.error)


@pytest.mark.parametrize("what", REFUSED)
async def test_broken_streams(what: str) -> None:
    """Each by one sentence; before the machine may have run the source is told that it never will."""
    data, why, events = REFUSED[what]
    received = await refused(data, postcopy=True)
    assert isinstance(received.error, StreamError), repr(received.error)
    assert why in str(received.error)
    assert "\n" not in str(received.error)
    assert "byte " in str(received.error) or "never came" in why
    assert received.events == events
    opened = h("08 0001 0000") in data[:30]
    assert (Shut(1) in received.messages) == (opened and events is not RUNNING)
    assert Shut(0) not in received.messages


# What a stock QEMU takes, and so is taken here: behind the package a refusal can lose the guest.
MORE_RAM = {
    "END again": h("03 00000007 0000000000000010 7e 00000007"),
    "a part": h("02 00000007 0000000000000010 7e 00000007"),
}
AGAIN = CLOCK.replace(h("00000009"), h("0000000a"))
LIKE_AN_END = CLOCK[:-9] + h("7e 00000009") + CLOCK
RESUME, BITMAP, OPEN = h("08 0009 0000"), h("08 000a 0005 04 72616d30"), h("08 0001 0000")
TAKEN: dict[str, bytes] = {
    "a section twice": with_package(LISTEN, CLOCK, AGAIN, PING3, RUN),
    "listen behind a section": with_package(CLOCK, LISTEN, PING3, RUN),
    "a ping behind run": with_package(LISTEN, CLOCK, PING3, RUN, PING3),
    "junk behind run": with_package(LISTEN, CLOCK, PING3, RUN, b"junkjunk"),
    "no ping": with_package(LISTEN, CLOCK, RUN),
    "a ping of any value": with_package(LISTEN, CLOCK, h("08 0002 0004 ffffffff"), PING3, RUN),
    "commands for nobody": with_package(
        LISTEN, CLOCK, OPEN, RESUME, BITMAP, h("08 000b 0000"), PING3, RUN
    ),
    "commands for nobody, outside": HEAD
    + OPEN + RESUME + BITMAP + h("08 000b 0000") + package(BLOB)
    + OPEN + RESUME + BITMAP + h("08 000b 0000") + TAIL,
    "a body that looks like an end": with_package(LISTEN, LIKE_AN_END, PING3, RUN),
    "END twice": POSTCOPY[:-1] + MORE_RAM["END again"] + h("00"),
    "a part behind END": POSTCOPY[:-1] + MORE_RAM["a part"] + h("00"),
    "no END": forged(POSTCOPY, h("03 00000007"), h("02 00000007")),
    "bytes behind the end": POSTCOPY + b"\x06\0\0\0\x02{}",
    "a page of one byte that is not zero": forged(
        POSTCOPY, h("0000000000002008 04 72616d30") + B, h("0000000000002002 04 72616d30 bb")
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", TAKEN)
async def test_what_qemu_takes_is_taken(what: str) -> None:
    data = TAKEN[what]
    machine, messages = await receive(data, postcopy=True)
    with machine:
        assert await content(machine) == {"ram0": [A, C, B], "rom0": [ZERO]}
        sent_on = b"".join(section.encode() for section in machine.devices)
        twice = {"a section twice": CLOCK + AGAIN, "a body that looks like an end": LIKE_AN_END}
        assert sent_on == twice.get(what, CLOCK)
    assert messages[-1] == Shut(0)
    assert {1, 2, 4} <= {m.value for m in messages if isinstance(m, Pong)}


JSON_AT = PRECOPY.index(h("00 06 0000009d")) + 1
DEVICES = JSON_AT - 1 - len(CLOCK)
RETURN_PATH = h("08 0001 0000  08 0002 0004 00000001")
TAKEN_AT_THE_END: dict[str, bytes] = {
    "no description": PRECOPY[:JSON_AT],
    "an empty description": PRECOPY[:JSON_AT] + h("06 00000000"),
    "a description that is none": PRECOPY[:JSON_AT] + h("06 00000009") + b"{nonsense",
    "a long description": PRECOPY[:JSON_AT] + h("06 00800000") + b" " * (8 << 20),
    "something else": PRECOPY[:JSON_AT] + b"\x09junk",
    "bytes behind it": PRECOPY + b"abc",
    "a section twice": PRECOPY[: JSON_AT - 1] + AGAIN + PRECOPY[JSON_AT - 1 :],
    "END twice": PRECOPY[:DEVICES] + MORE_RAM["END again"] + PRECOPY[DEVICES:],
    "a part behind END": PRECOPY[:DEVICES] + MORE_RAM["a part"] + PRECOPY[DEVICES:],
    "no END": PRECOPY.replace(h("03 00000007"), h("02 00000007"), 1),
    "advice for dirty bitmaps": forged(
        PRECOPY, CONFIGURATION, CONFIGURATION + RETURN_PATH + h("08 0003 0000")
    ),
}


@pytest.mark.parametrize("what", TAKEN_AT_THE_END)
async def test_what_qemu_takes_is_taken_at_the_end_of_a_precopy(what: str) -> None:
    """A source without a return path has said that it has completed by then."""
    machine, messages = await receive(TAKEN_AT_THE_END[what])
    with machine:
        assert await content(machine) == {"ram0": [A, ZERO, B], "rom0": [ZERO]}
        sections = [*machine.early, *machine.devices]
        assert [s.idstr for s in sections] == ["clk"] * (2 if what == "a section twice" else 1)
    assert messages == ([Pong(1), Shut(0)] if what == "advice for dirty bitmaps" else [])


async def test_a_broken_byte_is_named_by_its_place_in_the_stream() -> None:
    at = PRECOPY.index(h("0000000000001022 00"))
    received = await refused(PRECOPY[: at + 7] + b"\x24" + PRECOPY[at + 8 :])
    assert f"byte {at} " in str(received.error)


async def test_bytes_behind_the_end(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The channel stays open, so more could come; it does not, and they are none of the stream's."""
    monkeypatch.setattr(link_module, "END_WAIT", 0.05)
    ours, theirs = pair()
    data = forged(PRECOPY, CONFIGURATION, CONFIGURATION + RETURN_PATH)
    with trio.fail_after(LIMIT), HeldMachine() as machine:
        async with Channel(ours) as channel, theirs:
            incoming = incoming_of(channel, machine, postcopy=False)
            await theirs.send_all(data + b"abc")
            await incoming.receive()
            incoming.close()
        assert [section.idstr for section in machine.devices] == ["clk"]
    assert "migration: the source sent 3 bytes behind the end" in caplog.messages


@pytest.mark.parametrize("closed", [False, True])
async def test_an_end_that_a_guest_has_written(closed: bool) -> None:
    """More comes behind it, and the true one: whole, late, and taken."""
    fake = h("deadbeef 7e 00000009 00 06 0000009d") + JSON
    body = fake + bytes(50)
    data = PRECOPY[:DEVICES] + CLOCK[:-9] + body + h("7e 00000009 00")
    text = JSON.replace(b'"size": 4', b'"size": %d' % len(body))
    data += h("06") + len(text).to_bytes(4, "big") + text
    if not closed:
        data = forged(data, CONFIGURATION, CONFIGURATION + RETURN_PATH)
    ours, theirs = pair()
    with trio.fail_after(LIMIT), HeldMachine() as machine:
        async with Channel(ours) as channel, theirs, trio.open_nursery() as nursery:
            incoming = incoming_of(channel, machine, postcopy=False)
            nursery.start_soon(incoming.receive)
            split = data.index(fake) + len(fake) + 10
            await theirs.send_all(data[:split])
            await trio.testing.wait_all_tasks_blocked()
            await theirs.send_all(data[split:])
            if closed:
                await theirs.send_eof()
        incoming.close()
        assert [section.body for section in machine.devices] == [body]


async def test_postcopy_that_is_not_enabled() -> None:
    received = await refused(POSTCOPY)
    assert "postcopy-ram is not enabled" in str(received.error)
    assert received.events == [Event.FAIL]
    assert received.messages == [Pong(1), Shut(1)]


def headed(*parts: bytes) -> bytes:
    """A precopy with these parts of a configuration."""
    return forged(PRECOPY, CONFIGURATION, CONFIGURATION + b"".join(parts))


def part(name: str, body: bytes) -> bytes:
    return h("05") + name_bytes(f"configuration/{name}") + h("00000001") + body


def capabilities(*names: str) -> bytes:
    return part("capabilities", len(names).to_bytes(4, "big") + b"".join(map(name_bytes, names)))


FLUSH = h("0000000000000010 7e 00000007")
# What is refused, in the words of QEMU 7.2 and 10.0; before any RAM.
HEADS: dict[str, tuple[bytes, str]] = {
    "shared": (
        headed(capabilities("x-ignore-shared")),
        "Capability x-ignore-shared is off, but received capability is on",
    ),
    "mapped": (
        headed(capabilities("mapped-ram")),
        "Capability mapped-ram is off, but received capability is on",
    ),
    "one of several": (
        headed(capabilities("events", "multifd")),
        "Capability multifd is off, but received capability is on",
    ),
    "unknown": (headed(capabilities("x-nothing")), "Received unknown capability x-nothing"),
    "bits": (
        headed(part("target-page-bits", h("0000000d"))),
        "Received TARGET_PAGE_BITS is 13 but local is 12",
    ),
    "multifd": (
        forged(PRECOPY, FLUSH, h("0000000000000200") + FLUSH),
        "Capability multifd is off, but the source sends RAM over further channels",
    ),
}


@pytest.mark.parametrize("what", HEADS)
async def test_what_a_head_asks_for_is_refused_if_it_cannot_be_done(what: str) -> None:
    data, why = HEADS[what]
    with HeldMachine() as machine:
        received = await feed(data, machine, postcopy=False)
        assert machine.ram.blocks == []
    assert isinstance(received.error, BadStream)
    assert received.error.reason == why
    assert received.events == [Event.FAIL]


async def test_what_a_head_asks_for_and_is_done() -> None:
    """It is sent on as it came."""
    parts = part("target-page-bits", h("0000000c")) + capabilities("events") + part("uuid", bytes(range(16)))
    machine, _ = await receive(headed(parts))
    with machine:
        assert machine.configuration.encode() == CONFIGURATION + parts


async def test_postcopy_without_a_userfaultfd(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused at ADVISE, when the source can still go on."""

    class Denied:
        @staticmethod
        def open(**_: object) -> None:
            raise UfdError("userfaultfd: not permitted; allow it with ...", 1)

    monkeypatch.setattr(postcopy_checks, "Userfaultfd", Denied)
    received = await refused(POSTCOPY, postcopy=True)
    assert "postcopy cannot be done here: userfaultfd: not permitted" in str(received.error)
    assert received.messages == [Pong(1), Shut(1)]


async def test_page_sizes_that_differ() -> None:
    received = await refused(POSTCOPY, postcopy=True, page_sizes={"ram0": 2 << 20})
    assert "has pages of 4 KiB at the source, not of 2 MiB" in str(received.error)


async def test_no_huge_pages_to_be_had() -> None:
    received = await refused(PRECOPY, page_sizes={"ram0": 2 << 20})
    assert "RAM block 'ram0', 12 KiB in pages of 2 MiB" in str(received.error)


@pytest.mark.parametrize("postcopy", [False, True], ids=["precopy", "postcopy"])
async def test_cut_at_every_step_leaks_nothing(postcopy: bool) -> None:
    data = POSTCOPY if postcopy else PRECOPY
    whole = len(data) if postcopy else PRECOPY.index(h("00 06 0000009d")) + 1
    places = [*range(0, 200), *range(4100, 4400), *range(whole - 60, whole - (1 if postcopy else 0))]
    await refused(data[:100], postcopy=postcopy)
    before = len(os.listdir("/proc/self/fd"))
    for place in places:
        received = await refused(data[:place], postcopy=postcopy)
        assert isinstance(received.error, StreamError | ChannelLost), (place, repr(received.error))
    assert len(os.listdir("/proc/self/fd")) == before


async def test_a_source_that_stops_talking() -> None:
    """Cancelled in each phase: nothing is left, and before RUN the source is told."""
    places = [0, 8, 20, 60, POSTCOPY.index(BLOB) - 20, POSTCOPY.index(BLOB) + 30, len(POSTCOPY) - 40]
    before = set(os.listdir("/proc/self/fd"))
    for place in places:
        ours, theirs = pair()
        with trio.fail_after(LIMIT), HeldMachine() as machine:
            async with Channel(ours) as channel, theirs, trio.open_nursery() as nursery:
                incoming = incoming_of(channel, machine, postcopy=True)
                nursery.start_soon(incoming.receive)
                await theirs.send_all(POSTCOPY[:place])
                await trio.testing.wait_all_tasks_blocked()
                nursery.cancel_scope.cancel()
            incoming.close()
            await until(lambda: not {"vpc-load", "vpc-fault"} & set(thread_names().values()))
    assert set(os.listdir("/proc/self/fd")) == before


@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_any_change_of_a_byte_ends_in_a_status(data: st.DataObject) -> None:
    """Flipped, doubled, left out, cut: one sentence or none, and no event that its phase does not allow."""
    postcopy = data.draw(st.booleans())
    stream = bytearray(POSTCOPY if postcopy else PRECOPY)
    # Not the content of pages, of which nothing depends.
    places = [at for at in range(len(stream)) if stream[at : at + 2] not in (A[:2], B[:2], C[:2])]
    at, to = data.draw(st.sampled_from(places)), data.draw(st.integers(1, 12))
    how = data.draw(st.sampled_from(["flip", "double", "leave out", "cut"]))
    if how == "flip":
        stream[at] ^= 1 << to % 8
    elif how == "double":
        stream[at:at] = stream[at : at + to]
    else:
        del stream[at : at + to if how == "leave out" else None]

    async def run() -> None:
        with HeldMachine() as machine:
            received = await feed(bytes(stream), machine, postcopy=postcopy)
        ended = received.events[-1]
        assert (received.error is None) == (ended is Event.FINISH)
        assert isinstance(received.error, StreamError | ChannelLost | None), repr(received.error)
        assert Shut(0 if ended is not Event.FINISH else 1) not in received.messages

    trio.run(run)


async def test_a_part_of_a_huge_page_cannot_be_discarded() -> None:
    """A source that says pages of 2 MiB discards them whole."""
    ours, theirs = pair()
    with hugepages(4), trio.fail_after(LIMIT), HeldMachine() as machine:
        async with Channel(ours) as channel, theirs, trio.open_nursery() as nursery:
            incoming = incoming_of(channel, machine, postcopy=True)
            source = ScriptedSource(theirs, {"ram": (2, 2 << 20), "rom": (2, 4096)})

            async def send() -> None:
                await source.begin()
                await source.send(RamDiscard("ram", ((0, 4096),)).encode())
                await source.heard(Shut(1))
                await source.stream.send_eof()

            nursery.start_soon(source.listen)
            nursery.start_soon(send)
            with pytest.raises(StreamError, match="0x0 of 'ram', which are not whole pages of 2 MiB"):
                await incoming.receive()
            incoming.close()


async def test_a_source_that_pings_and_does_not_read() -> None:
    """The answers are bounded, and the stream is read on until then."""
    ours, theirs = pair()
    pings = h("08 0002 0004 00000009") * 1000
    with trio.fail_after(LIMIT), HeldMachine() as machine:
        async with Channel(ours) as channel, theirs, trio.open_nursery() as nursery:
            incoming = incoming_of(channel, machine, postcopy=True)

            async def flood() -> None:
                with suppress(trio.BrokenResourceError):
                    await theirs.send_all(ADVISED)
                    while True:
                        await theirs.send_all(pings)

            nursery.start_soon(flood)
            with pytest.raises(StreamError, match="a PING, but the source does not read"):
                await incoming.receive()
        incoming.close()


async def test_a_source_that_reads_late() -> None:
    """It sends all of the stream before it reads a byte, with more answers than the socket takes."""
    ours, theirs = pair()
    count = 6_000
    data = forged(POSTCOPY, h("08 0002 0004 00000001"), h("08 0002 0004 00000001") * count)
    with trio.fail_after(LIMIT), HeldMachine() as machine:
        async with Channel(ours) as channel, theirs, trio.open_nursery() as nursery:
            incoming = incoming_of(channel, machine, postcopy=True)
            nursery.start_soon(incoming.receive)
            await theirs.send_all(data)
            await until(lambda: incoming.missing() == 0 and incoming.course.may_run)
            assert incoming.service.numbers().outbox_bytes > 0
            heard = 0
            while heard < (count + 4) * 8:
                heard += len(await theirs.receive_some(1 << 16))
        incoming.close()
        assert heard == (count + 4) * 8


@pytest.mark.parametrize("name", [b"\xf2om0", b"a" * 255, b"\xff" * 255])
async def test_names_of_blocks_are_bytes(name: bytes) -> None:
    """Of any length, and no text perhaps; sent on it is the same."""
    data = PRECOPY.replace(h("04 726f6d30"), bytes([len(name)]) + name)
    assert data != PRECOPY
    machine, _ = await receive(data)
    with machine:
        block = machine.ram.blocks[1]
        assert block.name.encode("utf-8", "surrogateescape") == name
        assert await content(machine) == {"ram0": [A, ZERO, B], block.name: [ZERO]}


async def test_a_name_with_a_nul_is_refused() -> None:
    error = (await refused(PRECOPY.replace(h("04 726f6d30"), h("04 726f0030")))).error
    assert isinstance(error, StreamError)
    assert "cannot contain NUL" in str(error)
