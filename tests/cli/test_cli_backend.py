"""``vhostpc backend``: the conventions of back-end programs, kept by a real process."""

from __future__ import annotations

import grp
import json
import os
import signal
import socket
import subprocess
import sys
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import pytest
import trio

from tests.peers.child import Child, open_child
from vhostpc.backend import serve
from vhostpc.cli.own_device import load_file
from vhostpc.errors import VhostpcError
from vhostpc.wire.vhost_user import Feature, FrameReader, ProtocolFeature, Request, encode, unpack_u64

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 30
RNG = "tests.kit.devices:Rng"


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "vhostpc", "backend", *arguments]


def call(
    *arguments: str, stdin: int | None = None, fds: tuple[int, ...] = ()
) -> subprocess.CompletedProcess[str]:
    """Run a back-end that is expected to end by itself."""
    return subprocess.run(
        command(*arguments),
        cwd=ROOT,
        stdin=stdin,
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
        pass_fds=fds,
    )


def program(*arguments: str, fds: tuple[int, ...] = ()) -> AbstractAsyncContextManager[Child]:
    """Start a back-end; it is ended if the test leaves it running."""
    return open_child(command(*arguments), name="back-end", cwd=ROOT, pass_fds=fds)


async def ask(sock: trio.socket.SocketType, request: Request) -> int:
    """Send a request without payload and return the number that comes back."""
    await sock.send(encode(request))
    reader = FrameReader()
    while True:
        frame = reader.feed(await sock.recv(reader.want))
        if frame is not None:
            assert frame.request == request
            return unpack_u64(frame.payload)


async def connected(path: Path) -> trio.socket.SocketType:
    sock = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    await sock.connect(str(path))
    return sock


