"""The pages of the documentation, and the Python in them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(path: Path) -> Iterator[str]:
    """Each piece of Python of a page."""
    yield from re.findall(r"^```python\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL)


def files() -> dict[str, str]:
    """The examples that name themselves in their first line (``# name.py``), by name.

    One that stands on two pages must be the same on both.
    """
    found: dict[str, str] = {}
    for page in PAGES:
        for text in blocks(page):
            if name := re.match(r"# (\w+\.py)\n", text):
                assert found.setdefault(name[1], text) == text, f"two examples are named {name[1]}"
    return found
