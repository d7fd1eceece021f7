"""RAM records: the plain model, the C loader and the C source agree, however the stream is cut or broken."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from vhostpc.errors import ChannelLost, StreamError
from vhostpc.pages.pagesource import UNLIMITED, Ended, PageSource
from vhostpc.pages.ramblock import Bits, RamSet
from vhostpc.pages.ramchannel import INPUT_ROOM
from vhostpc.pages.service import FaultService
from vhostpc.units import TARGET_PAGE
from vhostpc.wire.migration.ramrec import (
    BadRamStream,
    BadRecord,
    EndOfSection,
    RamDecoder,
    RamEncoder,
    RamModel,
    RamPage,
)
from vhostpc.wire.migration.return_path import PageRequest, Pong, ReturnPathDecoder, ReturnPathMessage, Shut

PAGE_A = b"a" * TARGET_PAGE
BLOCKS = {"ram0": (6 * TARGET_PAGE, TARGET_PAGE), "rom": (2 * TARGET_PAGE, TARGET_PAGE)}
# A "host page" of four target pages: the loader only needs the bitmaps and buffers to know about it.
BIG = {"ram0": (32 * 1024, 16 * 1024), "rom": (8192, 4096)}


def test_bytes_of_records() -> None:
    encoder = RamEncoder()
    # word: offset 0x1000 and PAGE; u8 length and name because the block is new
    assert encoder.page("ram0", 0x1000, PAGE_A) == bytes.fromhex("0000000000001008 0472616d30") + PAGE_A
    # ZERO and CONTINUE: no name, one fill byte
    assert encoder.page("ram0", 0x2000, bytes(TARGET_PAGE)) == bytes.fromhex("0000000000002022 00")
    assert encoder.zero("rom", 0) == bytes.fromhex("0000000000000002 03726f6d 00")
    assert encoder.end() == bytes.fromhex("0000000000000010")
    # The block survives the end of a section.
    assert encoder.zero("rom", 0x1000) == bytes.fromhex("0000000000001022 00")


def test_bytes_of_return_path() -> None:
    stream = bytes.fromhex(
        "0002 0004 00000001"  # PONG 1
        "0003 0011 0000000000002000 00001000 04 72616d30"  # REQ_PAGES_ID ram0+0x2000, 0x1000
        "0004 000c 0000000000001000 00001000"  # REQ_PAGES in the same block
        "0001 0004 00000000"  # SHUT 0
    )
    expected: list[ReturnPathMessage] = [
        Pong(1),
        PageRequest("ram0", 0x2000, 0x1000),
        PageRequest("ram0", 0x1000, 0x1000),
        Shut(0),
    ]
    decoder = ReturnPathDecoder()
    assert list(decoder.feed(stream)) == expected
    decoder = ReturnPathDecoder()
    assert [m for b in stream for m in decoder.feed(bytes([b]))] == expected
    assert expected[0].encode() + expected[1].encode() == stream[:29]


@pytest.mark.parametrize(
    "message",
    [
        "0003 000d 0000000000002000 00001000 00",  # empty name
        "0003 0011 0000000000002000 00001000 05 72616d30",  # name longer than the message
        "0004 000c 0000000000001000 00001000",  # no block yet
        "0003 0011 0000000000002001 00001000 04 72616d30",  # not a page
        "0009 0000",
        "0001 0201",
        "0001 0000",
    ],
)
async def test_broken_return_path(message: str) -> None:
    raw = bytes.fromhex(message)
    with pytest.raises(StreamError):
        list(ReturnPathDecoder().feed(raw))
    with RamSet() as ram:
        ram.create("ram0", 16 * TARGET_PAGE)
        ours, theirs = socket.socketpair()
        with ours, theirs, PageSource(ram, ours.fileno()) as source:
            theirs.send(raw)
            with trio.fail_after(10), pytest.raises(StreamError):
                await source.serve()


# --- twins ------------------------------------------------------------------------------------------

ENDS = st.sampled_from(["eos", "eof"])
PAGES = st.tuples(st.sampled_from(["ram0", "rom"]), st.integers(0, 7), st.sampled_from([0, 0, 1, 255]))


class Stream(bytes):
    """Bytes that print briefly: the seed of a failure is in hypothesis's own line."""

    def __repr__(self) -> str:
        return f"<{len(self)} bytes {self[:60].hex()}...>"


