"""The front-end's session with one back-end: requests and their replies, the back-end's own requests.

Specification: vhost-user, "Communication". There is one request in flight at a time, replies are matched by
order and every reply is verified: number, flags, size.
"""

from __future__ import annotations

import errno
import os
import socket
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from types import TracebackType

import trio

from vhostpc.errors import LocalProtocolError, PeerClosed, RemoteProtocolError, RequestFailed, naming
from vhostpc.listener import accept, connect_to, listening
from vhostpc.logs import rationed_logger
from vhostpc.transport import MessageSocket
from vhostpc.wire.vhost_user import (
    FLAG_NEED_REPLY,
    FLAG_REPLY,
    VERSION,
    BackendRequest,
    ConfigSpace,
    Feature,
    Frame,
    Inflight,
    ProtocolFeature,
    Request,
    VringAddr,
    VringState,
    encode,
    pack_u64,
    request_name,
    unpack_u64,
)

#: The bits that this front-end understands; others are never acknowledged.
KNOWN_PROTOCOL_FEATURES = (
    ProtocolFeature.MQ
    | ProtocolFeature.LOG_SHMFD
    | ProtocolFeature.RARP
    | ProtocolFeature.REPLY_ACK
    | ProtocolFeature.MTU
    | ProtocolFeature.BACKEND_REQ
    | ProtocolFeature.PAGEFAULT
    | ProtocolFeature.CONFIG
    | ProtocolFeature.RESET_DEVICE
    | ProtocolFeature.CONFIGURE_MEM_SLOTS
    | ProtocolFeature.STATUS
)
REPLY_FLAGS = VERSION | FLAG_REPLY

log = rationed_logger(__name__)

OnBackendRequest = Callable[[Frame], int]


LAST_REQUESTS = 256
"""Most requests of a back-end that are kept."""
MOST_INDEX = 0xFFFF
"""The highest index of a split ring."""


