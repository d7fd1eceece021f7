"""Manifests of back-end programs: the schema's rules, and that a program is what its manifest says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tools.check_manifest import manifests, problems
from vhostpc.cli.program import TYPES

ROOT = Path(__file__).resolve().parents[2]
GOOD = {"description": "d", "type": "rng", "binary": "/x"}


def test_there_is_one() -> None:
    assert manifests()


@pytest.mark.parametrize("path", manifests(), ids=lambda p: p.name)
def test_manifests_of_the_examples(path: Path, tmp_path: Path) -> None:
    assert problems(path) == []
    # The program beside it, run as a manager runs it, says the same type.
    manifest = json.loads(path.read_text())
    program = path.parent / Path(manifest["binary"]).name
    launcher = tmp_path / "vhostpc"
    launcher.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m vhostpc "$@"\n')
    launcher.chmod(0o755)
    done = subprocess.run(
        [program, "--print-capabilities"],
        cwd=ROOT,
        env={
            **os.environ,
            "VHOSTPC": str(launcher),
            "VHOSTPC_DEVICES": str(path.parent),
        },
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["type"] == manifest["type"]
    assert isinstance(said["features"], list)


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ({**GOOD, "type": "gpio"}, "type 'gpio' is not one of"),
        ({**GOOD, "binary": "x"}, "absolute"),
        ({**GOOD, "tags": "x"}, "list of texts"),
        ({**GOOD, "extra": 1}, "unknown key 'extra'"),
        ({"type": "rng", "binary": "/x"}, "'description' must be a text"),
        ([], "not a JSON object"),
    ],
)
def test_each_rule_is_checked(data: object, text: str, tmp_path: Path) -> None:
    path = tmp_path / "50-x.json"
    path.write_text(json.dumps(data))
    assert text in "\n".join(problems(path))


def test_names_and_texts(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text("{")
    assert len(problems(path)) == 2
    hidden = tmp_path / "50-x.json"
    hidden.write_text("")
    assert problems(hidden) == []


def test_types_that_we_print_are_types_of_the_schema(tmp_path: Path) -> None:
    for kind in TYPES.values():
        path = tmp_path / "50-x.json"
        path.write_text(json.dumps({**GOOD, "type": kind}))
        assert problems(path) == []
