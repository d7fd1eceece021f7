"""What a channel is made of: a socket, pipes (a command's, or passed ones), a file. Errors in QEMU's words."""

from __future__ import annotations

import fcntl
import os
import select
import signal
import socket
import stat
import subprocess
import sys
import termios
from collections.abc import Awaitable, Callable, Sequence
from contextlib import ExitStack, suppress
from typing import Literal, Protocol, TypeVar

import trio

from vhostpc._native.entries import Thread
from vhostpc._native.threads import KeptThread
from vhostpc.errors import ChannelLost, Shortage
from vhostpc.logs import rationed_logger

S = TypeVar("S")
T = TypeVar("T")
Way = Literal["out", "in"]
"""Which way the stream of a migration goes, seen from here."""

LAST_WORD = 10.0
"""Seconds that a command which brought a stream has to end once its pipes are closed: then it is killed."""

log = rationed_logger(__name__)


UNSENT = 32 << 10
"""Bytes that may lie in the kernel before a requested page."""


class Ends(Protocol):
    """Descriptors, -1 for a direction that does not exist; ``receive`` and ``send`` raise ChannelLost."""

    in_fd: int
    out_fd: int

    async def receive(self, most: int) -> bytes: ...

    async def send(self, data: bytes) -> None: ...

    def shut_down(self) -> None: ...

    def keep_unsent_small(self) -> None: ...

    def limit_silence(self, seconds: float) -> None: ...

    def unsent(self) -> int: ...

    async def aclose(self) -> None: ...


def _lost(doing: str, what: str, why: BaseException | None) -> ChannelLost:
    text = os.strerror(why.errno) if isinstance(why, OSError) and why.errno else "the channel is closed"
    return ChannelLost(f"Unable to {doing} {what}: {text}")


def _queued(fd: int, which: int) -> int:
    """Bytes in the kernel, by an ioctl that tells them (tcp(7), unix(7), pipe(7)); 0 where it does not."""
    if fd < 0:
        return 0
    try:
        raw = fcntl.ioctl(fd, which, bytes(4))
    except OSError:
        return 0
    return int.from_bytes(raw, sys.byteorder)


