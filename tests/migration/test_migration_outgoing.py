"""The source of a migration, against a destination that notes everything: order, rounds, limits, and failures."""

from __future__ import annotations

import pytest
import trio

from tests.kit.scripted_destination import PAGE, LivelyMachine, Sent, content, options, send
from tests.kit.until import until
from vhostpc._native import lib
from vhostpc.dialect import DIALECTS, Compat
from vhostpc.errors import ChannelLost, MigrationRefused, StreamError
from vhostpc.migration.outgoing import After, NeverRan
from vhostpc.migration.phase import Phase
from vhostpc.migration.status import Status
from vhostpc.pages.ramblock import Bits
from vhostpc.wire.migration.elements import (
    MUST_HEAR,
    DeviceSection,
    Package,
    RamBlocks,
    RamDiscard,
    SectionPart,
    StreamEvent,
    VmDescription,
)
from vhostpc.wire.migration.return_path import PageRequest, Pong, Shut

ALL = tuple(DIALECTS)


async def filled(machine: LivelyMachine, *, every: int = 1) -> LivelyMachine:
    for block in machine.ram.blocks:
        for page in range(0, block.pages, every):
            await machine.write(block.name, page, f"{block.name} {page} first".encode())
    return machine


@pytest.mark.parametrize("return_path", [False, True])
@pytest.mark.parametrize("compat", ALL)
async def test_precopy_of_a_machine_that_stands_still(compat: Compat, return_path: bool) -> None:
    with await filled(LivelyMachine(ram0=300, rom0=1), every=2) as machine:
        sent = await send(machine, options(*(["return-path"] if return_path else []), compat=compat))
        assert sent.error is None
        assert sent.destination.content == await content(machine.ram)
    order = sent.destination.order()
    head = ["Header", "Configuration", *(["OpenReturnPath", "Ping 1"] if return_path else [])]
    assert order[: len(head) + 3] == [*head, "SectionStart", "RamBlocks", "Footer"]
    assert order[-6:] == [
        "SectionEnd",
        "EndOfSection",
        "Footer",
        "DeviceSection",
        "EndOfStream",
        "VmDescription",
    ]
    told = sent.watched.told
    dialect = DIALECTS[compat]
    device = ["device"] if dialect.device_status else []
    if dialect.precopy_passes_only:
        assert told == ["active", "pass 2", "stop", *device, "completed"]
    else:
        assert told == ["pass 1", "active", "pass 2", "stop", *device, "pass 3", "completed"]
    numbers = sent.outgoing.numbers()
    assert (numbers.data_pages, numbers.zero_pages) == (151, 150)
    info = sent.outgoing.ram_info()
    assert (info.total, info.remaining, info.normal, info.duplicate) == (301 * PAGE, 0, 151, 150)
    assert info.transferred == sent.destination.reader.offset


@pytest.mark.parametrize("compat", ALL)
async def test_postcopy_at_once(compat: Compat) -> None:
    """Nothing of RAM has gone before: everything is discarded, and comes once."""
    with await filled(LivelyMachine(ram0=300, rom0=1)) as machine:
        sent = await send(machine, options("postcopy-ram", compat=compat), postcopy=True)
        assert sent.error is None
        assert sent.destination.content == await content(machine.ram)
    assert sent.destination.order() == [
        *("Header", "Configuration", "OpenReturnPath", "Ping 1", "PostcopyAdvise"),
        *("SectionStart", "RamBlocks", "Footer"),
        *("RamDiscard", "RamDiscard", "Ping 2"),
        *("Package", "PostcopyListen", "DeviceSection", "Ping 3"),
        *(["Ping 66"] if DIALECTS[compat].loaded_ping else []),
        *("PostcopyRun", "Ping 4", "SectionPart", "RamPage", "EndOfSection", "Footer"),
        *("SectionEnd", "EndOfSection", "Footer", "EndOfStream"),
    ]
    assert len(sent.destination.pages) == len(set(sent.destination.pages)) == 301
    # This destination answers no PING.
    assert (
        sent.watched.told
        == {
            "7.2": ["pass 1", "active", "postcopy-active", "stop", "pass 2", "completed"],
            "10.0": ["pass 1", "active", "stop", "device", "pass 2", "postcopy-active", "completed"],
            "11.1": ["active", "stop", "device", "postcopy-device", "completed"],
        }[compat]
    )


