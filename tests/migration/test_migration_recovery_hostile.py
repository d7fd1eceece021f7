"""Peers that lie in a recovery, or are no part of it: one sentence each, and a right attempt succeeds afterwards."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import pytest
import trio

from tests.kit.scripted_destination import LivelyMachine, channels
from tests.kit.until import until
from tests.migration.test_migration_recovery import LIMIT, PAGES, Carried, fill
from vhostpc.errors import ChannelLost, StreamError
from vhostpc.migration.channel import Channel
from vhostpc.migration.held import HeldMachine
from vhostpc.migration.phase import Event, Phase
from vhostpc.wire.migration.elements import (
    BitmapRequest,
    EndOfStream,
    Footer,
    PostcopyResume,
    SectionEnd,
    SectionPart,
)
from vhostpc.wire.migration.return_path import Pong, ReceivedBitmap, ResumeAck, Shut

pytestmark = pytest.mark.ufd
BLOCKS = ("ram0", "rom0")
SIZES = {"ram0": (PAGES + 63) // 64 * 8, "rom0": 8}
NOTHING = {name: bytes(size) for name, size in SIZES.items()}


@asynccontextmanager
async def paused() -> AsyncIterator[Carried]:
    with LivelyMachine(ram0=PAGES, rom0=1) as machine, HeldMachine() as copy, trio.fail_after(LIMIT):
        await fill(machine)
        async with trio.open_nursery() as nursery:
            ends = Carried(nursery, machine, copy)
            await until(lambda: ends.phases[1] is Phase.POSTCOPY)
            await ends.cut()
            yield ends
            ends.begin()
            await ends.resumed()
            await ends.finish()


def bitmap(name: str, bits: bytes | None = None) -> bytes:
    return ReceivedBitmap(name, NOTHING[name] if bits is None else bits).encode()


FIRST = bitmap("ram0")
PAST = bytes(SIZES["ram0"] - 1) + b"\x80"
ANSWERS = {
    "too short": (bitmap("ram0", bytes(8)), "has 8 bytes, not"),
    "too long": (bitmap("ram0", bytes(SIZES["ram0"] + 8)), "at most 256 are accepted"),
    "no whole words": (
        FIRST.replace((SIZES["ram0"]).to_bytes(8, "big"), (9).to_bytes(8, "big"), 1),
        "of 9 bytes",
    ),
    "end mark": (FIRST[:-1] + b"\0", "without its end mark"),
    "bits behind the end": (bitmap("ram0", PAST), "has bits behind its last page"),
    "unknown": (ReceivedBitmap("other", NOTHING["ram0"]).encode(), "'other' in place of that of 'ram0'"),
    "wrong order": (bitmap("rom0"), "'rom0' in place of that of 'ram0'"),
    "twice": (FIRST + FIRST, "'ram0' in place of that of 'rom0'"),
    "ACK first": (ResumeAck().encode(), "ResumeAck in the middle of a recovery"),
    "done": (Shut(0).encode(), "says that it is done, in the middle of a recovery"),
    "no message": (b"\xff" * 8, "return path: message type"),
    "nothing": (b"", "closed the connection"),
}


@pytest.mark.parametrize("what", ANSWERS)
async def test_wrong_answers(what: str) -> None:
    said, words = ANSWERS[what]
    async with paused() as ends:
        there, here = channels()
        async with there, here, trio.open_nursery() as nursery:
            nursery.start_soon(answer, here, said)
            ends.outgoing.course.move(Event.RECOVER)
            with pytest.raises((StreamError, ChannelLost), match=words):
                await ends.outgoing.resume(there)
            nursery.cancel_scope.cancel()
        assert ends.phases == (Phase.PAUSED, Phase.PAUSED)


async def answer(channel: Channel, said: bytes) -> None:
    with suppress(ChannelLost):
        await channel.receive_some(4096)
        await channel.send_all(said)
        if not said:
            channel.shut_down()
        await trio.sleep_forever()


async def test_another_acknowledgement() -> None:
    async with paused() as ends:
        there, here = channels()
        async with there, here, trio.open_nursery() as nursery:

            async def play() -> None:
                await here.receive_some(4096)
                await here.send_all(Pong(3).encode() + bitmap("ram0") + bitmap("rom0"))
                await here.receive_some(4096)
                await here.send_all(ResumeAck(2).encode())

            nursery.start_soon(play)
            ends.outgoing.course.move(Event.RECOVER)
            with pytest.raises(StreamError, match="answers 2 to POSTCOPY_RESUME, not 1"):
                await ends.outgoing.resume(there)
        assert ends.phases == (Phase.PAUSED, Phase.PAUSED)


ASKED = b"".join(BitmapRequest(name).encode() for name in BLOCKS)
PART = SectionPart(2).encode() + bytes(7) + b"\x10" + Footer(2).encode()
COMMANDS = {
    "RESUME before the bitmaps": PostcopyResume().encode(),
    "RESUME after one of them": BitmapRequest("ram0").encode() + PostcopyResume().encode(),
    "an unknown block": BitmapRequest("other").encode(),
    "the same block again": BitmapRequest("ram0").encode() * 2,
    "pages at once": PART,
    "pages before RESUME": ASKED + PART,
    "the end at once": SectionEnd(2).encode()
    + bytes(7)
    + b"\x10"
    + Footer(2).encode()
    + EndOfStream().encode(),
    "a stream of its own": b"QEVM\0\0\0\3",
    "another protocol": b"GET / HTTP/1.0\r\n\r\n",
    "an end": b"",
}


@pytest.mark.parametrize("what", COMMANDS)
async def test_wrong_commands(what: str) -> None:
    async with paused() as ends:
        section = ends.machine.ram_section
        there, here = channels()
        async with there, here, trio.open_nursery() as nursery:
            nursery.start_soon(ends.incoming.resume, here)
            with suppress(ChannelLost):
                await there.send_all(COMMANDS[what].replace(bytes([0, 0, 0, 2]), section.to_bytes(4, "big")))
            if not COMMANDS[what]:
                there.shut_down()
            await until(lambda: ends.received.events.count(Event.LOSE) == 2)
        assert ends.phases == (Phase.PAUSED, Phase.PAUSED)
        assert isinstance(ends.received.error, StreamError | ChannelLost)
