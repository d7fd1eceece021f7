"""Requests from the back-end to the front-end, on the socket from SET_BACKEND_REQ_FD."""

from __future__ import annotations

import socket

import trio

from vhostpc.errors import RemoteProtocolError, RequestFailed
from vhostpc.logs import rationed_logger
from vhostpc.transport import MessageSocket
from vhostpc.wire.vhost_user import FLAG_NEED_REPLY, BackendRequest, Frame, VringState, encode, unpack_u64

log = rationed_logger(__name__)

CLOSED = "the front-end closed the back-end channel"


class BackendChannel:
    """One request at a time. A reply on the main socket must never wait for this channel.

    (QEMU does not read it while it waits for a reply on the main one.) While :meth:`run` runs, the channel is always
    read: descriptors that stay in its socket could keep the front-end's own connection, and so the session, open for
    ever.
    """

    def __init__(self, sock: socket.socket, *, reply_ack: bool, name: str) -> None:
        self._socket = MessageSocket(trio.socket.from_stdlib_socket(sock))
        self._reply_ack = reply_ack
        self._name = name
        self._turn = trio.Lock()
        self._asked: BackendRequest | None = None
        self._answer: Frame | None = None
        self._news = trio.Event()
        #: Why no request can be made any more.
        self._end: str | None = None

    async def run(self) -> None:
        """Read to the channel's end. Its end, or a broken frame, ends only the channel."""
        try:
            while (frame := await self._socket.receive()) is not None:
                frame.close_fds()
                if self._asked is None or self._answer is not None:
                    log.warning("%s: back-end channel: unexpected message %d", self._name, frame.request)
                else:
                    self._answer = frame
                    self._news.set()
            self._end = CLOSED
        except RemoteProtocolError as e:
            self._end = f"back-end channel: {e}"
        except (OSError, trio.ClosedResourceError):
            self._end = CLOSED
        self._news.set()
        self.close()

    async def request(self, request: BackendRequest, payload: bytes = b"", *, timeout: float = 10) -> None:
        """Send a request; wait for its ack if REPLY_ACK was negotiated.

        Raises RequestFailed when the front-end refuses, does not answer within ``timeout`` seconds, or has closed the
        channel, RemoteProtocolError when its message is not an answer to the request.
        """
        async with self._turn:
            if self._end is not None:
                raise RequestFailed(f"{request.name}: {self._end}")
            flags = FLAG_NEED_REPLY if self._reply_ack else 0
            try:
                with trio.move_on_after(timeout):
                    self._news = trio.Event()
                    if self._reply_ack:
                        self._asked = request
                    await self._socket.send(encode(request, payload, flags=flags))
                    if self._reply_ack:
                        await self._news.wait()
                        self._check(request)
                    return
            finally:
                self._asked = self._answer = None
            raise RequestFailed(f"{request.name}: no answer within {timeout:g} s")

    def _check(self, request: BackendRequest) -> None:
        frame = self._answer
        if frame is None:
            raise RequestFailed(f"{request.name}: {self._end}")
        if frame.request != request or not frame.is_reply or len(frame.payload) != 8:
            raise RemoteProtocolError(f"back-end channel: no proper reply to {request.name}")
        if unpack_u64(frame.payload) != 0:
            raise RequestFailed(f"the front-end refused {request.name}")

    async def config_changed(self) -> None:
        """Tell the front-end that config space changed; it will ask for it."""
        await self.request(BackendRequest.CONFIG_CHANGE_MSG)

    async def vring_call(self, index: int) -> None:
        """In-band interrupt of a ring (INBAND_NOTIFICATIONS)."""
        await self.request(BackendRequest.VRING_CALL, VringState(index, 0).pack())

    async def vring_error(self, index: int) -> None:
        """In-band error of a ring (INBAND_NOTIFICATIONS)."""
        await self.request(BackendRequest.VRING_ERR, VringState(index, 0).pack())

    def close(self) -> None:
        """Close the socket; waiting requests fail."""
        self._socket.close()
