"""The front-end's session: order of messages, verified replies, late ones, wrong ones, the back-end's channel."""

from __future__ import annotations

import os
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest
import trio

from tests.kit.fake_backend import REPLY, Answer, Change, FakeBackend, answers_to
from vhostpc.errors import LocalProtocolError, PeerClosed, PostcopyRefused, RemoteProtocolError, RequestFailed
from vhostpc.frontend import (
    BackendPostcopy,
    FrontEnd,
    GuestRegion,
    MemoryShare,
    Mode,
    SharedLog,
    connect,
    listen,
    over,
)
from vhostpc.pages.ramblock import RamSet
from vhostpc.pages.service import FaultService
from vhostpc.wire import vhost_user as vu
from vhostpc.wire.vhost_user import (
    FLAG_NEED_REPLY,
    FLAG_REPLY,
    BackendRequest,
    Feature,
    Frame,
    MemoryRegion,
    ProtocolFeature,
    Request,
)


@asynccontextmanager
async def session(
    change: Change = lambda frame: None, *, negotiate: bool = True, timeout: float = 5
) -> AsyncIterator[tuple[FrontEnd, FakeBackend]]:
    ours, theirs = trio.socket.socketpair()
    fake = FakeBackend(theirs, change)
    with trio.fail_after(20), theirs:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fake.run)
            async with over(ours, timeout=timeout) as front:
                if negotiate:
                    await front.negotiate()
                    await front.barrier()
                yield front, fake
            nursery.cancel_scope.cancel()


async def test_opening_in_qemus_order() -> None:
    async with session() as (front, fake):
        assert [Request(r).name for r, *_ in fake.got] == [
            "GET_FEATURES",
            "GET_PROTOCOL_FEATURES",
            "SET_PROTOCOL_FEATURES",
            "GET_QUEUE_NUM",
            "GET_MAX_MEM_SLOTS",
            "SET_BACKEND_REQ_FD",
            "SET_OWNER",
            "SET_FEATURES",
            "GET_FEATURES",
        ]
        assert front.queues == 2
        assert front.memory_slots == 509
        assert not front.features & Feature.LOG_ALL
        flags = {r: f for r, f, *_ in fake.got}
        assert flags[Request.SET_BACKEND_REQ_FD] == vu.VERSION | FLAG_NEED_REPLY
        assert flags[Request.SET_OWNER] == vu.VERSION


async def test_bits_that_nobody_knows_are_not_accepted() -> None:
    def change(frame: Frame) -> list[Answer] | None:
        if frame.request == Request.GET_PROTOCOL_FEATURES:
            return [(frame.request, REPLY, vu.pack_u64((1 << 64) - 1), [])]
        return None

    async with session(change) as (front, _):
        assert ProtocolFeature.INBAND_NOTIFICATIONS not in front.protocol_features
        assert ProtocolFeature.XEN_MMAP not in front.protocol_features
        assert int(front.protocol_features) < 1 << 20


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ((Request.GET_STATUS, REPLY, bytes(8), []), "number of GET_STATUS"),
        ((Request.GET_FEATURES, REPLY | FLAG_NEED_REPLY, bytes(8), []), "flags 0xd"),
        ((Request.GET_FEATURES, vu.VERSION, bytes(8), []), "flags 0x1"),
        ((Request.GET_FEATURES, REPLY, bytes(4), []), "4 bytes"),
        ((Request.GET_FEATURES, REPLY, b"", []), "0 bytes"),
        ((Request.GET_FEATURES, FLAG_REPLY, bytes(8), []), "version"),
    ],
)
async def test_wrong_replies_are_refused(answer: Answer, text: str) -> None:
    async with session(answers_to(Request.GET_FEATURES, answer), negotiate=False) as (front, _):
        with pytest.raises(RemoteProtocolError, match=text):
            await front.barrier()


async def test_descriptors_of_wrong_replies_are_closed() -> None:
    def change(frame: Frame) -> list[Answer] | None:
        if frame.request != Request.GET_FEATURES:
            return None
        return [(Request.GET_STATUS, REPLY, bytes(8), [os.eventfd(0), os.eventfd(0)])]

    async with session(change, negotiate=False) as (front, _):
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(5):
            with pytest.raises(RemoteProtocolError):
                await front.barrier()
        assert len(os.listdir("/proc/self/fd")) == before


async def test_a_late_reply_is_a_failure() -> None:
    async with session(answers_to(Request.GET_STATUS), timeout=0.1) as (front, _):
        with pytest.raises(RequestFailed, match="GET_STATUS: no reply within"):
            await front.get_status()


async def test_failure_status() -> None:
    change = answers_to(Request.SET_STATUS, (Request.SET_STATUS, REPLY, vu.pack_u64(3), []))
    async with session(change) as (front, _):
        with pytest.raises(RequestFailed, match="SET_STATUS failed with status 3"):
            await front.set_status(1)


