"""What the commands show on screens of any width, on terminals without control sequences, and where there is none."""

from __future__ import annotations

import fcntl
import io
import os
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from rich.console import Console
from rich.progress import Progress

from vhostpc.cli.checks import Check, Level
from vhostpc.cli.demo import output
from vhostpc.cli.demo.books import Frames, Pages, Pause, Phase, Result, Step, Traffic, Waiting, Waits
from vhostpc.cli.demo.demo import print_tables
from vhostpc.cli.demo.run import COPYING, FOLLOWING, RUNNING, STARTING, THERE
from vhostpc.cli.demo.tables import tables
from vhostpc.cli.doctor import text_report

ROOT = Path(__file__).resolve().parents[2]
WIDTHS = range(20, 101)
PHASES = (STARTING, RUNNING, COPYING, FOLLOWING, THERE)
MARKS = "…\x1b\r"


def result() -> Result:
    found = Result()
    found.pages = Pages(
        total=1234567, precopy=765432, background=345678, requested=123457, placed=6, checked=9
    )
    found.bytes = Traffic(987 << 20, 36 << 10, 1234 << 20, 0)
    found.phases = [Phase("postcopy", 1, 30)]
    found.downtime_ms, found.total_ms = 12345, 654321
    found.waits = [
        Waits("vCPU 10", 12345, 12345678, 123456789, 1234567890, 23456789012, 987654321),
        Waits("guest's drivers", 0, 0, 0, 0, 0, None),
    ]
    waiting = [Waiting("vCPU 10", 1, 1234567890), Waiting("guest's drivers", 123, 98765432)]
    found.pauses = [Pause(123.45, 234.56, 0.987, 14, 262144, 128, 345, waiting)]
    found.steps = [
        Step(123.46, "source", "postcopy-paused"),
        Step(124, "destination", "postcopy-recover-setup"),
    ]
    found.frames = [Frames("net0", 2043276, 2043212, 17, 0, 47, 0, 0)]
    return found


def shown(width: int) -> str:
    out = io.StringIO()
    console = Console(file=out, width=width, highlight=False)
    for table in tables(result()):
        output.print_table(console, *table)
    return out.getvalue()


@pytest.mark.parametrize("width", WIDTHS)
def test_no_number_is_cut(width: int) -> None:
    text = shown(width)
    assert not set(text) & set(MARKS)
    lines = text.splitlines()
    assert max(map(len, lines)) <= width
    for _, _, rows in tables(result()):
        for _, *values in rows:
            for value in filter(None, values):
                alone = rf"(?<![\w.]){re.escape(value)}(?![\w.])"
                assert any(re.search(alone, line) for line in lines), value


def test_where_there_is_room_they_are_tables() -> None:
    assert "─" in shown(80)
    assert re.search(r"vCPU 10 +12345 +12\.35 ms", shown(80))
    assert "  faults: 12345\n" in shown(40)


@pytest.mark.parametrize("width", WIDTHS)
def test_no_phase_is_cut(width: int) -> None:
    out = io.StringIO()
    console = Console(file=out, width=width, force_terminal=True, color_system=None, legacy_windows=False)
    with Progress(*output.columns(width), console=console, auto_refresh=False) as progress:
        for what in PHASES:
            progress.add_task(what, total=1, completed=1, short=output.short(what))
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", out.getvalue())
    assert "…" not in text
    lines = [line.rstrip() for line in text.replace("\r", "\n").splitlines() if line.strip()]
    assert max(map(len, lines)) <= width
    for name in ("starting", "before", "precopy", "postcopy", "after"):
        assert any(re.match(rf"{name}\b.* 100%", line) for line in lines), (name, lines)


def on_terminal(columns: int, *arguments: str, **environment: str) -> str:
    """All that a command writes to a terminal."""
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    known = {
        name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")
    }
    argv = [sys.executable, "-m", "vhostpc", *arguments]
    process = subprocess.Popen(
        argv, cwd=ROOT, stdin=theirs, stdout=theirs, stderr=theirs, env=known | environment
    )
    os.close(theirs)
    text = b""
    while True:
        try:
            more = os.read(ours, 65536)
        except OSError:  # nobody has the other end any more
            break
        text += more
    os.close(ours)
    assert process.wait() == 0, text
    return text.decode().replace("\r\n", "\n")


@pytest.mark.ufd
@pytest.mark.parametrize("columns", [40, 120])
def test_a_terminal_without_control_sequences(columns: int) -> None:
    text = on_terminal(columns, "demo", "--size", "64M", TERM="dumb")
    assert not set(text) & set(MARKS)
    for phase in PHASES:
        assert text.count(phase) == 1
    assert ("─" in text) == (columns == 120)


@pytest.mark.ufd
def test_no_terminal() -> None:
    argv = [sys.executable, "-m", "vhostpc", "demo", "--size", "64M"]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr
    assert not set(done.stdout + done.stderr) & set(MARKS)
    assert [line.rstrip() for line in done.stderr.splitlines()] == [f"{phase:40} 100%" for phase in PHASES]


@pytest.mark.ufd
def test_no_colour_where_none_is_wanted() -> None:
    """Bold is none."""
    for environment in ({"NO_COLOR": "1"}, {"TERM": "dumb"}):
        text = on_terminal(80, "doctor", **({"TERM": "xterm-256color"} | environment))
        assert "\x1b" not in text
    assert "\x1b[32m" in on_terminal(80, "doctor", TERM="xterm-256color")
    text = on_terminal(80, "demo", "--size", "64M", TERM="xterm-256color", NO_COLOR="1")
    assert not re.search(r"\x1b\[[0-9;]*[34][0-9][;m]", text)


def test_what_is_wrong_with_a_run_is_told_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    found = result()
    found.problems = ["net0 [x86] is gone"]
    print_tables(found)
    assert "- net0 [x86] is gone" in capsys.readouterr().out


@pytest.mark.parametrize("columns", [*WIDTHS, None])
def test_a_doctor_for_any_screen(columns: int | None) -> None:
    long = "/proc/sys/vm/unprivileged_userfaultfd"
    checks = [
        Check("kernel", Level.OK, "Linux 6.1 (at least 5.11 needed)"),
        Check("transparent huge pages", Level.NOTE, "shmem_enabled is always", f"echo 1 > {long}"),
    ]
    text = re.sub(r"\x1b\[[0-9;]*m", "", text_report(checks, columns))
    lines = text.splitlines()
    assert any(long in line for line in lines)  # it can be copied
    if columns is None:
        assert len(lines) == 3
    else:
        assert all(
            len(line) <= max(columns, len("ok    transparent huge pages"), len(long) + 2) for line in lines
        )
    assert " ".join(text.split()).count("shmem_enabled is always") == 1
