"""Back-ends with few rights: an ordinary user completes postcopy; without userfaultfd all else works."""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import socket
import struct
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import pytest
import trio

from tests.kit.raw_front_end import GUEST_BASE, WRITE, Guest, RawFrontEnd, Ring
from tests.kit.until import until
from tests.peers.child import Child, open_child
from vhostpc.ufd import PageFault, Userfaultfd
from vhostpc.wire import vhost_user as vu
from vhostpc.wire.vhost_user import Feature, ProtocolFeature, Request

pytestmark = pytest.mark.ufd

ROOT = Path(__file__).resolve().parents[2]
PAGE = mmap.PAGESIZE
LIMIT = 60
HEADER = 12  # virtio 1.2, 5.1.6.1, with VERSION_1
RX, TX = 0, 1
FRAMES = 32
BUFFERS = 64  # for receiving; more than frames, because probes go first
PROBE = b"is anybody there"
TX_BUFFERS, RX_BUFFERS = 0x40000, 0x80000  # offsets in guest memory, a page for each frame

LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.mmap.restype = ctypes.c_void_p
LIBC.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]


@pytest.fixture(autouse=True)
def as_root() -> None:
    if os.geteuid() != 0:
        pytest.fail("needs root") if os.environ.get("CI") else pytest.skip("needs root to give rights away")


@pytest.fixture
def sysctl_off() -> Iterator[None]:
    knob = Path("/proc/sys/vm/unprivileged_userfaultfd")
    before = knob.read_text()
    if before.strip() != "0":
        knob.write_text("0")
    yield
    if before.strip() != "0":
        knob.write_text(before)


class Arrivals:
    """Guest memory at a migration's destination: absent at first, placed page by page from the source."""

    def __init__(self, source: Guest) -> None:
        self.source = source
        self.fd = os.memfd_create("destination", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, source.size)
        flags = mmap.PROT_READ | mmap.PROT_WRITE
        self.address = int(LIBC.mmap(None, source.size, flags, mmap.MAP_SHARED, self.fd, 0))
        self.ufd = Userfaultfd.open()
        self.ufd.register(self.address, source.size)
        self.placed: set[int] = set()
        self.faults: list[PageFault] = []

    def place(self, offset: int) -> None:
        if offset not in self.placed:
            self.placed.add(offset)
            assert self.ufd.copy(self.address + offset, self.source.mem[offset : offset + PAGE]) == PAGE

    async def serve(self, lent: Userfaultfd, base: int) -> None:
        """Place what the back-end, whose memory begins at ``base``, waits for, and wake it."""
        while True:
            await trio.lowlevel.wait_readable(lent)
            for fault in lent.events():
                assert isinstance(fault, PageFault)
                self.faults.append(fault)
                offset = fault.address - base
                assert 0 <= offset < self.source.size
                self.place(offset & -PAGE)
                lent.wake(fault.address & -PAGE, PAGE)

    def read(self, offset: int, length: int) -> bytes:
        """From the file, where a page that is absent reads as zeros and stays absent."""
        return os.pread(self.fd, length, offset)

    def close(self) -> None:
        self.ufd.close()
        LIBC.munmap(ctypes.c_void_p(self.address), ctypes.c_size_t(self.source.size))
        os.close(self.fd)


def payload(i: int) -> bytes:
    return b"frame %04d " % i + bytes([i]) * (100 + i)


def guest_with_traffic() -> tuple[Guest, Ring, Ring]:
    """A guest that has put FRAMES frames and BUFFERS receive buffers into its rings."""
    guest = Guest()
    rx, tx = guest.ring(RX, 64), guest.ring(TX, 64)
    for i in range(FRAMES):
        frame = bytes(HEADER) + payload(i)
        tx.set_desc(i, guest.put(TX_BUFFERS + i * PAGE, frame), len(frame))
    for i in range(BUFFERS):
        rx.set_desc(i, GUEST_BASE + RX_BUFFERS + i * PAGE, 2048, WRITE)
    tx.offer(*range(FRAMES))
    rx.offer(*range(BUFFERS))
    return guest, rx, tx


def udp() -> trio.socket.SocketType:
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind(("127.0.0.1", 0))
    return trio.socket.from_stdlib_socket(sock)


@asynccontextmanager
async def bridge(profile: str, remote: trio.socket.SocketType) -> AsyncIterator[tuple[Child, RawFrontEnd]]:
    """The example program with few rights, at the other end of a socket pair."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    host, port = remote.getsockname()
    command = [sys.executable, "-m", "tests.kit.confine", profile, sys.executable, "examples/bridge"]
    command += ["--fd", str(theirs.fileno()), "-l", "127.0.0.1:0", "-r", f"{host}:{port}"]
    front = RawFrontEnd(ours)
    started: AbstractAsyncContextManager[Child] = open_child(
        command, name="bridge", cwd=ROOT, pass_fds=(theirs.fileno(),)
    )
    async with started as child:
        theirs.close()
        try:
            yield child, front
        except BaseException as e:
            e.add_note(f"the bridge said:\n{child.last_words()}")
            raise
        finally:
            front.close()


def received(rx: Ring, memory: Arrivals | Guest) -> list[bytes]:
    """The frames in the guest's receive buffers, in the order of the used ring."""

    def read(offset: int, length: int) -> bytes:
        return (
            memory.read(offset, length)
            if isinstance(memory, Arrivals)
            else memory.mem[offset : offset + length]
        )

    (count,) = struct.unpack("<H", read(rx.used + 2, 2))
    found = []
    for i in range(count):
        head, length = struct.unpack("<II", read(rx.used + 4 + 8 * i, 8))
        found.append(read(RX_BUFFERS + head * PAGE + HEADER, length - HEADER))
    return found


