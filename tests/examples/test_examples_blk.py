"""The disk: every request, good and bad, over rings written by hand; and as the program that a person starts."""

from __future__ import annotations

import os
import signal
import struct
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.backend.test_backend_channel import answer, channel
from tests.examples.test_examples_bridge import until_listening
from tests.kit.raw_front_end import GUEST_BASE, NEXT, WRITE, Guest, RawFrontEnd, Ring, connected
from vhostpc.backend import disk as blk
from vhostpc.backend.disk import Disk
from vhostpc.wire import vhost_user as vu
from vhostpc.wire.vhost_user import BackendRequest, Request

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = [sys.executable, str(ROOT / "examples" / "blk")]
IN, OUT, FLUSH, GET_ID = 0, 1, 4, 8
OK, IOERR, UNSUPP = 0, 1, 2
FLUSH_FEATURE = 1 << 9
SECTORS = 128


@pytest.fixture
def guest() -> Iterator[Guest]:
    guest = Guest(4 << 20)
    yield guest
    guest.close()


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(b"".join(bytes([i]) * 512 for i in range(SECTORS)))
    return path


class Driver:
    """One request at a time on one ring."""

    def __init__(self, guest: Guest, ring: Ring) -> None:
        self.guest, self.ring, self.count = guest, ring, 0

    async def ask(
        self, kind: int, sector: int = 0, data: bytes = b"", room: int = 0, header: int = 16
    ) -> tuple[int, bytes]:
        """Status and what was read."""
        at = 0x100000
        out = struct.pack("<IIQ", kind, 0, sector)[:header] + data
        self.guest.put(at, out)
        self.guest.put(at + 0x100000, b"\xee" * (room + 1))
        # The header apart from the data, the status apart from both: as drivers do it.
        parts = [(at, min(len(out), 16), 0), (at + 16, len(data), 0)]
        parts += [(at + 0x100000, room, WRITE), (at + 0x100000 + room, 1, WRITE)]
        parts = [p for p in parts if p[1]]
        for i, (where, length, flags) in enumerate(parts):
            last = i == len(parts) - 1
            self.ring.set_desc(
                i, GUEST_BASE + where, length, flags | (0 if last else NEXT), 0 if last else i + 1
            )
        self.ring.offer(0)
        self.count += 1
        await self.ring.until_used(self.count)
        assert self.ring.used_element(self.count - 1) == (0, room + 1)
        found = self.guest.mem[at + 0x100000 : at + 0x100000 + room + 1]
        return found[-1], found[:-1]


@asynccontextmanager
async def driven(device: Any, guest: Guest, *, hide: int = 0, index: int = 0) -> AsyncIterator[Driver]:
    async with connected(device) as front:
        await front.negotiate(hide=hide)
        await guest.send_memory(front)
        ring = guest.ring(index, 16)
        await ring.send_setup(front)
        yield Driver(guest, ring)
        await front.ask(Request.GET_VRING_BASE, vu.VringState(index, 0).pack())


@pytest.mark.parametrize("memory", [False, True])
async def test_read_write_flush_id(guest: Guest, image: Path, memory: bool) -> None:
    device = Disk(memory="64K") if memory else Disk(str(image))
    async with driven(device, guest) as disk:
        for sector, count in ((0, 1), (7, 3), (SECTORS - 1, 1), (0, SECTORS)):
            before = (
                bytes(count * 512) if memory else image.read_bytes()[sector * 512 : (sector + count) * 512]
            )
            if not memory or count == 1:
                assert await disk.ask(IN, sector, room=count * 512) == (OK, before)
            data = os.urandom(count * 512)
            assert await disk.ask(OUT, sector, data) == (OK, b"")
            assert await disk.ask(IN, sector, room=count * 512) == (OK, data)
            assert await disk.ask(FLUSH) == (OK, b"")
            if not memory:
                assert image.read_bytes()[sector * 512 : (sector + count) * 512] == data
        assert await disk.ask(GET_ID, room=20) == (OK, b"vhostpc".ljust(20, b"\0"))
        assert await disk.ask(IN, 3, room=0) == (OK, b"")