def listening(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.bind(str(path))
    sock.listen()
    return sock


async def test_socket_path_until_sigterm(tmp_path: Path) -> None:
    path = tmp_path / "b.sock"
    async with program(RNG, "--socket-path", str(path)) as running:
        await running.until(f"ready on {path}")
        assert path.stat().st_mode & 0o777 == 0o600
        for _ in range(2):
            with await connected(path) as sock:
                features = await ask(sock, Request.GET_FEATURES)
                assert features & Feature.VERSION_1
        running.process.send_signal(signal.SIGTERM)
        assert await running.wait() == 0, running.said
        assert not path.exists()
        assert "Traceback" not in running.said


async def test_sigint_is_a_clean_end_with_a_front_end_connected(tmp_path: Path) -> None:
    path = tmp_path / "b.sock"
    async with program(RNG, "--socket-path", str(path)) as running:
        await running.until("ready on")
        with await connected(path) as sock:
            await ask(sock, Request.GET_FEATURES)
            running.process.send_signal(signal.SIGINT)
            assert await running.wait() == 0, running.said
        assert not path.exists()


async def test_mode_and_group_of_the_socket(tmp_path: Path) -> None:
    path = tmp_path / "b.sock"
    group = grp.getgrgid(os.getgid()).gr_name
    options = ("--socket-mode", "660", "--socket-group", group)
    async with program(RNG, "--socket-path", str(path), *options) as running:
        await running.until("ready on")
        assert path.stat().st_mode & 0o777 == 0o660
        assert path.stat().st_gid == os.getgid()


async def test_once_ends_with_the_first_front_end(tmp_path: Path) -> None:
    path = tmp_path / "b.sock"
    async with program(RNG, "--once", "--socket-path", str(path)) as running:
        await running.until("ready on")
        with await connected(path) as sock:
            await ask(sock, Request.GET_FEATURES)
        assert await running.wait() == 0, running.said
        assert not path.exists()


async def test_connect(tmp_path: Path) -> None:
    path = tmp_path / "f.sock"
    with trio.socket.from_stdlib_socket(listening(path)) as listener:
        async with program(RNG, "--connect", "--socket-path", str(path)) as running:
            front, _ = await listener.accept()
            with front:
                assert await ask(front, Request.GET_FEATURES)
            assert await running.wait() == 0, running.said
    assert path.exists(), "the socket of the front-end is not ours to remove"


async def test_fd_that_listens(tmp_path: Path) -> None:
    path = tmp_path / "b.sock"
    with listening(path) as listener:
        async with program(RNG, "--fd", str(listener.fileno()), fds=(listener.fileno(),)) as running:
            for _ in range(2):
                with await connected(path) as sock:
                    assert await ask(sock, Request.GET_FEATURES)
            running.process.send_signal(signal.SIGTERM)
            assert await running.wait() == 0, running.said
    assert path.exists(), "the socket of the manager is not ours to remove"


async def test_fd_that_is_connected() -> None:
    ours, theirs = socket.socketpair()
    with trio.socket.from_stdlib_socket(ours) as front:
        async with program(RNG, "--fd", str(theirs.fileno()), fds=(theirs.fileno(),)) as running:
            theirs.close()
            assert await ask(front, Request.GET_FEATURES)
            front.close()
            assert await running.wait() == 0, running.said


async def test_hidden_bits_are_not_offered(tmp_path: Path) -> None:
    with listening(tmp_path / "b.sock") as listener:
        hide = ("--hide-feature", "event_idx", "--hide-feature", "28", "--hide-protocol-feature", "PAGEFAULT")
        number = listener.fileno()
        async with program(RNG, *hide, "--fd", str(number), fds=(number,)):
            with await connected(tmp_path / "b.sock") as sock:
                features = await ask(sock, Request.GET_FEATURES)
                assert not features & (Feature.EVENT_IDX | Feature.INDIRECT_DESC)
                assert features & Feature.VERSION_1
                bits = await ask(sock, Request.GET_PROTOCOL_FEATURES)
                assert not bits & ProtocolFeature.PAGEFAULT
                assert bits & ProtocolFeature.MQ


async def test_a_stale_socket_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "b.sock"
    listening(path).close()
    assert path.exists()
    async with program(RNG, "--socket-path", str(path)) as running:
        await running.until("ready on")
        with await connected(path) as sock:
            assert await ask(sock, Request.GET_FEATURES)


def test_what_is_no_socket_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "precious"
    path.write_text("data")
    done = call(RNG, "--socket-path", str(path))
    assert done.returncode == 1
    assert done.stderr.endswith("is not a socket; it was left alone\n")
    assert path.read_text() == "data"


def test_a_socket_in_use_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "b.sock"
    with listening(path):
        done = call(RNG, "--socket-path", str(path))
        assert done.returncode == 1
        assert "another process is listening" in done.stderr
        assert path.exists()


async def test_a_second_one_does_not_end_the_first(tmp_path: Path) -> None:
    """Which serves one front-end, and takes no look for one."""
    path = tmp_path / "b.sock"
    async with program(RNG, "--once", "--socket-path", str(path)) as first:
        await first.until("ready on")
        async with program(RNG, "--socket-path", str(path)) as second:
            assert await second.wait() == 1
            assert "another process is listening" in second.said
        with await connected(path) as sock:
            assert await ask(sock, Request.GET_FEATURES)
        assert await first.wait() == 0, first.said
        assert first.said.count("connected\n") == 2, first.said  # and disconnected


def test_nobody_to_connect_to(tmp_path: Path) -> None:
    done = call(RNG, "--connect", "--socket-path", str(tmp_path / "absent"))
    assert done.returncode == 1
    assert "cannot connect" in done.stderr
    assert "Traceback" not in done.stderr


def test_print_capabilities_ignores_the_rest(tmp_path: Path) -> None:
    done = call(RNG, "--print-capabilities", "--socket-path", str(tmp_path / "b.sock"))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"type": "rng", "features": ["fast"]}
    assert not (tmp_path / "b.sock").exists()


