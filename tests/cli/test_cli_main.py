"""The command ``vhostpc`` itself: exit codes, and one sentence for a mistake."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import click
import pytest

from vhostpc.cli import main as cli_main
from vhostpc.errors import PeerClosed, UfdError

ROOT = Path(__file__).resolve().parents[2]


def vhostpc(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "vhostpc", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_help_names_every_command() -> None:
    done = vhostpc("--help")
    assert done.returncode == 0, done.stderr
    for name in cli_main.COMMANDS:
        assert f"\n  {name}" in done.stdout


def test_version() -> None:
    done = vhostpc("--version")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("vhostpc 0.")


@pytest.mark.parametrize(
    "arguments", [["nonsense"], ["--nonsense"], ["doctor", "--nonsense"], ["doctor", "extra"]]
)
def test_wrong_usage_is_2_and_says_what(arguments: list[str]) -> None:
    done = vhostpc(*arguments)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert arguments[-1] in done.stderr


def failing(error: BaseException) -> click.Command:
    @click.command()
    def command() -> None:
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (PeerClosed("the peer closed the connection"), 1, "vhostpc: the peer closed the connection\n"),
        (
            UfdError("userfaultfd cannot be opened: why", 1),
            3,
            "vhostpc: userfaultfd cannot be opened: why\n",
        ),
        (
            FileNotFoundError(2, "No such file or directory", "x.sock"),
            1,
            "vhostpc: x.sock: No such file or directory\n",
        ),
        (ExceptionGroup("nursery", [ExceptionGroup("inner", [PeerClosed("gone")])]), 1, "vhostpc: gone\n"),
        (ExceptionGroup("nursery", [ValueError("bug"), PeerClosed("gone")]), 1, "vhostpc: gone\n"),
        (ValueError("odd"), 1, "vhostpc: internal error: ValueError: odd (--debug shows the traceback)\n"),
        (KeyboardInterrupt(), 130, "\n"),
    ],
    ids=lambda v: type(v).__name__,
)
def test_errors_are_one_sentence_and_a_code(
    error: BaseException,
    code: int,
    text: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(cli_main.LazyGroup, "get_command", lambda *_: failing(error))
    assert cli_main.run(["anything"]) == code
    assert capsys.readouterr().err == text


def test_debug_shows_the_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli_main.LazyGroup, "get_command", lambda *_: failing(PeerClosed("gone")))
    assert cli_main.run(["--debug", "anything"]) == 1
    shown = capsys.readouterr().err
    assert "Traceback" in shown
    assert shown.endswith("vhostpc: gone\n")


@pytest.mark.parametrize(
    "arguments",
    [
        ["backend", "tests.kit.devices:Rng", "--socket-path", "{folder}/s"],
        ["endpoint", "--ram", "pc.ram=64M", "--qmp", "unix:{folder}/q"],
        ["demo"],
    ],
    ids=lambda arguments: arguments[0],
)
@pytest.mark.parametrize("limit", [7, 10, 30])
def test_few_descriptors_at_the_start_are_one_sentence(
    arguments: list[str], limit: int, tmp_path: Path
) -> None:
    """Not a program that is ready and then can serve nobody, or not offer postcopy."""
    with_limit = (
        f"import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_NOFILE, ({limit}, {limit}));"
    )
    main = "sys.argv[0] = 'vhostpc'; runpy.run_module('vhostpc', run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", with_limit + main, *(a.format(folder=tmp_path) for a in arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 3, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"vhostpc: this process may have {limit} open files, of which ")
    assert list(tmp_path.iterdir()) == []
