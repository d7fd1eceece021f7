"""The Makefile: which Python it builds with, and its help. Builds of their own, without the network."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The Makefile beside tools that install nothing, and an interpreter whose environments have a pip that notes."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "vhostpc/_native").mkdir(parents=True)
    for name in ("pyproject.toml", "setup.py", "vhostpc/_native/build.py"):
        (tmp_path / name).touch()
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "need").write_text("#!/bin/sh\n")
    for name, version in (("one", "3.12.1"), ("two", "3.13.2")):
        interpreter(tmp_path / name, version)
    (tools / "need").chmod(0o755)
    return tmp_path


def interpreter(path: Path, version: str) -> None:
    """A program that answers as a Python of that version would, and makes environments of itself."""
    path.write_text(
        f"""#!/bin/sh
case "$1 $2" in
"-c "*) echo {version}-1 ;;
"-m venv") mkdir -p $3/bin && cp {path} $3/bin/python ;;
"-m pip") echo "$@" >> .venv/pip ;;
esac
"""
    )
    path.chmod(0o755)


def make(folder: Path, *arguments: str, **environment: str) -> str:
    known = {k: v for k, v in os.environ.items() if k not in ("PYTHON", "MAKEFLAGS", "MAKELEVEL")}
    done = subprocess.run(
        ["make", *arguments],
        cwd=folder,
        env=known | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def version(folder: Path) -> str:
    argv: list[str | Path] = [folder / ".venv/bin/python", "-c", ""]
    return subprocess.run(argv, capture_output=True, text=True, check=True).stdout.partition("-")[0]


def test_another_interpreter_is_taken(checkout: Path) -> None:
    one, two = str(checkout / "one"), str(checkout / "two")
    make(checkout, PYTHON=one)
    kept = checkout / ".venv" / "kept"
    kept.touch()
    assert version(checkout) == "3.12.1"
    # The same one, and none: it stays, and nothing is built again.
    for environment in ({"PYTHON": one}, {}):
        assert "building" not in make(checkout, **environment)
        assert kept.exists()
    said = make(checkout, PYTHON=two)
    assert f".venv is of another Python than {two}, which is 3.13.2: recreating it" in said
    assert "building vhostpc in .venv" in said
    assert version(checkout) == "3.13.2"
    assert not kept.exists()
    kept.touch()
    for environment in ({"PYTHON": two}, {}):
        assert "building" not in make(checkout, **environment)
    assert version(checkout) == "3.13.2"
    assert kept.exists()
    # On make's command line as well.
    assert "recreating it" in make(checkout, f"PYTHON={one}")
    assert version(checkout) == "3.12.1"


def test_an_environment_that_was_made_before_is_kept(checkout: Path) -> None:
    """Made by hand or by an older Makefile, with no note of its interpreter."""
    two = str(checkout / "two")
    subprocess.run([two, "-m", "venv", ".venv"], cwd=checkout, check=True)
    kept = checkout / ".venv" / "kept"
    kept.touch()
    make(checkout)  # no interpreter is asked for
    make(checkout, PYTHON=two)
    assert kept.exists()
    make(checkout, PYTHON=str(checkout / "one"))
    assert not kept.exists()


def test_an_environment_whose_interpreter_is_gone_is_made_anew(checkout: Path) -> None:
    make(checkout, PYTHON=str(checkout / "one"))
    (checkout / ".venv/bin/python").unlink()
    assert "building vhostpc" in make(checkout, PYTHON=str(checkout / "one"))
    assert version(checkout) == "3.12.1"
    (checkout / ".venv/bin/python").unlink()
    assert "building vhostpc" in make(checkout, PYTHON=str(checkout / "two"))
    assert version(checkout) == "3.13.2"


def test_real_interpreters_are_told_apart(tmp_path: Path) -> None:
    """What the Makefile asks of an interpreter: an environment of it answers the same."""
    (line,) = [row for row in (ROOT / "Makefile").read_text().splitlines() if row.startswith("WHICH := ")]
    program = line.removeprefix("WHICH := ").strip("'")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "v"], check=True)
    answers = [
        subprocess.run([python, "-c", program], capture_output=True, text=True, check=True).stdout
        for python in (sys.executable, tmp_path / "v/bin/python")
    ]
    assert answers[0] == answers[1]
    assert answers[0].startswith(".".join(map(str, sys.version_info[:3])) + "-")


@pytest.mark.parametrize(
    ("what", "packages"),
    [
        ("build", {"python3", "python3-venv", "libpython3-dev", "gcc", "libc6-dev"}),
        ("test", {"iproute2", "gcc", "libc6-dev"}),
    ],
)
def test_little_is_installed(what: str, packages: set[str], tmp_path: Path) -> None:
    """On a machine that has nothing of it. What tests need besides is unpacked into the cache folder."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("bash", "env"):
        (programs / name).symlink_to(shutil.which(name) or "")
    for name, text in {
        "id": "echo 0",
        "dpkg-query": "exit 1",
        "apt-get": f'echo "$@" > {tmp_path}/asked',
    }.items():
        (programs / name).write_text(f"#!{programs}/bash\n{text}\n")
        (programs / name).chmod(0o755)
    argv: list[str | Path] = [programs / "bash", ROOT / "tools/need", what]
    done = subprocess.run(
        argv, env={"PATH": str(programs)}, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    words = (tmp_path / "asked").read_text().split()
    assert "--no-install-recommends" in words
    assert {word for word in words if not word.startswith("-")} - {"install"} == packages


def test_help_is_the_first_comment_and_the_targets() -> None:
    lines = make(ROOT, "help").splitlines()
    head = [
        row.removeprefix("# ") for row in (ROOT / "Makefile").read_text().partition("\n\n")[0].splitlines()
    ]
    assert lines[:-1] == head
    assert lines[-1].startswith("targets: build demo ")
