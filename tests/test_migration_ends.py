"""Destination and source without QEMU: streams written byte by byte, cut and broken; one end feeds the other."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from contextlib import suppress

import pytest
import trio

from tests.streams import BLOB, POSTCOPY, PRECOPY, A, B, C, h
from vhostpc.errors import ChannelLost, MemoryLost, StreamError, UfdError
from vhostpc.memory.ramblock import Bits
from vhostpc.migration import incoming as incoming_module
from vhostpc.migration.held import HeldMachine
from vhostpc.migration.incoming import Incoming
from vhostpc.migration.outgoing import Outgoing
from vhostpc.migration.state import Status
from vhostpc.wire.return_path import PageRequest, Pong, ReturnPathDecoder, Shut

ZERO = bytes(4096)
LIMIT = 30


def pair() -> tuple[trio.SocketStream, trio.SocketStream]:
    ours, theirs = socket.socketpair()
    return tuple(trio.SocketStream(trio.socket.from_stdlib_socket(s)) for s in (ours, theirs))  # type: ignore[return-value]


async def said(stream: trio.SocketStream) -> list[object]:
    """All that a destination says until it closes."""
    decoder, messages = ReturnPathDecoder(), list[object]()
    with suppress(trio.BrokenResourceError):
        async for data in stream:
            messages += decoder.feed(bytes(data))
    return messages


async def receive(
    data: bytes, *, postcopy: bool = False, page_sizes: dict[str, int] | None = None, pieces: int = 1 << 20
) -> tuple[HeldMachine, list[object]]:
    """What a destination makes of a stream that comes in pieces, and what it says."""
    ours, theirs = pair()
    messages: list[object] = []

    async def feed() -> None:
        with suppress(trio.BrokenResourceError):
            for at in range(0, len(data), pieces):
                await theirs.send_all(data[at : at + pieces])
            await theirs.send_eof()

    async def listen() -> None:
        messages.extend(await said(theirs))

    with trio.fail_after(LIMIT):
        async with theirs, trio.open_nursery() as nursery:
            nursery.start_soon(feed)
            nursery.start_soon(listen)
            async with ours:
                incoming = Incoming(ours, postcopy=postcopy, page_sizes=page_sizes)
                try:
                    machine = await incoming.receive()
                except BaseException:
                    incoming.close()
                    raise
            # Both tasks end with our side.
    return machine, messages


async def content(machine: HeldMachine) -> dict[str, list[bytes]]:
    return {
        block.name: [await block.read(at, 4096) for at in range(0, block.length, 4096)]
        for block in machine.ram.blocks
    }


def one(group: BaseException) -> BaseException:
    while isinstance(group, BaseExceptionGroup) and len(group.exceptions) == 1:
        group = group.exceptions[0]
    return group


async def refused(data: bytes, **more: object) -> BaseException:
    try:
        machine, _ = await receive(data, **more)  # type: ignore[arg-type]
    except BaseException as error:
        return one(error)
    machine.close()
    raise AssertionError("it was taken")


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
    assert [m for m in messages if isinstance(m, Pong)] == [Pong(1), Pong(2), Pong(3), Pong(4)]
    assert messages[-1] == Shut(0)


async def test_a_touched_page_is_asked_for() -> None:
    """The source brings only what it is asked for, from RUN on."""
    ours, theirs = pair()
    split = POSTCOPY.index(BLOB) + len(BLOB) + 9  # behind PING 4
    with trio.fail_after(LIMIT):
        async with ours, theirs, trio.open_nursery() as nursery:
            incoming = Incoming(ours, postcopy=True)
            held: list[HeldMachine] = []

            async def run() -> None:
                held.append(await incoming.receive())

            nursery.start_soon(run)
            await theirs.send_all(POSTCOPY[:split])
            await incoming.running()
            assert incoming.machine
            touched: list[bytes] = []

            async def touch() -> None:
                assert incoming.machine
                touched.append(await incoming.machine.ram["ram0"].read(4096, 4096))

            nursery.start_soon(touch)
            decoder = ReturnPathDecoder()
            asked: list[object] = []
            while PageRequest("ram0", 4096, 4096) not in asked:
                asked += decoder.feed(bytes(await theirs.receive_some(4096)))
            assert touched == []
            await theirs.send_all(POSTCOPY[split:])
        assert touched == [C]
        held[0].close()


def forged(change: Callable[[bytes], bytes], data: bytes = POSTCOPY) -> bytes:
    changed = change(data)
    assert changed != data
    return changed


REFUSED: dict[str, tuple[bytes, str]] = {
    "no stream": (b"GET / HTTP/1.0\r\n\r\n", "not a migration stream"),
    "broken record": (
        forged(lambda d: d.replace(h("0000000000001022 00"), h("0000000000001024 00"), 1)),
        "flags that are neither",
    ),
    "offset behind the block": (
        forged(lambda d: d.replace(h("0000000000001022 00"), h("0000000000007022 00"), 1)),
        "behind the end of its block",
    ),
    "no footer": (
        forged(
            lambda d: d.replace(h("0000000000000010 7e 00000007 08"), h("0000000000000010 7e 00000008 08"), 1)
        ),
        "no footer of the section",
    ),
    "a page that never comes": (
        forged(lambda d: d.replace(h("0000000000000002 04 726f6d30 00"), b"", 1)),
        "1 pages never came",
    ),
    "discard of an unknown block": (
        forged(lambda d: d.replace(h("0006 0017 00 04 726f6d30"), h("0006 0017 00 04 726f6d31"), 1)),
        "was not listed",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
async def test_broken_streams(what: str) -> None:
    data, why = REFUSED[what]
    error = await refused(data, postcopy=True)
    assert isinstance(error, StreamError), repr(error)
    assert why in str(error)


async def test_a_broken_byte_is_named_by_its_place_in_the_stream() -> None:
    at = PRECOPY.index(h("0000000000001022 00"))
    error = await refused(PRECOPY[: at + 7] + b"\x24" + PRECOPY[at + 8 :])
    assert f"byte {at} " in str(error)


async def test_bytes_behind_the_end() -> None:
    assert "3 bytes behind the end" in str(await refused(PRECOPY + b"abc"))


async def test_postcopy_that_is_not_enabled() -> None:
    assert "postcopy-ram is not enabled" in str(await refused(POSTCOPY))


async def test_postcopy_without_a_userfaultfd(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused at ADVISE, when the source can still go on."""

    class Denied:
        @staticmethod
        def open() -> None:
            raise UfdError("userfaultfd: not permitted; allow it with ...", 1)

    monkeypatch.setattr(incoming_module, "Userfaultfd", Denied)
    error = await refused(POSTCOPY, postcopy=True)
    assert "postcopy can not be done here: userfaultfd: not permitted" in str(error)


