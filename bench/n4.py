"""N4: frames out of the guest into a sink that reads every byte. ``python -m bench.n4``.

The bridge's pump with the null device behind it, against the polling back-end of DPDK, net_vhost in rxonly. The
sender is the same for both; each receiver counts what it took, and both run on the same core.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import trio

from tests.peers.child import open_child
from tests.peers.dpdk import MAIN_CPU, WORK_CPU, open_testpmd, virtio_user

from . import ROOT
from .net import REST
from .rows import REPETITIONS, Row, Sample, at_least, in_turn, print_rows, stated

OURS, PEER = "vhostpc pump", "DPDK net_vhost, rxonly"
WARM, LENGTH = 0.3, 1.5  # seconds
SIZES = {"64": at_least(0.5), "1500": stated()}

Count = Callable[[], Awaitable[int]]


@asynccontextmanager
async def pump(path: Path) -> AsyncIterator[Count]:
    """Our receiver; gives what counts its frames."""
    argv: list[str | Path] = ["taskset", "-c", str(REST), sys.executable, "-m", "bench.n4_service", path]
    async with open_child(argv, name=OURS, cwd=ROOT) as child:
        with trio.fail_after(20):
            while not path.is_socket():
                if child.ended.is_set():
                    raise RuntimeError(f"{OURS} ended: {child.last_words()}")
                await trio.sleep(0.01)

        async def count() -> int:
            return int(json.loads(await child.line("show"))["frames"])

        yield count


@asynccontextmanager
async def net_vhost(path: Path) -> AsyncIterator[Count]:
    """DPDK's receiver. Its polling thread takes the core that the sender's does not."""
    assert (MAIN_CPU, WORK_CPU) == (REST, 1)
    async with open_testpmd(
        f"net_vhost0,iface={path},queues=1", forward="rxonly", eal=[f"--main-lcore={WORK_CPU}"]
    ) as testpmd:
        await testpmd.start()

        async def count() -> int:
            return (await testpmd.stats())["rx_packets"]

        yield count


async def measure(name: str, size: str) -> Sample:
    """Frames a second that the receiver took."""
    receiver = pump if name == OURS else net_vhost
    with tempfile.TemporaryDirectory(prefix="vpc-bench-") as folder:
        path = Path(folder) / "sink.sock"
        async with (
            receiver(path) as count,
            virtio_user(path, forward="txonly", args=[f"--txpkts={size}"]) as guest,
        ):
            await guest.start()
            await trio.sleep(WARM)
            first, begin = await count(), trio.current_time()
            await trio.sleep(LENGTH)
            last, end = await count(), trio.current_time()
            await guest.stop()
    return Sample((last - first) / (end - begin))


async def rows(repetitions: int = REPETITIONS) -> list[Row]:
    table = []
    for size, goal in SIZES.items():
        what = f"{size}-byte frames out, all bytes read, sent nowhere"
        got = await in_turn({n: partial(measure, n, size) for n in (OURS, PEER)}, repetitions, f"N4 {what}")
        table.append(Row("N4", what, "frames/s", PEER, goal, got[OURS], got[PEER]))
    return table


if __name__ == "__main__":
    print_rows(trio.run(rows))
