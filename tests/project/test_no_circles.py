"""No file needs one that needs it, in Python by imports, in C by includes and calls: each can be read by itself."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

from tests.kit.c_calls import CallGraph, Function, c_files
from tests.project.test_layers import ROOT, includes, sources


def imported(path: Path, ours: set[str]) -> Iterator[str]:
    """Modules of ours that a file imports, wherever the import stands, also for type checking."""
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from ours & {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: imports are absolute here"
            full = {f"{node.module}.{alias.name}" for alias in node.names}
            yield from ours & full
            # Something of the module itself, and not only files of a folder.
            if not full <= ours:
                yield from ours & {node.module or ""}


def test_no_circle_of_python_files() -> None:
    paths = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in sources()
    }
    needs = {module: set(imported(path, set(paths))) - {module} for module, path in paths.items()}
    assert {"vhostpc._native", "vhostpc._native.handles"} <= needs["vhostpc.memory.table"]
    assert {"vhostpc.wire.qmp", "vhostpc.qmp.human"} <= needs["vhostpc.qmp.qmp_server"]
    assert "vhostpc.wire" not in needs["vhostpc.qmp.qmp_server"]
    TopologicalSorter(needs).prepare()


def called(graph: CallGraph, f: Function, seen: set[str]) -> Iterator[str]:
    """C files with a function that ``f`` calls, itself or by one in a header."""
    for name in f.calls:
        callee = graph.find(name, f.file)
        assert callee is not None
        if callee.file.endswith(".c"):
            yield callee.file
        elif name not in seen:
            seen.add(name)
            yield from called(graph, callee, seen)


def test_no_circle_of_c_files() -> None:
    files = c_files()
    graph = CallGraph(files)
    needs = {path.name: {Path(name).name for name in includes(path)} for path in files}
    assert len(needs) == len(files), "two files of one name"
    for f in graph.functions:
        if f.file.endswith(".c"):
            needs[f.file] |= set(called(graph, f, set())) - {f.file}
    assert {"gm.c", "ring_internal.h"} <= needs["walk.c"]
    assert "event.c" in needs["outbox.c"], "by a function in a header"
    TopologicalSorter(needs).prepare()
