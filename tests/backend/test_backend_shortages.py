"""A back-end short of threads or descriptors: the session that needed one ends alone, with one line."""

from __future__ import annotations

import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from tests.backend.test_backend_unordered import start, used
from tests.kit.absent_guest import AbsentGuest, answer_of, prepare
from tests.kit.hostile import Net, Scripts, all_lines_from_here, lines, open_fds
from tests.kit.own_machine import far_side
from tests.kit.raw_front_end import Guest, RawFrontEnd
from tests.kit.shortages import as_side, descriptors_left, threads_left
from tests.kit.until import until
from vhostpc.backend import Device, Options, Queue, serve
from vhostpc.backend.net import Bridge
from vhostpc.guest.own_machine import Block, OwnMachine, Spec, open_machine

CHAINS = 4


class Echo(Device):
    """Answers each chain with its text, backwards."""

    def __init__(self, *, unordered: bool = False) -> None:
        self.unordered = unordered

    async def handle_queue(self, queue: Queue) -> None:
        async for chain in queue.unordered() if self.unordered else queue:
            chain.write(chain.read()[::-1][: chain.writable])


class Borrower(Device):
    """Has work done on a thread of trio's, as a device may that reads a disk."""

    async def handle_queue(self, queue: Queue) -> None:
        async for chain in queue:
            await trio.to_thread.run_sync(os.sched_yield)
            chain.write(chain.read()[::-1][: chain.writable])


@asynccontextmanager
async def served(
    device: Device, path: Path, *, slow: bool = False, pages_ahead: int = 0
) -> AsyncIterator[None]:
    async with trio.open_nursery() as nursery:
        with as_side("back-end"):
            await nursery.start(serve, device, path, Options(slow=slow, pages_ahead=pages_ahead))
        yield
        nursery.cancel_scope.cancel()


def connect(path: Path) -> RawFrontEnd:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.connect(str(path))
    return RawFrontEnd(sock)


def ended_sessions(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [line for line in lines(caplog) if "session ended: " in line]


async def session(path: Path) -> bool:
    """In postcopy, where each page comes when it is asked for: whether all requests are answered, or it is ended."""
    guest, front = AbsentGuest(), connect(path)
    texts = prepare(guest, 0, CHAINS)
    ended = trio.Event()

    async def end() -> None:
        await front.ended()
        ended.set()

    try:
        ring = await start(guest, front)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(guest.serve)
            nursery.start_soon(end)
            await until(lambda: ended.is_set() or used(guest, ring) == CHAINS)
            nursery.cancel_scope.cancel()
        if used(guest, ring) == CHAINS:
            assert [answer_of(guest, 0, i, len(t)) for i, t in enumerate(texts)] == [t[::-1] for t in texts]
        return not ended.is_set()
    finally:
        front.close()
        guest.close()


@pytest.mark.ufd
@pytest.mark.parametrize(
    ("device", "slow"),
    [(Echo(), False), (Echo(unordered=True), False), (Echo(), True), (Borrower(), False)],
    ids=["in order", "unordered", "slow", "of its own"],
)
async def test_no_thread_is_left_for_a_request(
    device: Device, slow: bool, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    path = tmp_path / "s"
    async with served(device, path, slow=slow):
        before = len(open_fds())
        for count in range(100):
            all_lines_from_here(caplog)
            with threads_left(count, side="back-end") as threads:
                whole = await session(path)
            assert whole or threads.refused
            await until(lambda: len(open_fds()) == before)
            assert "Traceback" not in caplog.text
            if not threads.refused:
                break
            if not whole:  # else it was looking for more
                (line,) = ended_sessions(caplog)
                own = isinstance(device, Borrower) and "this process cannot start more threads" in line
                assert own or "no thread for a touch of guest memory" in line
        assert count >= 2
        assert await session(path)


async def works(machine: OwnMachine) -> None:
    frames = machine.devices[0].books().received
    await until(lambda: machine.devices[0].books().received > frames)


async def test_no_thread_is_left_for_a_pump(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    """One guest's network goes on, also where its front-end changes something; a later one has none."""
    path = tmp_path / "s"
    spec = Spec([Block("pc.ram", 8 << 20)], backends=[str(path)])
    async with far_side() as far:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as link:
            link.connect(far)
            async with served(Bridge([link.fileno()]), path), open_machine(spec) as first:
                await first.cont()
                await works(first)
                for count in (0, 1):
                    async with open_machine(spec) as later:
                        with threads_left(count, side="back-end") as threads:
                            await later.cont()
                            await until(lambda m=later: m.problems)  # type: ignore[misc]
                            await first.start_tracking()  # its rings pause
                            await first.stop_tracking()
                            await works(first)
                        assert threads.refused == 1
                        assert "no thread for the pump of queue" in ended_sessions(caplog)[-1]
                        assert later.running
                assert first.problems == []
                await first.stop()
                async with open_machine(spec) as last:
                    await last.cont()
                    await works(last)
    assert "Traceback" not in caplog.text


@pytest.mark.ufd
@pytest.mark.parametrize("script", ["calm", "postcopy"])
async def test_no_descriptor_is_left(script: str, caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    """Wherever in a session it is: it ends, or is whole; nothing stays behind, and the next one is served."""
    path = tmp_path / "s"
    guest = Guest()
    guest.ring(0)
    scripts = Scripts(guest)
    async with served(Net(), path):
        before = len(open_fds())
        whole = False
        for count in range(60):
            all_lines_from_here(caplog)
            front = connect(path)
            await front.barrier()
            with descriptors_left(count):
                whole = True
                try:
                    for message in getattr(scripts, script):
                        await message.play(front)
                    await front.barrier()
                except (AssertionError, BrokenPipeError, ConnectionResetError):
                    whole = False
            front.close()
            await until(lambda: len(open_fds()) == before)
            assert len(ended_sessions(caplog)) == (0 if whole else 1)
            assert "Traceback" not in caplog.text
            if whole:
                break
        assert whole
        assert count >= 4
    scripts.close()
    guest.close()