@pytest.mark.parametrize("ends", ["completed", "postcopy-paused", "failed"])
async def test_the_destinations_word_that_it_has_loaded(ends: str) -> None:
    """It is told as soon as it comes, while pages go on; and an end behind it is what it is without."""
    with await filled(LivelyMachine(ram0=3000)) as machine:

        async def act(event: StreamEvent, sent: Sent) -> None:
            if not isinstance(event, Package):
                return
            told = sent.watched.told
            await until(lambda: told[-1] == "postcopy-device")
            await sent.destination.channel.send_all(Pong(MUST_HEAR).encode() + Pong(MUST_HEAR).encode())
            await until(lambda: told[-1] == "postcopy-active")
            if ends == "postcopy-paused":
                sent.destination.channel.shut_down()
            elif ends == "failed":
                await sent.destination.channel.send_all(Shut(1).encode())

        chosen = options("postcopy-ram", compat="11.1")
        sent = await send(machine, chosen, postcopy=True, on_event=act)
        assert (sent.error is None) == (ends == "completed")
        if ends == "completed":
            assert sent.destination.content == await content(machine.ram)
            assert len(sent.destination.pages) == 3000
    failing = ["failing"] if ends == "failed" else []
    assert sent.watched.told == [
        *("active", "stop", "device", "postcopy-device", "postcopy-active", *failing, ends),
    ]


@pytest.mark.parametrize("compat", ALL)
async def test_its_word_together_with_the_last_one(compat: Compat) -> None:
    """Both are read at once; of the older ones nobody waits for it, and a destination that says it does no harm."""
    with await filled(LivelyMachine(ram0=30)) as machine:

        async def act(event: StreamEvent, sent: Sent) -> None:
            if isinstance(event, Package):
                await sent.destination.channel.send_all(Pong(MUST_HEAR).encode() + Shut(1).encode())

        sent = await send(machine, options("postcopy-ram", compat=compat), postcopy=True, on_event=act)
    assert isinstance(sent.error, NeverRan)
    heard = ["postcopy-device", "postcopy-active", "failing"] if compat == "11.1" else ["postcopy-active"]
    told = [status for status in sent.watched.told if status.startswith(("postcopy", "fail"))]
    assert told == [*heard, "failed"]


def test_both_sides_of_the_code_name_the_same_ping() -> None:
    assert lib.VPC_MUST_HEAR == MUST_HEAR


