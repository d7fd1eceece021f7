"""Sockets at paths: existing files there, what becomes of the file; which signals end a program in good order."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import stat
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import pytest
import trio

from tests.kit.devices import Rng
from tests.kit.fake_endpoint import FakeEndpoint
from tests.kit.until import until
from tests.peers.child import open_child
from vhostpc import backend, frontend
from vhostpc.errors import PeerClosed, VhostpcError
from vhostpc.migration import channel
from vhostpc.migration.uri import Unix
from vhostpc.qmp import Monitor, TextMonitor
from vhostpc.qmp.qmp_client import open_monitor

ROOT = Path(__file__).resolve().parents[2]
Served = Callable[[Path], AbstractAsyncContextManager[None]]


@pytest.fixture(autouse=True)
def no_descriptor_left() -> Iterator[None]:
    before = set(os.listdir("/proc/self/fd"))
    yield
    assert set(os.listdir("/proc/self/fd")) == before


@contextlib.asynccontextmanager
async def monitor(path: Path) -> AsyncIterator[None]:
    endpoint = FakeEndpoint()
    async with Monitor(endpoint, endpoint.events).listening(path):
        yield


@contextlib.asynccontextmanager
async def text_monitor(path: Path) -> AsyncIterator[None]:
    endpoint = FakeEndpoint()
    async with TextMonitor(endpoint, endpoint.events).listening(path):
        yield


@contextlib.asynccontextmanager
async def back_end(path: Path) -> AsyncIterator[None]:
    async with trio.open_nursery() as nursery:
        await nursery.start(backend.serve, Rng(), path)
        yield
        nursery.cancel_scope.cancel()


@contextlib.asynccontextmanager
async def migration(path: Path) -> AsyncIterator[None]:
    async with channel.listen(Unix(str(path))):
        yield


@contextlib.asynccontextmanager
async def front_end(path: Path) -> AsyncIterator[None]:
    async def wait() -> None:
        async with frontend.listen(path, timeout=60):
            raise AssertionError("nobody was to come")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        await until(path.exists)
        yield
        nursery.cancel_scope.cancel()


ALL = [monitor, text_monitor, back_end, migration, front_end]
CAREFUL = [monitor, text_monitor, back_end, front_end]  # a migration replaces any socket, as QEMU's does
LISTENERS = [monitor, text_monitor, back_end]


def name_of(served: Served) -> str:
    return served.__name__


def bound(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(str(path))
    return sock


@pytest.mark.parametrize("served", ALL, ids=name_of)
async def test_only_ones_own_file_is_removed(served: Served, tmp_path: Path) -> None:
    path = tmp_path / "s"
    async with served(path):
        assert stat.S_ISSOCK(path.stat().st_mode)
    assert not os.listdir(tmp_path)
    async with served(path):
        path.unlink()
        another = bound(path)
    with another:
        assert path.exists()


@pytest.mark.parametrize("served", CAREFUL, ids=name_of)
async def test_a_stale_file_is_replaced(served: Served, tmp_path: Path) -> None:
    path = tmp_path / "s"
    bound(path).close()
    async with served(path):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
            await until(lambda: probe.connect_ex(str(path)) == errno.EPROTOTYPE)
        assert os.listdir(tmp_path) == ["s"]
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("queue", ["empty", "full", "not listening"])
@pytest.mark.parametrize("served", LISTENERS, ids=name_of)
async def test_who_listens_is_left_alone_and_not_connected_to(
    served: Served, queue: str, tmp_path: Path
) -> None:
    """Also where its queue is full, which a connection would wait for."""
    path = tmp_path / "s"
    with bound(path) as theirs, contextlib.ExitStack() as stack:
        theirs.setblocking(False)
        if queue != "not listening":
            theirs.listen(0)
        if queue == "full":
            waiting = stack.enter_context(socket.socket(socket.AF_UNIX))
            waiting.connect(str(path))
            more = stack.enter_context(socket.socket(socket.AF_UNIX))
            more.setblocking(False)
            with pytest.raises(BlockingIOError):
                more.connect(str(path))
        held_up = signal.signal(signal.SIGALRM, signal.default_int_handler)
        signal.alarm(20)
        try:
            with pytest.raises(VhostpcError, match="another process is listening there"), alone():
                async with served(path):
                    pass
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, held_up)
        assert os.listdir(tmp_path) == ["s"]
        if queue == "empty":
            with pytest.raises(BlockingIOError):
                theirs.accept()


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """An error out of the groups that nurseries put it into."""
    try:
        yield
    except BaseExceptionGroup as group:
        found: BaseException = group
        while isinstance(found, BaseExceptionGroup):
            found = found.exceptions[0]
        raise found from None


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o077])
@pytest.mark.parametrize("mode", [0o600, 0o660, 0o666])
async def test_mode_under_any_umask(mask: int, mode: int, tmp_path: Path) -> None:
    """The umask of the process is as it was all the time: it is that of other threads, too."""
    before = os.umask(mask)
    try:
        sock = backend.bind(tmp_path / "s", mode=mode)
        with sock:
            assert stat.S_IMODE((tmp_path / "s").stat().st_mode) == mode
        assert os.umask(mask) == mask
    finally:
        os.umask(before)


@pytest.mark.parametrize("mode", [0o600, 0o660])
async def test_what_is_put_in_its_place_keeps_its_mode_and_group(
    mode: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A user who may write to the folder replaces the socket by a link as soon as it is there."""
    path, precious = tmp_path / "s", tmp_path / "precious"
    precious.write_text("")
    precious.chmod(0o640)
    made = socket.socket.bind

    def bind_and_swap(sock: socket.socket, where: str) -> None:
        made(sock, where)
        os.unlink(where)
        os.symlink(precious, where)

    monkeypatch.setattr(socket.socket, "bind", bind_and_swap)
    with pytest.raises(VhostpcError, match="cannot listen on"):
        backend.bind(path, mode=mode, group=os.getgid())
    assert stat.S_IMODE(precious.stat().st_mode) == 0o640
    assert path.is_symlink()


