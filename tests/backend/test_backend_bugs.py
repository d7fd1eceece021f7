"""Unexpected errors in one session of a back-end: it ends, and nothing else does."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from tests.kit.hostile import Net, guest_mappings, open_fds, state
from tests.kit.raw_front_end import Guest, RawFrontEnd
from tests.kit.until import until
from vhostpc.backend import Device, requests, serve_listener, session
from vhostpc.backend.backend_channel import BackendChannel
from vhostpc.backend.postcopy_state import Postcopy
from vhostpc.backend.vring import Vring
from vhostpc.listener import bind
from vhostpc.memory.mapping import Mapping
from vhostpc.transport import MessageSocket
from vhostpc.virtio.work import Work
from vhostpc.wire import vhost_user as vu
from vhostpc.wire.vhost_user import Request


class Bug(Exception):
    """One of ours, or of the device's author."""


def bug(*_: object, **__: object) -> int:
    raise Bug("a bug")


async def slow_bug(*_: object, **__: object) -> int:
    await trio.lowlevel.checkpoint()
    raise Bug("a bug")


@pytest.fixture
def guests() -> Iterator[list[Guest]]:
    guests = [Guest(), Guest()]
    for guest in guests:
        guest.ring(0, 16)
    yield guests
    for guest in guests:
        guest.close()


@asynccontextmanager
async def served(folder: Path, device: Callable[[], Device]) -> AsyncIterator[Callable[[], RawFrontEnd]]:
    """A server for any number of front-ends, and how to become one."""
    path = folder / "backend"

    def join() -> RawFrontEnd:
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(str(path))
        return RawFrontEnd(sock)

    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            await nursery.start(serve_listener, device, bind(path))
            yield join
            nursery.cancel_scope.cancel()


async def start(front: RawFrontEnd, guest: Guest) -> None:
    await front.negotiate()
    await guest.send_memory(front)
    await guest.rings[0].send_setup(front)
    await front.barrier()


async def works(front: RawFrontEnd, guest: Guest) -> None:
    """Its ring does what is asked for."""
    ring = guest.rings[0]
    ring.set_desc(0, guest.put(0x80000, b"x"), 1, 0)
    used = ring.used_idx
    ring.offer(0)
    await ring.until_used(used + 1)
    await front.barrier()


async def session_life(front: RawFrontEnd, guest: Guest) -> None:
    """Whatever has a handler, once."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        await start(front, guest)
        await front.send(Request.SET_BACKEND_REQ_FD, fds=[theirs.fileno()])
        ring = guest.rings[0]
        ring.set_desc(0, guest.put(0x80000, b"x"), 1, 0)
        ring.offer(0)
        for request, payload in (
            (Request.SET_STATUS, vu.pack_u64(15)),
            (Request.GET_CONFIG, vu.ConfigSpace(0, 0, bytes(8)).pack()),
            (Request.SET_CONFIG, vu.ConfigSpace(0, 0, b"yes").pack()),
            (Request.SEND_RARP, bytes(8)),
            (Request.NET_SET_MTU, vu.pack_u64(1500)),
            (Request.GET_VRING_BASE, state(0, 0)),
            (Request.RESET_DEVICE, b""),
            (Request.POSTCOPY_ADVISE, b""),
        ):
            await front.send(request, payload)
        while (frame := await front.receive()) is not None:
            frame.close_fds()
            if frame.request == Request.POSTCOPY_ADVISE:
                return


def patches() -> list[tuple[object, str, Callable[..., object]]]:
    found: list[tuple[object, str, Callable[..., object]]] = [
        (Net, "handle_session", slow_bug),
        (Net, "handle_queue", slow_bug),
        *((Net, name, bug) for name in ("read_config", "write_config", "send_rarp", "set_mtu")),
        *((Net, name, bug) for name in ("set_status", "reset")),
        (Work, "finish", slow_bug),
        (Work, "start", bug),
        (Work, "close", bug),
        (Vring, "update", slow_bug),
        (Vring, "close", bug),
        (Postcopy, "lost", bug),
        (Postcopy, "close", bug),
        (Mapping, "close", bug),
        (BackendChannel, "close", bug),
        (MessageSocket, "close", bug),
        (MessageSocket, "send", slow_bug),
        (MessageSocket, "receive", slow_bug),
        (session.Session, "_handle", slow_bug),
        (session, "request_name", bug),
        (requests, "ring", bug),
    ]
    return found


@pytest.mark.parametrize(
    ("where", "name", "what"), patches(), ids=lambda x: getattr(x, "__name__", str(x)).rpartition(".")[2]
)
async def test_a_bug_in_one_session(
    where: object,
    name: str,
    what: Callable[..., object],
    tmp_path: Path,
    guests: list[Guest],
    caplog: pytest.LogCaptureFixture,
) -> None:
    mine: list[bool] = []

    def once(self: object, *args: object, **named: object) -> object:
        """In the other session it is as ever. What closes has closed, so that nothing is left of the test."""
        if mine:
            if name == "close":
                real(self, *args, **named)
            return what()
        return real(self, *args, **named)

    real = getattr(where, name)
    async with served(tmp_path, Net) as join:
        good = join()
        await start(good, guests[0])
        held, mapped = len(open_fds()), guest_mappings()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(where, name, once)
            mine.append(True)
            bad = join()
            with contextlib.suppress(OSError, AssertionError):  # it hung up in the middle
                await session_life(bad, guests[1])
            bad.close()
            await until(lambda: any(record.exc_info for record in caplog.records), what="a traceback")
            mine.clear()
        await until(
            lambda: len(open_fds()) <= held and guest_mappings() <= mapped, what="nothing left behind"
        )
        await works(good, guests[0])
        good.close()
        another = join()
        await start(another, guests[0])
        another.close()
