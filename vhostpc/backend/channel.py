"""Requests from the back-end to the front-end, on the socket that SET_BACKEND_REQ_FD brought."""

from __future__ import annotations

import logging
import socket

import trio

from vhostpc.errors import RemoteProtocolError, RequestFailed
from vhostpc.transport import MessageSocket
from vhostpc.wire.vhost_user import FLAG_NEED_REPLY, BackendRequest, VringState, encode, unpack_u64

log = logging.getLogger(__name__)


class BackendChannel:
    """One request at a time. A reply on the main socket must never wait for this channel.

    (QEMU does not read it while it waits for a reply on the main one.)
    """

    def __init__(self, sock: socket.socket, *, reply_ack: bool) -> None:
        self._socket = MessageSocket(trio.socket.from_stdlib_socket(sock))
        self._reply_ack = reply_ack
        self._turn = trio.Lock()

    async def request(self, request: BackendRequest, payload: bytes = b"", *, timeout: float = 10) -> None:
        """Send a request; wait for its ack if REPLY_ACK was negotiated.

        Raises RequestFailed when the front-end refuses or does not answer within ``timeout`` seconds.
        """
        async with self._turn:
            flags = FLAG_NEED_REPLY if self._reply_ack else 0
            with trio.move_on_after(timeout):
                await self._socket.send(encode(request, payload, flags=flags))
                if not self._reply_ack:
                    return
                frame = await self._socket.receive()
                if frame is None:
                    raise RequestFailed(f"{request.name}: the front-end closed the back-end channel")
                frame.close_fds()
                if frame.request != request or not frame.is_reply or len(frame.payload) != 8:
                    raise RemoteProtocolError(f"back-end channel: no proper reply to {request.name}")
                if unpack_u64(frame.payload) != 0:
                    raise RequestFailed(f"the front-end refused {request.name}")
                return
            raise RequestFailed(f"{request.name}: no answer within {timeout:g} s")

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
        self._socket.close()
