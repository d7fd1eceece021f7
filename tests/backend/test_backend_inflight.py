"""The inflight region: its two messages, what a ring does with what stands in it, what stands in it afterwards."""

from __future__ import annotations

import fcntl
import logging
import mmap
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest
import trio

from tests.kit.hostile import all_lines_from_here, open_fds, state
from tests.kit.raw_front_end import GUEST_BASE, WRITE, Guest, RawFrontEnd, Ring, connected
from tests.kit.until import until
from vhostpc.backend import Chain, Device, Queue
from vhostpc.backend.net import Bridge
from vhostpc.errors import QueueEnded
from vhostpc.memory.inflight import part_size, stride_of
from vhostpc.wire import vhost_user as vu
from vhostpc.wire.vhost_user import Request

SIZE = 8  # entries of a ring


class Holder(Device):
    """Keeps every chain until a test completes it."""

    num_queues = 2

    def __init__(self, *, unordered: bool = False, in_order: bool = False) -> None:
        self.held: list[tuple[int, Chain]] = []
        self.unordered, self.in_order = unordered, in_order
        self.regions: list[bool] = []

    async def handle_queue(self, queue: Queue) -> None:
        queue.in_order = self.in_order
        self.regions.append(queue.inflight)
        async for chain in queue.unordered() if self.unordered else queue:
            chain.keep()
            self.held.append((chain.writable, chain))

    @property
    def names(self) -> list[int]:
        """Of all chains that came, in this order."""
        return [name for name, _ in self.held]

    def complete(self, *names: int) -> None:
        for wanted in names:
            at = next(
                i for i, (name, chain) in enumerate(self.held) if name == wanted and not chain.completed
            )
            self.held[at][1].complete()


@dataclass
class Region:
    """The file, as the front-end keeps it, and what stands in the first queue's part."""

    queues: int = 2
    queue_size: int = SIZE
    fd: int = -1
    told: vu.Inflight = field(init=False)

    def __post_init__(self) -> None:
        size = self.queues * stride_of(self.queue_size)
        if self.fd < 0:
            self.fd = os.memfd_create("region", os.MFD_CLOEXEC)
            os.ftruncate(self.fd, size)
        self.told = vu.Inflight(size, 0, self.queues, self.queue_size)
        self.mem = mmap.mmap(self.fd, size)

    async def send(self, front: RawFrontEnd) -> None:
        await front.send(Request.SET_INFLIGHT_FD, self.told.pack(), [self.fd])

    def entry(self, i: int, mark: int, counter: int = 0, following: int = 0) -> None:
        struct.pack_into("<BxxxxxHQ", self.mem, 16 + 16 * i, mark, following, counter)

    def head(self, *, version: int = 1, features: int = 0, last: int = 0, used: int = 0) -> None:
        struct.pack_into("<QHHHH", self.mem, 0, features, version, self.queue_size, last, used)

    @property
    def marked(self) -> list[int]:
        """Heads in flight, by their counters."""
        found = [struct.unpack_from("<BxxxxxHQ", self.mem, 16 + 16 * i) for i in range(self.queue_size)]
        return sorted((i for i, e in enumerate(found) if e[0]), key=lambda i: found[i][2])

    @property
    def used(self) -> int:
        return int(struct.unpack_from("<H", self.mem, 14)[0])

    def close(self) -> None:
        self.mem.close()
        os.close(self.fd)


@pytest.fixture
def guest() -> Iterator[Guest]:
    guest = Guest()
    yield guest
    guest.close()


@pytest.fixture
def region() -> Iterator[Region]:
    region = Region()
    yield region
    region.close()


@pytest.fixture
def ring(guest: Guest) -> Ring:
    """Head i is a chain of i + 1 writable bytes, which is its name less 1."""
    ring = guest.ring(0, SIZE)
    for i in range(SIZE):
        ring.set_desc(i, GUEST_BASE + 0x80000, i + 1, WRITE)
    return ring


