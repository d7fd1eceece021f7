"""Hostile peers of ``vhostpc endpoint``: of one that waits for a machine, and of one that sends its own.

Whatever comes, the process lives and answers at its monitor, tells one sentence, and keeps nothing.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import socket
import struct
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
import trio

from tests.kit import hostile
from tests.kit.own_machine import End, check, end
from tests.kit.streams import Encoded
from tests.kit.until import until
from tests.qemu.proc import unwrapped
from tests.qemu.qmp import Qmp
from vhostpc.cli import endpoint_command as cli
from vhostpc.guest.own_machine import Block, Spec, open_machine
from vhostpc.migration.options import Options
from vhostpc.wire.migration.elements import (
    BlockInfo,
    Configuration,
    Footer,
    Header,
    OpenReturnPath,
    Ping,
    PostcopyAdvise,
    RamBlocks,
    RamDiscard,
    SectionPart,
    SectionStart,
)
from vhostpc.wire.migration.ramrec import RamEncoder
from vhostpc.wire.migration.return_path import PageRequest, Pong, ReceivedBitmap, ResumeAck, Shut

MIB = 1 << 20
PAGE = 4096
LIMIT = 60
Family = Literal["unix", "tcp"]

# --- those who send to a destination


def head(machine: str = "vhostpc-1", *, postcopy: bool = False, length: int = 4 * MIB) -> bytes:
    """An honest beginning, up to the list of blocks."""
    parts: list[Encoded] = [Header(), Configuration(machine), OpenReturnPath(), Ping(1)]
    parts += [PostcopyAdvise(PAGE, PAGE)] if postcopy else []
    parts += [SectionStart(1), RamBlocks((BlockInfo("mem", length),)), Footer(1)]
    return b"".join(part.encode() for part in parts)


def pages(count: int) -> bytes:
    """A part of RAM."""
    encoder, page = RamEncoder(), random.Random(3).randbytes(PAGE)
    records = b"".join(encoder.page("mem", n * PAGE, page) for n in range(count))
    return SectionPart(1).encode() + records + encoder.end() + Footer(1).encode()


def package(length: int) -> bytes:
    return b"\x08" + struct.pack(">HHI", 7, 4, length)


STREAMS = {
    "nothing": b"",
    "garbage": random.Random(1).randbytes(1 * MIB),
    "zeros": bytes(MIB),
    "http": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "half-a-header": Header().encode()[:5],
    "half-a-list": head()[:-20],
    "half-a-page": head() + pages(40)[:-2000],
    "a-long-name": Header().encode() + b"\x07" + struct.pack(">I", 0xFFFFFFFF) + bytes(MIB),
    "another-name": head("pc-\x1b[2J\n" * 20),
    "more-memory-than-there-is": head(length=1 << 60),
    "a-package-of-4-gib": head(postcopy=True) + package(0xFFFFFFFF) + bytes(MIB),
    "a-package-that-is-none": head(postcopy=True) + package(64) + b"\xee" * 64,
    "a-discard-beyond": head(postcopy=True) + RamDiscard("mem", ((1 << 40, PAGE),)).encode(),
    "a-page-beyond": head()
    + pages(2)
    + SectionPart(1).encode()
    + struct.pack(">Q", (1 << 40) | 8)
    + b"\x03mem",
    "a-flood-of-pings": head() + Ping(5).encode() * 200_000,
}


async def pour(address: tuple[socket.AddressFamily, Any], data: bytes) -> None:
    """Send all of it, read nothing, hang up. Who is shut out at once has had his turn."""
    family, where = address
    with trio.socket.socket(family) as sock, contextlib.suppress(OSError, trio.BrokenResourceError):
        await sock.connect(where)
        await trio.SocketStream(sock).send_all(data)


async def listens(qmp: Qmp, folder: Path, family: Family) -> tuple[socket.AddressFamily, Any]:
    """Let it listen for a machine, not to end if none comes; where."""
    uri = f"unix:{folder / 'in'}" if family == "unix" else "tcp:127.0.0.1:0"
    await qmp.command("migrate-incoming", uri=uri, exit_on_error=False)
    if family == "unix":
        return socket.AF_UNIX, str(folder / "in")
    (where,) = (await qmp.command("query-migrate"))["socket-address"]
    return socket.AF_INET, (where["host"], int(where["port"]))


async def attacked(qmp: Qmp, address: Any, data: bytes) -> str:
    """What it says of it."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(pour, address, data)
        with trio.fail_after(LIMIT):
            while (info := await qmp.command("query-migrate")).get("status") != "failed":
                assert info.get("status", "setup") in ("setup", "active"), info
                await trio.sleep(0.005)
        nursery.cancel_scope.cancel()  # a flood that nobody takes any more
    assert (await qmp.command("query-status"))["status"] == "inmigrate"
    text = str(info["error-desc"])
    assert text
    assert len(text) < 500
    assert text.isprintable(), text
    return text