@st.composite
def streams(draw: st.DrawFn) -> bytes:
    """Mostly valid records, now and then something broken in the middle."""
    encoder = RamEncoder()
    out = bytearray()
    for block, page, kind in draw(st.lists(PAGES, max_size=14)):
        offset = page * TARGET_PAGE
        if kind == 0:
            out += encoder.zero(block, offset, draw(st.sampled_from([0, 0, 0, 7])))
        else:
            out += encoder.page(block, offset, bytes([kind]) * TARGET_PAGE)
    if draw(ENDS) == "eos":
        out += encoder.end()
    if out and draw(st.integers(0, 3)) == 0:
        at = draw(st.integers(0, min(len(out) - 1, 40)))
        out[at] ^= 1 << draw(st.integers(0, 7))
    if out and draw(st.integers(0, 3)) == 0:
        del out[draw(st.integers(0, len(out))) :]
    return Stream(out)


def runs_of_big(block_pages: int = 4) -> st.SearchStrategy[bytes]:
    """Streams for blocks with host pages of several target pages."""

    @st.composite
    def build(draw: st.DrawFn) -> bytes:
        encoder, out = RamEncoder(), bytearray()
        for host, kinds in draw(
            st.lists(
                st.tuples(st.integers(0, 1), st.lists(st.sampled_from([0, 0, 1, 2]), min_size=3, max_size=4)),
                max_size=4,
            )
        ):
            for i, kind in enumerate(kinds):
                offset = (host * block_pages + i) * TARGET_PAGE
                out += encoder.page("ram0", offset, bytes([kind]) * TARGET_PAGE)
            if draw(st.booleans()):
                out += encoder.page("rom", 0, PAGE_A)
        if draw(ENDS) == "eos":
            out += encoder.end()
        return Stream(out)

    return build()


@contextmanager
def loader(blocks: dict[str, tuple[int, int]]) -> Iterator[tuple[RamSet, FaultService]]:
    with RamSet() as ram:
        for name, (length, page_size) in blocks.items():
            fd = os.memfd_create(name, os.MFD_CLOEXEC)
            os.ftruncate(fd, length)
            ram.add(name, fd, length, page_size)
            os.close(fd)
        with FaultService(ram) as service:
            yield ram, service


async def load_cut(service: FaultService, stream: bytes, cuts: list[int]) -> str:
    """Feed the C loader the stream in pieces; returns the verdict as text."""
    ours, theirs = trio.socket.socketpair()
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)

    async def feed() -> None:
        at = 0
        with theirs:
            for cut in [*sorted(cuts), len(stream)]:
                if cut > at:
                    await trio.SocketStream(theirs).send_all(stream[at:cut])
                    at = cut
                    await trio.lowlevel.checkpoint()

    verdict = ""
    with ours:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(swallow_broken, feed)
            try:
                numbers = await service.load(ours.fileno())
                verdict = f"end of section after {numbers.bytes}"
            except BadRamStream as e:
                verdict = f"{e.why.name} at {e.offset}"
            except ChannelLost as e:
                verdict = "cut inside" if "inside" in str(e) else "closed"
            nursery.cancel_scope.cancel()
    return verdict


async def swallow_broken(feed: object) -> None:
    with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
        await feed()  # type: ignore[operator]


def model_verdict(model: RamModel, stream: bytes) -> str:
    try:
        for i in range(0, len(stream), 1000):
            model.feed(stream[i : i + 1000])
            if model.ended:
                break
        if model.ended:
            return "end of section"
        model.eof()
        return "closed"
    except BadRamStream as e:
        return "cut inside" if e.why == BadRecord.TRUNCATED else f"{e.why.name} at {e.offset}"


def check_twins(blocks: dict[str, tuple[int, int]], stream: bytes, cuts: list[int], armed: bool) -> None:
    placed: dict[tuple[str, int], bytes] = {}
    # The calm loader writes plainly, the last copy of a page wins; armed and model: the first one stays.
    model = RamModel(blocks, lambda block, offset, data: placed.update({(block, offset): data}))
    expected = model_verdict(model, stream)

    async def run() -> None:
        with loader(blocks) as (ram, service):
            if armed:
                service.arm()
            verdict = await load_cut(service, stream, cuts)
            assert verdict.startswith(expected)
            received = {
                (b.name, page * b.page_size)
                for b in ram.blocks
                for page in range(b.pages)
                if b.test_bit(Bits.RECEIVED, page)
            }
            assert received == set(placed)
            for (block, offset), data in placed.items():
                assert os.pread(ram[block].fd, len(data), offset) == data
            for b in ram.blocks:
                made = b.length - sum(length for _, length in b.holes())
                assert made == sum(len(d) for (name, _), d in placed.items() if name == b.name)

    with_limit(run)


