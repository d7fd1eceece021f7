"""Unix sockets by their paths: created with narrow permissions in place of stale ones, accepting connections,
and connecting."""

from __future__ import annotations

import errno
import grp
import os
import pwd
import secrets
import socket
import stat
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import trio

from vhostpc.errors import VhostpcError
from vhostpc.logs import rationed_logger

log = rationed_logger(__name__)

#: Temporary errors of accepting: they pass when sessions end and release their resources.
ACCEPT_LATER = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.ECONNABORTED})
#: Seconds until it is tried again.
ACCEPT_INTERVAL = 0.1
FULL = 0.02
"""Seconds between two attempts at a socket whose queue is full."""
MOST_BYTES = 108
"""Longest path of a socket (unix(7), ``sun_path``)."""
ROOM = 64
"""Bytes that a socket's name in a folder of :func:`socket_folder` may have."""
FOLDERS = ("/tmp", "/var/tmp", "/dev/shm")


def must_fit(path: str | bytes | os.PathLike[str]) -> None:
    """Raises OSError (ENAMETOOLONG) for a path that no unix socket can have."""
    if (count := len(os.fsencode(path))) > MOST_BYTES:
        raise OSError(
            errno.ENAMETOOLONG,
            f"a unix socket's path can have at most {MOST_BYTES} bytes, and this one has {count}",
        )


@contextmanager
def socket_folder(prefix: str) -> Iterator[Path]:
    """A new folder for sockets, removed at the end: in ``TMPDIR``, or elsewhere if that name is too long for a socket.

    Raises VhostpcError where none can be made.
    """
    wanted = tempfile.gettempdir()
    name = f"/{prefix}12345678/"
    fits = [place for place in (wanted, *FOLDERS) if len(os.fsencode(place)) + len(name) + ROOM <= MOST_BYTES]
    place = next((place for place in fits if os.access(place, os.W_OK | os.X_OK)), None)
    if place is None:
        raise VhostpcError(
            f"TMPDIR is {wanted}, which is too long for unix sockets ({MOST_BYTES} bytes), and none of"
            f" {', '.join(FOLDERS)} can be written to: set TMPDIR to another folder"
        )
    if place != wanted:
        log.warning("TMPDIR is too long for unix sockets: they are created under %s", place)
    with tempfile.TemporaryDirectory(prefix=prefix, dir=place) as folder:
        yield Path(folder)


def bind(path: str | os.PathLike[str], *, mode: int = 0o600, group: int | None = None) -> socket.socket:
    """A listening unix socket at ``path`` with that mode and group; a stale socket file is replaced.

    Raises VhostpcError when something else is at the path, or another process has it.
    """
    listener, file = _bind(path, mode, group)
    os.close(file)
    return listener


@contextmanager
def listening(
    path: str | os.PathLike[str], *, mode: int = 0o600, group: int | None = None
) -> Iterator[socket.socket]:
    """As :func:`bind`, for the length of a block, which may close it. Then the file is removed if it is still ours."""
    listener, file = _bind(path, mode, group)
    try:
        with listener:
            yield listener
    finally:
        remove(path, file)


def _bind(path: str | os.PathLike[str], mode: int, group: int | None) -> tuple[socket.socket, int]:
    """The socket and its file."""
    path = Path(path)
    with ExitStack() as unless_bound:
        try:
            must_fit(path)
            _clear(path)
            listener = unless_bound.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            # Linux gives the file the mode of the socket, less the umask: so it is narrow from its first moment.
            os.fchmod(listener.fileno(), mode if group is None else mode & 0o600)
            listener.bind(os.fspath(path))
            file = bound_file(path)
            unless_bound.callback(remove, path, file)
            if group is not None:
                _give(file, group, path)
            if stat.S_IMODE(os.fstat(file).st_mode) != mode:
                os.chmod(_through(file), mode)
            listener.listen()
        except OSError as e:
            raise VhostpcError(f"cannot listen on {path}: {e.strerror or e}") from None
        unless_bound.pop_all()
    return listener, file