async def test_two_that_start_at_a_stale_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both find it stale; one is quicker. The other one does not remove that one's socket."""
    path = tmp_path / "s"
    bound(path).close()
    quicker: list[socket.socket] = []
    looked = os.lstat

    def lstat_and_bind(where: str | os.PathLike[str]) -> os.stat_result:
        found = looked(where)
        if not quicker and Path(where) == path:
            path.unlink()
            quicker.append(bound(path))
        return found

    with monkeypatch.context() as patch:
        patch.setattr(os, "lstat", lstat_and_bind)
        with pytest.raises(VhostpcError, match="another process is listening there"):
            backend.bind(path)
    with quicker[0]:
        quicker[0].listen()
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
        assert os.listdir(tmp_path) == ["s"]


# --- to connect where the queue is full


@contextlib.asynccontextmanager
async def monitor_client(path: Path) -> AsyncIterator[None]:
    async with open_monitor(str(path), "it"):
        yield


@contextlib.asynccontextmanager
async def front_end_that_connects(path: Path) -> AsyncIterator[None]:
    async with frontend.connect(path) as front:
        await front.barrier()
        yield


@contextlib.asynccontextmanager
async def back_end_that_connects(path: Path) -> AsyncIterator[None]:
    await backend.serve(Rng(), path, connect=True)
    yield


@pytest.mark.parametrize(
    "connects", [monitor_client, front_end_that_connects, back_end_that_connects], ids=name_of
)
async def test_who_connects_waits_while_the_queue_is_full(connects: Served, tmp_path: Path) -> None:
    path = tmp_path / "s"
    ended: list[str] = []

    async def come() -> None:
        with contextlib.suppress(PeerClosed), alone():
            async with connects(path):
                pass
        ended.append("ended")

    with bound(path) as listener, socket.socket(socket.AF_UNIX) as first:
        listener.listen(0)
        listener.settimeout(20)
        first.connect(str(path))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(come)
            with trio.move_on_after(0.2):  # long enough to see that it went on without a connection
                await until(lambda: ended)
            assert not ended
            listener.accept()[0].close()
            listener.setblocking(False)
            there: list[socket.socket] = []

            def accepted() -> bool:
                with contextlib.suppress(BlockingIOError):
                    there.append(listener.accept()[0])
                return bool(there)

            await until(accepted)
            there[0].close()
            await until(lambda: ended)


