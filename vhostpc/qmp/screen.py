"""Log lines on a terminal that also shows the monitor's prompt: they go above it, and it stays the last line."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TextIO

_CLEAR = "\r\x1b[K"

held_threads: list[str] = []
"""Threads that a stopped terminal blocks for good. Each has the lock of a stream, which Python needs at its exit."""


class Screen:
    """Stands for a text file to write to. ``prompt``: its last line, if that is not a log line.

    ``dumb``: the terminal knows no control sequences. ``above``: receives lines while an editor draws the last line;
    it must not wait.
    """

    def __init__(self, stream: TextIO, *, dumb: bool = False) -> None:
        self.prompt = ""
        self.above: Callable[[str], None] | None = None
        self._stream = stream
        self._dumb = dumb

    def write(self, text: str) -> None:
        """Whole lines."""
        if self.above is not None:
            self.above(text)
        elif self.prompt:
            clear = f"\r{' ' * len(self.prompt)}\r" if self._dumb else _CLEAR
            self._stream.write(f"{clear}{text}{self.prompt}")
        else:
            self._stream.write(text)

    def write_now(self, text: str) -> None:
        """Called by the editor that draws the last line, when nothing else is in it."""
        self._stream.write(text)
        self._stream.flush()

    def flush(self) -> None:
        self._stream.flush()


def shared(log: TextIO, out_fd: int = 1) -> Screen | None:
    """The screen of a log that goes to the same terminal as ``out_fd``; None where it does not."""
    try:
        same = os.path.samestat(os.fstat(log.fileno()), os.fstat(out_fd))
    except (OSError, ValueError):  # closed, or not a file
        return None
    if not same or not os.isatty(out_fd):
        return None
    return Screen(log, dumb=is_dumb())


def is_dumb() -> bool:
    """Whether the terminal declares that it knows no control sequences, or declares nothing."""
    return os.environ.get("TERM", "") in ("", "dumb", "unknown")
