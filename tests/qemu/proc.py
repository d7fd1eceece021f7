"""Child processes under trio: their output as lines to wait for, their stderr in every failure.

Children die with this process (PR_SET_PDEATHSIG, by setpriv).  That signal goes with the *thread* that
started them, so they are started on the main thread and never on one of trio's borrowed threads, which come
and go.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from types import TracebackType

import trio

WAIT = 60.0  # seconds that a wait may last when nothing else is said


@contextlib.contextmanager
def unwrapped() -> Iterator[None]:
    """Take a lone exception out of the group that a nursery made of it, or the nurseries of a test would
    bury it so deep that pytest does not show it."""
    try:
        yield
    except BaseExceptionGroup as group:
        if len(group.exceptions) == 1:
            raise group.exceptions[0] from None
        raise


class Lines:
    """Lines that arrive; any number of tasks can wait for one that matches."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.lines: list[str] = []
        self.closed = False
        self._changed = trio.Event()

    def add(self, line: str) -> None:
        self.lines.append(line)
        self._wake()

    def close(self) -> None:
        self.closed = True
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    async def changed(self) -> None:
        """Wait for the next line, or the end."""
        await self._changed.wait()

    def __len__(self) -> int:
        return len(self.lines)

    async def find(self, pattern: str, since: int = 0, limit: float = WAIT) -> re.Match[str]:
        """The first match at or after line ``since``; fails after ``limit`` seconds or when all ended."""
        regex = re.compile(pattern)
        at = since
        with trio.move_on_after(limit):
            while True:
                for line in self.lines[at:]:
                    at += 1
                    if found := regex.search(line):
                        return found
                if self.closed:
                    raise AssertionError(f"{self.name} ended without a line like {pattern!r}:\n{self.tail()}")
                await self.changed()
        raise AssertionError(f"{self.name}: no line like {pattern!r} in {limit:g} s:\n{self.tail()}")

    def tail(self, count: int = 30) -> str:
        return "\n".join(f"  {self.name}| {line}" for line in self.lines[-count:])


class Child:
    """A running child: ``out`` and ``err`` are its lines, ``send`` writes to its standard input."""

    def __init__(self, name: str, popen: subprocess.Popen[bytes]) -> None:
        self.name = name
        self.popen = popen
        self.out = Lines(name)
        self.err = Lines(f"{name} stderr")
        self._pidfd = os.pidfd_open(popen.pid)
        assert popen.stdin
        assert popen.stdout
        assert popen.stderr
        self._stdin = trio.lowlevel.FdStream(os.dup(popen.stdin.fileno()))
        self._pipes = [
            (trio.lowlevel.FdStream(os.dup(popen.stdout.fileno())), self.out),
            (trio.lowlevel.FdStream(os.dup(popen.stderr.fileno())), self.err),
        ]
        for pipe in (popen.stdin, popen.stdout, popen.stderr):
            pipe.close()

    @property
    def pid(self) -> int:
        return self.popen.pid

    @property
    def alive(self) -> bool:
        return self.popen.poll() is None

    async def send(self, text: str) -> None:
        await self._stdin.send_all(text.encode())

    async def close_stdin(self) -> None:
        await self._stdin.aclose()

    async def wait(self, limit: float = WAIT) -> int:
        """Wait for the end; the exit code, negative for a signal."""
        with trio.fail_after(limit):
            while self.popen.poll() is None:
                await trio.lowlevel.wait_readable(self._pidfd)
        return int(self.popen.returncode)

    async def stop(self, sig: int = signal.SIGTERM, limit: float = 10) -> int:
        """Ask it to end, insist after ``limit`` seconds."""
        if self.alive:
            self.popen.send_signal(sig)
        try:
            return await self.wait(limit)
        except trio.TooSlowError:
            self.popen.kill()
            return await self.wait()

    def tail(self) -> str:
        return "\n".join(filter(None, [self.out.tail(), self.err.tail()]))

    async def _read(self, pipe: trio.lowlevel.FdStream, lines: Lines) -> None:
        rest = b""
        async with pipe:
            async for data in pipe:
                *whole, rest = (rest + data).split(b"\n")
                for line in whole:
                    lines.add(line.decode(errors="replace").rstrip("\r"))
        if rest:
            lines.add(rest.decode(errors="replace"))
        lines.close()

    async def drained(self) -> None:
        """Wait until both outputs have ended."""
        for lines in (self.out, self.err):
            while not lines.closed:
                await lines.changed()


class _Explained:
    """Adds the children's last lines to an exception that passes."""

    def __init__(self, child: Child) -> None:
        self.child = child

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        if isinstance(exc, Exception):
            state = "running" if self.child.alive else f"ended with {self.child.popen.returncode}"
            exc.add_note(f"{self.child.name} ({state}):\n{self.child.tail()}")


@contextlib.asynccontextmanager
async def child(
    name: str,
    argv: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    pass_fds: Iterable[int] = (),
    cwd: str | None = None,
) -> AsyncIterator[Child]:
    """Start a child for the length of a block; it is ended (SIGTERM, then SIGKILL) when the block is left."""
    popen = subprocess.Popen(  # noqa: ASYNC220 - see the head of this file
        ["setpriv", "--pdeathsig", "KILL", *argv],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, **(env or {})},
        pass_fds=tuple(pass_fds),
        cwd=cwd,
    )
    it = Child(name, popen)
    try:
        with unwrapped():
            async with trio.open_nursery() as nursery:
                for pipe, lines in it._pipes:
                    nursery.start_soon(it._read, pipe, lines)
                try:
                    with _Explained(it):
                        yield it
                finally:
                    with trio.CancelScope(shield=True):
                        await it.stop()
                        with contextlib.suppress(trio.ClosedResourceError):
                            await it.close_stdin()
                    # A grandchild may hold the pipes open: give the last lines a moment, then let go.
                    with trio.move_on_after(2) as last:
                        await it.drained()
                    if last.cancelled_caught:
                        nursery.cancel_scope.cancel()
    finally:
        os.close(it._pidfd)


async def run(argv: Sequence[str], limit: float = WAIT) -> str:
    """Run a short command to its end; its output, or a failure with its stderr."""
    async with child(argv[0], argv) as it:
        code = await it.wait(limit)
        await it.drained()
        if code:
            raise AssertionError(f"{' '.join(argv)} failed with {code}")
    return "\n".join(it.out.lines)
