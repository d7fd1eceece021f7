"""What the commands say while they wait and when they fail: whom they wait for, until when, and each thing once."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from vhostpc.errors import VhostpcError
from vhostpc.listener import FOLDERS, MOST_BYTES, ROOM, socket_folder

ROOT = Path(__file__).resolve().parents[2]
TOO_LONG = "x" * 120


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "vhostpc", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
        env=os.environ | environment,
    )


def endpoint(*arguments: str) -> tuple[str, ...]:
    return ("endpoint", "--ram", "mem=64M", "--qmp", f"unix:/tmp/{os.getpid()}.qmp", *arguments)


@pytest.mark.ufd
def test_a_folder_for_temporary_files_whose_name_is_too_long(tmp_path: Path) -> None:
    """The demonstration runs all the same, elsewhere."""
    folder = tmp_path / TOO_LONG
    folder.mkdir()
    done = run("demo", "--json", "--size", "64M", TMPDIR=str(folder))
    assert done.returncode == 0, done.stderr
    assert "TMPDIR is too long for unix sockets: they are created under /" in done.stderr
    assert list(folder.iterdir()) == []


def test_no_folder_for_sockets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / TOO_LONG
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    monkeypatch.setattr("vhostpc.listener.FOLDERS", ("/nowhere", "/nowhere/else"))
    with pytest.raises(
        VhostpcError, match=f"TMPDIR is {folder}, which is too long .* /nowhere, /nowhere/else"
    ):
        with socket_folder("a-"):
            pass


def test_a_folder_that_is_just_short_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "/tmp" in FOLDERS
    short = Path("/tmp") / f"v{os.getpid()}"
    short.mkdir()
    try:
        monkeypatch.setattr("tempfile.tempdir", str(short))
        with socket_folder("a-") as folder:
            assert folder.parent == short
            path = folder / ("s" * ROOM)
            assert len(os.fsencode(path)) <= MOST_BYTES
            with socket.socket(socket.AF_UNIX) as sock:
                sock.bind(str(path))
    finally:
        short.rmdir()


@pytest.mark.parametrize(
    "arguments",
    [
        ["endpoint", "--ram", "mem=8M", "--qmp", f"unix:/tmp/{TOO_LONG}"],
        [*endpoint("--backend", f"/tmp/{TOO_LONG}")],
        ["inspect", f"unix:/tmp/{TOO_LONG}"],
        ["backend", "tests.kit.devices:Rng", "--socket-path", f"/tmp/{TOO_LONG}"],
        ["backend", "tests.kit.devices:Rng", "--socket-path", f"/tmp/{TOO_LONG}", "--connect"],
    ],
    ids=["monitor", "back-end", "inspect", "listen", "connect"],
)
def test_a_path_that_no_socket_can_have(arguments: list[str]) -> None:
    done = run(*arguments)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.endswith(
        f"/tmp/{TOO_LONG}: a unix socket's path can have at most 108 bytes, and this one has 125"
    )


def test_a_back_end_that_is_not_there() -> None:
    done = run(*endpoint("--backend", "/nowhere/x", "--backend-timeout", "1"))
    assert done.returncode == 1
    waits, ends = done.stderr.splitlines()
    assert waits.endswith("net0: waiting for the back-end at /nowhere/x, for at most 1 s")
    assert ends == "vhostpc: no back-end listens on /nowhere/x: No such file or directory, waited for 1 s"


def test_a_back_end_that_says_nothing(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        done = run(*endpoint("--backend", str(path), "--backend-timeout", "1"))
    assert done.returncode == 1
    waits, ends = done.stderr.splitlines()
    assert waits.endswith(f"net0: waiting for the back-end at {path}, for at most 1 s")
    assert ends == f"vhostpc: the back-end at {path}: GET_FEATURES: no reply within 1 s"


@pytest.mark.parametrize("machine", [(), ("--ram", "mem=8M", "--vcpus", "1")], ids=["held", "own"])
@pytest.mark.parametrize("uri", ["file:{path}", "exec:cat {path}"])
def test_why_a_machine_did_not_come_is_said_once(uri: str, machine: tuple[str, ...], tmp_path: Path) -> None:
    path = tmp_path / "stream"
    path.write_bytes(b"no stream" * 100)
    qmp = f"unix:/tmp/{os.getpid()}.qmp"
    done = run("endpoint", "--qmp", qmp, *machine, "--incoming", uri.format(path=path))
    assert done.returncode == 1
    why = "it does not begin with QEVM"
    assert done.stderr.count(why) == 1, done.stderr
    assert done.stderr.splitlines()[-1].startswith("vhostpc: the machine did not arrive: ")
    assert "migration: failed\n" in done.stderr


def test_the_first_wrong_byte_is_said_once_on_a_terminal(tmp_path: Path) -> None:
    """Elsewhere both streams have it, since they may go to two places."""
    path = tmp_path / "stream"
    path.write_bytes(b"no stream" * 100)
    ours, theirs = os.openpty()
    argv = [sys.executable, "-m", "vhostpc", "inspect", str(path)]
    done = subprocess.run(argv, cwd=ROOT, stdout=theirs, stderr=theirs, timeout=60, check=False)
    shown = os.read(ours, 65536).decode()
    os.close(ours)
    os.close(theirs)
    assert done.returncode == 1
    assert shown.count("it does not begin with QEVM") == 1, shown
    apart = run("inspect", str(path))
    assert "it does not begin with QEVM" in apart.stdout
    assert "it does not begin with QEVM" in apart.stderr


@pytest.mark.parametrize(
    ("address", "why"),
    [
        ("tcp:nowhere.invalid:99", ""),
        ("tcp:192.0.2.1:99", "Cannot assign requested address"),
        (f"tcp:{'a' * 70}.b:99", ""),
        (f"tcp:{'a' * 300}:99", ""),
    ],
    ids=["no host", "another's", "a long name", "longer"],
)
def test_where_it_cannot_listen_is_named(address: str, why: str) -> None:
    done = run("inspect", address)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"vhostpc: cannot listen on {address}: {why}")
    assert "internal error" not in line
