"""Our bridge with DPDK's virtio-user as its front-end: every frame arrives, whole, and is counted.

DPDK 22.11's virtio-user has table mode only (no memory slots), declines the event index, and takes
indirect descriptors for packets of several segments.
"""

from __future__ import annotations

import random
import re
import signal
import struct
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio

from tests.peers.bridge import FarEnd, open_bridge, open_far_end
from tests.peers.child import Child
from tests.peers.dpdk import Testpmd, needs_dpdk, virtio_user
from vhostpc.virtio.features import NetFeature
from vhostpc.wire.vhost_user import Feature

pytestmark = pytest.mark.dpdk

ETHERNET, IPV4 = 14, 20
LIMIT = 60  # seconds a test
# As large a packet as testpmd is ready for; with 2 KiB buffers it needs five of them.
JUMBO = ["--max-pkt-len=9600", "--enable-scatter"]
WINDOW = 32  # frames under way: less than any ring, so nothing may be lost


@pytest.fixture(autouse=True)
def dpdk() -> None:
    needs_dpdk()


@pytest.fixture
async def far() -> AsyncIterator[FarEnd]:
    async with open_far_end() as end:
        yield end


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "bridge.sock"


def random_frames(count: int, sizes: tuple[int, int], seed: int) -> list[bytes]:
    """Ethernet frames, each with its number and bytes of its own."""
    chance = random.Random(seed)
    head = b"\x02\0\0\0\0\xaa\x02\0\0\0\0\xbb\x88\xb5"
    frames = []
    for number in range(count):
        size = chance.choice([*sizes, chance.randint(*sizes)])
        frames.append(head + struct.pack("<Q", number) + chance.randbytes(size - len(head) - 8))
    return frames


def check_txonly(frame: bytes, length: int) -> None:
    """A frame of testpmd's generator: UDP in IPv4, lengths and header checksum right (it leaves the rest)."""
    assert len(frame) == length
    assert frame[12:14] == b"\x08\x00"
    header = frame[ETHERNET : ETHERNET + IPV4]
    words = sum(struct.unpack("!10H", header))
    assert (words & 0xFFFF) + (words >> 16) == 0xFFFF
    assert struct.unpack("!H", header[2:4])[0] == length - ETHERNET
    assert header[9] == 17
    assert struct.unpack("!H", frame[38:40])[0] == length - ETHERNET - IPV4


async def send_bursts(guest: Testpmd, far: FarEnd, bursts: int) -> list[bytes]:
    """Have the guest send ``bursts`` of 32 frames; return all that arrived. Every frame must."""
    before = (await guest.stats())["tx_packets"]
    await guest.command(f"start tx_first {bursts}")
    await guest.stop()
    sent = (await guest.stats())["tx_packets"] - before
    assert sent > 0
    frames = [await far.receive() for _ in range(sent)]
    assert await far.receive_now() is None
    assert far.drops == 0
    return frames


async def echo(far: FarEnd, frames: list[bytes]) -> None:
    """Send frames to a guest that sends them back; each comes back once, in order, unchanged."""
    for begin in range(0, len(frames), WINDOW):
        window = frames[begin : begin + WINDOW]
        for frame in window:
            await far.send(frame)
        for number, frame in enumerate(window, begin):
            got = await far.receive()
            assert got == frame, f"frame {number} of {len(frame)} bytes came back as {len(got)} bytes"
    assert await far.receive_now() is None


@pytest.mark.parametrize("mergeable", [True, False], ids=["mergeable", "not-mergeable"])
@pytest.mark.parametrize("size", [64, 1500])
async def test_txonly(path: Path, far: FarEnd, mergeable: bool, size: int) -> None:
    """All that a guest hands over arrives, in the form in which it was made."""
    with trio.fail_after(LIMIT):
        async with open_bridge(path, far):
            options = f"mrg_rxbuf={int(mergeable)}"
            async with virtio_user(path, forward="io", options=options, args=[f"--txpkts={size}"]) as guest:
                assert bool(guest.features & NetFeature.MRG_RXBUF) == mergeable
                for _ in range(3):
                    for frame in await send_bursts(guest, far, 50):
                        check_txonly(frame, size)


async def test_txonly_without_a_pause(path: Path, far: FarEnd) -> None:
    """A guest that never stops sending: what is not counted as dropped by our own socket arrived."""
    seen = 0
    with trio.fail_after(LIMIT):
        async with open_bridge(path, far):
            async with virtio_user(path, forward="txonly", args=["--txpkts=64"]) as guest:
                await guest.start()
                while seen < 20_000:
                    check_txonly(await far.receive(), 64)
                    seen += 1
                await guest.stop()
                sent = (await guest.stats())["tx_packets"]
                while (frame := await far.receive_now()) is not None:
                    assert len(frame) == 64
                    seen += 1
                assert seen + far.drops == sent