BUSY = {"vpc-fault", "vpc-load", "vpc-source", "vpc-dirty"}


def holds(one: End, before: dict[str, Any], blocks: int = 0) -> bool:
    """What it held before, and at most so many RAM blocks (two descriptors, a map); nothing of a migration."""
    held = one.held()
    same = held["fds"] <= before["fds"] + 2 * blocks and held["maps"] <= before["maps"] + blocks
    return same and not held["ufds"] and not held["threads"] & BUSY


MACHINES = {"held": (), "own": ("--ram", "mem=4M", "--vcpus", "1")}


@pytest.mark.parametrize("family", ["unix", "tcp"])
@pytest.mark.parametrize("what", STREAMS)
async def test_what_comes_is_no_machine(what: str, family: Family, tmp_path: Path) -> None:
    machine = "own" if family == "unix" else "held"
    async with end("one", tmp_path, *MACHINES[machine], "--incoming", "defer") as one:
        await one.set("postcopy-ram")
        before = one.held()
        address = await listens(one.qmp, tmp_path, family)
        text = await attacked(one.qmp, address, STREAMS[what])
        # Of a machine that is only held the content stays, until the program ends: nothing else can come there.
        await until(lambda: holds(one, before, 1 if machine == "held" else 0))
        log = "\n".join(one.process.err.lines)
        assert "Traceback" not in log
        assert sum("migration: failed" in line for line in one.process.err.lines) == 1, log
        assert text.splitlines()[0] in log
        await one.qmp.command("quit")
        assert await one.process.wait() == 0


@pytest.mark.parametrize("machine", MACHINES)
async def test_one_that_says_nothing_more(machine: str, tmp_path: Path) -> None:
    """It stays connected. Nobody else is let in, the monitor answers, and the program ends when it is told to."""
    async with end("one", tmp_path, *MACHINES[machine], "--incoming", "defer") as one:
        family, where = await listens(one.qmp, tmp_path, "unix")
        with trio.socket.socket(family) as sock:
            await sock.connect(where)
            await trio.SocketStream(sock).send_all((head() + pages(40))[:-2000])
            await one.until_status("active")
            with trio.socket.socket(family) as second, pytest.raises(OSError, match="refused|No such file"):
                await second.connect(where)
            assert await one.state() == "inmigrate"
            await one.qmp.command("quit")
            with trio.fail_after(LIMIT):
                assert await one.process.wait() == 0


async def test_a_crowd_at_the_door(tmp_path: Path) -> None:
    """The first connection is accepted, the others are not kept."""
    async with end("one", tmp_path, "--incoming", "defer") as one:
        before = one.held()
        address = await listens(one.qmp, tmp_path, "tcp")
        with trio.fail_after(LIMIT):
            async with trio.open_nursery() as nursery:
                for _ in range(100):
                    nursery.start_soon(pour, address, STREAMS["http"])
        await one.until_status("failed")
        await until(lambda: holds(one, before))


@dataclass
class Held:
    """What this process holds."""

    fds: int
    maps: int
    threads: int

    @classmethod
    def now(cls) -> Held:
        return cls(len(hostile.open_fds()), hostile.guest_mappings(), len(os.listdir("/proc/self/task")))

    def within(self, other: Held) -> bool:
        return self.fds <= other.fds and self.maps <= other.maps and self.threads <= other.threads


@contextlib.asynccontextmanager
async def in_process(machine: str, folder: Path) -> AsyncIterator[Qmp]:
    """All of the command but its words: in this process, so that another can follow."""
    spec = Spec([Block("mem", 4 * MIB)])
    opened = open_machine(spec, empty=True) if machine == "own" else cli.held([])
    path = folder / "qmp"
    path.unlink(missing_ok=True)
    with unwrapped():
        async with trio.open_nursery() as nursery:
            nursery.start_soon(cli.run, opened, cli.Given(Options("10.0"), str(path), incoming=cli.DEFER))
            await until(path.is_socket)
            async with await trio.open_unix_socket(path) as stream, trio.open_nursery() as inner:
                qmp = Qmp(stream, "one")
                inner.start_soon(qmp.run)
                await qmp.handshake()
                yield qmp
                await qmp.command("quit")
                inner.cancel_scope.cancel()


