"""The two ends of a migration in one process: a pair of sockets, a destination that is fed bytes, what it says."""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import trio

from vhostpc.dialect import DIALECTS
from vhostpc.migration.channel import Channel
from vhostpc.migration.held import HeldMachine
from vhostpc.migration.incoming import Incoming
from vhostpc.migration.machine import Machine
from vhostpc.migration.phase import Course, Event
from vhostpc.migration.watcher import Unwatched
from vhostpc.wire.migration.return_path import ReturnPathDecoder

LIMIT = 30


def pair() -> tuple[trio.SocketStream, trio.SocketStream]:
    ours, theirs = socket.socketpair()
    return tuple(trio.SocketStream(trio.socket.from_stdlib_socket(s)) for s in (ours, theirs))  # type: ignore[return-value]


async def said(stream: trio.SocketStream) -> list[object]:
    """All that a destination says until it closes."""
    decoder, messages = ReturnPathDecoder(), list[object]()
    with suppress(trio.BrokenResourceError):
        async for data in stream:
            messages += decoder.feed(bytes(data))
    return messages


class Received:
    """What became of a stream: what the destination said, what it reported, what it raised."""

    def __init__(self) -> None:
        self.messages: list[object] = []
        self.events: list[Event] = []
        self.error: BaseException | None = None

    def report(self, event: Event, error: BaseException | None) -> None:
        self.events.append(event)
        self.error = error or self.error


Report = Callable[[Event, BaseException | None], None]
Run = Callable[[bool], Awaitable[None]]
REPORTED = (Event.PACKAGE, Event.FINISH, Event.FAIL, Event.LOSE, Event.NEVER_RAN)


class Reported(Course):
    """The course of a destination to which a source has connected; ``report`` is told of what ends its phases."""

    def __init__(self, report: Report | None = None) -> None:
        super().__init__("destination", DIALECTS["10.0"])
        self._report = report
        self.move(Event.START)
        self.move(Event.CONNECT)

    def move(self, event: Event, error: BaseException | None = None) -> None:
        super().move(event, error)
        if self._report is not None and event in REPORTED:
            self._report(event, error)


class Arrivals(Unwatched):
    """Awaits ``run`` where the machine is to run."""

    def __init__(self, machine: Machine, run: Run | None) -> None:
        super().__init__(machine)
        self._run = run

    async def let_run(self, postcopy: bool) -> None:
        if self._run is not None:
            await self._run(postcopy)


def incoming_of(
    channel: Channel, machine: Machine, *, report: Report | None = None, run: Run | None = None, **more: Any
) -> Incoming:
    """A destination by itself, without an endpoint."""
    return Incoming(channel, machine, Reported(report), Arrivals(machine, run), **more)


async def feed(data: bytes, machine: Machine, *, pieces: int = 1 << 20, **more: Any) -> Received:
    """Give a destination a stream that comes in pieces. It is closed when it is paused."""
    ours, theirs = pair()
    received = Received()

    async def send() -> None:
        with suppress(trio.BrokenResourceError):
            for at in range(0, len(data), pieces):
                await theirs.send_all(data[at : at + pieces])
            await theirs.send_eof()

    async def listen() -> None:
        received.messages.extend(await said(theirs))

    with trio.fail_after(LIMIT):
        async with theirs, trio.open_nursery() as nursery:
            nursery.start_soon(send)
            nursery.start_soon(listen)
            async with Channel(ours) as channel:

                def report(event: Event, error: BaseException | None) -> None:
                    received.report(event, error)
                    if event is Event.LOSE:
                        incoming.close()

                incoming = incoming_of(channel, machine, report=report, **more)
                try:
                    await incoming.receive()
                except Exception as error:
                    received.error = error
                finally:
                    incoming.close()
            # Both tasks end with our side.
    return received


async def receive(
    data: bytes, *, page_sizes: dict[str, int] | None = None, pieces: int = 1 << 20, postcopy: bool = False
) -> tuple[HeldMachine, list[object]]:
    """The held machine of a stream that is good, and what the destination said."""
    machine = HeldMachine(page_sizes=page_sizes)
    received = await feed(data, machine, pieces=pieces, postcopy=postcopy)
    if received.error is not None:
        machine.close()
        raise received.error
    assert received.events[-1] is Event.FINISH
    return machine, received.messages


async def refused(
    data: bytes, *, page_sizes: dict[str, int] | None = None, postcopy: bool = False, **more: Any
) -> Received:
    """What became of a stream that is not taken."""
    with HeldMachine(page_sizes=page_sizes) as machine:
        received = await feed(data, machine, postcopy=postcopy, **more)
    assert received.error is not None, "it was taken"
    return received


async def content(machine: HeldMachine) -> dict[str, list[bytes]]:
    return {
        block.name: [await block.read(at, 4096) for at in range(0, block.length, 4096)]
        for block in machine.ram.blocks
    }


def forged(data: bytes, old: bytes, new: bytes) -> bytes:
    """``data`` with its first ``old`` replaced."""
    assert old in data
    return data.replace(old, new, 1)
