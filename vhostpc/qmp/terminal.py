"""The text monitor as a server of its own: on a unix socket, or on this program's standard input and output.

A line in, its text and a prompt out, for people with ``nc -U``, ``socat`` or a terminal. It differs from QEMU in two
ways. It echoes nothing: QEMU edits lines itself and echoes each character with escape codes; here that is left to the
terminal, to ``rlwrap``, or, on this program's own terminal, to prompt_toolkit if it is installed (``editing.py``). And
a line that is too long is refused, where QEMU runs the part that fits.

A client has one task and at most one line and its answer in memory. A client that does not read delays only its task.
"""

from __future__ import annotations

import contextlib
import os
import select
import stat
import sys
from collections.abc import AsyncIterator, Iterator
from typing import TYPE_CHECKING, Protocol

import trio

from vhostpc.errors import VhostpcError, sentence
from vhostpc.logs import rationed_logger
from vhostpc.qmp import human
from vhostpc.qmp.commands import Session
from vhostpc.qmp.events import Events
from vhostpc.qmp.listening import SocketServer
from vhostpc.qmp.monitored import Endpoint
from vhostpc.qmp.screen import Screen, is_dumb

log = rationed_logger(__name__)

if TYPE_CHECKING:
    from vhostpc.qmp.editing import Editor

MAX_LINE = 4095
"""Bytes of the longest line, as with QEMU."""
PROMPT = "(qemu) "
CHUNK = 4096
_SURE = 512  # bytes that every pipe or socket accepts when it is ready for writing

_CONTROL = bytes(set(range(32)) - set(b"\t\r\n")) + b"\x7f"


class Lines:
    """Bytes to lines, which end with ``\
``, ``\\r`` or both. Control characters are dropped."""

    def __init__(self) -> None:
        self._rest = bytearray()
        self._too_long = False
        self._after_cr = False

    def feed(self, data: bytes) -> Iterator[str | None]:
        """The lines that are complete, None for one that was too long. Bytes that are not UTF-8 are kept (as
        surrogates)."""
        if self._after_cr and data:
            data = data.removeprefix(b"\n")
            self._after_cr = False
        self._after_cr = data.endswith(b"\r")
        *whole, rest = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
        for piece in whole:
            self._take(piece)
            yield None if self._too_long else self._rest.decode(errors="surrogateescape")
            self._rest.clear()
            self._too_long = False
        self._take(rest)

    def _take(self, piece: bytes) -> None:
        if not self._too_long:
            self._rest += piece.translate(None, _CONTROL)
            if len(self._rest) > MAX_LINE:
                self._too_long = True
                self._rest.clear()


def _bytes(text: str) -> bytes:
    """Encode; bytes that were not UTF-8 become the same bytes again."""
    try:
        return text.encode(errors="surrogateescape")
    except UnicodeEncodeError:
        return text.encode(errors="replace")


class _Wire(Protocol):
    """A source of lines and a sink for texts. ``newline``: the line end there."""

    newline: str

    async def receive(self) -> bytes:
        """Some bytes; none at the end."""
        ...

    async def send(self, data: bytes) -> None:
        """Raises OSError when the peer has gone."""
        ...

    async def ask(self) -> None:
        """Show the prompt: the next input is the answer to it. Raises OSError."""
        ...