async def test_page_sizes_that_differ() -> None:
    error = await refused(POSTCOPY, postcopy=True, page_sizes={"ram0": 2 << 20})
    assert "has pages of 0x1000 at the source, not of 0x200000" in str(error)


async def test_no_huge_pages_to_be_had() -> None:
    error = await refused(PRECOPY, page_sizes={"ram0": 2 << 20})
    assert "RAM block 'ram0', 0x3000 bytes in pages of 0x200000" in str(error)


@pytest.mark.parametrize("postcopy", [False, True], ids=["precopy", "postcopy"])
async def test_cut_at_every_step_leaks_nothing(postcopy: bool) -> None:
    data = POSTCOPY if postcopy else PRECOPY
    whole = len(data) if postcopy else PRECOPY.index(h("00 06 0000009d")) + 1
    places = [*range(0, 200), *range(4100, 4400), *range(whole - 60, whole - (1 if postcopy else 0))]
    await refused(data[:100], postcopy=postcopy)
    before = len(os.listdir("/proc/self/fd"))
    for place in places:
        error = await refused(data[:place], postcopy=postcopy)
        assert isinstance(error, StreamError | ChannelLost), (place, repr(error))
    assert len(os.listdir("/proc/self/fd")) == before


async def test_lost_in_postcopy_is_a_pause() -> None:
    """All pages that came stay; who waits for another gets an error, and no page is made."""
    ours, theirs = pair()
    cut = POSTCOPY.index(BLOB) + len(BLOB) + 9
    with trio.fail_after(LIMIT):
        async with ours, trio.open_nursery() as nursery:
            incoming = Incoming(ours, postcopy=True)
            caught: list[BaseException] = []

            async def run() -> None:
                try:
                    await incoming.receive()
                except (StreamError, ChannelLost) as error:
                    caught.append(error)

            async def touch() -> None:
                assert incoming.machine
                with pytest.raises(MemoryLost):
                    await incoming.machine.ram["ram0"].read(4096, 1)

            nursery.start_soon(run)
            await theirs.send_all(POSTCOPY[:cut])
            await incoming.running()
            nursery.start_soon(touch)
            while b"\x00\x03\x00\x11" not in bytes(await theirs.receive_some(4096)):
                pass
            await theirs.aclose()
    assert len(caught) == 1
    assert incoming.status is Status.POSTCOPY_PAUSED
    assert incoming.machine
    block = incoming.machine.ram["ram0"]
    assert [block.test_bit(Bits.RECEIVED, page) for page in range(3)] == [True, False, False]
    assert os.pread(block.fd, 4096, 0) == A
    assert block.holes() == [(4096, 8192)]
    incoming.close()


