"""The connection that a migration goes over: to connect, to listen for one, to use.

Errors are in QEMU's words, as recorded from 7.2 and 10.0, which say the same.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import stat
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import ExitStack, asynccontextmanager, suppress
from dataclasses import astuple
from typing import Any

import trio

from vhostpc.errors import ChannelLost, MigrationRefused
from vhostpc.listener import bound_file, remove
from vhostpc.listener import connect as connect_unix
from vhostpc.migration import ends
from vhostpc.migration.uri import Address, Exec, Fd, File, Tcp, Unix

MANY = 128
"""Connections that wait to be accepted, where many are expected: one by one they are connected to somewhere else."""
UNIX_PATH = 107
"""Bytes of the longest path of a unix socket."""


class Channel:
    """A connected transport: Python sends and receives small pieces, C loops use the descriptors.

    ``in_fd`` and ``out_fd`` are the descriptors to read from and to write to, the same one for a socket; -1 where
    the channel goes one way only. They belong to the channel, and are non-blocking if their kind can be: a regular
    file cannot, and poll() always reports it ready. Python reads and writes a file on a thread, ``vpc-file``.
    """

    def __init__(self, stream: trio.SocketStream | ends.Ends) -> None:
        self._ends: ends.Ends = ends.SocketEnds(stream) if isinstance(stream, trio.SocketStream) else stream
        self._shut = False
        self.number = 0
        """Which connection of its listener it is: 0 is the main one."""
        self.in_fd = self._ends.in_fd
        self.out_fd = self._ends.out_fd

    @property
    def two_way(self) -> bool:
        """Whether the destination can answer: postcopy and a return path need it."""
        return self.in_fd >= 0 and self.out_fd >= 0

    async def receive_some(self, most: int) -> bytes:
        """Up to ``most`` bytes, none at the end. Raises ChannelLost when the connection broke or was shut down."""
        if self.in_fd < 0:
            raise ChannelLost("Nothing can be read from this channel: it goes one way")
        self._look()
        data = await self._ends.receive(most)
        if not data:
            self._look()
        return data

    async def send_all(self, data: bytes) -> None:
        """Raises ChannelLost when the connection broke or was shut down."""
        if self.out_fd < 0:
            raise ChannelLost("Nothing can be written to this channel: it goes one way")
        self._look()
        await self._ends.send(data)

    def _look(self) -> None:
        if self._shut:
            raise ChannelLost("The channel was shut down")

    def shut_down(self) -> None:
        """Break both directions. Never waits; a task that waits in a method here gets ChannelLost.

        A C loop that polls a descriptor is woken if the descriptor is a socket's or a command's. (A command is killed
        with its process group, so its ends of the pipes close, unless one of its children has left the group.) At a
        pipe that was passed to us the loop sleeps on until the peer acts, and a file never makes it sleep. So write the
        loop's stop eventfd, too.
        """
        self._shut = True
        self._ends.shut_down()

    def keep_unsent_small(self) -> None:
        """From now on keep little unsent data in the kernel: urgent data must not wait behind it."""
        self._ends.keep_unsent_small()

    def limit_silence(self, seconds: float) -> None:
        """Have the kernel break a TCP connection whose peer is gone for ``seconds``. 0, or no TCP: nothing.

        By keep-alive where nothing is sent, and by TCP_USER_TIMEOUT where something is (tcp(7)).
        """
        if seconds:
            self._ends.limit_silence(seconds)

    @property
    def hung_up(self) -> bool:
        """The peer has closed it, or it is broken, and nothing is left to read. Never waits."""
        poll = select.poll()
        poll.register(self.in_fd, select.POLLIN | select.POLLRDHUP)
        return any(found & ~select.POLLIN for _, found in poll.poll(0))

    def unsent(self) -> int:
        """Bytes that the peer has not taken: unacknowledged (TCP), unread (a unix socket, a pipe). 0 for a file."""
        return self._ends.unsent()

    async def aclose(self) -> None:
        """Close the descriptors, which no loop may be using any more, and see a command to its end.

        A command to which a stream was sent may take any time to end; after a cancellation or :meth:`shut_down` it is
        killed. A command from which a stream was read has 10 seconds. In the end nothing of the channel is left,
        cancelled or not.
        """
        await self._ends.aclose()

    async def __aenter__(self) -> Channel:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()


Connect = Callable[[], Awaitable[Channel]]
"""Makes another connection between the same two; it is closed where the first one is."""


async def connect(address: Address) -> Channel:
    """Connect to where a machine is to be sent. Raises ChannelLost; owns an ``Fd`` from the call on."""
    try:
        match address:
            case Fd():
                return Channel(_descriptor(address, "out"))
            case _ if _has_nul(address):
                raise ChannelLost("An address has no NUL character in it")
            case Tcp():
                return await _connect_tcp(address)
            case Unix():
                return await _connect_unix(address)
            case Exec():
                await trio.lowlevel.checkpoint()
                return Channel(ends.run(address.args, "out"))
            case File():
                return Channel(await ends.open_file(address.path, address.offset, "out"))
    except OSError as e:  # no more descriptors, most likely
        raise ChannelLost(f"Unable to connect: {e.strerror or e}") from None


class Listener:
    """Waits for connections, for as many as its caller takes, until its block ends. See :func:`listen`.

    ``socket_address``: where it listens, as query-migrate reports it; empty if it is no socket.
    """

    def __init__(self, many: bool = False) -> None:
        self.socket_address: list[dict[str, Any]] = []
        self.backlog = MANY if many else 1
        self._channel: Channel | None = None
        self._accepted = 0
        self._sockets: list[socket.socket] = []
        self._stack = ExitStack()
        self._poll: select.epoll | None = None

    async def accept(self) -> Channel:
        """The next channel; the caller's to close. A descriptor, a command or a file makes one only.

        The first one is the main one, as with QEMU (:attr:`Channel.number`). Raises ChannelLost, also after the block.
        """
        await trio.lowlevel.checkpoint()
        if self._channel is not None:
            channel, self._channel = self._channel, None
            return channel
        while self._poll is not None:
            for listening in self._sockets:
                try:
                    sock, _ = listening.accept()
                except (BlockingIOError, ConnectionAbortedError):
                    continue
                except OSError as e:
                    raise ChannelLost(f"Unable to accept connection: {e.strerror or e}") from None
                sock.setblocking(False)
                channel = Channel(trio.SocketStream(trio.socket.from_stdlib_socket(sock)))
                channel.number, self._accepted = self._accepted, self._accepted + 1
                return channel
            # One set for all of them: its readiness is that of any.
            with suppress(trio.ClosedResourceError):
                await trio.lowlevel.wait_readable(self._poll.fileno())
        raise ChannelLost("No other connection comes from there, or the listener was closed")

    def _listen_at(self, sock: socket.socket) -> None:
        if self._poll is None:
            self._poll = self._stack.enter_context(select.epoll())
        self._stack.enter_context(sock)
        sock.setblocking(False)
        self._poll.register(sock, select.EPOLLIN)
        self._sockets.append(sock)

    def _close(self) -> None:
        if self._poll is not None:
            trio.lowlevel.notify_closing(self._poll.fileno())
            self._poll = None
        self._sockets = []
        self._stack.close()

    async def _aclose(self) -> None:
        self._close()
        if self._channel is not None:
            self._channel.shut_down()
            await self._channel.aclose()


@asynccontextmanager
async def listen(address: Address, *, many: bool = False) -> AsyncIterator[Listener]:
    """Listen for the length of a block. Owns an ``Fd`` from the call on. ``many``: a few may wait to be accepted.

    Raises MigrationRefused at the block's beginning, with the answer of ``migrate-incoming``.
    """
    listener = Listener(many)
    try:
        try:
            await _begin(listener, address)
        except ChannelLost as e:
            raise MigrationRefused(str(e)) from None
        except OSError as e:
            raise MigrationRefused(f"Unable to listen: {e.strerror or e}") from None
        yield listener
    finally:
        await listener._aclose()


async def _begin(listener: Listener, address: Address) -> None:
    match address:
        case Fd():
            listener._channel = Channel(_descriptor(address, "in"))
        case _ if _has_nul(address):
            raise ChannelLost("An address has no NUL character in it")
        case Tcp():
            await _listen_tcp(listener, address)
        case Unix():
            _listen_unix(listener, address)
        case Exec():
            listener._channel = Channel(ends.run(address.args, "in"))
        case File():
            listener._channel = Channel(await ends.open_file(address.path, address.offset, "in"))


def _has_nul(address: Address) -> bool:
    texts = address.args if isinstance(address, Exec) else astuple(address)
    return any(isinstance(text, str) and "\0" in text for text in texts)


def _descriptor(address: Fd, way: ends.Way) -> ends.Ends:
    fd = ends.inherited(address.name) if address.fd < 0 else address.fd
    return ends.passed(fd, address.name, way)


# --- tcp

_Found = list[tuple[int, int, int, str, Any]]


async def _resolve(address: Tcp, *, passive: bool) -> _Found:
    if address.ipv4 is False and address.ipv6 is False:
        raise ChannelLost("Cannot disable IPv4 and IPv6 at same time")
    family = socket.AF_UNSPEC
    if address.ipv6 or address.ipv4 is False:
        family = socket.AF_INET6
    elif address.ipv4 or address.ipv6 is False:
        family = socket.AF_INET
    flags = socket.AI_PASSIVE if passive else socket.AI_V4MAPPED | socket.AI_ADDRCONFIG
    if address.numeric:
        flags |= socket.AI_NUMERICHOST
    host = address.host if address.host or not passive else None
    if address.port.isdecimal() and (len(address.port) > 5 or int(address.port) > 65535):
        raise ChannelLost(
            f"address resolution failed for {address.host}:{address.port}: there is no such port"
        )
    try:
        found = await trio.socket.getaddrinfo(host, address.port, family, socket.SOCK_STREAM, flags=flags)
    except socket.gaierror as e:
        why = e.args[1]
    except ValueError:  # no name that DNS could hold
        why = "Name or service not known"
    except RuntimeError as e:  # trio looks a name up on a thread
        if "can't start new thread" not in str(e):
            raise
        why = "no thread can be started for it"
    else:
        proto = socket.IPPROTO_MPTCP if address.mptcp else 0
        return [(item[0], item[1], proto, item[3], item[4]) for item in found]
    raise ChannelLost(f"address resolution failed for {address.host}:{address.port}: {why}")


def _keep_alive(sock: socket.socket | trio.socket.SocketType, address: Tcp) -> None:
    if not address.keep_alive:
        return
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (
        (socket.TCP_KEEPCNT, address.keep_alive_count),
        (socket.TCP_KEEPIDLE, address.keep_alive_idle),
        (socket.TCP_KEEPINTVL, address.keep_alive_interval),
    ):
        if value:
            sock.setsockopt(socket.IPPROTO_TCP, option, value)


async def _connect_tcp(address: Tcp) -> Channel:
    error: OSError | None = None
    for family, kind, proto, _, where in await _resolve(address, passive=False):
        with ExitStack() as unless_connected:
            try:
                sock = unless_connected.enter_context(trio.socket.socket(family, kind, proto))
                _keep_alive(sock, address)
                await sock.connect(where)
            except OSError as e:
                error = e
            else:
                unless_connected.pop_all()
                return Channel(trio.SocketStream(sock))
    raise ChannelLost(f"Failed to connect to '{address.host}:{address.port}': {_why(error)}")


def _why(error: OSError | None) -> str:
    return os.strerror(error.errno) if error is not None and error.errno else str(error)


async def _listen_tcp(listener: Listener, address: Tcp) -> None:
    """Listen at each possible address of the name; one is enough."""
    first: ChannelLost | None = None
    for family, kind, proto, _, where in await _resolve(address, passive=True):
        try:
            sock = _bound(address, family, kind, proto, where, listener.backlog)
        except ChannelLost as e:
            first = first or e
            continue
        listener._listen_at(sock)
        host, port, *_rest = sock.getsockname()
        told: dict[str, Any] = {"type": "inet", "host": host, "port": str(port)}
        told["ipv6" if family == socket.AF_INET6 else "ipv4"] = True
        listener.socket_address.append(told)
    if first is not None and not listener.socket_address:
        raise first


def _bound(address: Tcp, family: int, kind: int, proto: int, where: Any, backlog: int) -> socket.socket:
    port = where[1]
    last = min(address.to, 65535) if address.to is not None else port
    # An IPv6 wildcard covers IPv4 too, unless just one of them was requested.
    both = (address.ipv4, address.ipv6) in ((None, None), (True, True))
    error: OSError | None = OSError(errno.EINVAL, "")
    for number in range(port, last + 1):
        for only in ([False, True] if both else [True]) if family == socket.AF_INET6 else [False]:
            with ExitStack() as unless_bound:
                try:
                    sock = unless_bound.enter_context(socket.socket(family, kind, proto))
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    if family == socket.AF_INET6:
                        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, only)
                    _keep_alive(sock, address)  # its connections inherit it
                    sock.bind((where[0], number, *where[2:]))
                    sock.listen(backlog)
                except OSError as e:
                    if e.errno != errno.EADDRINUSE:
                        raise ChannelLost(f"Failed to bind socket: {_why(e)}") from None
                    error = e
                else:
                    unless_bound.pop_all()
                    return sock
    raise ChannelLost(f"Failed to find an available port: {_why(error)}")


# --- unix


def _unix_name(address: Unix) -> bytes:
    path = os.fsencode(address.path)
    if len(path) > UNIX_PATH:
        raise ChannelLost(f"UNIX socket path '{address.path}' is too long")
    if address.abstract:
        return b"\0" + (path if address.tight else path.ljust(UNIX_PATH, b"\0"))
    if not path:
        raise ChannelLost("invalid Unix socket address")
    return path


async def _connect_unix(address: Unix) -> Channel:
    name = _unix_name(address)
    try:
        return Channel(trio.SocketStream(await connect_unix(name)))
    except OSError as e:
        raise ChannelLost(f"Failed to connect to '{address.path}': {_why(e)}") from None


def _listen_unix(listener: Listener, address: Unix) -> None:
    """A socket that is in the way is replaced, as QEMU does; anything else is left alone (QEMU replaces it)."""
    name = _unix_name(address)
    told: dict[str, Any] = {"type": "unix", "path": address.path}
    with ExitStack() as unless_bound:
        try:
            sock = unless_bound.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            if address.abstract:
                told |= {"abstract": True, "tight": address.tight}
            else:
                with suppress(FileNotFoundError):
                    if stat.S_ISSOCK(os.lstat(name).st_mode):
                        os.unlink(name)
            sock.bind(name)
            if not address.abstract:
                unless_bound.callback(remove, name, bound_file(name))
            sock.listen(listener.backlog)
        except OSError as e:
            raise ChannelLost(f"Failed to bind socket to {address.path}: {_why(e)}") from None
        listener._stack.enter_context(unless_bound.pop_all())
    listener._listen_at(sock)
    listener.socket_address.append(told)