async def test_what_was_written_again_is_discarded_and_comes_again() -> None:
    """Postcopy in the middle: what went before and is unchanged stays, the rest is forgotten there and comes once."""
    with await filled(LivelyMachine(ram0=2000)) as machine:
        seen = 0

        async def act(event: StreamEvent, sent: Sent) -> None:
            nonlocal seen
            if isinstance(event, SectionPart):
                seen += 1
                if seen == 3:
                    for page in (5, 7, 8, 9, 1999):
                        await machine.write("ram0", page, f"{page} again".encode())
                    sent.outgoing.start_postcopy()

        sent = await send(machine, options("postcopy-ram", max_bandwidth=8 << 20), on_event=act)
        assert sent.error is None, repr(sent.error)
        assert sent.destination.content == await content(machine.ram)
    at = next(i for i, e in enumerate(sent.destination.events) if isinstance(e, Package))
    discarded = {
        start // PAGE + i
        for event in sent.destination.events[:at]
        if isinstance(event, RamDiscard)
        for start, length in event.ranges
        for i in range(length // PAGE)
    }
    before = [page for _, page in sent.destination.pages if page not in discarded]
    assert {5, 7, 8, 9, 1999} <= discarded
    assert 0 < len(before) < 2000
    again = [page for _, page in sent.destination.pages]
    assert all(again.count(page) == 2 for page in (5, 7, 8, 9))
    assert sorted(set(again)) == list(range(2000))


async def test_many_discards() -> None:
    """More ranges than fit a command, and more commands than fit a buffer."""
    with LivelyMachine(ram0=20000) as machine:
        block = machine.ram["ram0"]
        for page in range(0, 20000, 2):
            block.set_bits(Bits.DIRTY, page, 1)
        pieces = list(block.discards(8192))
        data = b"".join(pieces)
        assert all(len(piece) <= 8192 for piece in pieces)
        assert block.count_bits(Bits.DISCARDED) == 10000
        assert list(block.discards()) == []  # each is told once
        block.set_bits(Bits.DISCARDED, value=False)
        assert b"".join(block.discards()) == data
    commands, ranges = 0, []
    at = 0
    while at < len(data):
        length = int.from_bytes(data[at + 3 : at + 5], "big")
        payload = data[at + 5 : at + 5 + length]
        assert data[at : at + 3] == b"\x08\x00\x06"
        assert payload[:7] == b"\x00\x04ram0\x00"
        pairs = payload[7:]
        assert 0 < len(pairs) <= 12 * 16
        ranges += [
            (int.from_bytes(pairs[i : i + 8], "big"), int.from_bytes(pairs[i + 8 : i + 16], "big"))
            for i in range(0, len(pairs), 16)
        ]
        commands += 1
        at += 5 + length
    assert commands == -(-10000 // 12)
    assert ranges == [(page * PAGE, PAGE) for page in range(0, 20000, 2)]


async def test_a_machine_that_writes_is_sent_in_passes() -> None:
    """Pass after pass, until what is left fits the downtime; then it is stopped and the last goes."""
    with await filled(LivelyMachine(ram0=1000)) as machine:
        left = [400, 100, 20, 3]

        async def write_more() -> None:
            if left:
                for page in range(left.pop(0)):
                    await machine.write("ram0", page, f"{page} {len(left)}".encode())

        machine.on_sync = write_more
        sent = await send(machine, options("return-path", downtime_limit=0))
        assert sent.error is None
        assert left == []
        assert sent.destination.content == await content(machine.ram)
    told = sent.watched.told
    assert told.index("stop") > told.index("pass 5")
    assert told[-1] == "completed"


async def test_one_that_does_not_converge_goes_on_until_it_may_stand_longer() -> None:
    with await filled(LivelyMachine(ram0=600)) as machine:
        chosen = options("return-path", max_bandwidth=16 << 20, downtime_limit=1)
        passes = 0

        async def write_more() -> None:
            nonlocal passes
            passes += 1
            if passes < 12:
                for page in range(300):
                    await machine.write("ram0", page, f"{page} {passes}".encode())
            if passes == 8:
                chosen.set_parameters({"downtime-limit": 10_000})

        machine.on_sync = write_more
        sent = await send(machine, chosen)
        assert sent.error is None
        assert 8 <= passes < 12
        assert sent.destination.content == await content(machine.ram)


@pytest.mark.parametrize("after", [After(seconds=0.3), After(passes=2)], ids=["seconds", "passes"])
async def test_postcopy_by_itself(after: After) -> None:
    with await filled(LivelyMachine(ram0=500)) as machine:

        async def write_more() -> None:
            for page in range(300):
                await machine.write("ram0", page, b"again")

        machine.on_sync = write_more
        sent = await send(
            machine,
            options("postcopy-ram", max_bandwidth=8 << 20, downtime_limit=0),
            after=after,
        )
        assert sent.error is None
        assert "postcopy-active" in sent.watched.told
        assert sent.destination.content == await content(machine.ram)
        if after.passes:
            assert sent.watched.told.count("pass 3") == 1
            assert sent.watched.told.index("pass 3") < sent.watched.told.index("stop")


async def test_asked_for_too_late_it_is_harmless() -> None:
    with await filled(LivelyMachine(ram0=50)) as machine:

        async def act(event: StreamEvent, sent: Sent) -> None:
            if isinstance(event, DeviceSection | VmDescription):
                sent.outgoing.start_postcopy()

        sent = await send(machine, options("postcopy-ram"), on_event=act)
        sent.outgoing.start_postcopy()
        assert sent.watched.status is Status.COMPLETED
        assert "postcopy-active" not in sent.watched.told


async def test_bandwidth_is_kept() -> None:
    """A machine that is busy may take longer than the limit says, never less; with four times as much it is faster."""
    took = {}
    for rate in (4, 16):
        with await filled(LivelyMachine(ram0=1000)) as machine:
            began = trio.current_time()
            sent = await send(machine, options(max_bandwidth=rate << 20, downtime_limit=0))
            took[rate] = trio.current_time() - began
            assert sent.error is None
            # What may go without waiting: a twentieth of a second's worth, and what is left at the end.
            assert took[rate] > 0.8 * 1000 * 4096 / (rate << 20)
    assert took[16] < took[4]


async def test_zero_pages_as_data() -> None:
    with LivelyMachine(ram0=20) as machine:
        chosen = options()
        chosen.set_parameters({"zero-page-detection": "none"})
        sent = await send(machine, chosen)
        numbers = sent.outgoing.numbers()
        assert (numbers.data_pages, numbers.zero_pages) == (20, 0)


async def test_requested_pages_are_the_next() -> None:
    """An order of the destination's own: each asked-for page comes next, the scan goes on behind it."""
    wanted = [700, 100, 101, 950, 3]
    with await filled(LivelyMachine(ram0=1000)) as machine:

        async def act(event: StreamEvent, sent: Sent) -> None:
            if isinstance(event, Package):
                for page in wanted:
                    await sent.destination.channel.send_all(PageRequest("ram0", page * PAGE, PAGE).encode())

        slow = options("postcopy-ram", max_postcopy_bandwidth=4 << 20)
        sent = await send(machine, slow, on_event=act, postcopy=True)
    pages = [page for _, page in sent.destination.pages]
    assert sorted(pages) == list(range(1000))
    places = [pages.index(page) for page in wanted]
    assert places == sorted(places)
    assert max(places) < 200, "asked for early, so they came early"
    # Behind the last request the scan goes on from there.
    assert pages[places[-1] + 1] == 4
    assert sent.outgoing.numbers().requests == 5


# --- failures, before and after the point of no return


@pytest.mark.parametrize("compat", ALL)
@pytest.mark.parametrize("cut", ["SectionPart", "Package"])
async def test_a_lost_link_before_and_behind_the_border(cut: str, compat: Compat) -> None:
    with await filled(LivelyMachine(ram0=3000)) as machine:

        async def act(event: StreamEvent, sent: Sent) -> None:
            if type(event).__name__ == cut:
                await sent.destination.channel.aclose()

        chosen = options("postcopy-ram", compat=compat, max_bandwidth=4 << 20)
        sent = await send(machine, chosen, on_event=act, postcopy=cut == "Package")
        assert isinstance(sent.error, ChannelLost)
        if cut == "Package":
            assert sent.watched.course.phase is Phase.PAUSED
            with pytest.raises(MigrationRefused, match="cannot cancel"):
                sent.outgoing.cancel()
            # What has not gone is still known.
            assert machine.ram["ram0"].count_bits(Bits.DIRTY) > 0
        else:
            assert sent.watched.course.phase is Phase.FAILED
        assert not machine.tracked


async def failing(machine: LivelyMachine, *, loaded: bool, chosen: str) -> Sent:
    """A destination that takes the package, or all of a precopy, and says that it failed: before or after it had
    loaded it."""

    async def act(event: StreamEvent, sent: Sent) -> None:
        if isinstance(event, Package | VmDescription):
            words = (Pong(3).encode() if loaded else b"") + Shut(1).encode()
            await sent.destination.channel.send_all(words)

    return await send(machine, options(chosen), on_event=act, postcopy=True)


async def test_the_destinations_word_that_it_never_ran() -> None:
    with await filled(LivelyMachine(ram0=100)) as machine:
        sent = await failing(machine, loaded=False, chosen="postcopy-ram")
        assert sent.watched.status is Status.FAILED
        assert isinstance(sent.error, NeverRan)


async def test_its_word_that_it_failed_is_not_taken_when_it_had_run() -> None:
    with await filled(LivelyMachine(ram0=100)) as machine:
        sent = await failing(machine, loaded=True, chosen="postcopy-ram")
        assert sent.watched.status is Status.POSTCOPY_PAUSED
        assert isinstance(sent.error, ChannelLost)


async def test_failed_at_the_end_of_precopy() -> None:
    with await filled(LivelyMachine(ram0=100)) as machine:
        sent = await failing(machine, loaded=False, chosen="return-path")
        assert sent.watched.status is Status.FAILED
        assert isinstance(sent.error, NeverRan)


async def test_silence_at_the_end_of_precopy() -> None:
    """All was sent, the link is gone, no word came: only a person can know where it runs."""
    with await filled(LivelyMachine(ram0=100)) as machine:
        sent = await send(machine, options("return-path"), answer=None)
        assert sent.watched.course.phase is Phase.UNKNOWN
        assert isinstance(sent.error, ChannelLost)


async def test_done_with_pages_left_is_a_pause() -> None:
    with await filled(LivelyMachine(ram0=3000)) as machine:

        async def act(event: StreamEvent, sent: Sent) -> None:
            if isinstance(event, Package):
                await sent.destination.channel.send_all(Shut(0).encode())

        slow = options("postcopy-ram", max_postcopy_bandwidth=1 << 20)
        sent = await send(machine, slow, on_event=act, postcopy=True)
        assert "were not sent" in str(sent.error)
        assert sent.watched.status is Status.POSTCOPY_PAUSED


async def test_nonsense_on_the_return_path() -> None:
    with await filled(LivelyMachine(ram0=3000)) as machine:

        async def act(event: StreamEvent, sent: Sent) -> None:
            if isinstance(event, SectionPart):
                await sent.destination.channel.send_all(b"\x00\x09\x00\x00" * 4)

        sent = await send(machine, options("return-path", max_bandwidth=4 << 20), on_event=act)
        assert isinstance(sent.error, StreamError)
        assert "return path" in str(sent.error)
        assert sent.watched.status is Status.FAILED


async def test_the_list_of_blocks() -> None:
    with LivelyMachine(ram0=3, rom0=1) as machine:
        sent = await send(machine, options("postcopy-ram"), postcopy=True)
        listed = next(e for e in sent.destination.events if isinstance(e, RamBlocks))
        assert [(b.name, b.length, b.page_size) for b in listed.blocks] == [
            ("ram0", 3 * PAGE, None),
            ("rom0", PAGE, None),
        ]


async def test_zero_pages_are_charged_what_they_cost() -> None:
    """At a rate at which their contents would take a minute, marks of zeros take next to nothing."""
    with LivelyMachine(ram0=20_000) as machine:
        with trio.fail_after(20):
            sent = await send(machine, options(max_bandwidth=1 << 20, downtime_limit=0))
        assert sent.error is None
        assert sent.outgoing.numbers().zero_pages >= 20_000