async def test_a_back_end_that_goes_away() -> None:
    gone: list[str] = []
    async with session() as (front, fake):
        front.on_closed(lambda: gone.append("told"))
        fake.sock.shutdown(socket.SHUT_RDWR)
        await front.closed.wait()
        front.on_closed(lambda: gone.append("told at once"))
        assert gone == ["told", "told at once"]
        with pytest.raises(PeerClosed):
            await front.barrier()
        with pytest.raises(PeerClosed):
            await front.set_vring_num(0, 16)


async def test_one_request_in_flight() -> None:
    """Requests of several tasks do not mix: replies are matched by order alone."""
    async with session() as (front, _):
        seen: list[int] = []

        async def ask(request: Request) -> None:
            for _ in range(30):
                seen.append(await front.ask_u64(request))

        async with trio.open_nursery() as nursery:
            for request in (Request.GET_QUEUE_NUM, Request.GET_MAX_MEM_SLOTS, Request.GET_FEATURES):
                nursery.start_soon(ask, request)
        assert sorted(set(seen)) == sorted({2, 509, FakeBackend.features})


async def test_the_back_ends_own_requests() -> None:
    async with session() as (front, fake):
        channel = fake.channel
        assert channel is not None
        front.on_backend_request = lambda frame: 5 if frame.request == BackendRequest.VRING_ERR else 0
        for number, status in ((BackendRequest.CONFIG_CHANGE_MSG, 0), (BackendRequest.VRING_ERR, 5), (99, 1)):
            await channel.send(vu.encode(number, b"", flags=FLAG_NEED_REPLY))
            answer = await channel.recv(100)
            assert answer == vu.HEADER.pack(number, REPLY, 8) + vu.pack_u64(status)
        # A reply on the main socket does not wait for the channel, nor the other way round.
        await channel.send(vu.encode(BackendRequest.CONFIG_CHANGE_MSG))
        await front.barrier()
        assert [number for number, _ in list(front.backend_requests)][:3] == [2, 5, 99]


async def test_anything_can_be_sent() -> None:
    async with session() as (front, fake):
        await front.send(77, b"abc", [fake.sock.fileno()], FLAG_NEED_REPLY)
        frame = await front.receive()
        assert (frame.request, frame.flags) == (77, REPLY)
        await front.send_bytes(b"\0" * 5)
        assert fake.got[-1] == (77, vu.VERSION | FLAG_NEED_REPLY, 3, 1)


# --- memory -----------------------------------------------------------------------------------------


@asynccontextmanager
async def memory(front: FrontEnd, mode: Mode) -> AsyncIterator[tuple[MemoryShare, BackendPostcopy]]:
    with RamSet() as ram:
        regions = []
        for i in range(3):
            block = ram.create(f"ram{i}", 0x10000)
            regions.append(GuestRegion(0x10000 * i, block.length, block))
        with FaultService(ram) as service:
            yield MemoryShare(front, regions, mode), BackendPostcopy(front, service)


@pytest.mark.parametrize("mode", list(Mode))
async def test_sharing_outside_postcopy(mode: Mode) -> None:
    async with session() as (front, fake), memory(front, mode) as (share, _):
        fake.got.clear()
        await share.share()
        if mode is Mode.TABLE:
            assert fake.got == [(Request.SET_MEM_TABLE, 0x9, 8 + 32 * 3, 3)]
        else:
            assert fake.got == [(Request.ADD_MEM_REG, 0x9, 40, 1)] * 3
            fake.got.clear()
            await share.share()
            assert fake.got == []  # nothing new
            share.regions.pop(1)
            await share.share()
            assert fake.got == [(Request.REM_MEM_REG, 0x9, 40, 0)]


@pytest.mark.parametrize("mode", list(Mode))
async def test_postcopy_exchange(mode: Mode) -> None:
    async with session() as (front, fake), memory(front, mode) as (share, postcopy):
        await postcopy.advise()
        await postcopy.listen()
        fake.got.clear()
        bases = await postcopy.share(share)
        await front.barrier()
        assert [b.base for b in bases] == [fake.base + r.guest_addr for r in share.regions]
        if mode is Mode.TABLE:
            assert fake.got[:-1] == [(5, 0x1, 104, 3), (5, 0x1, 8, 0)]
        else:
            assert fake.got[:-1] == [(37, 0x1, 40, 1)] * 3 + [(37, 0x1, 8, 0)]
        fake.got.clear()
        await postcopy.share(share)  # again, as after stop and continue
        share.regions.pop()
        await postcopy.share(share)
        await postcopy.end()
        if mode is Mode.TABLE:
            assert fake.got == [(5, 1, 104, 3), (5, 1, 8, 0), (5, 1, 72, 2), (5, 1, 8, 0), (30, 9, 0, 0)]
        else:
            # Nothing new has the number 0; a removal its own.
            assert fake.got == [(0, 1, 8, 0), (38, 1, 40, 0), (38, 1, 8, 0), (30, 9, 0, 0)]
        assert postcopy.client is not None
        assert postcopy.client.removed


