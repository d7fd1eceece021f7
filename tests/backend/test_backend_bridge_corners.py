"""The bridge's frames of every size, the ones that fit nowhere, and neighbours that misbehave."""

from __future__ import annotations

import select
import socket
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest

from tests.kit.net_card import HEADER, MEMORY, Card, frame, udp
from tests.kit.raw_front_end import Guest, RawFrontEnd, connected
from tests.kit.until import until
from vhostpc.backend.net import Bridge
from vhostpc.virtio.features import NetFeature
from vhostpc.wire import vhost_user as vu
from vhostpc.wire.vhost_user import Request

UDP_SEGMENT, UDP_GRO = 103, 104


@dataclass
class Network:
    """The bridge's link, and the socket that it talks to."""

    link: socket.socket
    far: socket.socket
    bridge: Bridge
    arrived: list[bytes] = field(default_factory=list)

    def send(self, data: bytes) -> None:
        self.far.sendto(data, self.link.getsockname())

    def drain(self) -> list[bytes]:
        try:
            while True:
                self.arrived.append(self.far.recv(65536))
        except BlockingIOError:
            return self.arrived

    async def until(self, count: int) -> list[bytes]:
        await until(lambda: len(self.drain()) >= count, 10, f"{count} frames out")
        return self.arrived


MakeNetwork = Callable[[bool], Network]


@pytest.fixture
def make_network() -> Iterator[MakeNetwork]:
    """``make_network(is_connected)``: the link is connected to the far side, or gets its address a message."""
    with udp() as link, udp() as far:

        def make(is_connected: bool) -> Network:
            if is_connected:
                link.connect(far.getsockname())
            return Network(link, far, Bridge([link.fileno()], to=None if is_connected else far.getsockname()))

        yield make


@pytest.fixture
def network(make_network: MakeNetwork) -> Network:
    return make_network(False)


@pytest.fixture
def guest() -> Iterator[Guest]:
    guest = Guest(MEMORY)
    yield guest
    guest.close()


async def start(front: RawFrontEnd, guest: Guest, network: Network, *, mergeable: bool = True) -> None:
    """Set up both rings; returns when incoming frames are no longer taken for stale."""
    await front.negotiate(hide=0 if mergeable else NetFeature.MRG_RXBUF)
    await guest.send_memory(front)
    network.send(b"stale")
    for ring in guest.rings:
        await ring.send_setup(front)
    await until(lambda: network.bridge.counters()["in"].discarded == 1, 10, "the stale frame is thrown away")


async def exchange(card: Card, network: Network, frames: list[bytes]) -> None:
    """All frames out and all of them in, whole, in order, once."""
    out = len(network.drain())
    came: list[bytes] = []

    def all_came() -> bool:
        came.extend(card.take())
        return len(came) >= len(frames)

    for data in frames:
        card.send(data)
        network.send(data)
    assert (await network.until(out + len(frames)))[out:] == frames
    await until(all_came, 10, f"{len(frames)} frames in")
    assert came == frames


SIZES = [1, 1514, 9000]


@pytest.mark.parametrize("is_connected", [False, True])
@pytest.mark.parametrize("mergeable", [True, False])
@pytest.mark.parametrize("size", SIZES)
async def test_sizes_both_ways(
    guest: Guest, make_network: MakeNetwork, size: int, mergeable: bool, is_connected: bool
) -> None:
    network = make_network(is_connected)
    card = Card(guest, rx_size=2048 if mergeable else 12288)
    async with connected(network.bridge) as front:
        await start(front, guest, network, mergeable=mergeable)
        for turn in range(4):
            await exchange(card, network, [frame(100 * turn + i, size) for i in range(12)])
        # All in one heap, and each frame of another size than its neighbours.
        await exchange(card, network, [frame(900 + i, (*SIZES, size)[i % 4]) for i in range(12)])
    counters = network.bridge.counters()
    assert [counters[way].frames for way in ("in", "out")] == [60, 60]
    assert [counters[way].dropped for way in ("in", "out")] == [0, 0]


