"""What the network rows share: bridges as subjects, the guest, the far end of the UDP pair."""

from __future__ import annotations

import json
import shlex
import socket
import sys
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import trio

from tests.peers.child import Child, open_child
from tests.peers.dpdk import Testpmd, virtio_user

from . import CACHE, ROOT
from .native import tool
from .peers import QUIET, STOCK

# The guest's polling thread has core 1 for itself; bridge, sender and receiver share core 0. Left to the
# scheduler, a bridge that now and then shares the poller's core measures the scheduler.
REST = 0


@dataclass(frozen=True)
class Bridge:
    """A program with vhost-user-bridge's letters."""

    name: str
    argv: tuple[str, ...]
    path_letter: str = "-u"


OURS = Bridge("vhostpc bridge", (sys.executable, str(ROOT / "examples" / "bridge")), "--socket-path")
THEIRS = Bridge("vhost-user-bridge", (str(STOCK),))
NODUMP = Bridge("vhost-user-bridge, no dump", (str(QUIET),))


@dataclass(frozen=True)
class Setup:
    """A bridge with a guest at one side; the far end binds ``here`` and sends ``there``."""

    bridge: Child
    guest: Testpmd
    here: str
    there: str


def free_ports(count: int) -> list[int]:
    """UDP ports on loopback that nobody has right now."""
    sockets = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(count)]
    for sock in sockets:
        sock.bind(("127.0.0.1", 0))
    ports = [sock.getsockname()[1] for sock in sockets]
    for sock in sockets:
        sock.close()
    return ports


@asynccontextmanager
async def setup(
    bridge: Bridge, forward: str, *, args: Sequence[str] = (), options: str = ""
) -> AsyncIterator[Setup]:
    """Run the bridge, its output thrown away as a service's is, and a DPDK guest at its socket."""
    there, here = (f"127.0.0.1:{port}" for port in free_ports(2))
    with tempfile.TemporaryDirectory(prefix="vpc-bench-") as folder:
        path = Path(folder) / "bridge.sock"
        argv = [*bridge.argv, bridge.path_letter, str(path), "-l", there, "-r", here]
        # The dump goes to both streams; stderr is kept for the error text unless it is the dump.
        dump = "2>&1" if bridge.argv[0] == str(STOCK) else f"2>{shlex.quote(folder)}/err"
        shell = f"exec taskset -c {REST} {shlex.join(argv)} >/dev/null {dump}"
        async with open_child(["sh", "-c", shell], name=bridge.name) as child:
            with trio.fail_after(20):
                while not path.exists():
                    if child.ended.is_set():
                        raise RuntimeError(f"{bridge.name} ended at once: {words(folder)}")
                    await trio.sleep(0.01)
            async with virtio_user(path, forward=forward, args=args, options=options) as guest:
                yield Setup(child, guest, here, there)
                if child.ended.is_set():
                    raise RuntimeError(f"{bridge.name} died: {words(folder)}")


def words(folder: str) -> str:
    path = Path(folder) / "err"
    return path.read_text()[-2000:] if path.exists() else "(no words)"


@asynccontextmanager
async def open_sink(here: str, cpu: int = REST) -> AsyncIterator[Child]:
    """The native receiver, ready to count."""
    async with open_child([tool("udp_sink"), here, str(cpu)]) as sink:
        await sink.until("ready\n")
        yield sink


async def counts(sink: Child) -> dict[str, int]:
    result: dict[str, int] = json.loads(await sink.line("show"))
    return result


async def settled(sink: Child) -> dict[str, int]:
    """The counts once nothing has come for a tenth of a second."""
    while True:
        now = await counts(sink)
        if now["now_ns"] - now["last_ns"] > 100_000_000:
            return now
        await trio.sleep(0.03)


async def run_tool(name: str, *args: object) -> dict[str, float]:
    """Run one of the native programs to its end and return the JSON it printed."""
    async with open_child([tool(name), *map(str, args)]) as child:
        if await child.wait(120):
            raise RuntimeError(f"{name}: {child.last_words()}")
        result: dict[str, float] = json.loads(child.said)
        return result


def ours_is_there() -> bool:
    """False in a checkout whose bridge does not exist yet: then only the peers are measured."""
    return (ROOT / "examples" / "bridge").exists()


__all__ = ["CACHE", "NODUMP", "OURS", "REST", "THEIRS", "Bridge", "Setup"]
