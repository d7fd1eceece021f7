"""What ``vhostpc backend``, ``bridge`` and ``blk`` share, by real processes: usage, the ready line, streams, groups."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import click
import pytest
import trio

from tests.kit.raw_front_end import RawFrontEnd
from tests.peers.child import open_child
from vhostpc.backend import bind
from vhostpc.cli.program import group_id
from vhostpc.errors import VhostpcError
from vhostpc.wire.vhost_user import Request

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 60
VHOSTPC = [sys.executable, "-m", "vhostpc"]
PROGRAMS = {
    "backend": [*VHOSTPC, "backend", "tests.kit.devices:Rng"],
    "bridge": [*VHOSTPC, "bridge", "-l", "127.0.0.1:0"],
    "blk": [*VHOSTPC, "blk", "--memory", "1M"],
    "examples/bridge": [sys.executable, "examples/bridge", "-l", "127.0.0.1:0"],
    "examples/blk": [sys.executable, "examples/blk", "--memory", "1M"],
}


def call(command: list[str], *more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*command, *more], cwd=ROOT, capture_output=True, text=True, timeout=LIMIT, check=False
    )


@pytest.mark.parametrize("name", PROGRAMS)
async def test_each_says_when_it_is_ready(name: str, tmp_path: Path) -> None:
    async with open_child([*PROGRAMS[name], "-u", str(tmp_path / "s")], name=name, cwd=ROOT) as child:
        line = (await child.until(r"[^\n]*ready on [^\n]*\n"))[0]
        assert re.search(rf" INFO vhostpc\.cli\.program: ready on {tmp_path}/s\n$", line), line
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.connect(str(tmp_path / "s"))
        child.process.send_signal(signal.SIGTERM)
        assert await child.wait() == 0, child.said


@pytest.mark.ufd
@pytest.mark.parametrize("option", ["", "--no-fault", "--answer-each-pair"])
@pytest.mark.parametrize("name", PROGRAMS)
async def test_each_can_help_a_front_end(name: str, option: str, tmp_path: Path) -> None:
    """The first lines of a session in postcopy say so, where it was wanted."""
    command = [*PROGRAMS[name], *filter(None, [option]), "-u", str(tmp_path / "s")]
    async with open_child(command, name=name, cwd=ROOT) as child:
        await child.until(r"ready on [^\n]*\n")
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.connect(str(tmp_path / "s"))
        with contextlib.closing(RawFrontEnd(sock)) as front:
            await front.negotiate()
            for _ in range(2):
                (await front.ask(Request.POSTCOPY_ADVISE)).close_fds()
        await child.until("disconnected")
        assert "postcopy advised" in child.said
        said = child.said
        assert ("postcopy without faults: absent pages are not requested" in said) == (option == "--no-fault")
        assert ("to be answered unasked" in said) == (option == "--answer-each-pair")


@pytest.mark.parametrize("name", PROGRAMS)
def test_wrong_usage_names_the_program_that_was_called(name: str) -> None:
    usage = f"Usage: python {name} [OPTIONS]" if "/" in name else f"Usage: vhostpc {name} [OPTIONS]"
    for wrong, words in {
        ("--bad",): "No such option",
        ("--log-level", "foo"): "'foo' is not one of 'debug'",
        ("--hide-feature", "FLYING"): "no feature 'FLYING'",
        ("-c", "-u", "x", "--socket-mode", "600"): "need a socket that is created here",
        ("--fd", "3", "--socket-group", "0"): "need a socket that is created here",
    }.items():
        done = call(PROGRAMS[name], *wrong)
        assert done.returncode == 2, done.stderr
        assert done.stderr.startswith(usage), done.stderr
        assert words in done.stderr
        assert "Traceback" not in done.stderr
        assert not done.stdout


def test_a_level_may_be_written_large(tmp_path: Path) -> None:
    assert "cannot connect" in call(PROGRAMS["bridge"], "--log-level", "INFO", "-c", "-u", "/absent/s").stderr


@pytest.mark.parametrize("name", ["bridge", "blk", "backend"])
def test_help_tells_defaults(name: str) -> None:
    text = " ".join(call(PROGRAMS[name], "--help").stdout.split())
    wanted = ["Mode of the socket file. [default: 600]", "log on stderr. [default: info]"]
    wanted += {
        "bridge": ["[default: 127.0.0.1:4444]", "[default: 127.0.0.1:5555]", "[default: vubr.sock]"],
        "blk": ["[default: 2;", "[default: 64;"],
        "backend": [],
    }[name]
    for part in wanted:
        assert part in text


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (["-l", "127.0.0.1:70000"], "'127.0.0.1:70000' is not HOST:PORT"),
        (["-r", "127.0.0.1"], "'127.0.0.1' is not HOST:PORT"),
        (["-l", "[::1]:0", "-r", "127.0.0.1:9"], "one of --local and --remote is an IPv6 address"),
        (["--make-tap"], "--make-tap needs --tap"),
    ],
)
def test_addresses_of_the_bridge(wrong: list[str], words: str) -> None:
    done = call([*VHOSTPC, "bridge"], *wrong)
    assert done.returncode == 2
    assert words in done.stderr


def test_a_tap_device_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    done = call([*VHOSTPC, "bridge"], "-u", str(tmp_path / "s"), "--tap", "mistyped0", "--pairs", "2")
    assert done.returncode == 1
    assert done.stderr == (
        "vhostpc: tap mistyped0: there is no such network device; to create it: "
        "ip tuntap add mistyped0 mode tap multi_queue\n"
    )
    assert not Path("/sys/class/net/mistyped0").exists()


# --- streams


@pytest.mark.parametrize("streams", ["2>&-", ">&-", "<&-", "<&- >&- 2>&-", "2>/dev/full"])
@pytest.mark.parametrize("name", ["bridge", "blk"])
async def test_closed_streams(name: str, streams: str, tmp_path: Path) -> None:
    """A clean end is 0, and what is meant for a person gets into no socket."""
    path = tmp_path / "s"
    shell = f'"$@" {streams} & pid=$!; echo $pid; wait $pid; echo "ended with $?"'
    command = ["sh", "-c", shell, "sh", *PROGRAMS[name], "-u", str(path)]
    async with open_child(command, name=name, cwd=ROOT) as child:
        pid = int((await child.until(r"^(\d+)\n"))[1])
        while True:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
                try:
                    sock.connect(str(path))
                except OSError:
                    os.kill(pid, 0)
                    await trio.sleep(0.01)
                    continue
                os.kill(pid, signal.SIGTERM)
                assert not sock.recv(100)
                break
        assert (await child.until(r"ended with (\d+)"))[1] == "0", child.said


def test_a_reader_of_stderr_that_went_away(tmp_path: Path) -> None:
    read, write = os.pipe()
    command = [*PROGRAMS["bridge"], "-u", str(tmp_path / "s")]
    process = subprocess.Popen(command, cwd=ROOT, stderr=write)
    try:
        os.close(write)
        text = b""
        while b"ready on" not in text:
            more = os.read(read, 1000)
            assert more, text
            text += more
        os.close(read)
        process.send_signal(signal.SIGUSR1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(LIMIT) == 0
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    ("arguments", "code"), [(["doctor"], None), (["--version"], 0), (["backend", "absent.py:X"], 2)]
)
def test_a_command_whose_streams_are_closed(arguments: list[str], code: int | None) -> None:
    """Its exit code is that of its work."""
    wanted = call(VHOSTPC, *arguments).returncode if code is None else code
    for streams in (">&-", "2>&-", ">&- 2>&-", "2>/dev/full"):
        done = call(["sh", "-c", f'"$@" {streams}', "sh", *VHOSTPC, *arguments])
        assert done.returncode == wanted, (streams, done.stderr)
        assert "Traceback" not in done.stderr


# --- the group of the socket


def test_a_group_that_is_refused_is_named(tmp_path: Path) -> None:
    """As an ordinary user meets it: here the right to give files away is what is missing."""
    command = (
        ["setpriv", "--bounding-set", "-chown", *PROGRAMS["blk"]] if os.geteuid() == 0 else PROGRAMS["blk"]
    )
    done = call(command, "-u", str(tmp_path / "s"), "--socket-group", "54321")
    assert done.returncode == 1
    assert re.fullmatch(
        rf"vhostpc: cannot listen on {tmp_path}/s: its group cannot be 54321: user \S+ \(\d+\) is not in that group\n",
        done.stderr,
    ), done.stderr
    assert not (tmp_path / "s").exists()


def test_a_group_that_the_system_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(os, "chown", refuse)
    with pytest.raises(VhostpcError, match=r"its group cannot be root \(0\): Read-only file system"):
        bind(tmp_path / "s", group=0)


@pytest.mark.parametrize("text", ["4294967295", "99999999999", "no such group", "", "-1", "²"])
def test_what_is_no_group(text: str) -> None:
    with pytest.raises(click.BadParameter, match="no group"):
        group_id(click.Context(click.Command("x")), click.Option(["--x"]), text)
