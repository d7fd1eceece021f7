"""One front-end's session: the message loop.

Two tasks: one always reads, so that the end of the connection is seen whatever a handler waits for; one
handles strictly in order. The moment the front-end is gone, memory whose pages it would have brought is given
up, which lets every waiter go.
"""

from __future__ import annotations

import errno
import logging
import time

import trio

from vhostpc.backend import requests  # noqa: F401 - its handlers
from vhostpc.backend.answer import HANDLERS, Answer
from vhostpc.backend.device import Device
from vhostpc.backend.memory_requests import use_pending_memory
from vhostpc.backend.options import Options
from vhostpc.backend.state import SessionState
from vhostpc.errors import (
    GuestMemoryError,
    PeerClosed,
    PostcopyRefused,
    ProtocolError,
    RemoteProtocolError,
    UfdError,
)
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

log = logging.getLogger(__name__)

#: A message that took longer than this (s) is logged with its name.
SLOW_MESSAGE = 0.5
#: Whole messages read ahead of the one being handled.
READ_AHEAD = 16


class Session:
    """Made by the server for each connection; ``run`` serves it to its end."""

    def __init__(
        self, device: Device, sock: trio.socket.SocketType, options: Options, *, pagefault: bool, name: str
    ) -> None:
        self.name = name
        self.state = SessionState(device, options, pagefault=pagefault, name=name)
        self.socket = MessageSocket(sock)
        self._frames_in, self._frames_out = trio.open_memory_channel[Frame](READ_AHEAD)

    async def run(self) -> None:
        """Serve until the front-end closes the connection.

        Raises RemoteProtocolError, GuestMemoryError, PostcopyRefused with one sentence for the log, or what
        the device raised. All descriptors, mappings and threads of the session are gone when it returns.
        """
        try:
            async with trio.open_nursery() as nursery:
                self.state.nursery = nursery
                nursery.start_soon(self.state.device.handle_session, self.state)
                nursery.start_soon(self._handle_all)
                try:
                    await self._read_all()
                finally:
                    # At once, also while a handler waits for a page that nobody will bring any more.
                    self.state.postcopy.lost()
                    self.state.supply.fail()
                    nursery.cancel_scope.cancel()
        finally:
            self._close()

    async def _read_all(self) -> None:
        with self._frames_in:
            while True:
                frame = await self.socket.receive()
                if frame is None:
                    return
                try:
                    handed_on = await self._hand_on(frame)
                except BaseException:
                    frame.close_fds()
                    raise
                if not handed_on:
                    frame.close_fds()
                    return

    async def _hand_on(self, frame: Frame) -> bool:
        """False: there was no room, and the front-end hung up while we waited for some.

        Nobody may be left to make room: the handler waits for a page of that very front-end, or its reply found
        nobody.
        """
        try:
            self._frames_in.send_nowait(frame)
        except trio.WouldBlock:
            pass
        else:
            return True
        handed_on = False
        async with trio.open_nursery() as nursery:

            async def watch() -> None:
                await self.socket.hung_up()
                nursery.cancel_scope.cancel()

            nursery.start_soon(watch)
            await self._frames_in.send(frame)
            handed_on = True
            nursery.cancel_scope.cancel()
        return handed_on

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
            # The reply found nobody; the reader sees the same.
            await trio.sleep_forever()

    async def _handle(self, frame: Frame) -> None:
        name = request_name(frame.request)
        if frame.is_reply:
            raise RemoteProtocolError(f"{name}: a reply, where a request was expected")
        log.debug("%s: %s, %d bytes, %d fds", self.name, name, len(frame.payload), len(frame.fds))
        state = self.state
        if self._is_postcopy_ack(frame):
            if state.postcopy.acknowledged() or state.pending_memory is not None:
                await use_pending_memory(state)
            await self._acknowledge(frame, 0)
            return
        spec = REQUESTS.get(frame.request)
        if spec is None or (spec.gate is not None and spec.gate not in state.protocol_features):
            # Not offered, so not ours: decline, do not exit.
            log.warning("%s: %s is not offered and was declined", self.name, name)
            await self._acknowledge(frame, 1)
            return
        if not spec.min_size <= len(frame.payload) <= spec.max_size:
            raise RemoteProtocolError(f"{name}: payload of {len(frame.payload)} bytes")
        if not spec.min_fds <= len(frame.fds) <= spec.max_fds:
            raise RemoteProtocolError(f"{name}: {len(frame.fds)} descriptors")
        answer = await HANDLERS[frame.request](state, frame)
        if spec.reply is Reply.VALUE or (answer is not None and answer.always):
            await self._reply(frame.request, answer or Answer())
        elif spec.reply is Reply.U64:
            await self._reply(frame.request, answer or Answer(pack_u64(0)))
        elif answer is not None and answer.failed and not self._wants_ack(frame):
            # Without an ack a failure can only be told by hanging up.
            raise RemoteProtocolError(f"{name} failed, and the front-end wants no ack for it")
        else:
            await self._acknowledge(frame, 1 if answer is not None and answer.failed else 0)

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
        self.socket.close()
        self.state.close()


def one_sentence(error: BaseException) -> str | None:
    """What to log for an error that is the peer's or the machine's doing; None for a bug."""
    if isinstance(error, BaseExceptionGroup):
        told = [one_sentence(e) for e in error.exceptions]
        known = [t for t in told if t is not None]
        return "; ".join(dict.fromkeys(known)) if len(known) == len(told) else None
    if isinstance(error, ProtocolError | GuestMemoryError | PostcopyRefused | PeerClosed | UfdError):
        return str(error)
    if isinstance(error, OSError) and error.errno in (errno.EPIPE, errno.ECONNRESET):
        return "the front-end is gone"
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
        return f"this process can have no more: {error.strerror}"
    return None
