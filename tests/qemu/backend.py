"""Our back-ends as child processes, one for each end of a migration."""

from __future__ import annotations

import contextlib
import re
import socket
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from tests.qemu.net import Network
from tests.qemu.peers import REPO
from tests.qemu.proc import Child, child


class Backend:
    """A running back-end: where it listens, what it logs."""

    def __init__(self, path: Path, process: Child) -> None:
        self.path = path
        self.process = process

    def logged(self, pattern: str) -> list[str]:
        return [line for line in self.process.err.lines if re.search(pattern, line)]

    def complaints(self) -> list[str]:
        """Warnings and errors, but for a message that took long: on a busy machine it may."""
        told = self.logged(r"^(\S+ \S+ (WARNING|ERROR|CRITICAL) |vhostpc: |Traceback)")
        return [line for line in told if " took " not in line]

    async def ended(self, times: int) -> str:
        """Wait until so many postcopies have ended; the last one's line."""
        at = 0
        for _ in range(times):
            found = await self.process.err.find("postcopy ended", at)
            at = self.process.err.lines.index(found.string, at) + 1
        return self.process.err.lines[at - 1]


@contextlib.asynccontextmanager
async def backend(
    name: str,
    example: str,
    options: Sequence[str],
    tmp_path: Path,
    inside: Sequence[str] = (),
    through: Sequence[str] = (),
) -> AsyncIterator[Backend]:
    """Start ``examples/EXAMPLE`` for the length of a block.

    ``inside``: words that enter a namespace. ``through``: a program that runs the example in its own way.
    """
    argv = [*inside, sys.executable, *through, str(REPO / "examples" / example), *options]
    async with _listening(name, argv, tmp_path) as found:
        yield found


@contextlib.asynccontextmanager
async def served(
    name: str, target: str, tmp_path: Path, options: Sequence[str] = ()
) -> AsyncIterator[Backend]:
    """``vhostpc backend TARGET`` for the length of a block; ``target``: ``FILE:CLASS``."""
    argv = [sys.executable, "-m", "vhostpc", "backend", target, *options]
    async with _listening(name, argv, tmp_path) as found:
        yield found


@contextlib.asynccontextmanager
async def _listening(name: str, argv: Sequence[str], tmp_path: Path) -> AsyncIterator[Backend]:
    path = tmp_path / f"{name}.sock"
    # It is given the listening socket, so that a front-end may connect before it is ready.
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        path.unlink(missing_ok=True)  # of one that was killed
        listener.bind(str(path))
        listener.listen()
        whole = [*argv, "--fd", str(listener.fileno())]
        async with child(name, whole, pass_fds=[listener.fileno()]) as process:
            listener.close()
            yield Backend(path, process)


def bridge(
    network: Network,
    name: str,
    tap: str,
    tmp_path: Path,
    options: Sequence[str] = (),
    through: Sequence[str] = (),
) -> contextlib.AbstractAsyncContextManager[Backend]:
    """``examples/bridge`` on a tap of a test's network."""
    return backend(name, "bridge", ["--tap", tap, *options], tmp_path, network.inside(), through)


def disk(
    name: str, file: Path, tmp_path: Path, options: Sequence[str] = ()
) -> contextlib.AbstractAsyncContextManager[Backend]:
    """``examples/blk`` on a file."""
    return backend(name, "blk", ["--blk-file", str(file), *options], tmp_path)
