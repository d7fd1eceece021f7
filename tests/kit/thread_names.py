"""The names of a process's threads, while they come and go."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path


def thread_names(pid: int | str = "self") -> dict[int, str]:
    """By thread id; one that ends meanwhile is passed over."""
    names = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        with suppress(FileNotFoundError, ProcessLookupError):
            names[int(task.name)] = (task / "comm").read_text().strip()
    return names