def with_limit(run: object) -> None:
    async def limited() -> None:
        with trio.fail_after(20):
            await run()  # type: ignore[operator]

    trio.run(limited)


@settings(deadline=None, max_examples=60)
@given(stream=streams(), cuts=st.lists(st.integers(0, 30_000), max_size=5))
def test_loader_and_model_agree(stream: bytes, cuts: list[int]) -> None:
    check_twins(BLOCKS, stream, cuts, armed=True)


@settings(deadline=None, max_examples=40)
@given(stream=runs_of_big(), cuts=st.lists(st.integers(0, 40_000), max_size=5))
def test_loader_and_model_agree_on_large_host_pages(stream: bytes, cuts: list[int]) -> None:
    # Placed by 16 KiB through 4 KiB pages of the kernel: the gathering is what is tested here.
    check_twins(BIG, stream, cuts, armed=True)


async def test_calm_loader_takes_the_last_copy() -> None:
    encoder = RamEncoder()
    stream = encoder.page("ram0", 0, PAGE_A) + encoder.page("ram0", 0, b"b" * TARGET_PAGE)
    stream += encoder.zero("ram0", TARGET_PAGE) + encoder.end()
    with trio.fail_after(10), loader(BLOCKS) as (ram, service):
        assert (await load_cut(service, stream, [])).startswith("end of section")
        assert await ram["ram0"].read(0, TARGET_PAGE) == b"b" * TARGET_PAGE
        assert ram["ram0"].count_bits(Bits.RECEIVED) == 2


async def test_loader_names_the_broken_byte() -> None:
    stream = RamEncoder().page("ram0", 0, PAGE_A) + bytes(7) + b"\x01"
    with trio.fail_after(10), loader(BLOCKS) as (_ram, service):
        assert await load_cut(service, stream, []) == f"FLAGS at {8 + 5 + TARGET_PAGE}"


async def test_loader_goes_on_after_a_section() -> None:
    """The block of CONTINUE and what was read too far belong to the channel, not to the section."""
    encoder = RamEncoder()
    stream = encoder.page("ram0", 0, PAGE_A) + encoder.end()
    stream += encoder.page("ram0", TARGET_PAGE, PAGE_A) + encoder.end()
    ours, theirs = socket.socketpair()
    with trio.fail_after(10), ours, theirs, loader(BLOCKS) as (ram, service):
        theirs.send(stream)
        with service.open_channel(ours.fileno()) as channel:
            await channel.load()
            assert ram["ram0"].count_bits(Bits.RECEIVED) == 1
            numbers = await channel.load()
        assert numbers.bytes == len(stream)
        assert ram["ram0"].count_bits(Bits.RECEIVED) == 2


async def test_cancelled_loader_can_go_on() -> None:
    encoder = RamEncoder()
    ours, theirs = socket.socketpair()
    with trio.fail_after(10), ours, theirs, loader(BLOCKS) as (ram, service):
        stream = encoder.page("ram0", 0, PAGE_A) + encoder.end()
        theirs.send(stream[:100])
        with service.open_channel(ours.fileno()) as channel:
            with trio.move_on_after(0.05) as scope:
                await channel.load()
            assert scope.cancelled_caught
            theirs.send(stream[100:])
            await channel.load()
        assert ram["ram0"].count_bits(Bits.RECEIVED) == 1


