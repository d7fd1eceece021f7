"""docs/phases.md is what tools/draw_phases.py makes of the tables."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_page_is_that_of_the_tables(tmp_path: Path) -> None:
    made = tmp_path / "phases.md"
    subprocess.run([sys.executable, str(ROOT / "tools" / "draw_phases.py"), str(made)], check=True)
    assert made.read_text() == (ROOT / "docs" / "phases.md").read_text()