def _give(file: int, group: int, path: Path) -> None:
    """Make ``group`` the group of a socket file. Raises VhostpcError with the reason if it cannot be."""
    try:
        os.chown(_through(file), -1, group)
    except OSError as e:
        why = e.strerror
        if e.errno == errno.EPERM:
            user = os.geteuid()
            why = f"user {_named(pwd.getpwuid, user)} is not in that group"
        raise VhostpcError(
            f"cannot listen on {path}: its group cannot be {_named(grp.getgrgid, group)}: {why}"
        ) from None


def _named(find: Callable[[int], Sequence[object]], number: int) -> str:
    """The name and number of a user or group, as far as the system knows one."""
    try:
        return f"{find(number)[0]} ({number})"
    except (KeyError, OSError):
        return str(number)


def bound_file(path: str | bytes | os.PathLike[str]) -> int:
    """A descriptor of the file that a socket of this process has just been bound to. Raises OSError."""
    fd = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    found = os.fstat(fd)
    if not stat.S_ISSOCK(found.st_mode) or found.st_uid != os.geteuid():
        os.close(fd)
        raise FileExistsError(errno.EEXIST, "somebody has replaced it")
    return fd


def remove(path: str | bytes | os.PathLike[str], file: int) -> None:
    """Remove the file at ``path`` if it is still that of the descriptor, which is closed.

    As long as the descriptor is open, no other file gets the same inode number.
    """
    with suppress(OSError):
        if os.path.samestat(os.lstat(path), os.fstat(file)):
            os.unlink(path)
    os.close(file)


def _through(fd: int) -> str:
    """A name for the file of a descriptor, whatever is at its path now."""
    return f"/proc/self/fd/{fd}"


def _clear(path: Path) -> None:
    """Remove a stale socket file that no process has bound. Raises VhostpcError, OSError."""
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(found.st_mode):
        raise VhostpcError(f"{path} exists and is not a socket; it was left alone")
    taken = VhostpcError(f"{path}: another process is listening there")
    if is_bound(path):
        raise taken
    # Another process may be doing the same: exactly the file that was examined is removed.
    aside = path.with_name(f".{path.name[:200]}.{secrets.token_hex(4)}")
    os.rename(path, aside)
    if is_bound(aside) or not os.path.samestat(os.lstat(aside), found):
        with suppress(FileExistsError):
            os.link(aside, path, follow_symlinks=False)
        os.unlink(aside)
        raise taken
    os.unlink(aside)


def is_bound(path: str | os.PathLike[str]) -> bool:
    """Whether a process has the socket at ``path``. Never waits, and that process does not notice.

    A connection would be noticed, and would wait where the queue is full. A datagram socket cannot connect to a stream
    socket: the error is EPROTOTYPE if a process has that one, ECONNREFUSED if none has. Raises OSError where this
    process may not ask.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
        probe.setblocking(False)
        code = probe.connect_ex(os.fspath(path))
    if code in (errno.EACCES, errno.ENOENT, errno.ENAMETOOLONG):
        raise OSError(code, os.strerror(code))
    return code != errno.ECONNREFUSED


async def connect(path: str | bytes | os.PathLike[str]) -> trio.socket.SocketType:
    """Connect to the unix socket at ``path``. Waits while its queue is full. Raises OSError."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        await connect_to(sock, path)
    except BaseException:
        sock.close()
        raise
    return trio.socket.from_stdlib_socket(sock)


async def connect_to(sock: socket.socket, path: str | bytes | os.PathLike[str]) -> None:
    """As :func:`connect`, with a socket that the caller closes."""
    must_fit(path)
    sock.setblocking(False)
    await trio.lowlevel.checkpoint()
    # EAGAIN: the queue there is full. Only another attempt shows that it no longer is
    # (trio's own connect would take the socket, which is writable, for connected).
    while code := sock.connect_ex(os.fspath(path)):
        if code != errno.EAGAIN:
            raise OSError(code, os.strerror(code))
        await trio.sleep(FULL)


async def accept(listener: trio.socket.SocketType) -> trio.socket.SocketType:
    """The next connection. Waits while this process or the computer is out of descriptors or memory."""
    told = False
    while True:
        try:
            connection, _ = await listener.accept()
        except OSError as e:
            if e.errno not in ACCEPT_LATER:
                raise
            if not told:
                log.error("new connections have to wait: %s", e.strerror)
            told = True
            await trio.sleep(ACCEPT_INTERVAL)
        else:
            return connection
