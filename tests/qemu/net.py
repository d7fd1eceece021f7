"""A network of its own for a test: a Linux bridge, taps for the VMs, and the far end of the guest's flow.

The namespace lives as long as a child that holds it, so nothing is left behind whatever happens.
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass
from pathlib import Path

import trio

from tests.qemu import guest
from tests.qemu.proc import WAIT, Child, child, run

FAR_IP = "10.77.0.1"
FAR_MAC = "52:54:00:aa:00:01"
GUEST_IP = "10.77.0.2"
GUEST_MAC = "52:54:00:12:34:56"

Ranges = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Flow:
    """One side's account of a numbered series; ``gaps`` are ranges of missing numbers, ends included."""

    tx: int
    rx: int
    bad: int
    dup: int
    lost: int
    gaps: Ranges
    late: int = 0
    high: int = 0
    acked: int = 0

    def gaps_after(self, start: int) -> Ranges:
        return tuple((max(a, start), b) for a, b in self.gaps if b >= start)


@dataclass(frozen=True)
class Mark:
    """The far end's numbers at one moment: the next frame it will send, one past the highest frame that
    the guest has acknowledged, that came from the guest; pings sent, and one past the highest answered."""

    next: int
    acked: int
    high: int
    pings: int
    echoed: int
    by: str = ""


def parse_flow(line: str) -> Flow:
    """A ``net`` or ``ping`` line of tests/guest/flow.c."""
    fields = dict(re.findall(r"(\w+)=(\S*)", line))
    gaps = tuple((int(a), int(b)) for a, b in re.findall(r"(\d+)-(\d+)", fields.pop("gaps")))
    return Flow(gaps=gaps, **{k: int(v) for k, v in fields.items()})


def _parse_mark(text: str) -> Mark:
    fields = dict(re.findall(r"(\w+)=(\S+)", text))
    by = fields.pop("by", "")
    return Mark(by=by, **{k: int(v) for k, v in fields.items()})


class Far:
    """The far end: sends and receives the flow, pings the guest, hears announcements."""

    def __init__(self, process: Child) -> None:
        self.process = process
        self._marks = 0

    async def mark(self) -> tuple[str, Mark]:
        """Note where the series stand now, and arm ``moved`` for the guest's next sign of life."""
        self._marks += 1
        name = f"m{self._marks}"
        await self.process.send(f"mark {name}\n")
        found = await self.process.out.find(rf"^mark {name} (.*)")
        return name, _parse_mark(found.group(1))

    async def moved(self, name: str, limit: float = WAIT) -> Mark:
        """Where the series stood when the guest was heard for the first time after that mark."""
        found = await self.process.out.find(rf"^moved {name} (.*)", limit=limit)
        return _parse_mark(found.group(1))

    async def report(self) -> tuple[Flow, Flow]:
        """The accounts of the UDP flow and of the pings, now."""
        since = len(self.process.out)
        await self.process.send("report\n")
        await self.process.out.find("^end$", since)
        net = await self.process.out.find(r"^net \w+ (.*)", since)
        ping = await self.process.out.find(r"^ping (.*)", since)
        return parse_flow(net.group(1)), parse_flow(ping.group(1))

    async def received(self, at_least: int) -> None:
        """Wait until frames from the guest with numbers up to ``at_least`` have come."""
        await self._reached("high", at_least)

    async def acknowledged(self, at_least: int) -> None:
        """Wait until the guest says that it has received frames with numbers up to ``at_least``."""
        await self._reached("acked", at_least)

    async def _reached(self, name: str, at_least: int) -> None:
        at = len(self.process.out)
        with trio.fail_after(WAIT):
            while True:
                found = await self.process.out.find(rf"^net .* {name}=(\d+) ", at)
                if int(found.group(1)) >= at_least:
                    return
                at = self.process.out.lines.index(found.string, at) + 1

    def announcements(self, since: int = 0) -> set[str]:
        """Kinds of announcements heard ("arp", "rarp") at or after output line ``since``."""
        return {line.split()[1] for line in self.process.out.lines[since:] if line.startswith("announce ")}


class Network:
    """The namespace; ``inside`` gives the words that start a command in it."""

    def __init__(self, holder: Child) -> None:
        self.holder = holder

    def inside(self) -> tuple[str, ...]:
        return ("nsenter", f"--net=/proc/{self.holder.pid}/ns/net")

    async def ip(self, words: str) -> None:
        await run([*self.inside(), "ip", *words.split()])

    @contextlib.asynccontextmanager
    async def far(self) -> AsyncIterator[Far]:
        argv = [*self.inside(), str(guest.program()), "flow", FAR_IP, GUEST_IP, "far"]
        async with child("far", argv) as process:
            await process.out.find("^flow ")
            yield Far(process)

    @contextlib.asynccontextmanager
    async def flood(self) -> AsyncIterator[None]:
        """Heavy traffic into the guest, beside the flow; it keeps some (tests/guest/keep.c)."""
        program = Path(__file__).with_name("flood.py")
        async with child("flood", [*self.inside(), sys.executable, str(program), GUEST_IP]) as process:
            await process.out.find("^flood$")
            yield


@contextlib.asynccontextmanager
async def network(
    taps: Iterable[str] = ("tap0", "tap1"), *, multi_queue: bool = False
) -> AsyncIterator[Network]:
    """A namespace with a bridge and taps; their queues long enough that a guest in postcopy loses nothing."""
    async with child("netns", ["unshare", "--net", "sh", "-c", "echo ready; exec cat"]) as holder:
        await holder.out.find("^ready$")
        net = Network(holder)
        await net.ip("link set lo up")
        await net.ip(f"link add br0 address {FAR_MAC} type bridge mcast_snooping 0")
        await net.ip(f"addr add {FAR_IP}/24 dev br0")
        await net.ip("link set br0 up")
        for tap in taps:
            await net.ip(f"tuntap add {tap} mode tap {'multi_queue' if multi_queue else ''}")
            await net.ip(f"link set {tap} mtu 9000 txqueuelen 100000 master br0 up")
        await net.ip(f"neigh replace {GUEST_IP} lladdr {GUEST_MAC} nud permanent dev br0")
        yield net