# --- programs and signals


def program(kind: str, path: Path) -> tuple[list[str], str]:
    """How to start one, and what it says when its socket is there."""
    if kind == "bridge":
        more = ["--socket-path", str(path), "-l", "127.0.0.1:0", "-r", "127.0.0.1:9"]
        return [sys.executable, str(ROOT / "examples/bridge"), *more], "ready on"
    arguments = {
        "back-end": ["backend", "tests.kit.devices:Rng", "--socket-path", str(path)],
        "qmp": ["endpoint", "--qmp", f"unix:{path}", "--incoming", "defer"],
        "monitor": ["endpoint", "--monitor", f"unix:{path}", "--incoming", "defer"],
        "inspect": ["inspect", f"unix:{path}"],
    }[kind]
    return [sys.executable, "-m", "vhostpc", *arguments], "waiting for" if kind == "inspect" else "ready on"


@pytest.mark.parametrize(
    ("kind", "number", "code"),
    [
        *((kind, signal.SIGHUP, 0) for kind in ("back-end", "bridge", "qmp", "monitor")),
        ("inspect", signal.SIGHUP, 128 + 1),
        ("inspect", signal.SIGTERM, 128 + 15),
    ],
)
async def test_a_signal_leaves_no_socket(kind: str, number: int, code: int, tmp_path: Path) -> None:
    path = tmp_path / "s"
    argv, said = program(kind, path)
    async with open_child(argv, name=kind, cwd=ROOT) as child:
        await child.until(said)
        child.process.send_signal(number)
        assert await child.wait() == code, child.said
        assert not path.exists()
        assert "Traceback" not in child.said


async def test_a_hang_up_that_is_ignored_stays_so(tmp_path: Path) -> None:
    """As nohup wants it."""
    argv, said = program("qmp", tmp_path / "s")
    async with open_child(["nohup", *argv], name="endpoint", cwd=ROOT) as child:
        await child.until(said)
        child.process.send_signal(signal.SIGHUP)
        async with open_monitor(str(tmp_path / "s"), "it") as client:
            await client.command("query-status")
            await client.command("quit")
        assert await child.wait() == 0, child.said


def living(group: int) -> list[str]:
    """The processes of a group that have not ended."""
    found = []
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            state, _, its = file.read_text().rpartition(")")[2].split()[:3]
            if int(its) == group and state != "Z":
                found.append(file.parent.name)
    return found


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM, None], ids=str)
async def test_a_migration_that_is_broken_off_says_by_what(number: int | None, tmp_path: Path) -> None:
    """And the command that took the stream ends, with what it has started; listeners to events are told."""
    path, taken = tmp_path / "s", tmp_path / "taken"
    argv = [sys.executable, "-m", "vhostpc", "endpoint", "--qmp", f"unix:{path}", "--ram", "a=64M"]
    async with open_child(argv, name="endpoint", cwd=ROOT) as child:
        await child.until("ready on")
        async with open_monitor(str(path), "it") as client:
            await client.command("migrate-set-parameters", max_bandwidth=1 << 20)
            await client.command("migrate", uri=f"exec:echo $$ >{taken}; sleep 1000 & cat >/dev/null")
            await until(lambda: taken.exists() and taken.read_text().strip())
            group = int(taken.read_text())
            await child.until("migration: active")
            if number is None:
                await client.command("quit")
            else:
                child.process.send_signal(number)
            assert await child.wait() == 0, child.said
            await until(lambda: client.events and client.events[-1][1]["event"] == "SHUTDOWN")
            reason = "host-qmp-quit" if number is None else "host-signal"
            assert client.events[-1][1]["data"] == {"guest": False, "reason": reason}
        await until(lambda: not living(group))
        name = "quit" if number is None else signal.Signals(number).name
        assert f"migration: interrupted by {name}, it was active" in child.said
        assert not path.exists()