@pytest.mark.parametrize("indirect", [True, False], ids=["indirect", "direct"])
async def test_segments(path: Path, far: FarEnd, indirect: bool) -> None:
    """Packets of one to four segments: with indirect descriptors a table, without a chain."""
    sizes = {64 + 200 * n for n in range(4)}
    hidden = [] if indirect else ["--hide-feature", "INDIRECT_DESC"]
    with trio.fail_after(LIMIT):
        async with open_bridge(path, far, hidden):
            async with virtio_user(path, forward="io", args=["--txpkts=64,200,200,200"]) as guest:
                assert bool(guest.features & Feature.INDIRECT_DESC) == indirect
                await guest.set("txsplit rand")
                frames = await send_bursts(guest, far, 40)
                assert {len(frame) for frame in frames} == sizes
                for frame in frames:
                    check_txonly(frame, len(frame))


@pytest.mark.parametrize("mergeable", [True, False], ids=["mergeable", "not-mergeable"])
async def test_rxonly(path: Path, far: FarEnd, mergeable: bool) -> None:
    """The guest counts each frame and each byte that was sent to it."""
    frames = random_frames(2000, (60, 1514), seed=1)
    with trio.fail_after(LIMIT):
        async with open_bridge(path, far):
            async with virtio_user(path, forward="rxonly", options=f"mrg_rxbuf={int(mergeable)}") as guest:
                await guest.start()
                for begin in range(0, len(frames), 200):
                    for frame in frames[begin : begin + 200]:
                        await far.send(frame)
                    await guest.until_stat("rx_packets", begin + 200)
                stats = await guest.stats()
    assert stats["rx_packets"] == len(frames)
    assert stats["rx_bytes"] == sum(map(len, frames))
    assert stats["rx_errors"] == stats["rx_missed"] == 0


@pytest.mark.parametrize(
    ("options", "queue_size"),
    [
        ("mrg_rxbuf=1", 256),
        ("mrg_rxbuf=0", 256),
        ("mrg_rxbuf=1", 64),
        ("mrg_rxbuf=1", 1024),
        ("mrg_rxbuf=1,packed_vq=1", 256),  # packed rings are asked for and not offered
        ("mrg_rxbuf=0,in_order=0,vectorized=1", 256),
    ],
)
async def test_both_ways(path: Path, far: FarEnd, options: str, queue_size: int) -> None:
    """Random frames into the guest and out again."""
    with trio.fail_after(LIMIT):
        async with open_bridge(path, far):
            async with virtio_user(path, forward="io", options=options, queue_size=queue_size) as guest:
                assert not guest.features & Feature.RING_PACKED
                await guest.start()
                await echo(far, random_frames(2000, (60, 1514), seed=2))


@pytest.mark.parametrize("mergeable", [True, False], ids=["mergeable", "not-mergeable"])
async def test_joined_datagrams(path: Path, far: FarEnd, mergeable: bool) -> None:
    """Datagrams that the kernel hands over joined are frames of their own again, the short last one too."""
    with trio.fail_after(LIMIT):
        async with open_bridge(path, far):
            async with virtio_user(path, forward="io", options=f"mrg_rxbuf={int(mergeable)}") as guest:
                await guest.start()
                for size in (60, 61, 600, 1514):
                    for count in (1, 2, WINDOW):
                        frames = random_frames(count, (size, size), seed=size)
                        frames[-1] = frames[-1][: 60 if count > 1 else size]
                        await far.send_joined(frames)
                        for frame in frames:
                            assert await far.receive() == frame
                assert await far.receive_now() is None


async def test_event_index(path: Path, far: FarEnd) -> None:
    """DPDK does not know the event index and leaves it; hidden or offered, frames come and go."""
    for args in ([], ["--hide-feature", "EVENT_IDX"]):
        with trio.fail_after(LIMIT):
            async with open_bridge(path, far, args):
                async with virtio_user(path, forward="io") as guest:
                    assert not guest.features & Feature.EVENT_IDX
                    await guest.start()
                    await echo(far, random_frames(300, (60, 1514), seed=3))
        path.unlink(missing_ok=True)


async def test_frames_of_many_buffers(path: Path, far: FarEnd) -> None:
    """Frames larger than a buffer: the parts come in several chains in, several segments out."""
    with trio.fail_after(LIMIT):
        async with open_bridge(path, far):
            async with virtio_user(path, forward="io", options="mrg_rxbuf=1", args=JUMBO) as guest:
                await guest.start()
                await echo(far, random_frames(600, (60, 9000), seed=4))


