"""CONTRIBUTING.md: every file, make target and name in it is there."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from tests.kit.pages import ROOT

PAGE = (ROOT / "CONTRIBUTING.md").read_text()
CODE = re.findall(r"`([^`\n]+)`", PAGE)
FILE = re.compile(r"(?:[\w.-]+/)+(?:[\w.-]+)?|\w+\.(?:md|py|in|toml)|Makefile")
MAKEFILE = (ROOT / "Makefile").read_text()


def recipes() -> Iterator[tuple[str, list[str], list[str]]]:
    """(section, files, names) of each row of a table of files."""
    for section in PAGE.split("\n## ")[1:]:
        title, _, text = section.partition("\n")
        if "| file | what |" not in text:
            continue
        for row in re.findall(r"^\| (`.*) \| (.*) \|$", text, re.MULTILINE):
            yield title, re.findall(r"`([^`]+)`", row[0]), re.findall(r"`(@?\w+)`", row[1])


def test_files_exist() -> None:
    files = {path for text in CODE for path in FILE.findall(text) if not path.startswith(".venv/")}
    assert len(files) > 50
    assert [path for path in sorted(files) if not (ROOT / path).exists()] == []


def test_make_targets_exist() -> None:
    targets = {found for text in CODE for found in re.findall(r"^make ([a-z-]+)", text)}
    assert targets >= {"test", "lint", "lint-c", "sanitize", "fuzz", "bench", "peers"}
    phony = re.search(r"^\.PHONY: (.*)$", MAKEFILE, re.MULTILINE)
    assert phony
    assert targets <= set(phony[1].split())
    assert all(re.search(rf"^{target}:", MAKEFILE, re.MULTILINE) for target in targets)


def test_variables_of_make_exist() -> None:
    variables = {found for text in CODE for found in re.findall(r"\b([A-Z_]+)=", text)}
    assert variables
    assert all(re.search(rf"^{name} \?=", MAKEFILE, re.MULTILINE) for name in variables)


def test_markers_exist() -> None:
    settings = (ROOT / "pyproject.toml").read_text()
    markers = {word for text in CODE if " -m '" in text for word in re.findall(r"not (\w+)", text)}
    assert markers
    assert all(f'"{marker}: ' in settings for marker in markers)


@pytest.mark.parametrize(
    ("files", "names"), [row[1:] for row in recipes()], ids=lambda found: ",".join(found)
)
def test_names_of_a_recipe_are_in_its_files(files: list[str], names: list[str]) -> None:
    text = "\n".join((ROOT / path).read_text() for path in files if (ROOT / path).is_file())
    assert [name for name in names if not re.search(rf"\b{name.lstrip('@')}", text)] == []


def test_there_is_a_recipe_for_each_kind_of_change() -> None:
    titles = {title for title, _, _ in recipes()}
    assert titles == {
        "A vhost-user request",
        "A migration capability",
        "A device",
        "A device of our own machine",
        "A point of the proxy",
        "A monitor command",
        "A C function",
    }


def test_it_is_found() -> None:
    assert "(CONTRIBUTING.md)" in (ROOT / "README.md").read_text()
    assert "CONTRIBUTING.md" in (ROOT / "MANIFEST.in").read_text()


def test_its_commit_is_as_it_says() -> None:
    example = PAGE.split("## Commits")[1].split("```")[1].strip().splitlines()
    assert re.fullmatch(r"[a-z]+: [a-z].*[^.]", example[0])
    assert len(example[0]) <= 72
    assert example[1] == ""
    assert all(len(line) <= 80 for line in example[2:])
