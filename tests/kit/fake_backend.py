"""A back-end made by hand: it answers as it should, unless a test says otherwise, and works no ring."""

from __future__ import annotations

import array
import os
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from vhostpc.ufd import Userfaultfd
from vhostpc.wire import vhost_user as vu
from vhostpc.wire.vhost_user import FLAG_REPLY, Feature, Frame, MemoryRegion, ProtocolFeature, Request

REPLY = vu.VERSION | FLAG_REPLY
Answer = tuple[int, int, bytes, list[int]]  # request, flags, payload, descriptors
Change = Callable[[Frame], list[Answer] | None]


class FakeBackend:
    """Answers as a back-end should, unless ``change`` says otherwise for a message. Keeps what it got."""

    features = int(Feature.PROTOCOL_FEATURES | Feature.VERSION_1 | Feature.LOG_ALL)
    protocol = ProtocolFeature(
        ProtocolFeature.MQ
        | ProtocolFeature.REPLY_ACK
        | ProtocolFeature.PAGEFAULT
        | ProtocolFeature.CONFIGURE_MEM_SLOTS
        | ProtocolFeature.BACKEND_REQ
        | ProtocolFeature.LOG_SHMFD
    )
    base = 0x7000_0000_0000

    def __init__(self, sock: trio.socket.SocketType, change: Change) -> None:
        self.sock = sock
        self.change = change
        self.got: list[tuple[int, int, int, int]] = []  # request, flags, payload size, descriptors
        self.channel: trio.socket.SocketType | None = None
        self.listening = False
        self.hears = trio.Event()  # it takes messages
        self.hears.set()
        self.bases: dict[int, int] = {}
        self.events: dict[tuple[int, int], int] = {}  # by request and ring: kicks and calls, ours too
        self.ufds: list[Userfaultfd] = []  # lent to the front-end

    async def run(self) -> None:
        reader = vu.FrameReader()
        try:
            while True:
                await self.hears.wait()
                data, control, _, _ = await self.sock.recvmsg(reader.want, socket.CMSG_SPACE(128))
                fds = array.array("i")
                for _, _, value in control:
                    fds.frombytes(value)
                frame = reader.feed(data, fds)
                if frame is None:
                    if not data:
                        return
                    continue
                self.got.append((frame.request, frame.flags, len(frame.payload), len(frame.fds)))
                try:
                    answers = self.change(frame)
                    for answer in self.usual(frame) if answers is None else answers:
                        await self.reply(*answer)
                finally:
                    frame.close_fds()
        except OSError:
            pass
        finally:
            reader.close()
            if self.channel is not None:
                self.channel.close()
            for fd in self.events.values():
                os.close(fd)
            for ufd in self.ufds:
                ufd.close()

    async def reply(self, request: int, flags: int, payload: bytes, fds: list[int]) -> None:
        data = vu.HEADER.pack(request, flags, len(payload)) + payload
        control = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds).tobytes())] if fds else []
        try:
            await self.sock.sendmsg([data], control)
        finally:
            for fd in fds:
                os.close(fd)

    def usual(self, frame: Frame) -> list[Answer]:
        number = frame.request

        def say(payload: bytes, fds: list[int] | None = None) -> list[Answer]:
            return [(number, REPLY, payload, fds or [])]

        values = {
            Request.GET_FEATURES: self.features,
            Request.GET_PROTOCOL_FEATURES: int(self.protocol),
            Request.GET_QUEUE_NUM: 2,
            Request.GET_MAX_MEM_SLOTS: 509,
        }
        if number in values:
            return say(vu.pack_u64(values[Request(number)]))
        if number == Request.SET_BACKEND_REQ_FD:
            self.channel = trio.socket.from_stdlib_socket(socket.socket(fileno=frame.take_fd()))
        if number == Request.POSTCOPY_ADVISE:
            self.ufds.append(Userfaultfd.open())
            return say(b"", [self.ufds[-1].dup()])
        if number == Request.POSTCOPY_LISTEN:
            self.listening = True
        if self.listening and number == Request.SET_MEM_TABLE and len(frame.payload) > 8:
            return say(vu.pack_table(self.mapped(vu.unpack_table(frame.payload))))
        if self.listening and number == Request.ADD_MEM_REG and len(frame.payload) > 8:
            region = vu.unpack_single_region(frame.payload)
            return say(vu.pack_single_region(self.mapped([region])[0]))
        if number == Request.SET_LOG_BASE:
            return say(frame.payload)
        if number in (Request.SET_VRING_KICK, Request.SET_VRING_CALL):
            key = number, vu.unpack_u64(frame.payload) & vu.VRING_INDEX_MASK
            if key in self.events:
                os.close(self.events.pop(key))
            self.events[key] = frame.take_fd()
        if number == Request.SET_VRING_BASE:
            state = vu.VringState.unpack(frame.payload)
            self.bases[state.index] = state.num
        if number == Request.GET_VRING_BASE:
            index = vu.VringState.unpack(frame.payload).index
            return say(vu.VringState(index, self.bases.get(index, 7)).pack())
        if frame.need_reply:
            return say(vu.pack_u64(0))
        return []

    def mapped(self, regions: list[MemoryRegion]) -> list[MemoryRegion]:
        return [MemoryRegion(r.guest_addr, r.size, self.base + r.guest_addr, r.mmap_offset) for r in regions]


def answers_to(request: Request, *answers: Answer) -> Change:
    return lambda frame: list(answers) if frame.request == request else None


@asynccontextmanager
async def listening(path: Path, change: Change) -> AsyncIterator[list[FakeBackend]]:
    """It serves every connection; those so far."""
    made: list[FakeBackend] = []
    with trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        await listener.bind(str(path))
        listener.listen()

        async def serve() -> None:
            while True:
                sock, _ = await listener.accept()
                made.append(FakeBackend(sock, change))
                nursery.start_soon(serve_one, made[-1])

        async def serve_one(fake: FakeBackend) -> None:
            with fake.sock:
                await fake.run()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve)
            yield made
            nursery.cancel_scope.cancel()
