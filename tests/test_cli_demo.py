"""``vhostpc demo``: the numbers agree, for root, for an ordinary user, and not at all where it can not be."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from vhostpc.cli.demo_run import Demo, Phase, Result

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.ufd


def run(*arguments: str, profile: str = "") -> subprocess.CompletedProcess[str]:
    """The command, with the rights of a profile of ``tests.confine``."""
    confined = [sys.executable, "-m", "tests.confine", profile] if profile else []
    return subprocess.run(
        [*confined, sys.executable, "-m", "vhostpc", "demo", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=ROOT,
    )


def check_numbers(text: str) -> dict[str, Any]:
    numbers: dict[str, Any] = json.loads(text)
    assert numbers["ok"]
    assert [p["name"] for p in numbers["phases"]] == ["before", "during", "after"]
    assert numbers["sent"] == numbers["received"] == numbers["far_frames"] == numbers["echoed"]
    assert numbers["bridge"]["faults"] > 100
    assert numbers["placed"] == numbers["pages"]
    assert numbers["withheld_pages"] >= 1
    return numbers


def test_json() -> None:
    done = run("--json")
    assert done.returncode == 0, done.stderr + done.stdout
    check_numbers(done.stdout)


def test_table() -> None:
    done = run()
    assert done.returncode == 0, done.stderr + done.stdout
    for word in ("before", "during", "after", "p50", "p99", "distinct"):
        assert word in done.stdout
    assert "every page is what it was" in done.stdout


def test_ordinary_user() -> None:
    """No right but to run programs: user-mode-only userfaultfds in every process."""
    done = run("--json", profile="nobody")
    assert done.returncode == 0, done.stderr + done.stdout
    check_numbers(done.stdout)


def test_where_userfaultfd_is_denied() -> None:
    done = run("--json", profile="denied")
    assert done.returncode == 3, done.stderr
    assert done.stdout == ""
    assert "userfaultfd" in done.stderr
    assert "Traceback" not in done.stderr


def test_numbers_that_do_not_agree_are_named() -> None:
    import trio

    async def judge() -> Result:
        demo = Demo(lambda what, share: None)
        try:
            demo.ram.create("pc.ram", 64 << 20)
            demo.result.phases = [Phase("before", 5, 4), Phase("during", 1, 1), Phase("after", 1, 1)]
            demo.result.far_frames, demo.result.placed = 7, 3
            await demo._verify()
        finally:
            demo.ram.close()
            demo.source_ram.close()
        return demo.result

    problems = "; ".join(trio.run(judge).problems)
    assert "7 frames sent and 6 received back" in problems
    assert "3 of 16384 pages" in problems
    assert "pages are not what they were" in problems