async def test_frame_larger_than_a_buffer_is_dropped_without_mergeable(path: Path, far: FarEnd) -> None:
    """It is never cut short, and the frames around it arrive."""
    small = random_frames(20, (60, 1514), seed=5)
    large = random_frames(1, (9000, 9000), seed=6)[0]
    with trio.fail_after(LIMIT):
        async with open_bridge(path, far):
            async with virtio_user(path, forward="io", options="mrg_rxbuf=0") as guest:
                await guest.start()
                await echo(far, small)
                await far.send(large)
                await echo(far, small)
                assert (await guest.stats())["rx_packets"] == 2 * len(small)


async def test_guests_come_and_go(path: Path, far: FarEnd) -> None:
    """A port that stops and starts, then a new guest at the same bridge: nothing lost, nothing left over."""
    frames = random_frames(200, (60, 1514), seed=7)
    with trio.fail_after(LIMIT):
        async with open_bridge(path, far):
            for _ in range(3):
                async with virtio_user(path, forward="io") as guest:
                    await guest.start()
                    await echo(far, frames)
                    await guest.stop()
                    await guest.command("port stop 0")
                    await guest.command("port start 0")
                    await guest.start()
                    await echo(far, frames)
                    assert await guest.quit() == 0


async def test_guest_killed(path: Path, far: FarEnd) -> None:
    """A guest that dies in the middle of traffic leaves the bridge ready for the next."""
    with trio.fail_after(LIMIT):
        async with open_bridge(path, far) as bridge:
            async with virtio_user(path, forward="txonly", args=["--txpkts=64"]) as guest:
                await guest.start()
                await far.receive()
                guest.child.process.kill()
                await guest.child.wait()
            await bridge.until("disconnected")
            while await far.receive_now() is not None:
                pass
            async with virtio_user(path, forward="io") as guest:
                await guest.start()
                await echo(far, random_frames(200, (60, 1514), seed=8))


async def end(bridge: Child) -> None:
    bridge.process.terminate()
    await bridge.wait()


async def test_bridge_as_client_comes_again(path: Path, far: FarEnd) -> None:
    """The guest listens; the bridge ends and another takes its place: the guest goes on."""
    async with trio.open_nursery() as nursery:
        with trio.fail_after(LIMIT):
            ready = trio.Event()
            done = trio.Event()

            async def guest_life() -> None:
                async with virtio_user(path, forward="io", options="server=1") as guest:
                    await guest.start()
                    ready.set()
                    await done.wait()

            nursery.start_soon(guest_life)
            while not path.is_socket():
                await trio.sleep(0.01)
            async with open_bridge(path, far, ["-c"]):
                await ready.wait()
                await echo(far, random_frames(200, (60, 1514), seed=9))
            async with open_bridge(path, far, ["-c"]) as second:
                await second.until("connected")
                # Until the new bridge's rings run, what is sent to the guest is discarded.
                probe = random_frames(1, (60, 60), seed=10)[0]
                got = None
                while got is None:
                    await far.send(probe)
                    got = await far.receive_now()
                # DPDK says "base 0" to the new one; what the guest sent before must not be sent again.
                while got is not None:
                    assert got == probe
                    got = await far.receive_now()
                await echo(far, random_frames(200, (60, 1514), seed=11))
            done.set()


async def frames_by_queue(bridge: Child, queues: int) -> list[int]:
    """What the bridge says when it is asked with SIGUSR1."""
    begin = len(bridge.said)
    bridge.process.send_signal(signal.SIGUSR1)
    await bridge.until(rf"queue {queues - 1}: .*\n", begin)
    return [int(n) for n in re.findall(r"^queue \d+: (\d+) frames", bridge.said[begin:], re.MULTILINE)]


async def test_eight_queue_pairs(path: Path, far: FarEnd) -> None:
    """Frames go into the guest and out again by each of eight pairs; each comes back once, whole."""
    frames = iter(random_frames(50_000, (60, 1514), seed=11))
    args = ["--rxq=8", "--txq=8", "--total-num-mbufs=20000"]
    with trio.fail_after(LIMIT):
        async with open_bridge(path, far, ["--pairs", "8"]) as bridge:
            async with virtio_user(path, forward="io", queues=8, args=args) as guest:
                await guest.start()
                by_queue = [0] * 16
                echoed = 0
                # The pumps share one socket: which pair a frame takes is theirs to find out, and so is the order.
                while min(by_queue) == 0:
                    window = [next(frames) for _ in range(WINDOW)]
                    for frame in window:
                        await far.send(frame)
                    assert sorted([await far.receive() for _ in window]) == sorted(window)
                    echoed += len(window)
                    if echoed % 1024 == 0:
                        by_queue = await frames_by_queue(bridge, 16)
                assert await far.receive_now() is None
                while sum(by_queue) < 2 * echoed:  # a pump counts what it sent when it has sent it
                    by_queue = await frames_by_queue(bridge, 16)
                assert sum(by_queue) == 2 * echoed
                assert by_queue[0::2] == by_queue[1::2]  # a pair sends what it has received