async def test_fifty_of_them_leave_nothing(tmp_path: Path) -> None:
    on = [{"capability": name, "state": True} for name in ("events", "postcopy-ram")]
    held = Held.now()
    for n in range(50):
        what = list(STREAMS)[n % len(STREAMS)]
        async with in_process("own" if n % 4 < 2 else "held", tmp_path) as qmp:
            await qmp.command("migrate-set-capabilities", capabilities=on)
            address = await listens(qmp, tmp_path, "unix" if n % 2 else "tcp")
            await attacked(qmp, address, STREAMS[what])
        if n == 9:
            held = Held.now()
    await until(lambda: Held.now().within(held), what=f"{Held.now()} within {held}")


# --- those whom a source sends to


def request(block: str, start: int, length: int) -> bytes:
    return PageRequest(block, start, length).encode()


def message(kind: int, body: bytes, length: int | None = None) -> bytes:
    return struct.pack(">HH", kind, len(body) if length is None else length) + body


FLOOD = 100_000
NONSENSE = {
    "garbage": random.Random(2).randbytes(MIB),
    "zeros": bytes(MIB),
    "a-type-that-is-none": message(99, b""),
    "a-length-that-is-wrong": message(2, b"", 65535) + bytes(65535),
    "another-block": request("nope", 0, PAGE),
    "outside-ram": request("mem", 1 << 40, PAGE),
    "over-the-end": request("mem", 16 * MIB - PAGE, 2 * PAGE),
    "wraps-round": request("mem", (1 << 64) - PAGE, 2 * PAGE),
    "unaligned": request("mem", 1, PAGE),
    "the-block-before-the-first": message(4, struct.pack(">QI", 0, PAGE)),
    "a-bitmap": ReceivedBitmap("mem", bytes(512)).encode(),
    "an-ack": ResumeAck(1).encode(),
}


