"""One front-end's session: the message loop.

Two tasks: one always reads, so that the end of the connection is seen whatever a handler waits for; one
handles strictly in order. The moment the front-end is gone, memory whose pages it would have delivered is given
up, which releases every waiter. A third task waits for the report that a touch met a page which the front-end had
removed (SIGBUS, see ``memory.strike``): that ends the session too.
"""

from __future__ import annotations

import errno
import time

import trio

from vhostpc.backend import inflight_requests, requests  # noqa: F401 - their handlers
from vhostpc.backend.answer import HANDLERS, Answer
from vhostpc.backend.device import Device
from vhostpc.backend.memory_requests import use_pending_memory
from vhostpc.backend.serve_options import Options
from vhostpc.backend.state import SessionState
from vhostpc.errors import (
    GuestMemoryError,
    LinkLost,
    PeerClosed,
    PostcopyRefused,
    ProtocolError,
    RemoteProtocolError,
    Shortage,
    UfdError,
)
from vhostpc.logs import rationed_logger
from vhostpc.memory.strike import struck
from vhostpc.own_sockets import known
from vhostpc.transport import MessageSocket
from vhostpc.wire.vhost_user import (
    FLAG_REPLY,
    POSTCOPY_ACKS,
    REQUESTS,
    Frame,
    ProtocolFeature,
    Reply,
    encode,
    pack_u64,
    request_name,
)

log = rationed_logger(__name__)

#: A message that took longer than this (s) is logged with its name.
SLOW_MESSAGE = 0.5
#: Whole messages read ahead of the one being handled.
READ_AHEAD = 16
#: How often (s), and how many times, giving up memory is tried again where nothing can be mapped in its place.
GIVE_UP_AGAIN = 0.1
GIVE_UP_TRIES = 50