# --- source -----------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=25)
@given(
    wanted=st.lists(st.tuples(st.sampled_from(["ram0", "rom"]), st.integers(0, 1), st.integers(1, 4))),
    zeros=st.sets(st.integers(0, 5)),
    rate=st.sampled_from([0, UNLIMITED, 1 << 30]),
)
def test_source_sends_each_page_once(wanted: list[tuple[str, int, int]], zeros: set[int], rate: int) -> None:
    async def run() -> None:
        with RamSet() as ram:
            contents: dict[tuple[str, int], bytes] = {}
            for name, (length, page_size) in BLOCKS.items():
                block = ram.create(name, length, page_size)
                await block.fill(3)
                for page in range(block.pages):
                    if page in zeros:
                        await block.write(page * TARGET_PAGE, bytes(TARGET_PAGE))
                    contents[name, page * TARGET_PAGE] = await block.read(page * TARGET_PAGE, TARGET_PAGE)
                block.set_bits(Bits.DIRTY)
            ours, theirs = trio.socket.socketpair()
            with ours, theirs, PageSource(ram, ours.fileno(), background_rate=rate) as source:
                decoder = RamDecoder({name: length for name, (length, _) in BLOCKS.items()})
                got: list[RamPage] = []
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(source.serve)
                    for name, first, count in wanted:
                        length = min(count * TARGET_PAGE, BLOCKS[name][0] - first * TARGET_PAGE)
                        await theirs.send(PageRequest(name, first * TARGET_PAGE, length).encode())
                    if rate == 0:  # then everything has to be asked for
                        for name, (length, _) in BLOCKS.items():
                            await theirs.send(PageRequest(name, 0, length).encode())
                    ended = False
                    while not ended:
                        data = await theirs.recv(65536)
                        assert data
                        for event in decoder.feed(data):
                            if isinstance(event, EndOfSection):
                                ended = True
                            else:
                                got.append(event)
                    await theirs.send(Shut(0).encode())
                assert {(p.block, p.offset): p.content for p in got} == contents
                assert len(got) == len(contents)
                assert source.numbers().eos_sent
                assert source.numbers().zero_pages == sum(not any(c) for c in contents.values())

    with_limit(run)


