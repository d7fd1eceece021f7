"""``vhostpc completion``: a shell that has its script completes commands, options and files."""

from __future__ import annotations

import os
import pty
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import trio

ROOT = Path(__file__).resolve().parents[2]


def script(shell: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "vhostpc", "completion", shell],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert not done.stderr
    return done.stdout


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Files to complete, the command and its script."""
    (tmp_path / "disk.img").touch()
    (tmp_path / "mine.py").touch()
    (tmp_path / "bin").mkdir()
    command = tmp_path / "bin" / "vhostpc"
    command.write_text(f'#!/bin/sh\nPYTHONPATH={ROOT} exec "{sys.executable}" -m vhostpc "$@"\n')
    command.chmod(0o755)
    (tmp_path / "script").write_text(script("bash"))
    return tmp_path


async def test_bash_completes_at_the_key(folder: Path) -> None:
    """In a real one, on a terminal of its own."""
    ours, theirs = pty.openpty()
    bash = shutil.which("bash")
    assert bash is not None
    environment = {
        **os.environ,
        "PATH": f"{folder}/bin:{os.environ['PATH']}",
        "TERM": "dumb",
        "PS1": "$ ",
        "COLUMNS": "200",
    }
    process = await trio.lowlevel.open_process(
        [bash, "--norc", "--noprofile", "-i"],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        cwd=folder,
        env=environment,
        start_new_session=True,
    )
    os.close(theirs)
    said = ""
    try:
        with trio.fail_after(60):
            async with trio.lowlevel.FdStream(ours) as terminal:

                async def until(words: str) -> None:
                    nonlocal said
                    while words not in said:
                        said += (await terminal.receive_some()).decode(errors="replace")

                await terminal.send_all(b"source ./script; echo so'urced'\n")
                await until("sourced")
                for begun, whole in {
                    "vhostpc br": "vhostpc bridge ",
                    "vhostpc blk --blk-file di": "vhostpc blk --blk-file disk.img",
                    "vhostpc backend mi": "vhostpc backend mine.py",
                    "vhostpc inspect di": "vhostpc inspect disk.img",
                    "vhostpc bridge --hide-f": "vhostpc bridge --hide-feature",
                    "vhostpc completion z": "vhostpc completion zsh",
                }.items():
                    said = ""
                    await terminal.send_all(begun.encode() + b"\t")
                    await until(whole)
                    await terminal.send_all(b"\x15")  # the line is not wanted
    finally:
        process.kill()
        await process.wait()


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_scripts_ask_this_program(shell: str) -> None:
    assert re.search(rf"_VHOSTPC_COMPLETE={shell}_complete", script(shell))


@pytest.mark.parametrize(
    ("shell", "answer"),
    [
        ("zsh", "plain\nbridge\nConnect a guest's network card to UDP or to a tap device."),
        ("fish", "plain,bridge\t"),
    ],
)
def test_answers_to_other_shells(shell: str, answer: str) -> None:
    """Without loading what the commands need: a person waits for it."""
    code = "import sys; from vhostpc.cli.main import run; run(); sys.exit('trio' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={
            **os.environ,
            "_VHOSTPC_COMPLETE": f"{shell}_complete",
            "COMP_WORDS": "vhostpc br",
            "COMP_CWORD": "br" if shell == "fish" else "1",
        },
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert answer in done.stdout


def test_no_such_shell() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "vhostpc", "completion", "csh"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert "'csh' is not one of 'bash', 'zsh', 'fish'" in done.stderr