async def start(guest: Guest, front: RawFrontEnd, region: Region | None, ring: Ring, base: int = 0) -> None:
    await front.negotiate()
    if region is not None:
        await region.send(front)
    await guest.send_memory(front)
    await ring.send_setup(front, base=base)
    await front.barrier()


async def stop(front: RawFrontEnd) -> int:
    frame = await front.ask(Request.GET_VRING_BASE, state(0, 0))
    return vu.VringState.unpack(frame.payload).num


def used_heads(ring: Ring) -> list[int]:
    return [ring.used_element(i)[0] for i in range(ring.used_idx)]


# --- the messages ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("queues", "size"), [(1, 1), (2, 128), (2, 32768), (1, 3)])
@pytest.mark.parametrize("length", [20, 24])
async def test_get(queues: int, size: int, length: int) -> None:
    """Zeros for so many queues; nobody can change the file's size; nothing of it stays here."""
    before = open_fds()
    async with connected(Holder()) as front:
        await front.negotiate()
        for _ in range(3):
            frame = await front.ask(Request.GET_INFLIGHT_FD, vu.Inflight(0, 0, queues, size).pack()[:length])
            told = vu.Inflight.unpack(frame.payload)
            assert len(frame.payload) == length
            assert told == vu.Inflight(queues * stride_of(size), 0, queues, size)
            (fd,) = frame.fds
            assert os.pread(fd, told.size, 0) == bytes(told.size)
            assert os.fstat(fd).st_blocks == 0
            wanted = fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
            assert fcntl.fcntl(fd, fcntl.F_GET_SEALS) == wanted
            await front.send(Request.SET_INFLIGHT_FD, frame.payload, [fd])
            frame.close_fds()
    assert open_fds() == before


@pytest.mark.parametrize(("queues", "size"), [(3, 128), (2, 32769), (65535, 65535)])
async def test_none_for_more_than_there_is(caplog: pytest.LogCaptureFixture, queues: int, size: int) -> None:
    """The front-end goes on without: QEMU does, too."""
    async with connected(Holder()) as front:
        await front.negotiate()
        frame = await front.ask(Request.GET_INFLIGHT_FD, vu.Inflight(0, 0, queues, size).pack())
        assert vu.Inflight.unpack(frame.payload) == vu.Inflight(0, 0, queues, size)
        assert frame.fds == []
        await front.ask(Request.GET_INFLIGHT_FD, vu.Inflight(0, 0, queues, size).pack())
    told = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert told == [
        f"front-end: no inflight region for {queues} queues of {size} entries: the device has 2 of at most 32768"
    ]


I = vu.Inflight  # noqa: E741
MIB = 1 << 20


@pytest.mark.parametrize(
    ("request_", "told", "words"),
    [
        (Request.GET_INFLIGHT_FD, I(0, 0, 0, 128), "0 queues of 128"),
        (Request.GET_INFLIGHT_FD, I(0, 0, 2, 0), "2 queues of 0"),
        (Request.SET_INFLIGHT_FD, I(0, 0, 2, 8), "too few"),
        (Request.SET_INFLIGHT_FD, I(2 * part_size(8) - 8, 0, 2, 8), "too few"),
        (Request.SET_INFLIGHT_FD, I(MIB, 0, 65535, 65535), "too few"),
        (Request.SET_INFLIGHT_FD, I(MIB, 0, 0, 8), "too few"),
        (Request.SET_INFLIGHT_FD, I(MIB, 0, 2, 0), "too few"),
        (Request.SET_INFLIGHT_FD, I(MIB + 8, 0, 2, 8), "do not lie"),
        (Request.SET_INFLIGHT_FD, I(MIB, 8, 2, 8), "do not lie"),
        (Request.SET_INFLIGHT_FD, I(4096, 4, 2, 8), "unaligned"),
        (Request.SET_INFLIGHT_FD, I(2**64 - 1, 0, 2, 8), "do not lie"),
        (Request.SET_INFLIGHT_FD, I(4096, 2**64 - 8, 2, 8), "do not lie"),
    ],
)
async def test_wrong_content(
    caplog: pytest.LogCaptureFixture, request_: Request, told: vu.Inflight, words: str
) -> None:
    before = open_fds()
    fd = os.memfd_create("region", os.MFD_CLOEXEC)
    os.ftruncate(fd, MIB)
    async with connected(Holder()) as front:
        await front.negotiate()
        await front.send(request_, told.pack(), [fd] if request_ == Request.SET_INFLIGHT_FD else [])
        assert await front.ended()
    os.close(fd)
    assert open_fds() == before
    (line,) = [r.getMessage() for r in caplog.records if r.levelno >= logging.ERROR]
    assert words in line
    assert "Traceback" not in caplog.text