class FrontEnd:
    """One session. Made by :func:`connect`, :func:`listen` or :func:`over`, which own its tasks."""

    def __init__(self, sock: trio.socket.SocketType, *, timeout: float = 10) -> None:
        self.timeout = timeout
        """Seconds that a reply may take."""
        self.offered_features = 0
        self.features = 0
        """The bits acknowledged with SET_FEATURES."""
        self.protocol_features = ProtocolFeature(0)
        self.queues = 1
        """GET_QUEUE_NUM: queues, or, with some back-ends, pairs of them."""
        self.memory_slots = 0
        self.closed = trio.Event()
        """The back-end closed the connection, or broke the protocol: ``error`` says why."""
        self.error: Exception | None = None
        self.backend_requests: deque[tuple[int, bytes]] = deque(maxlen=LAST_REQUESTS)
        """The requests on the back-end's channel: (BackendRequest, payload)."""
        self.on_backend_request: OnBackendRequest = lambda frame: 0
        self._stream = MessageSocket(sock)
        self._frames_in, self._frames = trio.open_memory_channel[Frame](16)
        self._one = trio.Lock()
        self._nursery: trio.Nursery | None = None
        self._on_closed: list[Callable[[], None]] = []

    # --- the connection ---

    async def read(self) -> None:
        """Read replies until the connection ends: run by the creator of the session. Raises nothing."""
        try:
            with self._frames_in:
                while (frame := await self._stream.receive()) is not None:
                    # The end is seen also of a back-end that sends messages which nobody requested.
                    if not await self._stream.hand_on(frame, self._frames_in):
                        break
        except (OSError, trio.ClosedResourceError):
            pass
        except RemoteProtocolError as e:
            self.error = e
        except Exception as e:  # the creator of the session has others
            log.exception("reading a back-end's messages")
            self.error = RequestFailed(f"its messages could not be read: {e!r}")
        finally:
            self.closed.set()
            for call in self._on_closed:
                self._tell(call)

    def _tell(self, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception:
            log.exception("a back-end's connection has ended")

    def on_closed(self, call: Callable[[], None]) -> None:
        """Register a callback for the connection's end, called at once if it has ended. Its exceptions are logged."""
        if self.closed.is_set():
            self._tell(call)
        else:
            self._on_closed.append(call)

    def close(self) -> None:
        """Close the socket; the back-end sees the end of the connection."""
        self._stream.close()
        while True:
            try:
                self._frames.receive_nowait().close_fds()
            except (trio.WouldBlock, trio.EndOfChannel, trio.ClosedResourceError):
                return

    def started_in(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery

    # --- messages, raw ---

    async def send(self, request: int, payload: bytes = b"", fds: Sequence[int] = (), flags: int = 0) -> None:
        """Send one message without waiting. ``flags``: in addition to the version. Nothing is checked.

        Raises PeerClosed when the back-end is gone, RequestFailed when it takes no more for ``timeout``.
        """
        await self.send_bytes(encode(request, payload, flags=flags), fds, request_name(request))

    async def send_bytes(self, data: bytes, fds: Sequence[int] = (), what: str = "bytes") -> None:
        """Send bytes that need not be a message. After a RequestFailed some of them may have been sent."""
        with trio.move_on_after(self.timeout):
            try:
                await self._stream.send(data, fds)
            except (OSError, trio.ClosedResourceError):
                raise PeerClosed(f"{what}: the back-end is gone") from None
            return
        raise RequestFailed(f"{what}: the back-end has read nothing for {self.timeout:g} s")

    async def receive(self, timeout: float | None = None) -> Frame:
        """The next message of the back-end, whatever it is. Raises PeerClosed, RequestFailed (too late)."""
        limit = self.timeout if timeout is None else timeout
        with trio.move_on_after(limit):
            try:
                return await self._frames.receive()
            except trio.EndOfChannel:
                raise self.error or PeerClosed("the back-end closed the connection") from None
        raise RequestFailed(f"no reply within {limit:g} s")

    # --- requests ---

    async def request(
        self,
        request: Request,
        payload: bytes = b"",
        fds: Sequence[int] = (),
        *,
        flags: int = 0,
        size: int | None = None,
        timeout: float | None = None,
    ) -> Frame:
        """Send a request and return its verified reply; the caller owns the reply's descriptors.

        ``size``: of the payload, in bytes. Raises RemoteProtocolError for a reply with another
        number, with flags other than 0x5 or another size; RequestFailed when it is late; PeerClosed.
        """
        async with self._one:
            await self.send(request, payload, fds, flags)
            return await self.reply_to(request, size=size, timeout=timeout)

    async def reply_to(
        self, request: Request, *, size: int | None = None, timeout: float | None = None
    ) -> Frame:
        """The verified reply to a request that was sent by :meth:`send`."""
        name = request_name(request)
        try:
            frame = await self.receive(timeout)
        except RequestFailed as e:
            raise RequestFailed(f"{name}: {e}") from None
        except PeerClosed as e:
            raise PeerClosed(f"{name}: {e}") from None
        problem = None
        if frame.request != request:
            problem = f"the reply has the number of {request_name(frame.request)}"
        elif frame.flags != REPLY_FLAGS:
            problem = f"the reply has flags {frame.flags:#x}, not {REPLY_FLAGS:#x}"
        elif size is not None and len(frame.payload) != size:
            problem = f"the reply has {len(frame.payload)} bytes, not {size}"
        if problem:
            frame.close_fds()
            raise RemoteProtocolError(f"{name}: {problem}")
        return frame

    async def request_all(
        self, asked: Sequence[tuple[Request, bytes]], *, size: int, timeout: float | None = None
    ) -> list[Frame]:
        """Send several requests at once and return their verified replies, in order; as :meth:`request` for each.

        The back-end serves one after the other; a round trip is saved for each.
        """
        frames: list[Frame] = []
        async with self._one:
            for request, payload in asked:
                await self.send(request, payload)
            try:
                for request, _ in asked:
                    frames.append(await self.reply_to(request, size=size, timeout=timeout))
            except BaseException:
                for frame in frames:
                    frame.close_fds()
                raise
        return frames

    async def ask_u64(self, request: Request, *, flags: int = 0, timeout: float | None = None) -> int:
        """A request whose reply is a number."""
        frame = await self.request(request, flags=flags, size=8, timeout=timeout)
        frame.close_fds()
        return unpack_u64(frame.payload)

    async def tell(
        self, request: Request, payload: bytes = b"", fds: Sequence[int] = (), *, ack: bool | None = None
    ) -> None:
        """A request without a value in its reply. With REPLY_ACK its success is verified.

        ``ack``: ask for it (True) or not (False); None asks if REPLY_ACK was negotiated. Raises
        RequestFailed if the back-end says that it failed.
        """
        able = ProtocolFeature.REPLY_ACK in self.protocol_features
        if not (able if ack is None else ack and able):
            async with self._one:
                await self.send(request, payload, fds)
            return
        frame = await self.request(request, payload, fds, flags=FLAG_NEED_REPLY, size=8)
        frame.close_fds()
        if status := unpack_u64(frame.payload):
            raise RequestFailed(f"{request_name(request)} failed with status {status}")

    async def barrier(self) -> None:
        """Return when everything sent before has taken effect (GET_FEATURES is answered in order)."""
        await self.ask_u64(Request.GET_FEATURES)

    # --- the session in QEMU's order ---

    async def negotiate(
        self,
        *,
        features: int | None = None,
        hide_features: int = 0,
        protocol: ProtocolFeature | None = None,
        hide_protocol: ProtocolFeature = ProtocolFeature(0),  # noqa: B008  a constant
    ) -> None:
        """From GET_FEATURES to SET_FEATURES. Accepts bits that are offered and known, except hidden ones.

        ``features`` and ``protocol`` ask for just these bits (of those that are offered).
        """
        self.offered_features = await self.ask_u64(Request.GET_FEATURES)
        if self.offered_features & Feature.PROTOCOL_FEATURES:
            offered = ProtocolFeature(await self.ask_u64(Request.GET_PROTOCOL_FEATURES))
            accepted = offered & (KNOWN_PROTOCOL_FEATURES if protocol is None else protocol) & ~hide_protocol
            await self.send(Request.SET_PROTOCOL_FEATURES, pack_u64(accepted))
            self.protocol_features = accepted
        if ProtocolFeature.MQ in self.protocol_features:
            self.queues = await self.ask_u64(Request.GET_QUEUE_NUM)
            if not self.queues:
                raise RemoteProtocolError("GET_QUEUE_NUM: the back-end has no queue")
        if ProtocolFeature.CONFIGURE_MEM_SLOTS in self.protocol_features:
            self.memory_slots = await self.ask_u64(Request.GET_MAX_MEM_SLOTS)
        if ProtocolFeature.BACKEND_REQ in self.protocol_features:
            await self.open_backend_channel()
        await self.tell(Request.SET_OWNER, ack=False)
        refused = Feature.LOG_ALL | Feature.RING_PACKED | Feature.ACCESS_PLATFORM | hide_features
        wanted = self.offered_features & ~refused if features is None else features & self.offered_features
        await self.set_features(wanted)

    async def set_features(self, features: int) -> None:
        """SET_FEATURES; an ack is requested with LOG_ALL, as QEMU does."""
        await self.tell(
            Request.SET_FEATURES, pack_u64(features), ack=None if features & Feature.LOG_ALL else False
        )
        self.features = features

    async def open_backend_channel(self) -> None:
        """SET_BACKEND_REQ_FD: give the back-end a socket for its own requests, and serve it."""
        with naming("channel for requests of a back-end"):
            ours, theirs = trio.socket.socketpair()
        with theirs:
            try:
                await self.tell(Request.SET_BACKEND_REQ_FD, fds=[theirs.fileno()])
            except BaseException:
                ours.close()
                raise
        assert self._nursery is not None, "a session is made by connect(), listen() or over()"
        self._nursery.start_soon(self._serve_backend, MessageSocket(ours))

    async def _serve_backend(self, stream: MessageSocket) -> None:
        try:
            while (frame := await stream.receive()) is not None:
                self.backend_requests.append((frame.request, frame.payload))
                known = frame.request in BackendRequest._value2member_map_
                try:
                    status = self.on_backend_request(frame) if known else 1
                finally:
                    frame.close_fds()
                if frame.need_reply:
                    await stream.send(encode(frame.request, pack_u64(status), flags=FLAG_REPLY))
        except OSError:
            pass
        except RemoteProtocolError as e:
            self.error = self.error or e
        except Exception as e:
            log.exception("serving a back-end's requests")
            self.error = self.error or RequestFailed(f"its requests could not be served: {e!r}")
        finally:
            stream.close()

    # --- rings ---

    async def set_vring_num(self, index: int, num: int) -> None:
        await self.tell(Request.SET_VRING_NUM, VringState(index, num).pack(), ack=False)

    async def set_vring_base(self, index: int, base: int) -> None:
        await self.tell(Request.SET_VRING_BASE, VringState(index, base).pack(), ack=False)

    async def set_vring_addr(self, addr: VringAddr) -> None:
        await self.tell(Request.SET_VRING_ADDR, addr.pack(), ack=None if addr.flags & 1 else False)

    async def set_vring_kick(self, index: int, fd: int | None) -> None:
        await self._vring_fd(Request.SET_VRING_KICK, index, fd)

    async def set_vring_call(self, index: int, fd: int | None) -> None:
        await self._vring_fd(Request.SET_VRING_CALL, index, fd)

    async def set_vring_err(self, index: int, fd: int | None) -> None:
        await self._vring_fd(Request.SET_VRING_ERR, index, fd)

    async def set_vring_enable(self, index: int, on: bool) -> None:
        await self.tell(Request.SET_VRING_ENABLE, VringState(index, int(on)).pack())

    async def get_vring_base(self, index: int, *, timeout: float | None = None) -> int:
        """Stop the ring; returns the next available index."""
        return (await self.get_vring_bases([index], timeout=timeout))[0]

    async def get_vring_bases(self, rings: Sequence[int], *, timeout: float | None = None) -> list[int]:
        """Stop these rings with all requests at once; the next available index of each. ``timeout``: for each answer.

        Raises RemoteProtocolError also for an index that a split ring cannot have.
        """
        asked = [(Request.GET_VRING_BASE, VringState(index, 0).pack()) for index in rings]
        frames = await self.request_all(asked, size=8, timeout=timeout)
        for frame in frames:
            frame.close_fds()
        bases = []
        for index, frame in zip(rings, frames, strict=True):
            state = VringState.unpack(frame.payload)
            if state.index != index:
                raise RemoteProtocolError(
                    f"GET_VRING_BASE of ring {index} was answered for ring {state.index}"
                )
            if state.num > MOST_INDEX:
                raise RemoteProtocolError(
                    f"GET_VRING_BASE of ring {index} was answered with {state.num:#x}, not an index of a split ring"
                )
            bases.append(state.num)
        return bases

    # --- the inflight region ---

    async def get_inflight_fd(self, queues: int, queue_size: int) -> tuple[Inflight, int] | None:
        """Have the back-end create an inflight region; its descriptor is the caller's. None: it creates none.

        A front-end that acknowledges INFLIGHT_SHMFD (``negotiate`` does on request) must also call
        :meth:`set_inflight_fd` before a ring starts: libvhost-user ends without it.
        """
        frame = await self.request(
            Request.GET_INFLIGHT_FD, Inflight(0, 0, queues, queue_size).pack(), size=24
        )
        told = Inflight.unpack(frame.payload)
        fds = frame.take_fds()
        if told.size and len(fds) == 1:
            return told, fds[0]
        for fd in fds:
            os.close(fd)
        if told.size:
            raise RemoteProtocolError(f"GET_INFLIGHT_FD: {told.size} bytes and {len(fds)} descriptors")
        return None

    async def set_inflight_fd(self, region: Inflight, fd: int) -> None:
        """Pass the region: a new one, or that of a back-end that is gone. No ring may be started."""
        await self.tell(Request.SET_INFLIGHT_FD, region.pack(), [fd])

    async def _vring_fd(self, request: Request, index: int, fd: int | None) -> None:
        no_fd = 0x100 if fd is None else 0
        await self.tell(request, pack_u64(index | no_fd), [] if fd is None else [fd], ack=False)

    # --- the rest ---

    async def get_config(self, offset: int, size: int) -> bytes:
        """GET_CONFIG. Raises RequestFailed when the back-end refuses, RemoteProtocolError for a wrong reply."""
        payload = ConfigSpace(offset, 0, bytes(size)).pack()
        frame = await self.request(Request.GET_CONFIG, payload)
        frame.close_fds()
        if not frame.payload:
            raise RequestFailed(f"GET_CONFIG of {size} bytes at {offset} was refused")
        if len(frame.payload) != len(payload):
            raise RemoteProtocolError(f"GET_CONFIG: {len(frame.payload)} bytes, not {len(payload)}")
        try:
            return ConfigSpace.unpack(frame.payload).data
        except LocalProtocolError as e:
            raise RemoteProtocolError(f"GET_CONFIG: {e}") from None

    async def set_config(self, offset: int, data: bytes, *, migration: bool = False) -> None:
        await self.tell(Request.SET_CONFIG, ConfigSpace(offset, int(migration), data).pack())

    async def set_status(self, status: int) -> None:
        await self.tell(Request.SET_STATUS, pack_u64(status))

    async def get_status(self) -> int:
        return await self.ask_u64(Request.GET_STATUS)

    async def reset_device(self) -> None:
        await self.tell(Request.RESET_DEVICE)

    async def send_rarp(self, mac: bytes) -> None:
        await self.tell(Request.SEND_RARP, mac.ljust(8, b"\0"))

    async def __aenter__(self) -> FrontEnd:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@asynccontextmanager
async def over(
    sock: socket.socket | trio.socket.SocketType, *, timeout: float = 10
) -> AsyncIterator[FrontEnd]:
    """A session over a connected unix socket, which is closed at the end."""
    stream = trio.socket.from_stdlib_socket(sock) if isinstance(sock, socket.socket) else sock
    front = FrontEnd(stream, timeout=timeout)
    async with trio.open_nursery() as nursery:
        front.started_in(nursery)
        nursery.start_soon(front.read)
        try:
            yield front
        finally:
            front.close()
            nursery.cancel_scope.cancel()


@asynccontextmanager
async def connect(path: str | os.PathLike[str], *, timeout: float = 10) -> AsyncIterator[FrontEnd]:
    """A session with the back-end that listens on ``path``.

    Tries again until ``timeout`` seconds have passed, since the back-end may just be starting. Raises
    PeerClosed.
    """
    sock: socket.socket | None = None
    problem: OSError | None = None
    with trio.move_on_after(timeout):
        while sock is None:
            with naming(f"socket for {os.fspath(path)}"):
                attempt = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                await connect_to(attempt, path)
                sock = attempt
            except OSError as e:
                problem = e
                attempt.close()
                if e.errno == errno.ENAMETOOLONG:
                    break  # an error that does not pass
                await trio.sleep(0.02)
            except BaseException:
                attempt.close()
                raise
    if sock is None:
        why = problem.strerror if problem else "no answer"
        waited = "" if problem and problem.errno == errno.ENAMETOOLONG else f", waited for {timeout:g} s"
        raise PeerClosed(f"no back-end listens on {os.fspath(path)}: {why}{waited}")
    async with over(sock, timeout=timeout) as front:
        yield front


@asynccontextmanager
async def listen(path: str | os.PathLike[str], *, timeout: float = 10) -> AsyncIterator[FrontEnd]:
    """A session with the first back-end that connects to ``path`` within ``timeout`` seconds."""
    with listening(path) as made, trio.socket.from_stdlib_socket(made) as listener:
        sock: trio.socket.SocketType | None = None
        with trio.move_on_after(timeout):
            sock = await accept(listener)
    if sock is None:
        raise PeerClosed(f"no back-end connected to {os.fspath(path)} within {timeout:g} s")
    async with over(sock, timeout=timeout) as front:
        yield front