async def test_source_goes_on_from_what_was_asked() -> None:
    with trio.fail_after(10), RamSet() as ram:
        block = ram.create("ram0", 64 * TARGET_PAGE)
        await block.fill(1)
        block.set_bits(Bits.DIRTY)
        ours, theirs = trio.socket.socketpair()
        with ours, theirs, PageSource(ram, ours.fileno()) as source:
            order: list[int] = []
            async with trio.open_nursery() as nursery:
                nursery.start_soon(source.serve)
                decoder = RamDecoder({"ram0": block.length})
                await theirs.send(PageRequest("ram0", 40 * TARGET_PAGE, TARGET_PAGE).encode())
                while len(order) < 64:
                    for event in decoder.feed(await theirs.recv(65536)):
                        if isinstance(event, RamPage):
                            order.append(event.offset // TARGET_PAGE)
                    source.set_rate(UNLIMITED)
                nursery.cancel_scope.cancel()
        # Near it first: test_ram_order.py has more of that.
        assert order == [*range(40, 48), *range(39, 31, -1), *range(48, 64), *range(31, -1, -1)]


async def test_source_withholds_and_releases() -> None:
    with trio.fail_after(10), RamSet() as ram:
        block = ram.create("ram0", 8 * TARGET_PAGE)
        await block.fill(1)
        block.set_bits(Bits.DIRTY)
        ours, theirs = trio.socket.socketpair()
        with ours, theirs, PageSource(ram, ours.fileno(), background_rate=UNLIMITED) as source:
            source.withhold("ram0", 2, 3)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(source.serve)
                decoder = RamDecoder({"ram0": block.length})
                seen: set[int | None] = set()

                async def take(until: int) -> None:
                    while len(seen) < until:
                        for event in decoder.feed(await theirs.recv(65536)):
                            seen.add(event.offset // TARGET_PAGE if isinstance(event, RamPage) else None)

                await take(5)
                assert seen == {0, 1, 5, 6, 7}
                await theirs.send(PageRequest("ram0", 3 * TARGET_PAGE, TARGET_PAGE).encode())
                await source.changed()
                assert source.numbers().withheld == 1
                source.release("ram0", 3, 1)
                await take(6)
                assert 3 in seen
                assert source.numbers().withheld == 0
                source.release("ram0")
                await take(9)  # all pages, and the end
                assert None in seen
                theirs.shutdown(socket.SHUT_WR)
                nursery.cancel_scope.deadline = trio.current_time() + 5
            assert not nursery.cancel_scope.cancelled_caught


async def test_source_ends_when_the_peer_closes() -> None:
    with trio.fail_after(10), RamSet() as ram:
        ram.create("ram0", 8 * TARGET_PAGE)
        ours, theirs = socket.socketpair()
        with ours, PageSource(ram, ours.fileno()) as source:
            theirs.close()
            assert await source.serve() is Ended.PEER_CLOSED


def framed(kind: int, section: int, body: bytes) -> bytes:
    """Header of a further part, its records, its footer."""
    header, footer = struct.pack(">BI", kind, section), struct.pack(">BI", 0x7E, section)
    return header + body + footer


def parts(section: int) -> bytes:
    """What follows the header of a PART, to the END's footer."""
    encoder = RamEncoder()
    first = encoder.page("ram0", 0, PAGE_A) + encoder.end() + struct.pack(">BI", 0x7E, section)
    second = framed(2, section, encoder.page("ram0", TARGET_PAGE, PAGE_A) + encoder.end())
    return first + second + framed(3, section, encoder.zero("ram0", 2 * TARGET_PAGE) + encoder.end())


async def followed(stream: bytes, cut: int) -> tuple[int, bytes, int]:
    """Pages received, what was read too far, sections; the first ``cut`` bytes are fed, the others sent."""
    ours, theirs = socket.socketpair()
    with trio.fail_after(10), ours, theirs, loader(BLOCKS) as (ram, service):
        theirs.send(stream[cut:])
        theirs.close()
        with service.open_channel(ours.fileno()) as channel:
            channel.feed(stream[:cut])
            numbers = await channel.load(7)
            return ram["ram0"].count_bits(Bits.RECEIVED), channel.take(), numbers.sections


@pytest.mark.parametrize("behind", [b"", b"\x00", b"\x04\x00\x00", b"\x02\x00\x00\x00\x07"])
async def test_loader_follows_a_section_to_its_end(behind: bytes) -> None:
    """Behind the END nothing is looked at, whatever it is."""
    stream = parts(7)
    for cut in (0, 1, 5, 4096, 4130, len(stream)):
        received, rest, sections = await followed(stream + behind, cut)
        assert (received, sections) == (3, 3)
        assert rest == (behind if cut < len(stream) else b"")


@pytest.mark.parametrize("behind", [b"\x08", b"\x04", b"\x02\x00\x00\x00\x08", b"\x03\x00\x00\x00\x08"])
async def test_loader_stops_before_another_section(behind: bytes) -> None:
    stream = RamEncoder().page("ram0", 0, PAGE_A) + RamEncoder().end() + struct.pack(">BI", 0x7E, 7)
    assert await followed(stream + behind, 0) == (1, behind, 1)
    assert await followed(stream + behind, len(stream + behind)) == (1, behind, 1)


@pytest.mark.parametrize("footer", [b"\x7e\x00\x00\x00\x08", b"\x02\x00\x00\x00\x07"])
async def test_loader_misses_a_footer(footer: bytes) -> None:
    stream = RamEncoder().page("ram0", 0, PAGE_A) + RamEncoder().end()
    with pytest.raises(BadRamStream) as caught:
        await followed(stream + footer, 0)
    assert (caught.value.why, caught.value.offset) == (BadRecord.FOOTER, len(stream))


async def test_loader_is_fed_no_more_than_a_buffer() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, loader(BLOCKS) as (_ram, service), service.open_channel(ours.fileno()) as channel:
        channel.feed(bytes(INPUT_ROOM))
        with pytest.raises(OSError, match="RAM channel"):
            channel.feed(b"x")
        assert channel.take() == bytes(INPUT_ROOM)
        assert channel.take() == b""


async def test_calm_loader_takes_huge_pages_in_parts() -> None:
    """Before postcopy a source sends what was written, not whole host pages."""
    encoder = RamEncoder()
    stream = encoder.page("big", 3 * TARGET_PAGE, PAGE_A) + encoder.page("big", TARGET_PAGE, PAGE_A)
    with trio.fail_after(10), loader({"big": (32768, 16384)}) as (ram, service):
        assert (await load_cut(service, stream + encoder.end(), [])).startswith("end of section")
        expected = (bytes(TARGET_PAGE) + PAGE_A) * 2
        assert await ram["big"].read(0, 4 * TARGET_PAGE) == expected
