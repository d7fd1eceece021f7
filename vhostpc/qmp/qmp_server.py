"""The monitor's server: QMP for any number of clients on a unix socket.

Each client has a reader, a worker that runs its commands one after the other, and a writer. The memory that a client
can occupy is bounded: waiting commands (:data:`QUEUED`, :data:`QUEUED_BYTES`), the one that is being read, the one that
is running, and messages that it does not read (``unsent.py``). A client that leaves too many events unread is
disconnected. Out-of-band commands, once negotiated, are run by the reader.
"""

from __future__ import annotations

import array
import contextlib
import socket
from typing import Any

import trio

from vhostpc.logs import rationed_logger
from vhostpc.qmp import commands, human
from vhostpc.qmp.commands import Session
from vhostpc.qmp.events import Events
from vhostpc.qmp.listening import SocketServer
from vhostpc.qmp.monitored import Endpoint
from vhostpc.qmp.unsent import EVENTS, Unsent
from vhostpc.wire import qmp

QUEUED = 8
QUEUED_BYTES = 64 << 10
"""Most bytes of JSON that may wait when one more command is added."""
_FDS = 16  # descriptors that one message may bring; QEMU's bound

log = rationed_logger(__name__)


class Monitor(SocketServer):
    """Serves one endpoint to its clients."""

    def __init__(self, endpoint: Endpoint, events: Events) -> None:
        super().__init__()
        self.endpoint = endpoint
        self.events = events

    async def serve(self, client: trio.socket.SocketType) -> None:
        self.clients += 1
        session = Session(self.endpoint, self.events, human.run)
        try:
            with client:
                await _Client(client, session).run()
        except OSError as exc:
            log.debug("monitor: client lost: %s", exc)
        finally:
            session.close()
            self.clients -= 1
        if session.leaving:
            self.endpoint.quit()


class _Client:
    def __init__(self, client: trio.socket.SocketType, session: Session) -> None:
        self._socket = client
        self._session = session
        self._scope = trio.CancelScope()
        self._unsent = Unsent()
        self._queued = 0  # bytes of JSON that wait
        self._fewer = trio.Event()
        self._queue, self._waiting = trio.open_memory_channel["qmp.Value | qmp.Broken"](QUEUED)

    async def run(self) -> None:
        self._session.events.listen(self._event)
        try:
            with self._scope:
                # Before a nursery, so that a client that is gone already is an OSError and not a group of errors.
                greeting = qmp.greeting(commands.version(self._session.dialect))
                await self._send(qmp.encode(greeting))
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._write)
                    nursery.start_soon(self._work)
                    await self._read()
        finally:
            self._session.events.forget(self._event)

    def _event(self, message: dict[str, Any]) -> None:
        if self._session.negotiated and not self._unsent.event(message):
            log.warning("monitor: a client does not read, with %d events unsent: disconnected", EVENTS)
            self._scope.cancel()

    async def _read(self) -> None:
        reader = qmp.Reader()
        # After ``quit`` no commands are taken any more.
        async with self._queue:
            with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                while data := await self._receive():
                    for item in reader.feed(data):
                        if self._session.oob and isinstance(item, qmp.Value) and _is_oob(item.value):
                            await self._unsent.reply(await self._reply(item))
                        else:
                            await self._enqueue(item)

    async def _enqueue(self, item: qmp.Value | qmp.Broken) -> None:
        while self._queued > QUEUED_BYTES:
            await self._fewer.wait()
        self._queued += item.size
        await self._queue.send(item)

    async def _receive(self) -> bytes:
        """The next bytes; nothing when the client has gone. Descriptors go to the session."""
        try:
            data, ancillary, _, _ = await self._socket.recvmsg(
                65536, socket.CMSG_SPACE(_FDS * array.array("i").itemsize), socket.MSG_CMSG_CLOEXEC
            )
        except OSError:
            return b""
        for level, kind, body in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds = array.array("i")
                fds.frombytes(body[: len(body) - len(body) % fds.itemsize])
                self._session.take_received(list(fds))
        return data

    async def _work(self) -> None:
        try:
            async with self._waiting:
                async for item in self._waiting:
                    self._queued -= item.size
                    self._fewer.set()
                    self._fewer = trio.Event()
                    await self._unsent.reply(await self._reply(item))
                    if self._session.leaving:
                        return  # unsent messages still go out
        finally:
            self._queued = 0
            self._fewer.set()
            self._unsent.close()

    async def _reply(self, item: qmp.Value | qmp.Broken) -> dict[str, Any]:
        asked = item.value if isinstance(item, qmp.Value) else None
        try:
            if isinstance(item, qmp.Broken):
                raise item.error()
            request = qmp.request(item.value, oob=self._session.oob)
            result = await commands.call(
                self._session, request.name, request.arguments, out_of_band=request.out_of_band
            )
            return qmp.answer(result, asked)
        except qmp.QmpError as exc:
            return qmp.refusal(exc, asked)

    async def _write(self) -> None:
        with contextlib.suppress(OSError):
            await self._unsent.drain(self._send)
        self._scope.cancel()  # all is sent, or nobody reads it

    async def _send(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[await self._socket.send(view) :]


def _is_oob(value: Any) -> bool:
    return isinstance(value, dict) and "exec-oob" in value
