"""The bench's own small C programs, compiled when a bench starts."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from .. import CACHE

HERE = Path(__file__).resolve().parent
FLAGS = "-std=gnu11 -O2 -Wall -Wextra -Wconversion -Wno-sign-conversion -Wshadow -pthread".split()


def tool(name: str, *extra: str) -> Path:
    """The program built from ``<name>.c`` (and ``extra`` arguments), rebuilt when a source is newer."""
    binary = CACHE / name
    sources = [HERE / f"{name}.c", *HERE.glob("*.h")]
    if not binary.exists() or any(s.stat().st_mtime > binary.stat().st_mtime for s in sources):
        CACHE.mkdir(parents=True, exist_ok=True)
        compiler = os.environ.get("CC", "cc")
        subprocess.run([compiler, *FLAGS, "-o", binary, sources[0], *extra], check=True)
    return binary