class SocketEnds:
    """A connected stream socket. ``shut_down`` wakes all that use it, here and at the peer."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        self.in_fd = self.out_fd = stream.socket.fileno()
        # trio keeps little unsent data in the kernel; the C loop that fills the socket needs its whole buffer.
        with suppress(OSError):
            stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, 0)

    async def receive(self, most: int) -> bytes:
        try:
            return bytes(await self._stream.receive_some(most))
        except (trio.BrokenResourceError, trio.ClosedResourceError) as e:
            raise _lost("read from", "socket", e.__cause__) from None

    async def send(self, data: bytes) -> None:
        try:
            await self._stream.send_all(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as e:
            raise _lost("write to", "socket", e.__cause__) from None

    def keep_unsent_small(self) -> None:
        with suppress(OSError):
            if self._stream.socket.family == socket.AF_UNIX:
                self._stream.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, UNSENT)
            else:  # data in flight is not a queue
                self._stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT)

    def limit_silence(self, seconds: float) -> None:
        sock = self._stream.socket
        if sock.family not in (socket.AF_INET, socket.AF_INET6):
            return
        probe = max(1, int(seconds / 4))
        with suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, probe)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, probe)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(seconds * 1000))

    def unsent(self) -> int:
        return _queued(self._stream.socket.fileno(), termios.TIOCOUTQ)

    def shut_down(self) -> None:
        with suppress(OSError):
            self._stream.socket.shutdown(socket.SHUT_RDWR)

    async def aclose(self) -> None:
        await trio.aclose_forcefully(self._stream)


class Command:
    """A child in a process group of its own. Blocks for a moment: it is started on the calling thread."""

    def __init__(self, args: Sequence[str], stdin: int, stdout: int) -> None:
        # A group of its own, so that a shell's children end with it.
        self._popen = subprocess.Popen(args, stdin=stdin, stdout=stdout, process_group=0)
        self._reaped = False
        try:
            self._pidfd = os.pidfd_open(self._popen.pid)
        except OSError:
            self.kill()
            self._popen.wait()
            raise

    def kill(self) -> None:
        """Kill the whole group. Until the child is reaped, no other group can have its number."""
        if not self._reaped:
            with suppress(ProcessLookupError):
                os.killpg(self._popen.pid, signal.SIGKILL)

    async def finish(self, patience: float) -> None:
        """Wait for its end, kill it after ``patience`` seconds or when cancelled, and reap it."""
        ended = False
        try:
            with trio.move_on_after(patience):
                await trio.lowlevel.wait_readable(self._pidfd)
                ended = True
        finally:
            if not ended:
                self.kill()
                with trio.CancelScope(shield=True):
                    await trio.lowlevel.wait_readable(self._pidfd)
            self._reaped = True
            code = self._popen.wait()
            os.close(self._pidfd)
            if ended and code:
                log.warning("migration: the command ended with %d", code)


class PipeEnds:
    """Pipes, or a character device that can be polled. Takes the descriptors over; they become non-blocking."""

    def __init__(
        self, in_fd: int, out_fd: int, command: Command | None = None, *, patience: float = LAST_WORD
    ) -> None:
        self.in_fd, self.out_fd = in_fd, out_fd
        self._command = command
        self._patience = patience
        self._what = "command" if command else "pipe"
        self._fds = {fd for fd in (in_fd, out_fd) if fd >= 0}
        for fd in self._fds:
            os.set_blocking(fd, False)

    async def receive(self, most: int) -> bytes:
        return await self._when_ready(os.read, self.in_fd, most, trio.lowlevel.wait_readable, "read from")

    async def send(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            count = await self._when_ready(
                os.write, self.out_fd, view, trio.lowlevel.wait_writable, "write to"
            )
            view = view[count:]

    async def _when_ready(
        self, do: Callable[[int, S], T], fd: int, what: S, ready: Callable[[int], Awaitable[None]], doing: str
    ) -> T:
        await trio.lowlevel.checkpoint()
        while True:
            if not self._fds:
                raise _lost(doing, self._what, None)
            try:
                return do(fd, what)
            except BlockingIOError:
                pass
            except OSError as e:
                raise _lost(doing, self._what, e) from None
            try:
                await ready(fd)
            except trio.ClosedResourceError:
                raise _lost(doing, self._what, None) from None

    def keep_unsent_small(self) -> None:
        pass  # postcopy needs a socket

    def limit_silence(self, seconds: float) -> None:
        pass

    def unsent(self) -> int:
        return _queued(self.out_fd if self._fds else -1, termios.FIONREAD)

    def shut_down(self) -> None:
        for fd in self._fds:
            trio.lowlevel.notify_closing(fd)
        if self._command:
            self._command.kill()

    async def aclose(self) -> None:
        fds, self._fds = self._fds, set()
        for fd in fds:
            trio.lowlevel.notify_closing(fd)
            os.close(fd)
        if command := self._command:
            self._command = None
            await command.finish(self._patience)


class FileEnds:
    """A file, or anything else that cannot be polled; one way. Used on a thread, which no peer can block."""

    def __init__(self, fd: int, way: Way, thread: KeptThread) -> None:
        """Takes both over: the last word of a stream must not fail for lack of a thread."""
        self.in_fd, self.out_fd = (fd, -1) if way == "in" else (-1, fd)
        self._fd = fd
        self._thread = thread

    async def _on_thread(self, call: Callable[[int], T], doing: str) -> T:
        if self._fd < 0:
            raise _lost(doing, "file", None)
        fd = self._fd
        try:
            return await self._thread.call(lambda: call(fd))
        except OSError as e:
            raise _lost(doing, "file", e) from None

    async def receive(self, most: int) -> bytes:
        return await self._on_thread(lambda fd: os.read(fd, most), "read from")

    async def send(self, data: bytes) -> None:
        def write(fd: int) -> None:
            view = memoryview(data)
            while view:
                view = view[os.write(fd, view) :]

        await self._on_thread(write, "write to")

    def keep_unsent_small(self) -> None:
        pass  # postcopy needs a socket

    def limit_silence(self, seconds: float) -> None:
        pass

    def unsent(self) -> int:
        return 0

    def shut_down(self) -> None:
        pass

    async def aclose(self) -> None:
        """Waits for the thread's current call."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            with trio.CancelScope(shield=True):
                await self._thread.call(lambda: os.close(fd))
            self._thread.close()


def run(args: Sequence[str], way: Way) -> PipeEnds:
    """Start a command; its standard input and output are the channel. Raises ChannelLost.

    A command that receives a stream may take any time to end, also after its pipes were closed: it has the machine. A
    command that sent one has :data:`LAST_WORD` seconds.
    """
    if not args:
        raise ChannelLost("A command to execute has at least one word")
    with ExitStack() as kept, ExitStack() as passed:
        try:
            stdin, out_fd = os.pipe()
            passed.callback(os.close, stdin)
            kept.callback(os.close, out_fd)
            in_fd, stdout = os.pipe()
            passed.callback(os.close, stdout)
            kept.callback(os.close, in_fd)
            command = Command(args, stdin, stdout)
        except (OSError, ValueError) as e:
            why = e.strerror if isinstance(e, OSError) else e
            raise ChannelLost(f"Failed to execute child process “{args[0]}” ({why})") from None
        kept.pop_all()
    return PipeEnds(in_fd, out_fd, command, patience=LAST_WORD if way == "in" else float("inf"))


