"""Each test that the threat model names exists, and each statement in it names one or says that there is none."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "threat-model.md").read_text()


def defined() -> set[str]:
    found = set()
    for path in (ROOT / "tests").rglob("test_*.py"):
        found.add(path.stem)
        found.update(re.findall(r"^(?:async )?def (test_\w+)", path.read_text(), re.MULTILINE))
    return found


def statements() -> list[str]:
    return re.findall(r"^\* .*(?:\n  .*)*", PAGE, re.MULTILINE)


def test_every_test_named_exists() -> None:
    named = set(re.findall(r"\btest_\w+", PAGE))
    assert len(named) > 40
    assert named <= defined(), named - defined()


def test_every_statement_names_its_test() -> None:
    assert len(statements()) > 20
    for statement in statements():
        assert statement.startswith("* Not defended") or "`test_" in statement, statement