async def test_without_flush_writes_go_through(
    guest: Guest, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A driver that does not know FLUSH can count on a write that was answered."""
    synced: list[int] = []
    monkeypatch.setattr(os, "fdatasync", synced.append)
    async with driven(Disk(str(image)), guest, hide=FLUSH_FEATURE) as disk:
        assert await disk.ask(OUT, 0, bytes(512)) == (OK, b"")
        assert len(synced) == 1
    async with driven(Disk(str(image)), guest) as disk:
        assert await disk.ask(OUT, 0, bytes(512)) == (OK, b"")
        assert len(synced) == 1
        await disk.ask(FLUSH)
        assert len(synced) == 2


@pytest.mark.parametrize(
    ("ask", "status"),
    [
        ({"kind": IN, "sector": SECTORS, "room": 512}, IOERR),
        ({"kind": IN, "sector": SECTORS - 1, "room": 1024}, IOERR),
        ({"kind": IN, "sector": (1 << 64) - 1, "room": 512}, IOERR),
        ({"kind": IN, "sector": 1 << 55, "room": 512}, IOERR),
        ({"kind": IN, "sector": 0, "room": 511}, IOERR),
        ({"kind": OUT, "sector": 0, "data": bytes(513)}, IOERR),
        ({"kind": OUT, "sector": SECTORS, "data": bytes(512)}, IOERR),
        ({"kind": OUT, "sector": (1 << 64) - 1, "data": bytes(512)}, IOERR),
        ({"kind": IN, "header": 15, "room": 512}, IOERR),
        ({"kind": 2}, UNSUPP),
        ({"kind": 11, "data": bytes(16)}, UNSUPP),
        ({"kind": 13, "data": bytes(16)}, UNSUPP),
        ({"kind": 0xFFFFFFFF}, UNSUPP),
    ],
    ids=str,
)
async def test_bad_requests(guest: Guest, image: Path, ask: dict[str, Any], status: int) -> None:
    before = image.read_bytes()
    async with driven(Disk(str(image)), guest) as disk:
        assert (await disk.ask(**ask))[0] == status
        assert await disk.ask(IN, 1, room=512) == (OK, b"\x01" * 512)
    assert image.read_bytes() == before


async def test_request_without_status(guest: Guest, image: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The queue stops with one line; the session and the other queue go on."""
    device = Disk(str(image))
    async with connected(device) as front:
        await front.negotiate()
        await guest.send_memory(front)
        bad, good = guest.ring(0, 16), guest.ring(1, 16)
        await bad.send_setup(front)
        await good.send_setup(front)
        bad.set_desc(0, guest.put(0x80000, struct.pack("<IIQ", OUT, 0, 0) + bytes(512)), 528)
        bad.offer(0)
        with trio.fail_after(10):
            await trio.lowlevel.wait_readable(bad.err)
        assert await Driver(guest, good).ask(IN, 1, room=512) == (OK, b"\x01" * 512)
    assert "no room for its status" in caplog.text
    assert image.read_bytes()[:1] == b"\0"


async def test_medium_fails(
    guest: Guest, image: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> int:
        raise OSError(5, "Input/output error")

    async with driven(Disk(str(image)), guest) as disk:
        monkeypatch.setattr(os, "pwrite", fail)
        assert await disk.ask(OUT, 0, bytes(512)) == (IOERR, b"")
        monkeypatch.undo()
        assert await disk.ask(OUT, 0, bytes(512)) == (OK, b"")
    assert "OUT of 512 bytes at 0: Input/output error" in caplog.text


async def test_read_that_is_not_cached(guest: Guest, image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the page cache has not goes to a thread; the answer is the same."""

    def not_here(*_: object) -> int:
        raise BlockingIOError

    async with driven(Disk(str(image)), guest) as disk:
        monkeypatch.setattr(os, "preadv", not_here)
        assert await disk.ask(IN, 5, room=1024) == (OK, b"\x05" * 512 + b"\x06" * 512)


async def test_read_only(guest: Guest, image: Path) -> None:
    image.chmod(0o444)
    device = Disk(str(image), read_only="yes")
    assert device.features & (1 << 5)
    before = image.read_bytes()
    async with driven(device, guest) as disk:
        assert (await disk.ask(OUT, 0, bytes(range(256)) * 2))[0] == IOERR
        assert await disk.ask(IN, 9, room=512) == (OK, b"\x09" * 512)
        assert await disk.ask(FLUSH) == (OK, b"")
    assert image.read_bytes() == before


async def test_config_and_queues(guest: Guest, image: Path) -> None:
    device = Disk(str(image), queues="4")
    async with connected(device) as front:
        await front.negotiate()
        assert vu.unpack_u64((await front.ask(Request.GET_QUEUE_NUM)).payload) == 4
        # QEMU asks for 57 bytes.
        reply = await front.ask(Request.GET_CONFIG, struct.pack("<III", 0, 57, 0) + bytes(57))
        config = reply.payload[12:]
        assert struct.unpack_from("<Q", config, 0) == (SECTORS,)
        assert struct.unpack_from("<I", config, 20) == (512,)
        assert struct.unpack_from("<H", config, 34) == (4,)
        await guest.send_memory(front)
        disks = []
        for i in range(4):
            ring = guest.ring(i, 16)
            await ring.send_setup(front)
            disks.append(Driver(guest, ring))
        for i, disk in enumerate(disks):
            assert await disk.ask(OUT, i, bytes([0x80 + i]) * 512) == (OK, b"")
    assert image.read_bytes()[: 4 * 512 : 512] == b"\x80\x81\x82\x83"


@pytest.mark.parametrize("size", [SECTORS + 7, SECTORS - 7], ids=["larger", "smaller"])
async def test_disk_that_changes_its_size(
    guest: Guest, image: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    """Each front-end is told, and asks; what lies behind the new end is an error, and what is before it is not."""
    monkeypatch.setattr(blk, "LOOK_INTERVAL", 0.01)
    device = Disk(str(image))
    async with connected(device) as front, connected(device) as other:
        await other.negotiate()
        their = await channel(other)
        await front.negotiate()
        peer = await channel(front)
        await guest.send_memory(front)
        ring = guest.ring(0, 16)
        await ring.send_setup(front)
        disk = Driver(guest, ring)
        assert await disk.ask(IN, SECTORS, room=512) == (IOERR, bytes(512))
        os.truncate(image, size * 512)
        for told in (peer, their):
            frame = await answer(told)
            assert frame.request == BackendRequest.CONFIG_CHANGE_MSG
            told.close()
        reply = await front.ask(Request.GET_CONFIG, struct.pack("<III", 0, 57, 0) + bytes(57))
        assert struct.unpack_from("<Q", reply.payload, 12) == (size,)
        assert (await disk.ask(IN, size - 1, room=512))[0] == OK
        assert await disk.ask(IN, size, room=512) == (IOERR, bytes(512))


async def session(front: RawFrontEnd, guest: Guest) -> None:
    await front.negotiate()
    await guest.send_memory(front)
    ring = guest.ring(0, 16)
    await ring.send_setup(front)
    disk = Driver(guest, ring)
    assert await disk.ask(OUT, 2, b"written!" * 64) == (OK, b"")
    assert await disk.ask(FLUSH) == (OK, b"")


async def test_program(guest: Guest, image: Path, tmp_path: Path) -> None:
    path = tmp_path / "blk.sock"
    process = await trio.lowlevel.open_process(
        [*PROGRAM, "--socket-path", str(path), "--blk-file", str(image)]
    )
    try:
        front = RawFrontEnd(await until_listening(path, process))
        await session(front, guest)
        front.close()
        assert image.read_bytes()[1024:1536] == b"written!" * 64
        process.send_signal(signal.SIGTERM)
        with trio.fail_after(20):
            assert await process.wait() == 0
        assert not path.exists()
    finally:
        if process.poll() is None:
            process.kill()
            await process.wait()


@pytest.mark.parametrize(
    ("options", "code", "text"),
    [
        ([], 2, "give one of --blk-file and --memory"),
        (["--blk-file", "/nowhere/disk"], 1, "cannot open /nowhere/disk: No such file"),
        (["--blk-file", "/dev/null"], 1, "/dev/null is neither a file nor a block device"),
        (["--memory", "64Q"], 1, "'64Q' is not the size of a disk"),
        (["--memory", "1M", "--queues", "65"], 2, "65 is not in the range"),
        (["--memory", "1M", "--colour"], 2, "No such option"),
    ],
)
def test_mistakes(options: list[str], code: int, text: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [*PROGRAM, "--socket-path", str(tmp_path / "s"), *options],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == code
    assert text in done.stderr
    assert "Traceback" not in done.stderr