def changed_table(edit: Callable[[list[MemoryRegion], list[MemoryRegion]], list[MemoryRegion]]) -> Change:
    def change(frame: Frame) -> list[Answer] | None:
        if frame.request != Request.SET_MEM_TABLE or len(frame.payload) == 8:
            return None
        sent = vu.unpack_table(frame.payload)
        right = [MemoryRegion(r.guest_addr, r.size, FakeBackend.base + r.guest_addr, 0) for r in sent]
        return [(frame.request, REPLY, vu.pack_table(edit(sent, right)), [])]

    return change


def moved(region: MemoryRegion, **fields: int) -> MemoryRegion:
    values = {n: getattr(region, n) for n in ("guest_addr", "size", "user_addr", "mmap_offset")} | fields
    return MemoryRegion(**values)


@pytest.mark.parametrize(
    ("edit", "text"),
    [
        (lambda sent, right: sent, "repeats our own address"),
        (lambda sent, right: right[::-1], "in the order and size"),
        (lambda sent, right: right[:2], "72 bytes in place of 104"),
        (lambda sent, right: [], "8 bytes in place of"),
        (lambda sent, right: [moved(right[0], size=4096), *right[1:]], "in the order and size"),
        (lambda sent, right: [moved(right[0], user_addr=right[1].user_addr), *right[1:]], "overlap"),
        (lambda sent, right: [moved(right[0], user_addr=FakeBackend.base + 8), *right[1:]], "not aligned"),
        (lambda sent, right: [moved(right[0], user_addr=0), *right[1:]], "leaves no room for it"),
        (
            lambda sent, right: [moved(right[0], user_addr=(1 << 64) - 4096), *right[1:]],
            "leaves no room for it",
        ),
    ],
)
async def test_addresses_that_cannot_be_right_refuse_postcopy(
    edit: Callable[[list[MemoryRegion], list[MemoryRegion]], list[MemoryRegion]], text: str
) -> None:
    """Before the last step: a back-end whose faults could not be served must not begin to fault."""
    async with session(changed_table(edit)) as (front, fake), memory(front, Mode.TABLE) as (share, postcopy):
        await postcopy.advise()
        await postcopy.listen()
        fake.got.clear()
        with pytest.raises(PostcopyRefused, match=text):
            await postcopy.share(share)
        await front.barrier()
        assert [size for request, _, size, _ in fake.got if request == Request.SET_MEM_TABLE] == [104]


@pytest.mark.parametrize(
    "answer",
    [
        (Request.POSTCOPY_ADVISE, REPLY, b"", []),
        (Request.POSTCOPY_ADVISE, REPLY, bytes(8), []),
    ],
)
async def test_advise_without_a_descriptor(answer: Answer) -> None:
    async with session(answers_to(Request.POSTCOPY_ADVISE, answer)) as (front, _):
        async with memory(front, Mode.TABLE) as (_, postcopy):
            with pytest.raises(PostcopyRefused, match="not with one userfaultfd"):
                await postcopy.advise()


async def test_advise_with_something_else() -> None:
    def change(frame: Frame) -> list[Answer] | None:
        if frame.request != Request.POSTCOPY_ADVISE:
            return None
        return [(frame.request, REPLY, b"", [os.eventfd(0)])]

    async with session(change) as (front, _), memory(front, Mode.TABLE) as (_, postcopy):
        before = len(os.listdir("/proc/self/fd"))
        with pytest.raises(PostcopyRefused, match="not a userfaultfd"):
            await postcopy.advise()
        assert len(os.listdir("/proc/self/fd")) == before


async def test_postcopy_that_was_not_offered() -> None:
    async with session(negotiate=False) as (front, _):
        await front.negotiate(hide_protocol=ProtocolFeature.PAGEFAULT)
        async with memory(front, Mode.TABLE) as (share, postcopy):
            with pytest.raises(PostcopyRefused, match="did not offer"):
                await postcopy.advise()
            with pytest.raises(LocalProtocolError):
                await postcopy.share(share)


async def test_listen_that_fails() -> None:
    change = answers_to(Request.POSTCOPY_LISTEN, (Request.POSTCOPY_LISTEN, REPLY, vu.pack_u64(1), []))
    async with session(change) as (front, _), memory(front, Mode.TABLE) as (_, postcopy):
        await postcopy.advise()
        with pytest.raises(RequestFailed, match="POSTCOPY_LISTEN failed"):
            await postcopy.listen()