async def test_no_file_that_others_bring(caplog: pytest.LogCaptureFixture) -> None:
    """No device, and no file whose pages others bring: a touch may wait, and this is read at any time."""
    for path, words in (
        ("/dev/null", "do not lie"),
        ("/sys/kernel/mm/transparent_hugepage/enabled", "neither on tmpfs"),
    ):
        all_lines_from_here(caplog)
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        async with connected(Holder()) as front:
            await front.negotiate()
            await front.send(Request.SET_INFLIGHT_FD, vu.Inflight(4096, 0, 1, 8).pack(), [fd])
            assert await front.ended()
        os.close(fd)
        assert words in caplog.text


async def test_not_while_a_ring_runs(
    caplog: pytest.LogCaptureFixture, guest: Guest, region: Region, ring: Ring
) -> None:
    async with connected(Holder()) as front:
        await start(guest, front, region, ring)
        await region.send(front)
        assert await front.ended()
    assert "SET_INFLIGHT_FD: ring 0 is running" in caplog.text


async def test_a_larger_ring_than_the_region(
    caplog: pytest.LogCaptureFixture, guest: Guest, ring: Ring
) -> None:
    small = Region(queue_size=SIZE // 2)
    async with connected(Holder()) as front:
        await start(guest, front, small, ring)
        ring.offer(0)
        await until(
            lambda: "ring 0 stopped: the ring has more entries than the inflight region" in caplog.text
        )
        await front.barrier()
    small.close()


# --- what stands in it -------------------------------------------------------------------------------


async def test_marked_while_in_flight(guest: Guest, region: Region, ring: Ring) -> None:
    device = Holder()
    async with connected(device) as front:
        await start(guest, front, region, ring)
        ring.offer(3, 1, 4)
        await until(lambda: len(device.held) == 3)
        assert region.marked == [3, 1, 4]
        device.complete(2)
        await ring.until_used(1)
        await until(lambda: region.marked == [3, 4] and region.used == 1)
        ring.offer(1)
        await until(lambda: len(device.held) == 4)
        assert region.marked == [3, 4, 1]
        device.complete(4, 5, 2)
        await ring.until_used(4)
        await until(lambda: region.marked == [] and region.used == 4)
    assert device.regions == [True]


async def test_given_back_at_a_stop(guest: Guest, region: Region, ring: Ring) -> None:
    device = Holder()
    async with connected(device) as front:
        await start(guest, front, region, ring)
        ring.offer(3, 1, 4)
        await until(lambda: len(device.held) == 3)
        device.complete(4)
        await ring.until_used(1)
        assert await stop(front) == 1
        assert region.marked == []
        assert region.used == 1
        await ring.send_setup(front, base=1)
        await until(lambda: len(device.held) == 5)
        assert device.names == [4, 2, 5, 2, 5]
        assert region.marked == [1, 4]
        device.held = device.held[3:]
        device.complete(5, 2)
        await ring.until_used(3)


async def test_queues_without_a_part(guest: Guest) -> None:
    """A region for one queue, of two."""
    region, device = Region(queues=1), Holder()
    rings = [guest.ring(i, SIZE) for i in range(2)]
    async with connected(device) as front:
        await start(guest, front, region, rings[0])
        await rings[1].send_setup(front)
        for ring in rings:
            ring.set_desc(0, GUEST_BASE + 0x80000, 1, WRITE)
            ring.offer(0)
        await until(lambda: len(device.held) == 2)
        assert sorted(device.regions) == [False, True]
    region.close()


# --- another back-end goes on ------------------------------------------------------------------------


async def out_of_order(guest: Guest, region: Region | None, ring: Ring, in_order: bool = False) -> Holder:
    """A session that ends when, of six chains, the second, fourth and fifth are answered."""
    device = Holder(in_order=in_order)
    async with connected(device) as front:
        await start(guest, front, region, ring)
        ring.offer(0, 1, 2, 3, 4, 5)
        await until(lambda: len(device.held) == 6)
        device.complete(2, 5, 4)
        if not in_order:
            await ring.until_used(3)
    return device


@pytest.mark.parametrize("unordered", [False, True])
async def test_done_again_first_and_in_order(
    guest: Guest, region: Region, ring: Ring, unordered: bool
) -> None:
    """What no index tells: the first and the third. The sixth comes by the ring, behind them, then what is new."""
    await out_of_order(guest, region, ring)
    assert sorted(used_heads(ring)) == [1, 3, 4]
    assert region.marked == [0, 2, 5]
    device = Holder(unordered=unordered)
    async with connected(device) as front:
        await start(guest, front, region, ring, base=99)
        ring.offer(6)
        await until(lambda: len(device.held) == 4)
        assert device.names == [1, 3, 6, 7]
        assert region.marked == [0, 2, 5, 6]
        device.complete(6, 1, 3, 7)
        await ring.until_used(7)
        await until(lambda: region.marked == [])
        assert sorted(used_heads(ring)) == list(range(7))
        assert await stop(front) == 7


@pytest.mark.parametrize("unordered", [False, True])
async def test_stopped_before_they_were_had(
    guest: Guest, region: Region, ring: Ring, unordered: bool
) -> None:
    """What is older than an answered one cannot be given back: the device gets it although the ring stops."""

    class Slow(Holder):
        async def handle_queue(self, queue: Queue) -> None:
            self.unordered = unordered
            async for chain in queue.unordered() if unordered else queue:
                self.held.append((chain.writable, chain))
                with trio.CancelScope(shield=True):
                    await self.go.wait()

        go: trio.Event

    await out_of_order(guest, region, ring)
    device = Slow()
    device.go = trio.Event()
    async with connected(device) as front:
        await start(guest, front, region, ring)
        await until(lambda: device.held)
        await front.send(Request.GET_VRING_BASE, state(0, 0))
        await trio.testing.wait_all_tasks_blocked()
        device.go.set()
        frame = await front.receive()
        assert frame is not None
        assert vu.VringState.unpack(frame.payload).num == 5
        assert device.names == [1, 3]
        assert sorted(used_heads(ring)) == [0, 1, 2, 3, 4]
        assert region.marked == []
        await ring.send_setup(front, base=5)
        await ring.until_used(6)
        assert device.names == [1, 3, 6]


async def test_a_device_that_ends_leaves_them_in_the_region(guest: Guest, region: Region, ring: Ring) -> None:
    class Leaves(Holder):
        async def handle_queue(self, queue: Queue) -> None:
            async for chain in queue:
                self.held.append((chain.writable, chain))
                return

    await out_of_order(guest, region, ring)
    device: Holder = Leaves()
    async with connected(device) as front:
        await start(guest, front, region, ring)
        await until(lambda: device.held)
        with pytest.raises(trio.TooSlowError), trio.fail_after(0.5):
            await stop(front)  # the first was taken and not answered: the stop waits
        device.complete(1)
        assert (await front.receive()) is not None
    assert region.marked == [2]
    device = Holder()
    async with connected(device) as front:
        await start(guest, front, region, ring)
        await until(lambda: len(device.held) == 2)
        assert device.names == [3, 6]


async def test_a_ring_that_was_broken_starts_again(
    caplog: pytest.LogCaptureFixture, guest: Guest, region: Region, ring: Ring
) -> None:
    """What its handler left unanswered, older than an answered one, comes again; and the ring can be stopped."""
    device = Holder()
    async with connected(device) as front:
        await start(guest, front, region, ring)
        ring.offer(0, 1)
        await until(lambda: len(device.held) == 2)
        device.complete(2)
        await ring.until_used(1)
        ring.set_desc(2, 1 << 60, 3, WRITE)
        ring.offer(2)
        await until(lambda: "ring 0 stopped: a descriptor points outside" in caplog.text)
        await stop(front)
        assert region.marked == [0]
        ring.set_desc(2, GUEST_BASE + 0x80000, 3, WRITE)
        await ring.send_setup(front, base=1)
        await until(lambda: len(device.held) == 4)
        assert device.names == [1, 2, 1, 3]
        with pytest.raises(QueueEnded):
            device.held[0][1].complete()  # of the run before: nobody waits for it
        device.held[2][1].complete()
        await ring.until_used(2)
        assert await stop(front) == 2
        assert sorted(used_heads(ring)) == [0, 1]
        assert region.marked == []


def lay(region: Region, ring: Ring, *, avail: list[int], used: int) -> None:
    """A ring on which ``used`` chains were answered, and its region as a fresh one is after that."""
    memory = ring.guest.mem
    for i, head in enumerate(avail):
        struct.pack_into("<H", memory, ring.avail + 4 + 2 * i, head)
    ring.avail_idx = len(avail)
    struct.pack_into("<H", memory, ring.avail + 2, len(avail))
    struct.pack_into("<H", memory, ring.used + 2, used)
    region.head(used=used)


def died_before_used_idx(region: Region) -> None:
    """Heads 1 and 2 were published as one batch; only one of the marks is off."""
    region.head(used=0, last=2)
    region.entry(1, 0, 1)
    region.entry(2, 1, 2, following=1)
    region.entry(0, 1, 0)


def libvhost_user_begins(region: Region) -> None:
    """It leaves used_idx at 0 in a fresh region, whatever the ring says."""
    region.head(used=0)


@pytest.mark.parametrize(
    ("lie", "names"),
    [
        (died_before_used_idx, [1, 4]),
        (lambda region: region.head(version=0, used=77), [3, 4]),
        (libvhost_user_begins, [3, 4]),
        (
            lambda region: region.head(used=1000),
            [3, 4],
        ),  # of another life of the ring, with nothing in flight
        (lambda region: (region.head(used=2), region.entry(2, 1, 5)), [3, 4]),  # by the ring, too
        (lambda region: (region.head(used=2), region.entry(3, 1, 5), region.entry(2, 1, 4)), [3, 4]),
        (lambda region: (region.head(used=2), region.entry(0, 1, 5), region.entry(3, 1, 9)), [1, 4]),
    ],
    ids=["batch", "fresh", "fresh-of-libvhost-user", "other-life", "first", "both", "older"],
)
async def test_what_others_left(
    guest: Guest, region: Region, ring: Ring, lie: object, names: list[int]
) -> None:
    """Two of four chains are answered."""
    lay(region, ring, avail=[0, 1, 2, 3], used=2)
    assert callable(lie)
    lie(region)
    device = Holder()
    async with connected(device) as front:
        await start(guest, front, region, ring)
        await until(lambda: len(device.held) >= len(names))
        await front.barrier()
        assert device.names == names
        assert region.used == 2
        device.complete(*names)
        await ring.until_used(4)
        await until(lambda: region.marked == [])


@pytest.mark.parametrize(
    ("lie", "words"),
    [
        (lambda region: region.head(version=2, used=2), "version"),
        (lambda region: region.head(version=0xFFFF, used=2), "version"),
        (lambda region: region.head(features=1, used=2), "version"),
        (lambda region: region.entry(0, 2), "neither 0 nor 1"),
        (lambda region: region.entry(7, 255), "neither 0 nor 1"),
        (lambda region: (region.entry(2, 1, 5), region.entry(3, 1, 5)), "a counter twice"),
        (lambda region: region.entry(2, 1, 2**64 - 1), "the last one there is"),
        (lambda region: [region.entry(i, 1, i) for i in range(3)], "more chains than the driver"),
        (lambda region: (region.head(used=0, last=8), region.entry(2, 1)), "last batch has a head outside"),
        (
            lambda region: (region.head(used=0, last=65535), region.entry(2, 1)),
            "last batch has a head outside",
        ),
        (
            lambda region: (region.head(used=0, last=1), region.entry(1, 1, 0, 9), region.entry(2, 1)),
            "last batch",
        ),
        (lambda region: (region.head(used=3), region.entry(2, 1)), "not of this ring"),
        (lambda region: (region.head(used=2 - 9 & 0xFFFF), region.entry(2, 1)), "not of this ring"),
    ],
)
async def test_what_cannot_be(
    caplog: pytest.LogCaptureFixture, guest: Guest, region: Region, ring: Ring, lie: object, words: str
) -> None:
    """That ring stops with one sentence, the region is as it was, the session goes on."""
    lay(region, ring, avail=[0, 1, 2, 3], used=2)
    assert callable(lie)
    lie(region)
    before = region.mem[:]
    device = Holder()
    async with connected(device) as front:
        await start(guest, front, region, ring)
        await until(lambda: "ring 0 stopped" in caplog.text)
        await front.barrier()
        assert region.mem[:] == before
    (line,) = [r.getMessage() for r in caplog.records if r.levelno >= logging.ERROR]
    assert words in line
    assert device.held == []
    assert "Traceback" not in caplog.text


async def test_a_head_outside_a_ring_that_is_smaller(
    caplog: pytest.LogCaptureFixture, guest: Guest, ring: Ring
) -> None:
    large = Region(queue_size=2 * SIZE)
    lay(large, ring, avail=[0, 1, 2, 3], used=2)
    large.entry(SIZE, 1, 5)
    async with connected(Holder()) as front:
        await start(guest, front, large, ring)
        await until(lambda: "ring 0 stopped: the inflight region has a head outside the ring" in caplog.text)
    large.close()


@pytest.mark.parametrize("stride", [stride_of(SIZE), part_size(SIZE)])
async def test_where_the_second_queue_lies(guest: Guest, stride: int) -> None:
    """64 bytes aligned, as libvhost-user and DPDK do, or one behind the other: by the size that was told."""
    region, device = Region(), Holder()
    region.told = vu.Inflight(2 * stride, 0, 2, SIZE)
    guest.ring(0, SIZE)
    ring = guest.ring(1, SIZE)
    ring.set_desc(5, GUEST_BASE + 0x80000, 1, WRITE)
    async with connected(device) as front:
        await start(guest, front, region, ring)
        ring.offer(5)
        await until(lambda: device.held)
        assert region.mem[stride + 8] == 1
        assert region.mem[stride + 16 + 16 * 5] == 1
    region.close()


# --- pumps -------------------------------------------------------------------------------------------


@contextmanager
def bridge() -> Iterator[tuple[Bridge, trio.socket.SocketType]]:
    ours, theirs = trio.socket.socketpair(trio.socket.AF_UNIX, trio.socket.SOCK_DGRAM)
    with ours, theirs:
        yield Bridge([theirs.fileno()]), ours


@pytest.mark.parametrize("way", ["out", "in"])
async def test_a_pump_takes_what_another_left(guest: Guest, region: Region, way: str) -> None:
    """Two of four are answered, the second and third; another region would not tell that the first is not."""
    rings = [guest.ring(i, SIZE) for i in range(2)]
    ring = rings[way == "out"]
    flags = 0 if way == "out" else WRITE
    at = 0 if way == "in" else region.told.size // 2
    for i in range(4):
        ring.set_desc(i, guest.put(0x80000 + 4096 * i, bytes(12) + b"frame %d" % i), 19, flags)
    lay(region, ring, avail=[0, 1, 2, 3], used=2)
    region.head(version=0)
    struct.pack_into("<QHHHH", region.mem, at, 0, 1, 0, 0, 2)
    struct.pack_into("<BxxxxxHQ", region.mem, at + 16, 1, 0, 0)
    with bridge() as (device, far):
        async with connected(device) as front:
            await start(guest, front, region, ring)
            if way == "out":
                for name in (b"frame 0", b"frame 3"):
                    with trio.fail_after(10):
                        assert await far.recv(100) == name
            else:
                await until(lambda: region.mem[at + 10] == SIZE)  # it runs: earlier frames are dropped
                for name in (b"FRAME A", b"FRAME B"):
                    await far.send(name)
            await ring.until_used(4)
            assert [ring.used_element(i)[0] for i in (2, 3)] == [0, 3]
            await until(lambda: region.mem[at + 14] == 4)
            assert not any(region.mem[at + 16 + 16 * i] for i in range(SIZE))
            frame = await front.ask(Request.GET_VRING_BASE, state(ring.index, 0))
            assert vu.VringState.unpack(frame.payload).num == 4


# --- without a region --------------------------------------------------------------------------------


async def test_answers_in_ring_order(guest: Guest, ring: Ring) -> None:
    """The used index is what is done, whenever the process dies; the rest is done again, in order."""
    device = Holder(in_order=True)
    async with connected(device) as front:
        await start(guest, front, None, ring)
        ring.offer(0, 1, 2, 3, 4, 5)
        await until(lambda: len(device.held) == 6)
        device.complete(2, 5, 4)
        await front.barrier()
        await trio.testing.wait_all_tasks_blocked()
        assert ring.used_idx == 0
        device.complete(1)
        await ring.until_used(2)
        assert used_heads(ring) == [0, 1]
    assert ring.used_idx == 2
    device = Holder(in_order=True)
    async with connected(device) as front:
        await start(guest, front, None, ring)
        await until(lambda: len(device.held) == 4)
        assert device.names == [3, 4, 5, 6]
        device.complete(4, 5, 6, 3)
        await ring.until_used(6)
        assert used_heads(ring) == [0, 1, 2, 3, 4, 5]
        assert await stop(front) == 6


async def test_a_stop_waits_for_the_one_that_holds_up_the_others(guest: Guest, ring: Ring) -> None:
    device = Holder(in_order=True)
    async with connected(device) as front:
        await start(guest, front, None, ring)
        ring.offer(0, 1, 2)
        await until(lambda: len(device.held) == 3)
        device.complete(2)
        await front.send(Request.GET_VRING_BASE, state(0, 0))
        await trio.testing.wait_all_tasks_blocked()
        device.complete(1)
        frame = await front.receive()
        assert frame is not None
        assert vu.VringState.unpack(frame.payload).num == 2
        assert used_heads(ring) == [0, 1]


async def test_the_log_says_what_a_restart_means(
    caplog: pytest.LogCaptureFixture, guest: Guest, region: Region, ring: Ring
) -> None:
    caplog.set_level(logging.INFO)
    for given in (None, region):
        all_lines_from_here(caplog)
        async with connected(Holder()) as front:
            await start(guest, front, given, ring)
            await stop(front)
            await ring.send_setup(front)
            await front.barrier()
        told = [r.getMessage() for r in caplog.records if "no inflight region" in r.getMessage()]
        assert len(told) == (given is None)
