"""The standard streams of a program: some may be closed, and some may have lost their reader.

The exit code reports the work. A line for people on stderr that reaches nobody is no failure of the work.
"""

from __future__ import annotations

import io
import os
import sys
from contextlib import suppress
from typing import NoReturn


class Unheard(io.FileIO):
    """A file whose writes may be lost: a pipe without a reader, a full disk."""

    def write(self, data: bytes, /) -> int:  # type: ignore[override]
        """See :class:`io.RawIOBase`."""
        try:
            return super().write(data)
        except OSError:
            return len(data)


def hold_streams() -> None:
    """Make stdin, stdout and stderr usable for the life of this process, and let writing to stderr never fail.

    A closed descriptor number gets ``/dev/null``. Otherwise the next file or socket that is opened would get the
    number, and with it output that is meant for a person.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free: this one
            os.set_inheritable(number, True)
    if sys.stdin is None:
        sys.stdin = open(0, closefd=False)  # noqa: SIM115
    if sys.stdout is None:
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    if sys.stderr is not None:
        with suppress(OSError):
            sys.stderr.flush()
    encoding, errors = getattr(sys.stderr, "encoding", None), "backslashreplace"
    raw = io.BufferedWriter(Unheard(2, "wb", closefd=False))
    sys.stderr = io.TextIOWrapper(raw, encoding=encoding, errors=errors, line_buffering=True)


def leave(code: int) -> NoReturn:
    """End the process. Nothing is flushed if a stopped terminal blocks a thread that has the lock of a stream: Python
    would wait for the lock, or abort."""
    # Only an endpoint loads this, and it is not worth loading for the others.
    screen = sys.modules.get("vhostpc.qmp.screen")
    if screen is not None and screen.held_threads:
        os._exit(code)
    sys.exit(code)


def let_stdout_go() -> None:
    """Discard the rest of our output, whose reader has gone, so that Python does not complain at exit."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)