@pytest.mark.parametrize("postcopy", [False, True], ids=["precopy", "postcopy"])
async def test_sent_on_it_is_the_same(postcopy: bool) -> None:
    machine, _ = await receive(PRECOPY)
    there, here = pair()
    with machine, trio.fail_after(LIMIT):
        outgoing = Outgoing(machine, there)
        got: list[HeldMachine] = []
        async with there, here, trio.open_nursery() as nursery:

            async def take() -> None:
                got.append(await Incoming(here, postcopy=postcopy).receive())

            nursery.start_soon(take)
            await outgoing.send(postcopy=postcopy)
        assert outgoing.status is Status.COMPLETED
        with got[0] as copy:
            assert await content(copy) == await content(machine)
            assert copy.configuration == machine.configuration
            assert copy.devices == machine.devices
            assert copy.description == (b"" if postcopy else machine.description)


@pytest.mark.parametrize("postcopy", [False, True], ids=["precopy", "postcopy"])
async def test_destination_that_is_gone(postcopy: bool) -> None:
    machine, _ = await receive(PRECOPY)
    there, here = pair()
    with machine, trio.fail_after(LIMIT):
        async with there:
            outgoing = Outgoing(machine, there)
            async with trio.open_nursery() as nursery:

                async def leave() -> None:
                    seen = b""
                    while h("03 00000001 0a") not in seen and len(seen) < 4000:
                        seen += bytes(await here.receive_some(512))
                    await here.aclose()

                nursery.start_soon(leave)
                with pytest.raises(ChannelLost, match="closed the connection"):
                    await outgoing.send(postcopy=postcopy)
        wanted = Status.POSTCOPY_PAUSED if postcopy else Status.FAILED
        assert outgoing.status is wanted


async def test_destination_that_talks_nonsense() -> None:
    machine, _ = await receive(PRECOPY)
    there, here = pair()
    with machine, trio.fail_after(LIMIT):
        async with there, here:
            await here.send_all(b"\x00\x09\x00\x00" * 4)
            with pytest.raises(StreamError, match="return path"):
                await Outgoing(machine, there).send()


async def test_destination_that_is_done_too_early() -> None:
    machine, _ = await receive(PRECOPY)
    there, here = pair()
    with machine, trio.fail_after(LIMIT):
        async with there, here:
            await here.send_all(Shut(0).encode())
            with pytest.raises(StreamError, match="were not sent"):
                await Outgoing(machine, there).send(rate=0)
