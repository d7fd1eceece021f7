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


def asleep_for_a_page(pid: int | str = "self") -> list[str]:
    """The names of its threads that wait for a missing page."""
    found = []
    for tid, name in thread_names(pid).items():
        with suppress(FileNotFoundError, ProcessLookupError):
            if "userfault" in Path(f"/proc/{pid}/task/{tid}/wchan").read_text():
                found.append(name)
    return found