async def check_traffic(remote: trio.socket.SocketType, rx: Ring, memory: Arrivals | Guest) -> None:
    """Every frame of the guest comes out; as many go in; the guest finds them in its buffers."""
    far = None
    for i in range(FRAMES):
        data, far = await remote.recvfrom(4096)
        assert data == payload(i)
    assert far is not None
    # Frames before the queue has started are dropped, as on any network: ask until it has.
    while not received(rx, memory):
        await remote.sendto(PROBE, far)
        await trio.sleep(0.05)
    wanted = [payload(FRAMES - i) for i in range(FRAMES)]
    for text in wanted:
        await remote.sendto(text, far)
    await until(lambda: len([x for x in received(rx, memory) if x != PROBE]) == FRAMES)
    assert [x for x in received(rx, memory) if x != PROBE] == wanted


@pytest.mark.usefixtures("sysctl_off")
async def test_the_bridge_of_an_ordinary_user_completes_postcopy() -> None:
    guest, rx, tx = guest_with_traffic()
    memory = Arrivals(guest)
    with trio.fail_after(LIMIT), udp() as remote:
        async with bridge("nobody", remote) as (child, front), trio.open_nursery() as nursery:
            _, bits = await front.negotiate()
            assert ProtocolFeature.PAGEFAULT in bits
            assert Path(f"/proc/{child.pid}").stat().st_uid == 65534
            advise = await front.ask(Request.POSTCOPY_ADVISE)
            with Userfaultfd.from_fd(advise.take_fd()) as lent:
                assert await front.ack(Request.POSTCOPY_LISTEN) == 0
                await front.send(Request.SET_MEM_TABLE, vu.pack_table([guest.region]), [memory.fd])
                reply = await front.receive()
                assert reply is not None
                (theirs,) = vu.unpack_table(reply.payload)
                assert theirs.user_addr != guest.region.user_addr
                await front.send(Request.SET_MEM_TABLE, vu.pack_u64(0))
                nursery.start_soon(memory.serve, lent, theirs.user_addr)
                # The guest filled its rings at the source; the pages come with the faults.
                for ring in (rx, tx):
                    await ring.send_setup(front)
                await front.barrier()
                await check_traffic(remote, rx, memory)
                assert len({f.address for f in memory.faults}) >= 2 * FRAMES
                for offset in range(0, guest.size, PAGE):
                    memory.place(offset)
                assert await front.ack(Request.POSTCOPY_END) == 0
                # Calm now: nothing is watched any more.
                lent.events()
                assert lent.waiting() == (0, 0)
            for index, count in ((RX, len(received(rx, memory))), (TX, FRAMES)):
                base = await front.ask(Request.GET_VRING_BASE, vu.VringState(index, 0).pack())
                assert vu.VringState.unpack(base.payload) == vu.VringState(index, count)
            nursery.cancel_scope.cancel()
            front.close()
            assert await child.wait() == 0, child.said
    memory.close()
    guest.close()


@pytest.mark.parametrize("profile", ["denied", "denied-nobody"])
async def test_without_userfaultfd_only_postcopy_is_missing(profile: str) -> None:
    guest, rx, tx = guest_with_traffic()
    with trio.fail_after(LIMIT), udp() as remote:
        async with bridge(profile, remote) as (child, front):
            features, bits = await front.negotiate()
            assert ProtocolFeature.PAGEFAULT not in bits
            assert ProtocolFeature.CONFIGURE_MEM_SLOTS in bits
            assert features & Feature.VERSION_1
            await child.until("postcopy is not offered: userfaultfd cannot be opened")
            await guest.send_memory(front)
            for ring in (rx, tx):
                await ring.send_setup(front)
            await check_traffic(remote, rx, guest)
            base = await front.ask(Request.GET_VRING_BASE, vu.VringState(TX, 0).pack())
            assert vu.VringState.unpack(base.payload) == vu.VringState(TX, FRAMES)
            front.close()
            assert await child.wait() == 0, child.said
    guest.close()


async def test_advise_is_declined_without_userfaultfd() -> None:
    """A front-end that asks although it was not offered is told so, and the session goes on."""
    with trio.fail_after(LIMIT), udp() as remote:
        async with bridge("denied", remote) as (child, front):
            await front.negotiate()
            assert await front.ack(Request.POSTCOPY_ADVISE) == 1
            await front.barrier()
            front.close()
            assert await child.wait() == 0, child.said


async def test_doctor_of_the_same_process_says_why() -> None:
    command = [sys.executable, "-m", "tests.kit.confine", "denied", sys.executable, "-m", "vhostpc", "doctor"]
    with trio.fail_after(LIMIT):
        async with open_child([*command, "--json"], name="doctor", cwd=ROOT) as child:
            assert await child.wait() == 3
            assert json.loads(child.said)["postcopy"] is False