@pytest.mark.parametrize("mergeable", [True, False])
@pytest.mark.parametrize("size", SIZES)
async def test_joined_datagrams(guest: Guest, network: Network, size: int, mergeable: bool) -> None:
    """UDP_SEGMENT out and UDP_GRO in: frames that go and come joined are whole and apart in the guest."""
    network.link.setsockopt(socket.IPPROTO_UDP, UDP_GRO, 1)
    network.far.setsockopt(socket.IPPROTO_UDP, UDP_GRO, 1)
    count = min(30, 60000 // size)
    card = Card(guest, rx_size=2048 if mergeable else 12288)
    frames = [frame(i, size) for i in range(count)]
    last = frame(99, max(1, size // 2))
    control = [(socket.SOL_UDP, UDP_SEGMENT, struct.pack("<H", size))]
    came: list[bytes] = []

    def all_came() -> bool:
        came.extend(card.take())
        return len(came) > count

    async with connected(network.bridge) as front:
        await start(front, guest, network, mergeable=mergeable)
        before = network.bridge.counters()
        sent = network.far.sendmsg([b"".join([*frames, last])], control, 0, network.link.getsockname())
        assert sent == size * count + len(last)
        card.send(*frames, last)
        await until(all_came, 10, "joined datagrams in the guest")
        assert came == [*frames, last]
        await until(
            lambda: b"".join(network.drain()) == b"".join([*frames, last]), 10, "joined datagrams out"
        )
        after = network.bridge.counters()
    # They did travel joined: both the socket and the pump saw fewer messages than frames.
    assert len(network.arrived) < count
    assert after["in"].frames - before["in"].frames == count + 1
    assert after["in"].batches - before["in"].batches < count


@pytest.mark.parametrize("joined", [False, True])
async def test_a_frame_longer_than_its_buffer(guest: Guest, network: Network, joined: bool) -> None:
    """Without mergeable buffers it is dropped whole and counted (virtio 1.2, 5.1.6.4); its buffer stays offered."""
    fits = 2048 - HEADER
    sizes = [9000, 9000, fits + 1, 9000] if not joined else [9000] * 4
    card = Card(guest, rx_size=2048)
    came: list[bytes] = []
    if joined:
        network.link.setsockopt(socket.IPPROTO_UDP, UDP_GRO, 1)
    async with connected(network.bridge) as front:
        await start(front, guest, network, mergeable=False)
        for turn in range(50):
            small = [frame(turn, fits), frame(turn, 60)]
            if joined:
                control = [(socket.SOL_UDP, UDP_SEGMENT, struct.pack("<H", 9000))]
                heap = b"".join(frame(0, n) for n in sizes) + small[0]
                network.far.sendmsg([heap], control, 0, network.link.getsockname())
                network.send(small[1])
            else:
                for data in [frame(0, n) for n in sizes] + small:
                    network.send(data)
            came.clear()

            def both(came: list[bytes] = came) -> bool:
                came.extend(card.take())
                return len(came) >= 2

            await until(both, 10, "the frames that fit")
            assert came == small
            assert network.bridge.counters()["in"].dropped == 4 * (turn + 1)
        assert card.rx.used_idx == 100
        await exchange(card, network, [frame(i, 1514) for i in range(8)])


async def test_a_frame_longer_than_the_whole_ring(guest: Guest, network: Network) -> None:
    """With mergeable buffers, all of them together: no more will come, so it is dropped, not waited for."""
    card = Card(guest, rx_size=1024, rx_count=4, rx_ring=4)
    async with connected(network.bridge) as front:
        await start(front, guest, network)
        network.send(frame(1, 9000))
        network.send(frame(2, 4096 - HEADER + 1))
        await exchange(card, network, [frame(3, 4096 - HEADER), frame(4, 1)])
        assert network.bridge.counters()["in"].dropped == 2


async def test_a_frame_that_waits_for_more_buffers(guest: Guest, network: Network) -> None:
    """It stays in the pump until the driver offers enough, however often it kicks for less in the meantime."""
    card = Card(guest, rx_size=2048, rx_count=2)
    data = frame(7, 9000)
    came: list[bytes] = []
    kick = select.poll()
    kick.register(card.rx.kick, select.POLLIN)

    def all_came() -> bool:
        came.extend(card.take())
        return bool(came)

    async with connected(network.bridge) as front:
        await start(front, guest, network)
        network.send(data)
        for _ in range(5):
            for _ in range(200):
                card.rx.offer()  # a kick and nothing new: the pump is woken soon after it fell asleep
            await until(lambda: not kick.poll(0), 10, "the pump to take the kick")
        assert not card.take()
        card.offer_more(3)
        await until(all_came, 10, "the frame")
        assert came == [data]
        assert network.bridge.counters()["in"].dropped == 0


@pytest.mark.parametrize("before", [0, 1], ids=["at once", "behind one that fits"])
async def test_a_frame_that_waits_for_buffers_in_vain(guest: Guest, network: Network, before: int) -> None:
    """A driver that never offers enough: the frame is dropped and counted after a second, and the next one comes."""
    card = Card(guest, rx_size=2048, rx_count=2 + before)
    wanted = [frame(8, 100)] * before + [frame(9, 200)]
    came: list[bytes] = []

    def all_came() -> bool:
        used = card.rx.used_idx  # take() would offer the buffers again
        return used == len(wanted)

    async with connected(network.bridge) as front:
        await start(front, guest, network)
        for data in wanted[:before]:
            network.send(data)
        network.send(frame(7, 9000))
        network.send(wanted[-1])
        await until(all_came, 10, "the frames that fit")
        came = card.take()
        assert came == wanted
        assert network.bridge.counters()["in"].dropped == 1


async def test_a_stop_drops_a_frame_that_lacks_buffers(guest: Guest, network: Network) -> None:
    """It is not first in line in the next run, whose buffers may be as few."""
    card = Card(guest, rx_size=2048, rx_count=2)
    async with connected(network.bridge) as front:
        await start(front, guest, network)
        network.send(frame(7, 9000))
        await until(lambda: network.bridge.queue_counters()[0].syscalls > 2, 10, "the pump to wait for more")
        await front.barrier()
        for _ in range(2):
            reply = await front.ask(Request.GET_VRING_BASE, vu.VringState(0, 0).pack())
            assert vu.VringState.unpack(reply.payload).num == 0
            await card.rx.send_setup(front)
        assert network.bridge.counters()["in"].dropped == 1
        network.send(frame(9, 200))
        await until(lambda: card.rx.used_idx == 1, 10, "the next frame")
        assert card.take() == [frame(9, 200)]


async def test_a_reset_drops_all_that_is_held(guest: Guest, network: Network) -> None:
    """Frames that came before RESET_DEVICE, held or still in the socket, are not for the guest's next life."""
    card = Card(guest, rx_count=0)
    async with connected(network.bridge) as front:
        await start(front, guest, network)
        stale = network.bridge.counters()["in"].discarded
        card.offer_more(1)
        for i in range(4):
            network.send(frame(i, 100))
        await until(lambda: card.rx.used_idx == 1, 10, "the first frame")
        await front.send(Request.RESET_DEVICE)
        await front.barrier()
        network.send(frame(5, 100))
        guest.mem[card.rx.avail : card.rx.avail + 4] = bytes(4)
        guest.mem[card.rx.used : card.rx.used + 4] = bytes(4)
        card.rx.avail_idx = card._rx_seen = 0
        card._in.clear()
        card.offer_more(4)
        await card.rx.send_setup(front)
        await until(
            lambda: network.bridge.counters()["in"].discarded == stale + 4, 10, "what is stale to be dropped"
        )
        network.send(frame(6, 100))
        await until(lambda: card.rx.used_idx == 1, 10, "a frame of the next life")
        assert card.take() == [frame(6, 100)]


async def test_a_frame_longer_than_any_datagram(guest: Guest, network: Network) -> None:
    """Out of the guest: dropped, counted, its buffer given back; what stands round it goes out."""
    card = Card(guest)
    async with connected(network.bridge) as front:
        await start(front, guest, network)
        for length in (65508, 65535, 65536, 70000):
            card.send_long(length)
            card.send(b"behind %d" % length)
        assert await network.until(4) == [b"behind %d" % n for n in (65508, 65535, 65536, 70000)]
        await until(lambda: card.free == 32, 10, "all buffers back")
        counters = network.bridge.counters()["out"]
        assert (counters.frames, counters.dropped) == (4, 4)


@pytest.mark.parametrize("is_connected", [True, False])
async def test_a_sender_from_a_foreign_port(
    guest: Guest, make_network: MakeNetwork, is_connected: bool
) -> None:
    """A connected link hears its far side alone. One that is not, as the example's, hears everybody, as
    QEMU's vhost-user-bridge does. Either way traffic goes on, frame by frame."""
    network = make_network(is_connected)
    card = Card(guest)
    came: list[bytes] = []
    with udp() as stranger:
        async with connected(network.bridge) as front:
            await start(front, guest, network)
            for turn in range(30):
                stranger.sendto(b"strange %d" % turn, network.link.getsockname())
                network.send(b"known %d" % turn)

                def known(came: list[bytes] = came, last: bytes = b"known %d" % turn) -> bool:
                    came.extend(card.take())
                    return last in came

                await until(known, 10, "the far side's frame")
            await exchange(card, network, [frame(i, 1514) for i in range(8)])
        with pytest.raises(BlockingIOError):
            stranger.recv(100)
    heard = [b"known %d" % i for i in range(30)]
    if not is_connected:
        heard = [word for i in range(30) for word in (b"strange %d" % i, b"known %d" % i)]
    assert came == heard
    assert network.bridge.counters()["in"].frames == len(heard) + 8


async def test_refused_by_the_far_side(guest: Guest, make_network: MakeNetwork) -> None:
    """The far side's port is closed: the kernel tells both pumps so, which end for it neither; then it opens."""
    network = make_network(True)
    card = Card(guest)
    address = network.far.getsockname()
    async with connected(network.bridge) as front:
        await start(front, guest, network)
        network.far.close()
        before = network.bridge.counters()["in"].syscalls
        for turn in range(50):
            card.send(*[frame(turn, 100)] * 2)
            await until(lambda: card.free == 32, 10, "the buffers back")
        counters = network.bridge.counters()
        assert counters["out"].frames + counters["out"].dropped == 100
        # A refusal goes to the first caller: it wakes the one pump, or fails a send of the other.
        assert counters["out"].dropped or counters["in"].syscalls > before, "nobody was told"
        with udp_at(address) as network.far:
            # A refusal that is still to be told may cost one frame more.
            card.send(b"anybody there?")
            await until(lambda: card.free == 32, 10, "the buffer back")
            network.drain()
            network.arrived.clear()
            await exchange(card, network, [frame(i, 1514) for i in range(8)])


def udp_at(address: tuple[str, int]) -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind(address)
    sock.setblocking(False)
    return sock
