"""A child process driven by lines on its stdin, that dies with its parent and whose words are kept."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import trio

KEPT = 64 * 1024


class ChildFailed(Exception):
    """A child ended, or did not say what it should; the text has its last words."""


class Child:
    """A running child. ``said`` is what it wrote so far (stdout, with stderr unless that was apart)."""

    def __init__(self, name: str, process: subprocess.Popen[bytes]) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self.name = name
        self.process = process
        self.said = ""
        self.ended = trio.Event()
        self._news = trio.Event()
        self._pidfd = os.pidfd_open(process.pid)
        self._stdin = trio.lowlevel.FdStream(os.dup(process.stdin.fileno()))
        self._stdout = trio.lowlevel.FdStream(os.dup(process.stdout.fileno()))
        process.stdin.close()
        process.stdout.close()

    @property
    def pid(self) -> int:
        return self.process.pid

    async def _listen(self) -> None:
        async with self._stdout:
            async for data in self._stdout:
                self.said += data.decode(errors="replace")
                self._wake()
        # A child may close its stdout and live on.
        await trio.lowlevel.wait_readable(self._pidfd)
        self.ended.set()
        self._wake()

    def _wake(self) -> None:
        self._news.set()
        self._news = trio.Event()

    def last_words(self) -> str:
        return self.said[-4000:]

    async def until(self, pattern: str, begin: int = 0, limit: float = 30) -> re.Match[str]:
        """Wait until ``pattern`` stands in what was said from position ``begin`` on."""
        wanted = re.compile(pattern, re.S)
        with trio.move_on_after(limit):
            while True:
                if found := wanted.search(self.said, begin):
                    return found
                if self.ended.is_set():
                    raise ChildFailed(f"{self.name} ended before it said {pattern!r}:\n{self.last_words()}")
                await self._news.wait()
        raise ChildFailed(f"{self.name} did not say {pattern!r} within {limit} s:\n{self.last_words()}")

    async def send(self, text: str) -> int:
        """Write to the child's stdin; return the position in ``said`` at which the answer begins."""
        begin = len(self.said)
        try:
            await self._stdin.send_all(text.encode())
        except (trio.BrokenResourceError, trio.ClosedResourceError) as err:
            raise ChildFailed(f"{self.name} is gone:\n{self.last_words()}") from err
        return begin

    async def line(self, text: str, limit: float = 30) -> str:
        """Send one line and return the one line that answers it."""
        begin = await self.send(text + "\n")
        return (await self.until(r"[^\n]*\n", begin, limit))[0].strip()

    async def wait(self, limit: float = 30) -> int:
        """Wait until the child has ended and return its exit code."""
        with trio.move_on_after(limit):
            await self.ended.wait()
            return await trio.to_thread.run_sync(self.process.wait)
        raise ChildFailed(f"{self.name} still runs after {limit} s:\n{self.last_words()}")

    async def aclose(self) -> None:
        """End the child: kindly by SIGTERM, after three seconds by SIGKILL. Safe to call twice."""
        with trio.CancelScope(shield=True):
            await self._stdin.aclose()
            for stop in (self.process.terminate, self.process.kill):
                if self.process.poll() is None:
                    stop()
                with trio.move_on_after(3):
                    await self.ended.wait()
            self.process.wait()


def spawn(
    argv: Sequence[str | Path],
    *,
    stderr: int | None = subprocess.STDOUT,
    stdout: int = subprocess.PIPE,
    env: dict[str, str] | None = None,
    cwd: Path | None = None,
    pass_fds: Sequence[int] = (),
) -> subprocess.Popen[bytes]:
    """Start a process that the kernel kills when this one dies.

    Called on the trio thread on purpose: the death signal is tied to the *thread* that forks, and
    ``trio.open_process`` forks in a worker thread, which ends after ten idle seconds.
    """
    return subprocess.Popen(
        ["setpriv", "--pdeathsig", "KILL", *map(str, argv)],
        stdin=subprocess.PIPE,
        stdout=stdout,
        stderr=stderr,
        env={**os.environ, **(env or {})},
        cwd=cwd,
        pass_fds=pass_fds,
    )


@asynccontextmanager
async def open_child(
    argv: Sequence[str | Path],
    *,
    name: str | None = None,
    start: Callable[..., subprocess.Popen[bytes]] = spawn,
    **options: object,
) -> AsyncIterator[Child]:
    """Run a child for the length of the block; it is ended at the block's end."""
    child = Child(name or Path(str(argv[0])).name, start(argv, **options))
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(child._listen)
            try:
                yield child
            finally:
                await child.aclose()
                nursery.cancel_scope.cancel()
    finally:
        os.close(child._pidfd)
