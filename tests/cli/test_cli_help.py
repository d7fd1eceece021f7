"""``--help`` of every command: each option that has a default tells it, and the program is called what it is."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from vhostpc.cli.common import Settings
from vhostpc.cli.main import COMMANDS

ROOT = Path(__file__).resolve().parents[2]
OWN_PROGRAMS = ["bench", "tests.qemu.demo", "vhostpc"]
# None on the command line, and what it then is.
TAKEN = {
    ("endpoint", "vcpus"): "1",
    ("endpoint", "dirty_tracking"): "the best that the kernel has",
    ("endpoint", "ram"): "4K",
}


def command(name: str) -> click.Command:
    module, attribute = COMMANDS[name][0].split(":")
    found = getattr(importlib.import_module(module), attribute)
    assert isinstance(found, click.Command)
    return found


def options() -> Iterator[tuple[str, click.Option]]:
    for name in COMMANDS:
        for parameter in command(name).params:
            if isinstance(parameter, click.Option):
                yield name, parameter


def told(name: str, option: click.Option) -> str:
    """What the help says of an option, without line ends."""
    row = option.get_help_record(click.Context(command(name), info_name=name))
    assert row is not None
    return " ".join(row[1].split())


@pytest.mark.parametrize(
    ("name", "option"), [pytest.param(*row, id=f"{row[0]}-{row[1].name}") for row in options()]
)
def test_an_option_with_a_default_tells_it(name: str, option: click.Option) -> None:
    text = told(name, option)
    wanted = TAKEN.get((name, option.name or ""))
    if option.name == "log_level":
        wanted = Settings().log_level
    elif not option.is_flag and not option.multiple and isinstance(option.default, str | int | float):
        wanted = str(option.default)
    shown = re.search(r"\[default(?: of \w+)?: ([^];]+)", text)
    if wanted is not None:
        assert shown, f"{name} {option.opts[0]}: the default {wanted} is not told: {text}"
        assert shown[1] == wanted
    else:
        assert (
            "default" not in text or shown
        ), f"{name} {option.opts[0]}: not in the form of the others: {text}"


def test_the_options_that_take_something_are_there() -> None:
    there = {(name, option.name) for name, option in options()}
    assert set(TAKEN) <= there
    assert {(name, "log_level") for name in COMMANDS} <= there


def help_of(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", *arguments, "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_the_usage_names_the_command(name: str) -> None:
    assert help_of("vhostpc", name).startswith(f"Usage: vhostpc {name} ")


@pytest.mark.parametrize("module", OWN_PROGRAMS)
def test_the_usage_names_the_program_as_it_is_started(module: str) -> None:
    wanted = "Usage: vhostpc " if module == "vhostpc" else f"usage: python -m {module} "
    assert help_of(module).startswith(wanted)