async def open_file(path: str, offset: int, way: Way) -> FileEnds:
    """Open a file at an offset; a file to be written is truncated there. Raises ChannelLost."""
    flags = (os.O_RDONLY if way == "in" else os.O_CREAT | os.O_WRONLY) | os.O_CLOEXEC

    def open_it() -> int:
        # Do not wait for the other end of a pipe, which is refused.
        fd = os.open(path, flags | os.O_NONBLOCK, 0o600)
        try:
            kind = os.fstat(fd).st_mode
            if stat.S_ISDIR(kind):
                raise IsADirectoryError(0, "Is a directory")
            if stat.S_ISFIFO(kind):
                raise OSError(0, "it is a pipe, which is passed as fd:")
            if way == "out" and stat.S_ISREG(kind):
                os.ftruncate(fd, offset)
            if offset:
                os.lseek(fd, offset, os.SEEK_SET)
            os.set_blocking(fd, True)
        except BaseException:
            os.close(fd)
            raise
        return fd

    thread = file_thread()
    try:
        # Also when cancelled, so that it cannot get lost.
        fd = await thread.call(open_it)
    except BaseException as e:
        thread.close()
        if not isinstance(e, OSError | ValueError | OverflowError):
            raise
        why = e.strerror if isinstance(e, OSError) else "Invalid argument"
        raise ChannelLost(f"Could not {'open' if way == 'in' else 'create'} '{path}': {why}") from None
    return FileEnds(fd, way, thread)


def file_thread() -> KeptThread:
    """The thread of a file. Raises ChannelLost."""
    try:
        return KeptThread(Thread.FILE, "reading or writing a file")
    except Shortage as e:
        raise ChannelLost(str(e)) from None


def inherited(name: str) -> int:
    """A descriptor that this process was started with, by its number: taken over. Raises ChannelLost.

    Not one that this process opened: such a descriptor would be closed at an exec; inherited ones were not.
    """
    number = int(name) if name.isascii() and name.isdigit() and len(name) < 10 else -1
    try:
        if number < 0 or fcntl.fcntl(number, fcntl.F_GETFD) & fcntl.FD_CLOEXEC:
            raise OSError
        fd = fcntl.fcntl(number, fcntl.F_DUPFD_CLOEXEC, 3)
    except OSError:
        raise ChannelLost(f"Invalid file descriptor number '{name}'") from None
    if number > 2:
        os.close(number)
    else:  # The next file that is opened must not become a standard stream.
        with open(os.devnull, "r+b", buffering=0) as null:
            os.dup2(null.fileno(), number)
    return fd


def passed(fd: int, name: str, way: Way) -> Ends:
    """Make ends of a descriptor. Owns it, also when it raises ChannelLost."""
    with ExitStack() as mine:
        mine.callback(os.close, fd)
        ends = _of_descriptor(fd, f"fd:{name}", way)
        mine.pop_all()
    return ends


def _of_descriptor(fd: int, words: str, way: Way) -> Ends:
    try:
        kind = os.fstat(fd).st_mode
        flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    except OSError as e:
        raise ChannelLost(f"{words}: {e.strerror}") from None
    access = flags & os.O_ACCMODE
    if flags & os.O_PATH:
        raise ChannelLost(f"{words} is not open: it only names a file")
    if stat.S_ISSOCK(kind):
        sock = socket.socket(fileno=fd)
        if sock.type != socket.SOCK_STREAM or sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            sock.detach()
            raise ChannelLost(f"{words} is not a connected stream socket")
        sock.setblocking(False)
        return SocketEnds(trio.SocketStream(trio.socket.from_stdlib_socket(sock)))
    if access == (os.O_WRONLY if way == "in" else os.O_RDONLY):
        raise ChannelLost(f"{words} cannot be {'read from' if way == 'in' else 'written to'}")
    if stat.S_ISFIFO(kind):
        return PipeEnds(fd, -1) if way == "in" else PipeEnds(-1, fd)
    if stat.S_ISCHR(kind) and _can_be_polled(fd):
        two_way = access == os.O_RDWR
        return PipeEnds(fd if two_way or way == "in" else -1, fd if two_way or way == "out" else -1)
    if stat.S_ISREG(kind) or stat.S_ISBLK(kind) or stat.S_ISCHR(kind):
        return FileEnds(fd, way, file_thread())
    raise ChannelLost(f"{words} is neither a socket nor a pipe nor a file")


def _can_be_polled(fd: int) -> bool:
    with select.epoll() as poll:
        try:
            poll.register(fd, 0)
        except PermissionError:
            return False
    return True