def test_a_file_as_module(tmp_path: Path) -> None:
    source = tmp_path / "mine.py"
    source.write_text("from tests.kit.devices import Rng\nclass Mine(Rng):\n    device_id = 2\n")
    done = call(f"{source}:Mine", "--print-capabilities")
    assert json.loads(done.stdout)["type"] == "block", done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        ([RNG], 2, "give one of --socket-path and --fd"),
        ([RNG, "--socket-path", "x", "--fd", "3"], 2, "give one of"),
        ([RNG, "--connect", "--fd", "3"], 2, "--connect needs --socket-path"),
        ([RNG, "--fd", "0"], 2, "--fd"),
        ([RNG, "--socket-path", "x", "--socket-mode", "999"], 2, "not a file mode"),
        ([RNG, "--socket-path", "x", "--socket-group", "no such group"], 2, "no group"),
        ([RNG, "--socket-path", "x", "--hide-feature", "nonsense"], 2, "no feature 'nonsense'"),
        ([RNG, "--socket-path", "x", "-o", "nonsense"], 2, "not KEY=VALUE"),
        ([RNG, "--socket-path", "x", "-o", "a=1"], 2, "unexpected keyword argument 'a'"),
        (["tests.kit.devices:Named", "--socket-path", "x"], 2, "missing a required argument: 'name'"),
        (["nonsense", "--socket-path", "x"], 2, "is not MODULE:CLASS"),
        (["nonsense:Rng", "--socket-path", "x"], 2, "no module named 'nonsense'"),
        (["tests.kit.devices:Absent", "--socket-path", "x"], 2, "has no class Absent"),
        (["absent.py:Rng", "--socket-path", "x"], 2, "absent.py: No such file or directory"),
        (["tests.kit.devices:not_a_device", "--socket-path", "x"], 2, "is not a vhostpc.backend.Device"),
        (["tests.kit.devices:breaks", "--socket-path", "x"], 1, "store.img: No space left on device"),
        (["tests.kit.devices:OutsideTheSchema", "--print-capabilities"], 1, "has no type in the schema"),
        ([RNG, "--socket-path", "/nonexistent/x"], 1, "cannot listen on /nonexistent/x"),
        ([RNG, "--socket-path", "x" * 120], 1, "cannot listen on"),
    ],
)
def test_mistakes_are_one_sentence(arguments: list[str], code: int, text: str) -> None:
    done = call(*arguments)
    assert done.returncode == code, done.stderr
    assert text in done.stderr
    assert "Traceback" not in done.stderr
    assert not done.stdout


def test_fd_that_is_no_unix_stream_socket(tmp_path: Path) -> None:
    with (tmp_path / "file").open("w") as file:
        done = call(RNG, "--fd", str(file.fileno()), fds=(file.fileno(),))
        assert done.returncode == 1
        assert "is not a socket" in done.stderr
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        done = call(RNG, "--fd", str(sock.fileno()), fds=(sock.fileno(),))
        assert done.returncode == 1
        assert "is not a unix stream socket" in done.stderr
    done = call(RNG, "--fd", "77")
    assert done.returncode == 1
    assert "--fd 77: Bad file descriptor" in done.stderr


BROKEN = {
    "None": ("class Lazy(Device): pass", "Lazy has no handle_queue"),
    "plain": (
        "class Plain(Device):\n    def handle_queue(self, queue): pass",
        "Plain.handle_queue is not an async function",
    ),
    "yields": (
        "class Yields(Device):\n    async def handle_queue(self, queue): yield",
        "Yields.handle_queue is not an async function",
    ),
    "session": (
        "class Session(Device):\n    async def handle_queue(self, queue): pass\n"
        "    def handle_session(self, front_end): pass",
        "Session.handle_session is not an async function",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
async def test_a_device_that_cannot_serve_is_refused_at_the_start(kind: str, tmp_path: Path) -> None:
    """With the class's name; by ``serve`` as well."""
    source, sentence = BROKEN[kind]
    (tmp_path / "device.py").write_text(f"from vhostpc.backend import Device\n\n\n{source}\n")
    name = sentence.split()[0].split(".")[0]
    path = tmp_path / "s"
    done = call(f"{tmp_path}/device.py:{name}", "--socket-path", str(path))
    assert done.returncode == 2
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr
    assert not path.exists()
    with pytest.raises(VhostpcError, match=sentence):
        await serve(getattr(load_file(tmp_path / "device.py"), name)(), path)
