"""A terminal's window: what a program has written there, as rows, and keys to press."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import trio

ROOT = Path(__file__).resolve().parents[2]
WIDE = 500  # so that no row is continued in the next one
_CONTROL = re.compile(r"\x1b\[([0-9;?]*)([a-zA-Z])|\x1b[=>]")


class Window:
    """``rows`` are what stands there; the last one is where the cursor is."""

    def __init__(self, process: subprocess.Popen[bytes], fd: int, other: int) -> None:
        self.process = process
        self.rows = [""]
        self.raw = ""
        self._fd, self._other = fd, other
        self._column = 0
        self._rest = ""

    async def press(self, keys: str) -> None:
        os.write(self._fd, keys.encode())
        await trio.lowlevel.checkpoint()

    def modes(self) -> list[object]:
        """How the terminal is set."""
        return termios.tcgetattr(self._fd)

    def stop_output(self) -> None:
        """As its key for that does: who writes there waits."""
        termios.tcflow(self._other, termios.TCOOFF)

    def start_output(self) -> None:
        termios.tcflow(self._other, termios.TCOON)

    async def until(self, pattern: str) -> re.Match[str]:
        """Wait until the window shows it (rows joined by newlines)."""
        with trio.move_on_after(10):
            while not (found := re.search(pattern, self._shown())):
                await trio.lowlevel.wait_readable(self._fd)
                self._take(os.read(self._fd, 65536).decode(errors="replace"))
            return found
        raise AssertionError(f"no {pattern!r} in the window:\n" + "\n".join(self.rows) + f"\n{self.raw!r}")

    def _shown(self) -> str:
        """The last row up to the cursor at least."""
        return "\n".join([*self.rows[:-1], self.rows[-1].ljust(self._column)])

    def _take(self, data: str) -> None:
        self.raw += data
        data, at = self._rest + data, 0
        self._rest = ""
        while at < len(data):
            found = _CONTROL.match(data, at)
            if found:
                self._control(found[1] or "", found[2] or "")
                at = found.end()
                continue
            if data[at] == "\x1b":
                if len(data) - at < 12:
                    self._rest = data[at:]
                    return
                at += 1
                continue
            self._character(data[at])
            at += 1

    def _control(self, numbers: str, letter: str) -> None:
        count = int(numbers) if numbers.isdigit() else 1
        row = self.rows[-1]
        if letter in ("K", "J"):
            self.rows[-1] = row[: self._column]
        elif letter == "C":
            self._column += count
        elif letter == "D":
            self._column = max(0, self._column - count)

    def _character(self, one: str) -> None:
        if one == "\n":
            self.rows.append("")
        elif one == "\r":
            self._column = 0
        elif one == "\b":
            self._column = max(0, self._column - 1)
        elif one >= " ":
            row = self.rows[-1].ljust(self._column)
            self.rows[-1] = row[: self._column] + one + row[self._column + 1 :]
            self._column += 1


@contextlib.asynccontextmanager
async def window(argv: Sequence[str], **env: str) -> AsyncIterator[Window]:
    """Run a program in a terminal of its own, which is its controlling one. Killed at the end of the block."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, WIDE, 0, 0))
    program = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY); os.execv(sys.argv[1], sys.argv[1:])"
    try:
        process = subprocess.Popen(  # noqa: ASYNC220
            [sys.executable, "-c", program, *argv],
            cwd=ROOT,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            env={**os.environ, "TERM": "xterm", **env},
        )
        try:
            yield Window(process, ours, theirs)
        finally:
            process.kill()
            process.wait()
    finally:
        os.close(ours)
        os.close(theirs)
