"""dpdk-testpmd, driven by its own command line on stdin: as a front-end and as a back-end.

As a front-end (``virtio_user``) it is a guest without a virtual machine; as a back-end (``net_vhost``)
it is the other implementation that lives through postcopy. It polls, so it takes a whole core.
"""

from __future__ import annotations

import os
import re
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from tests.qemu.peers import PeerMissing

from .child import Child, open_child
from .packages import TESTPMD, dpdk

PROMPT = "testpmd> "
MAIN_CPU, WORK_CPU = 0, 1


def needs_dpdk() -> None:
    """Skip the calling test when DPDK is not here; in CI that is a failure."""
    try:
        dpdk()
    except PeerMissing as error:
        if os.environ.get("CI"):
            pytest.fail(str(error))
        pytest.skip(str(error))


class Testpmd:
    """A testpmd at its prompt. Commands are testpmd's own; see its user guide."""

    __test__ = False

    def __init__(self, child: Child) -> None:
        self.child = child

    async def command(self, text: str, limit: float = 20) -> str:
        """Send one command and return what it printed, once the prompt is back."""
        begin = await self.child.send(text + "\n")
        found = await self.child.until(rf"(.*?)\n{PROMPT}", begin, limit)
        return found[1].replace("\r", "")

    @property
    def features(self) -> int:
        """The virtio feature bits that a virtio_user front-end has set last."""
        found = re.findall(r"set features: (0x[0-9a-f]+)", self.child.said)
        assert found, f"no features were set\n{self.child.last_words()}"
        return int(found[-1], 16)

    async def start(self) -> None:
        """Begin to forward."""
        await self.command("start")

    async def stop(self) -> None:
        """Stop forwarding; returns when the lcores have stopped."""
        await self.command("stop")

    async def set(self, what: str) -> None:
        """``set <what>`` while stopped, for example ``set("fwd rxonly")``."""
        await self.command(f"set {what}")

    async def stats(self, port: int = 0) -> dict[str, int]:
        """The port's counters: ``rx_`` and ``tx_`` with packets, bytes and errors, and rx_missed."""
        text = await self.command(f"show port stats {port}")
        pairs = re.findall(r"([RT]X)-(packets|missed|bytes|errors|nombuf):\s*(\d+)", text)
        return {f"{way.lower()}_{what}": int(number) for way, what, number in pairs}

    async def until_stat(self, name: str, least: int, limit: float = 20) -> int:
        """Wait until a counter of port 0 is at least ``least`` and return it."""
        value = -1
        with trio.move_on_after(limit):
            while True:
                value = (await self.stats())[name]
                if value >= least:
                    return value
                await trio.sleep(0.02)
        raise AssertionError(f"{name} is {value}, not {least}, after {limit} s\n{self.child.last_words()}")

    async def quit(self) -> int:
        """Leave as a guest leaves: stop, close the ports, close the socket. Returns the exit code."""
        await self.child.send("quit\n")
        return await self.child.wait()


@asynccontextmanager
async def open_testpmd(
    vdev: str, *, forward: str, args: Sequence[str] = (), memory_mib: int = 256, eal: Sequence[str] = ()
) -> AsyncIterator[Testpmd]:
    """Run testpmd with one device and wait for its prompt; it does not forward until ``start``.

    ``vdev`` is DPDK's device string, ``forward`` a mode such as ``txonly``, ``rxonly``, ``io`` or
    ``icmpecho``; ``args`` are further arguments for testpmd, ``eal`` for DPDK's own part.
    """
    peer = dpdk()
    argv = [
        # Lines as they are written, not when four kilobytes are full.
        *("stdbuf", "-oL", peer.program, *peer.eal),
        *("--no-huge", "-m", str(memory_mib), "--no-pci", "--no-telemetry"),
        *("--no-shconf", "-l", f"{MAIN_CPU},{WORK_CPU}", *eal),
        *("--log-level=pmd.net.virtio.driver:info", "--vdev", vdev, "--"),
        *("-i", f"--forward-mode={forward}", "--total-num-mbufs=4096", *args),
    ]
    async with open_child(argv, name=TESTPMD, env=peer.env) as child:
        testpmd = Testpmd(child)
        await child.until(PROMPT)
        yield testpmd


@asynccontextmanager
async def virtio_user(
    path: Path,
    *,
    forward: str,
    options: str = "",
    args: Sequence[str] = (),
    queues: int = 1,
    queue_size: int = 256,
    mac: str = "02:00:00:00:00:aa",
) -> AsyncIterator[Testpmd]:
    """A front-end at the back-end that listens on ``path``; ``options`` such as ``mrg_rxbuf=0``."""
    vdev = f"net_virtio_user0,path={path},queues={queues},queue_size={queue_size},mac={mac}"
    async with open_testpmd(f"{vdev},{options}" if options else vdev, forward=forward, args=args) as testpmd:
        yield testpmd


@asynccontextmanager
async def net_vhost(
    path: Path, *, forward: str, options: str = "postcopy-support=1", args: Sequence[str] = ()
) -> AsyncIterator[Testpmd]:
    """A back-end that listens on ``path``. Locked memory would make the pages that postcopy must bring."""
    vdev = f"net_vhost0,iface={path},queues=1"
    async with open_testpmd(
        f"{vdev},{options}" if options else vdev, forward=forward, args=["--no-mlockall", *args]
    ) as testpmd:
        yield testpmd