class Session:
    """Made by the server for each connection; ``run`` serves it to its end."""

    def __init__(
        self, device: Device, sock: trio.socket.SocketType, options: Options, *, pagefault: bool, name: str
    ) -> None:
        self.name = name
        self.state = SessionState(device, options, pagefault=pagefault, name=name)
        self._connection = sock
        self.socket = MessageSocket(sock)
        self._frames_in, self._frames_out = trio.open_memory_channel[Frame](READ_AHEAD)

    async def run(self) -> None:
        """Serve until the front-end closes the connection.

        Raises RemoteProtocolError, GuestMemoryError, PostcopyRefused with one sentence for the log, or what
        the device raised. All descriptors, mappings and threads of the session are gone when it returns; the log names
        those that could not be given up.
        """
        try:
            with known(self._connection):
                await self._serve()
        finally:
            self._close()

    async def _serve(self) -> None:
        async with trio.open_nursery() as nursery:
            self.state.nursery = nursery
            nursery.start_soon(self.state.device.handle_session, self.state)
            nursery.start_soon(self._handle_all)
            nursery.start_soon(self._watch_memory)
            try:
                await self._read_all()
            finally:
                # At once, also while a handler waits for a page that nobody will bring any more.
                self.state.postcopy.lost()
                why = self.state.supply.fail()
                nursery.cancel_scope.cancel()
                with trio.CancelScope(shield=True):
                    if why is None or await self._let_waiters_go(why):
                        await self.state.gate.ahead.until_ended()

    async def _watch_memory(self) -> None:
        strike = await struck(self.state.supply)
        raise GuestMemoryError(strike.sentence(self.state.regions))

    async def _let_waiters_go(self, why: str | None) -> bool:
        """Nothing could be mapped in place of memory that is given up: try again, then leave the sleeping threads.

        True: none was left.
        """
        state = self.state
        for _ in range(GIVE_UP_TRIES):
            if why is None or not state.supply.asleep:
                return True
            await trio.sleep(GIVE_UP_AGAIN)
            why = state.supply.fail()
        log.error(
            "%s: memory cannot be given up (%s): %d of its threads still wait for pages, and stay, with everything"
            " that they use, until this process ends",
            self.name,
            why,
            state.supply.asleep,
        )
        state.gate.sleepers.leave()
        return False

    async def _read_all(self) -> None:
        with self._frames_in:
            while True:
                frame = await self.socket.receive()
                if frame is None:
                    return
                # The handler may wait for a page of this very front-end, or its reply may have met a closed connection.
                if not await self.socket.hand_on(frame, self._frames_in):
                    return

    async def _handle_all(self) -> None:
        try:
            async for frame in self._frames_out:
                started = time.monotonic()
                try:
                    await self._handle(frame)
                finally:
                    frame.close_fds()
                took = time.monotonic() - started
                if took > SLOW_MESSAGE:
                    log.warning("%s: %s took %.1f s", self.name, request_name(frame.request), took)
        except (BrokenPipeError, ConnectionResetError):
            # The connection is closed; the reader sees the same.
            await trio.sleep_forever()

    async def _handle(self, frame: Frame) -> None:
        name = request_name(frame.request)
        if frame.is_reply:
            raise RemoteProtocolError(f"{name}: a reply, but a request was expected")
        log.debug("%s: %s, %d bytes, %d fds", self.name, name, len(frame.payload), len(frame.fds))
        state = self.state
        if self._is_postcopy_ack(frame):
            if state.postcopy.acknowledged() or state.pending_memory is not None:
                await use_pending_memory(state)
            await self._acknowledge(frame, 0)
            return
        spec = REQUESTS.get(frame.request)
        if spec is None or (spec.gate is not None and spec.gate not in state.protocol_features):
            # Not offered: decline it, do not end the session.
            log.warning("%s: %s is not offered and was declined", self.name, name)
            await self._acknowledge(frame, 1)
            return
        size = len(frame.payload)
        if size < spec.min_size or (size > spec.max_size and not spec.padded):
            raise RemoteProtocolError(f"{name}: payload of {size} bytes")
        frame.payload = frame.payload[: spec.max_size]
        if not spec.min_fds <= len(frame.fds) <= spec.max_fds:
            raise RemoteProtocolError(f"{name}: {len(frame.fds)} descriptors")
        answer = await HANDLERS[frame.request](state, frame)
        if spec.reply is Reply.VALUE or (answer is not None and answer.always):
            await self._reply(frame.request, answer or Answer())
        elif spec.reply is Reply.U64:
            await self._reply(frame.request, answer or Answer(pack_u64(0)))
        elif answer is not None and answer.failed and not self._wants_ack(frame):
            # Without an ack only the end of the connection can report a failure.
            raise RemoteProtocolError(f"{name} failed, and the front-end did not request an ack")
        else:
            await self._acknowledge(frame, 1 if answer is not None and answer.failed else 0)
        status = ProtocolFeature.STATUS in state.protocol_features
        for request, payload in state.postcopy.pairs.owed(frame.request, status=status):
            await self._reply(request, Answer(payload))

    def _is_postcopy_ack(self, frame: Frame) -> bool:
        return (
            self.state.postcopy.listening
            and frame.request in POSTCOPY_ACKS
            and len(frame.payload) == 8
            and not frame.fds
            and frame.payload == bytes(8)
        )

    def _wants_ack(self, frame: Frame) -> bool:
        return frame.need_reply and ProtocolFeature.REPLY_ACK in self.state.protocol_features

    async def _acknowledge(self, frame: Frame, status: int) -> None:
        if self._wants_ack(frame):
            await self._reply(frame.request, Answer(pack_u64(status)))

    async def _reply(self, request: int, answer: Answer) -> None:
        await self.socket.send(encode(request, answer.payload, flags=FLAG_REPLY), answer.fds)

    def _close(self) -> None:
        while True:
            try:
                self._frames_out.receive_nowait().close_fds()
            except (trio.WouldBlock, trio.EndOfChannel, trio.ClosedResourceError):
                break
        self._frames_out.close()
        try:
            self.socket.close()
        finally:
            self.state.close()


def one_sentence(error: BaseException) -> str | None:
    """The log text for an error that the peer or the computer caused; None for a bug."""
    if isinstance(error, BaseExceptionGroup):
        told = [one_sentence(e) for e in error.exceptions]
        known = [t for t in told if t is not None]
        return "; ".join(dict.fromkeys(known)) if len(known) == len(told) else None
    if isinstance(
        error,
        ProtocolError | GuestMemoryError | LinkLost | PostcopyRefused | PeerClosed | UfdError | Shortage,
    ):
        return str(error)
    if isinstance(error, OSError) and error.errno in (errno.EPIPE, errno.ECONNRESET):
        return "the front-end is gone"
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
        return f"this process is out of resources: {error.strerror}"
    if isinstance(error, MemoryError):
        return "this process is out of memory"
    if isinstance(error, RuntimeError) and "can't start new thread" in str(
        error
    ):  # one that the device borrowed
        return "this process cannot start more threads"
    return None
