"""Back-ends of a machine of our own that lie, break off or hold it up: they are left, and the machine goes on."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import logging
import mmap
import os
import socket
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio
import trio.testing

from tests.kit.fake_backend import REPLY, Answer, Change, FakeBackend, answers_to, listening
from tests.kit.until import until
from vhostpc._native import lib
from vhostpc.errors import PostcopyRefused, RequestFailed
from vhostpc.frontend import BackendPostcopy, Driver, FrontEnd, MemoryShare
from vhostpc.guest import netdev
from vhostpc.guest.own_machine import Block, OwnMachine, Spec, open_machine
from vhostpc.pages.service import FaultService
from vhostpc.ufd import Way
from vhostpc.wire import vhost_user as vu
from vhostpc.wire.migration.ramrec import RamEncoder
from vhostpc.wire.vhost_user import BackendRequest, Frame, Request

pytestmark = pytest.mark.ufd
MIB = 1 << 20
PAGE = 4096
FULL = (1 << 64) - 2
KICK, CALL = Request.SET_VRING_KICK, Request.SET_VRING_CALL


@dataclass
class Setup:
    machine: OwnMachine
    fakes: list[FakeBackend]

    @property
    def fake(self) -> FakeBackend:
        return self.fakes[-1]

    @property
    def left(self) -> bool:
        return not self.machine.backends[0].works

    async def goes_on(self) -> None:
        """The guest's processor runs, and whatever is asked of the machine is done."""
        machine = self.machine
        beats = machine.vcpus[0].numbers().beats
        await until(lambda: machine.vcpus[0].numbers().beats > beats)
        assert machine.running
        machine.report()


@contextlib.asynccontextmanager
async def running(
    folder: Path, change: Change = lambda frame: None, *, timeout: float = 30, run: bool = True
) -> AsyncIterator[Setup]:
    path = folder / "backend"
    spec = Spec([Block("mem", 8 * MIB)], backends=[str(path)], writes=100, checks=100, timeout=timeout)
    with trio.fail_after(60):
        async with listening(path, change) as fakes, open_machine(spec) as machine:
            if run:
                await machine.cont()
            yield Setup(machine, fakes)
            await machine.stop()


def impatient(setup: Setup, seconds: float) -> None:
    """How long an answer may take from now on: earlier ones may have taken as long as a busy machine needs."""
    backend = setup.machine.backends[0]
    backend.front.timeout = backend._timeout = seconds


def said(caplog: pytest.LogCaptureFixture) -> str:
    """The one sentence about it."""
    assert not any(r.exc_info for r in caplog.records)
    (line,) = (r.getMessage() for r in caplog.records if r.levelno >= logging.ERROR)
    assert "the machine goes on without it" in line
    return line


BASE = Request.GET_VRING_BASE


