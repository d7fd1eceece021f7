"""The public interface: what each package exports, and that the pages and examples use nothing below it."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kit.pages import PAGES, ROOT, blocks
from tests.project.test_layers import loaded_by

ROOMS = (
    *("vhostpc", "vhostpc.backend", "vhostpc.endpoint", "vhostpc.frontend", "vhostpc.guest"),
    *("vhostpc.migration", "vhostpc.pages", "vhostpc.proxy", "vhostpc.qmp", "vhostpc.ufd", "vhostpc.wire"),
)
# ``vhostpc blk`` and ``vhostpc bridge`` as programs of their own.
PROGRAMS = {"vhostpc.cli": {"run_only"}}
# This one is about the modules themselves.
ABOUT_MODULES = {"architecture.md"}


def exported(room: str) -> set[str]:
    return set(importlib.import_module(room).__all__)


def imported(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """(module, name) of every import of ours."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names if alias.name.split(".")[0] == "vhostpc")
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "vhostpc":
            yield from ((node.module, alias.name) for alias in node.names)


@pytest.mark.parametrize("room", ROOMS)
def test_what_a_room_says_is_what_it_has(room: str) -> None:
    """``__all__``, the imports for type checkers, and the names that are looked up are the same."""
    module = importlib.import_module(room)
    assert module.__file__ is not None
    tree = ast.parse(Path(module.__file__).read_text())
    names = {name for where, name in imported(tree) if where != "vhostpc.lazy"} - {"TYPE_CHECKING"}
    assert names == exported(room)
    for name in names:
        assert getattr(module, name) is not None, name
    for where, name in imported(tree):
        if where not in ("vhostpc.lazy", room, "vhostpc"):
            assert getattr(module, name) is getattr(importlib.import_module(where), name), name
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = module.nothing
    # A type checker must not see what would stand for every name, also for one that is not there.
    assert not [
        node for node in tree.body if isinstance(node, ast.Assign) and "__getattr__" in ast.unparse(node)
    ]


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_costs_what_is_used_of_it(room: str) -> None:
    loaded = loaded_by(f"import {room}")
    assert not {name for name in loaded if name.split(".")[0] in ("trio", "click", "rich", "asyncio")}
    # That one opens userfaultfds, which is done in C.
    assert room == "vhostpc.ufd" or "vhostpc._native" not in loaded


def check(text: str, where: str) -> int:
    """How many names of ours are imported; all of them from the rooms."""
    count = 0
    for module, name in imported(ast.parse(text, where)):
        count += 1
        names = PROGRAMS[module] if module in PROGRAMS else exported(module) if module in ROOMS else None
        assert names is not None, f"{where} imports {module}, which is no room: {', '.join(ROOMS)}"
        assert not name or name in names, f"{where} imports {name}, which {module} does not export"
    return count


def test_pages_import_from_the_rooms() -> None:
    assert sum(check(text, page.name) for page in PAGES for text in blocks(page)) > 20


def test_examples_import_from_the_rooms() -> None:
    files = sorted((ROOT / "examples").rglob("*.py"))
    assert {path.parent.name for path in files} >= {"blk", "bridge", "migrate", "rng"}
    assert all(check(path.read_text(), str(path.relative_to(ROOT))) for path in files)


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page.name not in ABOUT_MODULES], ids=lambda p: p.name
)
def test_names_in_the_pages_are_those_of_the_rooms(page: Path) -> None:
    """``vhostpc.backend.Disk`` in a sentence is a name that can be imported from there."""
    for name in re.findall(r"`(vhostpc(?:\.\w+)+)(?:\([^`]*\))?`", page.read_text()):
        if name in (*ROOMS, "vhostpc.errors"):
            continue
        room, _, rest = name.rpartition(".")
        assert room in ROOMS, f"{page.name}: {name} is below the public interface"
        assert rest in exported(room), f"{page.name}: {room} exports no {rest}"