class Peer:
    """Whom a source has connected to. ``taken``: bytes that were read."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream
        self.taken = 0

    async def drain(self) -> None:
        with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            async for data in self.stream:
                self.taken += len(data)

    async def say(self, data: bytes) -> None:
        """What is not taken to the end, because it was broken off for that, has done its part."""
        with contextlib.suppress(trio.BrokenResourceError):
            await self.stream.send_all(data)


@contextlib.asynccontextmanager
async def sends(
    one: End, folder: Path, *capabilities: str, reads: bool = True, **parameters: int
) -> AsyncIterator[Peer]:
    """The machine goes, slowly, to somebody who answers nothing by himself."""
    await one.set(*capabilities, **{"max_bandwidth": MIB, **parameters})
    path = folder / "peer"
    path.unlink(missing_ok=True)
    with trio.socket.socket(socket.AF_UNIX) as listener:
        await listener.bind(str(path))
        listener.listen(1)
        await one.qmp.command("migrate", uri=f"unix:{path}")
        with trio.fail_after(LIMIT):
            sock, _ = await listener.accept()
    async with trio.SocketStream(sock) as stream, trio.open_nursery() as nursery:
        peer = Peer(stream)
        if reads:
            nursery.start_soon(peer.drain)
        yield peer
        nursery.cancel_scope.cancel()


@contextlib.asynccontextmanager
async def source(folder: Path) -> AsyncIterator[End]:
    async with end("one", folder, "--ram", "mem=16M", "--vcpus", "1") as one:
        await one.until_works()
        yield one
        assert one.process.alive
        assert "Traceback" not in "\n".join(one.process.err.lines)
        await one.qmp.command("quit")
        assert await one.process.wait() == 0


def one_sentence(info: dict[str, Any]) -> str:
    text = str(info["error-desc"])
    assert text
    assert text.isprintable()
    assert len(text) < 500
    return text


async def test_nonsense_while_it_runs(tmp_path: Path) -> None:
    """Each ends the migration, none the machine; after fifty of them nothing is left of any."""
    async with source(tmp_path) as one:
        before: dict[str, Any] = {}
        for n in range(52):
            what = list(NONSENSE)[n % len(NONSENSE)]
            async with sends(one, tmp_path, "postcopy-ram" if n % 2 else "return-path") as peer:
                await one.until_status("active")
                await peer.say(NONSENSE[what])
                info = await one.until_status("failed", not_these=("completed", "cancelled"))
            assert "return path" in one_sentence(info), (what, info)
            assert await one.state() == "running"
            if n < len(NONSENSE):
                before = one.held()
        check(await one.until_works())
        await until(lambda: holds(one, before))


@pytest.mark.parametrize("what", NONSENSE)
async def test_nonsense_in_postcopy(what: str, tmp_path: Path) -> None:
    """The machine may be running there: it stands here, and why is told."""
    async with source(tmp_path) as one:
        async with sends(one, tmp_path, "postcopy-ram", max_postcopy_bandwidth=MIB) as peer:
            await one.qmp.command("migrate-start-postcopy")
            await one.until_status("postcopy-active")
            await peer.say(NONSENSE[what])
            info = await one.until_status("postcopy-paused", not_these=("completed", "failed"))
        assert "return path" in one_sentence(info)
        assert await one.state() == "finish-migrate"
        first = await one.report()
        assert not first["running"]
        await until_error(one, "cont")
        assert (await one.report()) == first
        assert one.held()["ufds"] == 0
        told = [e["data"]["status"] for e in one.qmp.events if e["event"] == "MIGRATION"]
        assert told[-1] == "postcopy-paused"


async def until_error(one: End, command: str) -> None:
    assert "error" in await one.qmp.reply(command)


async def test_word_that_it_is_done_before_it_is(tmp_path: Path) -> None:
    async with source(tmp_path) as one:
        for word in (Shut(0), Shut(1), Shut(0xFFFFFFFF)):
            async with sends(one, tmp_path, "return-path") as peer:
                await one.until_status("active")
                await peer.say((Pong(9).encode() + request("mem", 0, 0)) * 1000 + word.encode())
                one_sentence(await one.until_status("failed", not_these=("completed",)))
            assert await one.state() == "running"
        check(await one.until_works())


@pytest.mark.parametrize("phase", ["precopy", "postcopy"])
async def test_a_flood_of_requests(phase: str, tmp_path: Path) -> None:
    """Good ones, again and again: the monitor answers, memory does not grow with them, and the machine gets there."""
    requests = b"".join(request("mem", n * 7 % 4096 * PAGE, PAGE) for n in range(4096))

    async def flood() -> None:
        for _ in range(FLOOD // 4096 + 1):
            await peer.say(requests)

    async with source(tmp_path) as one:
        async with (
            sends(one, tmp_path, "postcopy-ram", max_postcopy_bandwidth=MIB) as peer,
            trio.open_nursery() as nursery,
        ):
            if phase == "postcopy":
                await one.qmp.command("migrate-start-postcopy")
                await one.until_status("postcopy-active")
            else:
                await one.until_status("active")
            before = resident(one)
            nursery.start_soon(flood)  # what is asked for goes at once, whatever the bandwidth
            await one.set(max_bandwidth=0, max_postcopy_bandwidth=0)
            with trio.fail_after(LIMIT):
                while (ram := (await one.migration())["ram"])["remaining"] or ram[
                    "postcopy-requests"
                ] < FLOOD:
                    await trio.sleep(0.02)
            assert resident(one) < before + 4 * MIB
            await peer.say(Pong(3).encode() + Shut(0).encode())
            await one.until_status("completed", not_these=("failed", "postcopy-paused"))
        assert await one.state() == "postmigrate"


def resident(one: End) -> int:
    """Bytes of the process's own, without what it shares."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{one.process.pid}/status").read_text())
    assert found
    return int(found[1]) << 10


async def test_one_that_stops_reading(tmp_path: Path) -> None:
    """The machine runs on, for whom is waited is told, and it can be cancelled."""
    async with source(tmp_path) as one:
        async with sends(one, tmp_path, "postcopy-ram", reads=False, max_bandwidth=0):
            await one.process.err.find("waiting for the destination: .* host pages are left")
            assert (await one.migration())["status"] == "active"
            check(await one.until_works())
            await one.qmp.command("migrate_cancel")
            await one.until_status("cancelled")
        assert await one.state() == "running"
        check(await one.until_works())


async def test_one_that_closes_its_ear_in_postcopy(tmp_path: Path) -> None:
    """It takes nothing more, and stays connected: a pause, and why is told."""
    async with source(tmp_path) as one:
        async with sends(one, tmp_path, "postcopy-ram", max_postcopy_bandwidth=MIB) as peer:
            await one.qmp.command("migrate-start-postcopy")
            await one.until_status("postcopy-active")
            at = len(one.process.err)
            peer.stream.socket.shutdown(socket.SHUT_RD)
            info = await one.until_status("postcopy-paused")
        assert one_sentence(info)
        assert await one.state() == "finish-migrate"
        await one.process.err.find("postcopy-paused", at)
