"""The versions of QEMU, and that nothing but their table tells them apart."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.project.test_layers import PACKAGE, sources
from vhostpc.dialect import DIALECTS, Compat
from vhostpc.migration.options import Options
from vhostpc.migration.status import Status

VERSION = re.compile(r"\d{1,2}\.\d{1,2}")


def words(path: Path) -> Iterator[tuple[int, str]]:
    """Every text in a file, with its line; docstrings are left out."""
    tree = ast.parse(path.read_text(), str(path))
    said = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in said:
            yield node.lineno, node.value


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_only_the_dialect_names_a_version(path: Path) -> None:
    """Neither in a comparison nor as a key, nor is one looked for in a machine's name."""
    if path.name == "dialect.py":
        return
    for line, text in words(path):
        assert not VERSION.fullmatch(text), f"{path.name}:{line}: {text!r} belongs into the dialect"
        assert not re.search(r"-.*\\d\+?\)?\\\.", text), f"{path.name}:{line}: {text!r} looks for a version"


def compared(path: Path) -> Iterator[tuple[int, tuple[object, ...]]]:
    """Every tuple of numbers that something is compared with, with its line."""
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        # (Whether it is one of several says nothing.)
        if isinstance(node, ast.Compare) and not any(isinstance(op, ast.In | ast.NotIn) for op in node.ops):
            for other in (node.left, *node.comparators):
                if isinstance(other, ast.Tuple) and all(isinstance(e, ast.Constant) for e in other.elts):
                    yield node.lineno, ast.literal_eval(other)


# The bugs of a QEMU that is installed here: no behaviour of ours.
BUGS = "cli/checks.py"


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_only_the_dialect_compares_versions(path: Path) -> None:
    found = [(line, what) for line, what in compared(path) if all(isinstance(n, int) for n in what)]
    assert not found or str(path.relative_to(PACKAGE)) == BUGS, found


def test_the_walk_finds_them(tmp_path: Path) -> None:
    file = tmp_path / "x.py"
    file.write_text('"""10.0"""\nif compat == "7.2" and {"10.0": 1}:\n    re.search(r"-(\\d+)\\.\\d+$", x)\n')
    assert [text for _, text in words(file)] == ["7.2", "10.0", r"-(\d+)\.\d+$"]
    file.write_text("if (7, 2) <= version < limit: pass\n")
    assert [what for _, what in compared(file)] == [(7, 2)]


@pytest.mark.parametrize("compat", DIALECTS)
def test_all_that_is_named_is_known(compat: Compat) -> None:
    dialect = DIALECTS[compat]
    assert compat == "{}.{}".format(*dialect.version)
    for names in (dialect.capabilities, dialect.parameters, dialect.statuses, dialect.parameters_in_text):
        assert len(names) == len(set(names))
    assert set(dialect.parameters_in_text) <= set(dialect.parameters) == Options(compat).values.keys()
    assert {"failed", "completed"} < set(dialect.statuses) & set(Status)
    for one, other, _ in dialect.conflicts:
        assert {one, other} <= set(dialect.capabilities)


@pytest.mark.parametrize(
    ("compat", "machine", "sent"),
    [
        ("10.0", "pc-i440fx-10.0", True),
        ("10.0", "pc-q35-10.0", True),
        ("10.0", "pc-q35-9.2", False),
        ("10.0", "pc-i440fx-7.2", False),
        ("10.0", "microvm", False),
        ("11.1", "pc-i440fx-11.1", True),
        ("11.1", "pc-i440fx-9.2", False),
        ("7.2", "pc-i440fx-7.2", False),
        ("7.2", "pc-i440fx-10.0", False),
    ],
)
def test_what_follows_the_machine_type(compat: Compat, machine: str, sent: bool) -> None:
    assert DIALECTS[compat].of_machine(machine).switchover_start is sent
