"""docs/stream.md says what is refused where nothing can be given back: the code says the same, and nothing more."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from vhostpc.wire.migration import ramrec

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "vhostpc"
PAGE = ROOT / "docs" / "stream.md"
FILES = [
    *(f"wire/migration/{name}.py" for name in ("stream", "elements", "split", "devices", "ramscan")),
    *("migration/postcopy_checks.py", "migration/heads.py", "migration/incoming.py", "migration/held.py"),
    "migration/link.py",
    "migration/answers.py",
    *("guest/own_machine.py",),
]
REFUSALS = {"BadStream", "StreamError", "PostcopyRefused"}

# Functions that refuse before the package only, while the source can go on.
BEFORE = {
    "wire/migration/stream.py": {"_header", "_configuration", "_name", "_end", "_footer"},
    "wire/migration/devices.py": {"early_section"},
    # In the end it is the C loader that reads records, whose reasons are in ramrec.
    "wire/migration/ramscan.py": {"block_list", "_page_size", "records", "_delta"},
    "migration/postcopy_checks.py": {"check_advise", "check_page_sizes", "check_discard"},
    "migration/heads.py": {"check_head"},
    "migration/incoming.py": {"_open_return_path", "_precopy"},
    "migration/held.py": {"accept_blocks", "_must_fit", "_page_size"},
    "guest/own_machine.py": {"accept", "accept_blocks"},
}
# Behind the package by nothing but a broken connection, or told under another name in the table.
BY_ANOTHER_NAME = {
    ("wire/migration/devices.py", "_try"): "what is wrong with a description is told, not refused",
    ("wire/migration/stream.py", "_command"): "those before the package; the others are in the table",
    ("wire/migration/stream.py", "_package"): "those before the package; the other is in the table",
    ("wire/migration/stream.py", "_start"): "those before the package; the others are in the table",
    ("wire/migration/stream.py", "_part"): "of a section that never started: there is one section only",
    ("guest/own_machine.py", "load"): "a state that is not a machine's of ours",
}

# The connection's end, what only precopy has, and a request, which a source refuses.
ELSEWHERE = {
    *(ramrec.BadRecord.TRUNCATED, ramrec.BadRecord.DELTA, ramrec.BadRecord.COMPRESSED),
    ramrec.BadRecord.PART,
}


def section(title: str) -> str:
    text = PAGE.read_text()
    return text[text.index(f"## {title}\n") :].split("\n## ", 1)[0]


def messages() -> list[str]:
    """The quoted messages of the table's second column."""
    rows = [line.split("|") for line in section("What is refused, and where").splitlines() if "|" in line]
    found = [text for row in rows[2:] for text in re.findall(r"`([^`]+)`", row[2])]
    assert len(found) > 30
    return found


def texts(node: ast.AST) -> str:
    """The constant parts of all strings below, one behind the other."""
    return "".join(
        n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)
    )


@cache
def strings(name: str) -> str:
    return texts(ast.parse((PACKAGE / name).read_text()))


def raises() -> Iterator[tuple[str, str, str]]:
    """File, function and text of each refusal."""
    for name in FILES:
        for function in ast.walk(ast.parse((PACKAGE / name).read_text())):
            if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            for node in ast.walk(function):
                if (
                    isinstance(node, ast.Call)
                    and isinstance(node.func, ast.Name)
                    and node.func.id in REFUSALS
                ):
                    yield name, function.name, texts(node)


@pytest.mark.parametrize("message", messages())
def test_what_the_table_names_is_said_by_the_code(message: str) -> None:
    code = [*map(strings, FILES), "".join(ramrec.REASONS.values())]
    # What is put in for a placeholder stands between two constant parts.
    name, _, rest = message.partition(" ")
    parts = [message, *([rest] if name.startswith(("POSTCOPY_", "PostcopyRun")) else [])]
    if message.startswith("the stream ends inside"):
        parts.append("the stream ends ")
    assert any(part in text for part in parts for text in code)


def test_what_the_code_refuses_is_in_the_table() -> None:
    told = messages()
    for name, function, text in raises():
        if function in BEFORE.get(name, ()) or (name, function) in BY_ANOTHER_NAME or text in ("", "nothing"):
            continue
        assert any(each in text or each.endswith(text.strip()) for each in told), (name, function, text)
    for reason, text in ramrec.REASONS.items():
        if reason not in ELSEWHERE:
            assert text in told, text


def test_the_lists_name_functions_that_there_are() -> None:
    functions = {(name, function) for name, function, _ in raises()}
    for name, names in BEFORE.items():
        for function in names:
            assert (name, function) in functions, f"{name}: {function} refuses nothing"
    for place in BY_ANOTHER_NAME:
        assert place in functions, f"{place} refuses nothing"