def base(*numbers: int, request: int = BASE, flags: int = REPLY, size: int = 8) -> Change:
    """Answers GET_VRING_BASE of ring i with the i-th number."""

    def change(frame: Frame) -> list[Answer] | None:
        if frame.request != BASE:
            return None
        index = vu.VringState.unpack(frame.payload).index
        return [(request, flags, vu.VringState(index, numbers[index]).pack()[:size], [])]

    return change


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (base(0x10000, 0), "not an index of a split ring"),
        (base(0, 0xFFFFFFFF), "not an index of a split ring"),
        (base(0, 40), "it says that ring 1 continues at 40"),
        (base(0xFFFF, 0), "it says that ring 0 continues at 65535"),
        (base(0, 0, size=4), "the reply has 4 bytes"),
        (base(0, 0, request=Request.GET_STATUS), "number of GET_STATUS"),
        (base(0, 0, flags=vu.VERSION), "flags 0x1"),
        (base(0, 0, flags=2), "version is not 1"),
        (answers_to(BASE, (BASE, REPLY, vu.VringState(1, 0).pack(), [])), "answered for ring 1"),
        (answers_to(BASE), "no answer within 0.5 s"),
    ],
)
async def test_where_its_rings_go_on(
    change: Change, text: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with running(tmp_path, change) as setup:
        if "no answer" in text:
            impatient(setup, 0.5)
        await setup.machine.stop()
        assert text in said(caplog)
        assert setup.left
        assert [text in problem for problem in setup.machine.problems] == [True]
        sections, _ = await setup.machine.save()
        assert sections
        await setup.machine.cont()
        await setup.goes_on()


async def test_one_that_tells_the_truth_is_not_left(tmp_path: Path) -> None:
    async with running(tmp_path) as setup:
        for _ in range(3):
            await setup.machine.stop()
            await setup.machine.cont()
        await setup.goes_on()
        assert not setup.machine.problems


async def test_it_dies_while_its_rings_are_stopped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def change(frame: Frame) -> list[Answer] | None:
        if frame.request == BASE:
            setup.fake.sock.shutdown(2)
            return []
        return None

    async with running(tmp_path, change) as setup:
        await setup.machine.stop()
        assert "closed the connection" in said(caplog)
        await setup.machine.cont()
        await setup.goes_on()


# --- its descriptors are ours, too


def fill(fd: int) -> None:
    """Full, and a writer waits."""
    os.set_blocking(fd, False)
    with contextlib.suppress(BlockingIOError):
        os.eventfd_read(fd)
    os.eventfd_write(fd, FULL)


@pytest.mark.parametrize("blocking", [False, True])
async def test_kicks_that_it_keeps_full(blocking: bool, tmp_path: Path) -> None:
    """The driver's thread, and the trio thread where a machine goes on: neither waits, neither ends the machine."""
    async with running(tmp_path) as setup:
        for _ in range(3):
            kicks = [fd for (request, _), fd in setup.fake.events.items() if request == KICK]
            assert len(kicks) == 2
            for fd in kicks:
                fill(fd)
                os.set_blocking(fd, not blocking)
            posted = setup.machine.devices[0].books().sent
            await until(lambda: setup.machine.devices[0].books().sent > posted)  # noqa: B023
            await setup.goes_on()
            await setup.machine.stop()
            for fd in kicks:
                fill(fd)
                os.set_blocking(fd, not blocking)
            await setup.machine.cont()
            await setup.goes_on()
        assert not setup.machine.problems


async def test_its_flags_on_our_memory_change_nothing(tmp_path: Path) -> None:
    """With O_APPEND a write to a place in a file goes to the file's end: ours go through an open file of our own."""
    page = b"p" * PAGE
    records = RamEncoder().page("mem", PAGE, page) + (0x10).to_bytes(8, "big")
    async with running(tmp_path, run=False) as setup:
        (block,) = setup.machine.ram.blocks
        # As who was given it may do.
        fcntl.fcntl(block.fd, fcntl.F_SETFL, fcntl.fcntl(block.fd, fcntl.F_GETFL) | os.O_APPEND)
        ours, theirs = trio.socket.socketpair()
        with ours, theirs, FaultService(setup.machine.ram) as service:
            with service.open_channel(ours.fileno()) as channel:
                await theirs.send(records)
                await channel.load()
        assert os.fstat(block.fd).st_size == block.length
        assert os.pread(block.fd, PAGE, PAGE) == page


async def test_it_uses_more_of_a_ring_than_there_is(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with running(tmp_path) as setup:
        driver = setup.machine.devices[0]._drivers[netdev.TX]
        await setup.machine.ram.blocks[0].write(driver.layout.used + 2, b"\xff\xff")
        await until(lambda: setup.left)
        await setup.goes_on()
        await setup.machine.stop()
        await setup.machine.cont()
        await setup.goes_on()
        assert "more of a ring than was available" in str(setup.machine.backends[0].problem)
        assert not any(record.exc_info for record in caplog.records)


# --- it does not answer


async def test_it_reads_nothing_more(tmp_path: Path) -> None:
    """Its socket is full: what is sent then does not wait for ever."""
    async with running(tmp_path) as setup:
        impatient(setup, 0.2)
        front = setup.machine.backends[0].front
        setup.fake.hears = trio.Event()
        with pytest.raises(RequestFailed, match="has read nothing"):
            await flood(front)
        await setup.machine.stop()
        assert setup.left
        await setup.machine.cont()
        await setup.goes_on()


async def flood(front: FrontEnd) -> None:
    while True:
        await front.send(Request.SET_OWNER, bytes(4000))


async def test_it_says_what_nobody_asked_for_and_goes(tmp_path: Path) -> None:
    """Its end is seen, whatever stands before it."""
    async with running(tmp_path) as setup:
        for _ in range(40):
            await setup.fake.reply(Request.GET_FEATURES, REPLY, bytes(8), [os.eventfd(0)])
        frames = setup.machine.backends[0].front._frames.statistics
        await until(lambda: frames().tasks_waiting_send, what="no room for more of them")
        assert not setup.left
        setup.fake.sock.shutdown(socket.SHUT_RDWR)
        await until(lambda: setup.left)
        await setup.goes_on()


def mapped(frame: Frame, at: int) -> list[Answer] | None:
    """The back-end has its only region at this address."""
    if frame.request != Request.ADD_MEM_REG or len(frame.payload) == 8:
        return None
    region = vu.unpack_single_region(frame.payload)
    answer = vu.MemoryRegion(region.guest_addr, region.size, at, region.mmap_offset)
    return [(frame.request, REPLY, vu.pack_single_region(answer), [])]


def touch(address: int) -> None:
    """Without the GIL."""
    ctypes.CDLL(None).memcmp(ctypes.c_void_p(address), ctypes.c_void_p(address), 1)


@pytest.mark.parametrize("where", ["nowhere", "in a page that comes"])
async def test_it_does_not_stop_and_says_that_it_waits_for_a_page(where: str, tmp_path: Path) -> None:
    """A back-end that waits for a page is waited for, as long as the page can come."""
    memory, others = mmap.mmap(-1, 8 * MIB), mmap.mmap(-1, MIB)
    at, elsewhere = (ctypes.addressof(ctypes.c_char.from_buffer(m)) for m in (memory, others))

    def change(frame: Frame) -> list[Answer] | None:
        return [] if frame.request == BASE else mapped(frame, at)

    async with running(tmp_path, change, run=False) as setup:
        machine = setup.machine
        with FaultService(machine.ram) as service:
            async with trio.open_nursery() as nursery:
                await machine.advise(service)
                await machine.listen()
                (ufd,) = setup.fake.ufds
                ufd.register(at, 8 * MIB)
                ufd.register(elsewhere, MIB)
                nursery.start_soon(service.run)
                await machine.cont()
                touched = elsewhere if where == "nowhere" else at
                thread = threading.Thread(target=touch, args=(touched,), daemon=True)
                thread.start()
                postcopy = machine.backends[0].postcopy
                assert postcopy is not None
                client = postcopy.client
                assert client is not None
                await until(lambda: client.numbers().waiting_now == 1)
                impatient(setup, 0.1)
                async with trio.open_nursery() as inner:
                    inner.start_soon(machine.stop)
                    if where != "nowhere":
                        await trio.sleep(0.5)  # five times what an answer may take: the time is the matter
                        assert not setup.left
                        client.remove()  # it is served no more
                    await until(lambda: setup.left)
                await until(lambda: not thread.is_alive())  # its userfaultfd was closed with its session
                assert not machine.running
                nursery.cancel_scope.cancel()
            await machine.end()


async def test_a_userfaultfd_that_is_none_yet(tmp_path: Path) -> None:
    """Without its handshake; postcopy is refused in one sentence, and the descriptor is not kept."""

    def change(frame: Frame) -> list[Answer] | None:
        if frame.request != Request.POSTCOPY_ADVISE:
            return None
        fd = lib.vpc_uffd_open(Way.USER_MODE_ONLY)
        assert fd >= 0
        return [(frame.request, REPLY, b"", [fd])]

    async with running(tmp_path, change) as setup:
        with FaultService(setup.machine.ram) as service:
            before = len(os.listdir("/proc/self/fd"))
            for _ in range(3):
                with pytest.raises(PostcopyRefused, match="handshake"):
                    await setup.machine.advise(service)
            assert len(os.listdir("/proc/self/fd")) == before
        await setup.goes_on()


# --- unexpected errors


class Bug(Exception):
    """One of ours."""


async def broken(*_: object, **__: object) -> None:
    raise Bug("a bug of ours")


def failing(*_: object) -> int:
    raise Bug("a bug of ours")


async def use_it(machine: OwnMachine) -> None:
    """Whatever an endpoint does with a back-end."""
    (backend,) = machine.backends
    await backend.set_log(machine._log)
    await backend.set_log(None)
    await machine.stop()
    with FaultService(machine.ram) as service, contextlib.suppress(PostcopyRefused):
        await machine.advise(service)
        await machine.listen()
    await machine.end()
    await machine.cont()


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (FrontEnd, "set_features"),
        (FrontEnd, "set_vring_addr"),
        (FrontEnd, "get_vring_bases"),
        (FrontEnd, "set_vring_enable"),
        (MemoryShare, "share"),
        (MemoryShare, "share_postcopy"),
        (MemoryShare, "set_log"),
        (BackendPostcopy, "advise"),
        (BackendPostcopy, "listen"),
        (BackendPostcopy, "end"),
        (BackendPostcopy, "forget"),
        (Driver, "run"),
        (Driver, "reap"),
    ],
    ids=lambda what: getattr(what, "__name__", what),
)
async def test_a_bug_in_what_one_back_end_needs(
    kind: type, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with running(tmp_path) as setup:
        with monkeypatch.context() as patch:
            patch.setattr(kind, name, failing if name == "forget" else broken)
            await use_it(setup.machine)
            await setup.goes_on()
            await until(lambda: any(record.exc_info for record in caplog.records), what="a traceback")
        await setup.machine.stop()
        await setup.machine.cont()
        await setup.goes_on()


@pytest.mark.parametrize("where", ["reading", "the channel", "being told of the end"])
async def test_a_bug_in_a_task_of_its_own(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with running(tmp_path) as setup:
        front, fake = setup.machine.backends[0].front, setup.fake
        if where == "reading":
            with monkeypatch.context() as patch:
                patch.setattr(front._stream._reader, "feed", failing)
                await fake.reply(Request.GET_FEATURES, REPLY, bytes(8), [])
                await until(lambda: setup.left)
        elif where == "the channel":
            front.on_backend_request = failing
            assert fake.channel is not None
            await fake.channel.send(vu.encode(BackendRequest.CONFIG_CHANGE_MSG, flags=vu.FLAG_NEED_REPLY))
            await until(lambda: front.error)
        else:
            front.on_closed(failing)  # type: ignore[arg-type]
            fake.sock.shutdown(socket.SHUT_RDWR)
            await until(lambda: setup.left)
        await setup.goes_on()
        await until(lambda: any(record.exc_info for record in caplog.records), what="a traceback")
        await setup.machine.stop()
        await setup.machine.cont()
        await setup.goes_on()