class TextMonitor(SocketServer):
    """Serves one endpoint to people. ``quit`` ends the program (``Endpoint.quit``)."""

    def __init__(self, endpoint: Endpoint, events: Events) -> None:
        super().__init__()
        self.endpoint = endpoint
        self.events = events

    async def serve(self, client: trio.socket.SocketType) -> None:
        self.clients += 1
        try:
            with client:
                leaving = await self._run(_Socket(client))
        finally:
            self.clients -= 1
        if leaving:
            self.endpoint.quit()

    async def serve_stdio(self, in_fd: int = 0, out_fd: int = 1, screen: Screen | None = None) -> None:
        """Serve two descriptors, which stay the caller's and stay as they are (blocking, most likely).

        ``screen``: the log's screen, if that is the same terminal.
        Returns when the input ends: the program goes on, as QEMU does. A terminal's end-of-file key ends nothing.
        Raises VhostpcError if they are not open descriptors.
        """
        async with self._opened(in_fd, out_fd, screen) as stdio:
            leaving = await self._run(stdio)
        if leaving:
            self.endpoint.quit()

    @contextlib.asynccontextmanager
    async def _opened(self, in_fd: int, out_fd: int, screen: Screen | None) -> AsyncIterator[_Wire]:
        if editor := self._editor(in_fd, out_fd, screen):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(editor.run)
                try:
                    yield editor
                finally:
                    await editor.aclose()
                    nursery.cancel_scope.cancel()
            return
        try:
            stdio = _Stdio(in_fd, out_fd, screen)
        except OSError as exc:
            raise VhostpcError(f"The monitor has no standard input or output: {exc.strerror}") from exc
        try:
            yield stdio
        finally:
            stdio.close()

    def _editor(self, in_fd: int, out_fd: int, screen: Screen | None) -> Editor | None:
        """A person's terminal with editing by prompt_toolkit; None without the library, or without a person."""
        standard = in_fd == 0 and out_fd == 1 and sys.stdin is sys.__stdin__ and sys.stdout is sys.__stdout__
        if not standard or not (os.isatty(0) and os.isatty(1)) or is_dumb():
            return None
        try:
            from vhostpc.qmp.editing import Editor
        except ImportError:
            return None
        try:
            return Editor(PROMPT, lambda before: human.complete(self.endpoint.options, before), screen)
        except Exception as exc:
            log.warning("monitor: line editing is unavailable: %s", sentence(exc))
            return None

    async def _run(self, wire: _Wire) -> bool:
        """Serve to the end; whether that was ``quit``."""
        session = Session(self.endpoint, self.events, human.run, negotiated=True, text=True)
        lines = Lines()
        version = ".".join(map(str, session.dialect.version))

        async def say(text: str) -> None:
            text = text.replace("\r\n", "\n").replace("\n", wire.newline)
            await wire.send(_bytes(text))

        try:
            await say(f"QEMU {version} monitor - type 'help' for more information\n")
            await wire.ask()
            while data := await wire.receive():
                for line in lines.feed(data):
                    if line is None:
                        text = f"Error: a line has at most {MAX_LINE} bytes: this one was not run\n"
                    else:
                        text = await human.run(session, line)
                    await say(text)
                    if session.leaving:
                        return True
                    await wire.ask()
        except OSError:  # nobody is there any more
            pass
        finally:
            session.close()
        return False


class _Socket:
    newline = "\r\n"

    def __init__(self, sock: trio.socket.SocketType) -> None:
        self._sock = sock

    async def receive(self) -> bytes:
        return await self._sock.recv(CHUNK)

    async def send(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[await self._sock.send(view) :]

    async def ask(self) -> None:
        await self.send(PROMPT.encode())


class _Stdio:
    """Standard input and output. Their modes are shared with other programs, so they are opened anew, non-blocking,
    where that is possible. Elsewhere each write is so short that it surely fits (except on another user's terminal,
    which may block us while it is stopped)."""

    def __init__(self, in_fd: int, out_fd: int, screen: Screen | None) -> None:
        self._screen = screen
        self._terminal = os.isatty(in_fd)
        self.newline = "\n" if os.isatty(out_fd) else "\r\n"  # a terminal adds the rest
        self._in = _anew(in_fd, os.O_RDONLY)
        try:
            self._out = _anew(out_fd, os.O_WRONLY)
        except OSError:
            os.close(self._in)
            raise

    async def receive(self) -> bytes:
        while True:
            try:
                await trio.lowlevel.wait_readable(self._in)
            except PermissionError:  # a file is always ready
                await trio.lowlevel.checkpoint()
            try:
                data = os.read(self._in, CHUNK)
            except BlockingIOError:
                continue
            if self._screen is not None:
                self._screen.prompt = ""  # the person has ended the line
            if not data and self._terminal and not self._hung_up():
                return b"\n"  # the key for the end of a file: a new prompt
            return data

    def _hung_up(self) -> bool:
        poll = select.poll()
        poll.register(self._in, 0)
        return bool(poll.poll(0))

    async def send(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            try:
                await trio.lowlevel.wait_writable(self._out)
            except PermissionError:
                await trio.lowlevel.checkpoint()
            try:
                view = view[os.write(self._out, view[:_SURE]) :]
            except BlockingIOError:
                continue

    async def ask(self) -> None:
        await self.send(PROMPT.encode())
        if self._screen is not None:
            self._screen.prompt = PROMPT

    def close(self) -> None:
        if self._screen is not None:
            self._screen.prompt = ""
        for fd in (self._in, self._out):
            trio.lowlevel.notify_closing(fd)
            os.close(fd)


def _anew(fd: int, mode: int) -> int:
    kind = os.fstat(fd).st_mode
    if stat.S_ISFIFO(kind) or stat.S_ISCHR(kind):
        try:
            return os.open(f"/proc/self/fd/{fd}", mode | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
        except OSError:  # another user's terminal, a pipe that nobody reads
            pass
    return os.dup(fd)
