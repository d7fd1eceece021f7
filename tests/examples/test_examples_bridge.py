"""The bridge as a person starts it: a program with options, counters on a signal, a clean end."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from tests.backend.test_backend_bridge import TX, frame, put_frames
from tests.kit.raw_front_end import Guest, RawFrontEnd
from vhostpc.wire import vhost_user as vu
from vhostpc.wire.vhost_user import Request

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = [sys.executable, str(ROOT / "examples" / "bridge")]


@pytest.fixture
def far() -> Iterator[socket.socket]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        sock.setblocking(False)
        yield sock


def udp(far: socket.socket) -> list[str]:
    host, port = far.getsockname()
    return ["-l", "127.0.0.1:0", "-r", f"{host}:{port}"]


async def exchange(sock: socket.socket, far: socket.socket) -> None:
    """A session with three frames out of the guest."""
    guest = Guest(4 << 20)
    ring = guest.ring(TX, 64)
    front = RawFrontEnd(sock)
    try:
        await front.negotiate()
        await guest.send_memory(front)
        await ring.send_setup(front)
        frames = [frame(i, 100) for i in range(3)]
        ring.offer(*put_frames(guest, frames))
        await ring.until_used(3)
        with trio.fail_after(10):
            for data in frames:
                await trio.lowlevel.wait_readable(far)
                assert far.recv(2000) == data
        await front.ask(Request.GET_VRING_BASE, vu.VringState(TX, 0).pack())
    finally:
        front.close()
        guest.close()


async def until_listening(path: Path, process: trio.Process) -> socket.socket:
    with trio.fail_after(20):
        while True:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                sock.connect(str(path))
                return sock
            except OSError:
                sock.close()
                assert process.poll() is None
                await trio.sleep(0.02)


async def start(args: list[str], **more: object) -> trio.Process:
    return await trio.lowlevel.open_process([*PROGRAM, *args], stderr=subprocess.PIPE, **more)  # type: ignore[call-overload,no-any-return]


async def stderr_of(process: trio.Process) -> str:
    assert process.stderr is not None
    with trio.fail_after(20):
        return b"".join([data async for data in process.stderr]).decode()


def resident_kib(process: trio.Process) -> int:
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0])


async def test_sessions_counters_and_end(far: socket.socket, tmp_path: Path) -> None:
    path = tmp_path / "bridge.sock"
    process = await start(["--socket-path", str(path), *udp(far)])
    try:
        for _ in range(2):  # reconnected outside a migration
            await exchange(await until_listening(path, process), far)
        assert resident_kib(process) < 40 << 10
        assert path.stat().st_mode & 0o777 == 0o600
        process.send_signal(signal.SIGUSR1)
        process.terminate()
        text = await stderr_of(process)
        assert await process.wait() == 0
    finally:
        process.kill()
    assert text.count("out of the guest: 6 frames, 600 bytes, 0 dropped") == 2
    assert not path.exists()


@pytest.mark.parametrize("listening", [True, False])
async def test_fd(far: socket.socket, tmp_path: Path, listening: bool) -> None:
    """--fd takes a listening socket or a connected one and can tell them apart."""
    if listening:
        given = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        given.bind(str(tmp_path / "s"))
        given.listen()
        ours = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        ours.connect(str(tmp_path / "s"))
    else:
        ours, given = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with given:
        process = await start(["--fd", str(given.fileno()), "--once", *udp(far)], pass_fds=[given.fileno()])
    try:
        await exchange(ours, far)
        text = await stderr_of(process)
        assert await process.wait() == 0
    finally:
        process.kill()
    assert "out of the guest: 3 frames" in text


async def test_connect(far: socket.socket, tmp_path: Path) -> None:
    path = tmp_path / "front.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        listener.listen()
        process = await start(["-c", "-u", str(path), *udp(far)])
        try:
            with trio.fail_after(20):
                await trio.lowlevel.wait_readable(listener)
            await exchange(listener.accept()[0], far)
            await stderr_of(process)
            assert await process.wait() == 0
        finally:
            process.kill()


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["-H"], 2, "host notifiers"),
        (["-l", "nonsense"], 2, "HOST:PORT"),
        (["--hide-feature", "FLYING"], 2, "no feature 'FLYING'"),
        (["-u", "/dev/null"], 1, "is not a socket"),
        (["-u", "/nonexistent/dir/s"], 1, "cannot listen"),
        (["-c", "-u", "/nonexistent/s"], 1, "cannot connect"),
        (["--tap", "a-name-that-is-too-long"], 1, "1 to 15"),
        (["--fd", "77"], 1, "--fd 77: Bad file descriptor"),
    ],
)
async def test_mistakes_get_one_sentence(args: list[str], code: int, words: str) -> None:
    process = await start(args)
    text = await stderr_of(process)
    assert await process.wait() == code
    assert words in text
    assert "Traceback" not in text


def test_it_can_be_read_at_a_sitting() -> None:
    assert len((ROOT / "examples" / "bridge" / "__main__.py").read_text().splitlines()) < 200
    assert os.access(ROOT / "examples" / "bridge" / "__main__.py", os.R_OK)