async def test_a_back_end_that_dies_is_served_no_more() -> None:
    async with session() as (front, fake), memory(front, Mode.TABLE) as (_, postcopy):
        first = await postcopy.advise()
        second = await postcopy.advise()
        assert postcopy.client is second
        fake.sock.shutdown(socket.SHUT_RDWR)
        await front.closed.wait()
        assert first.removed
        assert second.removed


async def test_slots_need_to_be_negotiated() -> None:
    async with session(negotiate=False) as (front, _):
        await front.negotiate(hide_protocol=ProtocolFeature.CONFIGURE_MEM_SLOTS)
        async with memory(front, Mode.TABLE) as (share, _):
            with pytest.raises(LocalProtocolError, match="not negotiated"):
                MemoryShare(front, share.regions, Mode.SLOTS)
            with pytest.raises(LocalProtocolError, match="in no region"):
                share.user_addr(0x30000)
            assert MemoryShare(front, share.regions).mode is Mode.TABLE


async def test_dirty_log() -> None:
    async with session() as (front, fake), memory(front, Mode.TABLE) as (share, _):
        log = SharedLog(share.regions)
        await share.set_log(log)
        assert fake.got[-1] == (Request.SET_LOG_BASE, vu.VERSION, 16, 1)
        assert log.dirty_pages() == set()
        os.pwrite(log.fd, b"\x81", 1)
        assert log.dirty_pages() == {8, 15}
        await front.set_features(front.features | Feature.LOG_ALL)
        assert fake.got[-1] == (Request.SET_FEATURES, vu.VERSION | FLAG_NEED_REPLY, 8, 0)
        log.close()


async def test_connect_and_listen(tmp_path: Path) -> None:
    with trio.fail_after(20):
        async with AsyncExitStack() as stack:
            nursery = await stack.enter_async_context(trio.open_nursery())

            async def serve(path: Path) -> None:
                with trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
                    await listener.bind(str(path))
                    listener.listen()
                    sock, _ = await listener.accept()
                    with sock:
                        await FakeBackend(sock, lambda frame: None).run()

            async def reach(path: Path) -> None:
                sock = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                with sock:
                    while True:
                        try:
                            await sock.connect(str(path))
                            break
                        except OSError:
                            await trio.sleep(0.01)
                    await FakeBackend(sock, lambda frame: None).run()

            nursery.start_soon(serve, tmp_path / "a")
            async with connect(tmp_path / "a") as front:
                await front.barrier()
            nursery.start_soon(reach, tmp_path / "b")
            async with listen(tmp_path / "b") as front:
                await front.barrier()
            assert not (tmp_path / "b").exists()
            with pytest.raises(PeerClosed, match="no back-end listens"):
                async with connect(tmp_path / "c", timeout=0.1):
                    pass
            with pytest.raises(PeerClosed, match="no back-end connected"):
                async with listen(tmp_path / "d", timeout=0.1):
                    pass


async def test_get_vring_base_of_another_ring() -> None:
    def change(frame: Frame) -> list[Answer] | None:
        if frame.request != Request.GET_VRING_BASE:
            return None
        return [(frame.request, REPLY, vu.VringState(3, 0).pack(), [])]

    async with session(change) as (front, _):
        with pytest.raises(RemoteProtocolError, match="answered for ring 3"):
            await front.get_vring_base(1)
    async with session() as (front, _):
        assert await front.get_vring_base(1) == 7


async def test_rings_are_stopped_with_one_wait_for_all() -> None:
    """The second request is sent before the first is answered; answers go to the rings they are for."""
    asked: list[int] = []

    def change(frame: Frame) -> list[Answer] | None:
        if frame.request != Request.GET_VRING_BASE:
            return None
        asked.append(vu.VringState.unpack(frame.payload).index)
        if len(asked) < 2:
            return []
        return [(frame.request, REPLY, vu.VringState(i, 10 + i).pack(), []) for i in asked]

    async with session(change) as (front, _):
        assert await front.get_vring_bases([4, 1]) == [14, 11]
    assert asked == [4, 1]


async def test_descriptors_of_answers_are_closed_when_a_later_one_fails() -> None:
    """Descriptors of the first answer are not left open when the second is wrong."""
    ends: list[int] = []

    def change(frame: Frame) -> list[Answer] | None:
        if frame.request != Request.GET_VRING_BASE:
            return None
        state = vu.VringState.unpack(frame.payload)
        if state.index == 1:
            return [(frame.request, vu.VERSION, frame.payload, [])]
        read, write = os.pipe()
        ends.append(read)
        return [(frame.request, REPLY, frame.payload, [write])]

    async with session(change) as (front, _):
        with pytest.raises(RemoteProtocolError, match="flags"):
            await front.get_vring_bases([0, 1])
        assert os.read(ends[0], 1) == b""  # nobody has the other end
        os.close(ends[0])
