"""What the tests of hostile input share: a device that offers everything, whole sessions, what a process holds."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.kit.raw_front_end import Guest, RawFrontEnd
from vhostpc.backend import Device, Queue
from vhostpc.logs import ration
from vhostpc.wire import vhost_user as vu
from vhostpc.wire.vhost_user import Feature, ProtocolFeature, Request


class Net(Device):
    """Has everything that a device can have, so that every request is offered."""

    num_queues = 2
    queue_size = 1024
    config_size = 24

    async def handle_queue(self, queue: Queue) -> None:
        async for chain in queue:
            chain.write(b"x" * min(chain.writable, 16))

    def read_config(self, offset: int, size: int) -> bytes:
        return bytes(range(24))[offset : offset + size]

    def write_config(self, offset: int, data: bytes, *, migration: bool) -> None:
        if data == b"no":
            raise ValueError("no")

    def send_rarp(self, mac: bytes) -> None: ...

    def set_mtu(self, mtu: int) -> None:
        if mtu < 68:
            raise ValueError(f"MTU {mtu}")


def open_fds() -> dict[str, str]:
    """What this process has open, without what listing it opens."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            found[name] = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:
            continue
    return found


def guest_mappings() -> int:
    return sum("memfd:" in line for line in Path("/proc/self/maps").read_text().splitlines())


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.ERROR]


def all_lines_from_here(caplog: pytest.LogCaptureFixture) -> None:
    """Forget what was logged; what is logged from here on has all its lines."""
    caplog.clear()
    ration.forget()


def state(index: int, num: int) -> bytes:
    return vu.VringState(index, num).pack()


@dataclass(frozen=True)
class Message:
    """One message of a session, and whether it is answered."""

    request: int
    payload: bytes = b""
    fds: tuple[int, ...] = ()
    answered: bool = False
    flags: int = 0

    @property
    def data(self) -> bytes:
        return vu.encode(self.request, self.payload, flags=self.flags)

    async def play(self, front: RawFrontEnd) -> None:
        """Send it; if it is answered, take the answer."""
        await front.send_bytes(self.data, self.fds)
        if self.answered:
            frame = await front.receive()
            assert frame is not None, f"no reply to {vu.request_name(self.request)}: the session ended"
            assert frame.request == self.request
            frame.close_fds()


class Scripts:
    """Whole sessions of a front-end with one ring: ``calm`` with a dirty log and a channel, ``postcopy``."""

    def __init__(self, guest: Guest) -> None:
        ring = guest.rings[0]
        u = guest.user
        self.log = os.memfd_create("log", os.MFD_CLOEXEC)
        os.ftruncate(self.log, 4096)
        self.sockets = socket.socketpair()
        bits = ProtocolFeature(0xFFFF) & ~ProtocolFeature.INBAND_NOTIFICATIONS
        features = Feature.VERSION_1 | Feature.PROTOCOL_FEATURES
        addr = vu.VringAddr(0, 1, u(ring.desc), u(ring.used), u(ring.avail), 0).pack()
        M, R = Message, Request
        opening = [
            M(R.GET_FEATURES, answered=True),
            M(R.GET_PROTOCOL_FEATURES, answered=True),
            M(R.SET_PROTOCOL_FEATURES, vu.pack_u64(bits)),
            M(R.SET_OWNER),
            M(R.SET_VRING_CALL, vu.pack_u64(0), (ring.call,)),
            M(R.SET_VRING_ERR, vu.pack_u64(0), (ring.err,)),
            M(R.SET_FEATURES, vu.pack_u64(features)),
        ]
        rings = [
            M(R.SET_VRING_NUM, state(0, ring.size)),
            M(R.SET_VRING_BASE, state(0, 0)),
            M(R.SET_VRING_ADDR, addr),
            M(R.SET_VRING_KICK, vu.pack_u64(0), (ring.kick,)),
            M(R.SET_VRING_ENABLE, state(0, 1)),
        ]
        stop = M(R.GET_VRING_BASE, state(0, 0), answered=True)
        table = vu.pack_table([guest.region])
        self.calm = [
            *opening,
            M(R.SET_BACKEND_REQ_FD, b"", (self.sockets[1].fileno(),)),
            M(R.SET_MEM_TABLE, table, (guest.fd,)),
            *rings,
            M(R.SET_LOG_BASE, vu.LogArea(4096, 0).pack(), (self.log,), answered=True),
            M(R.SET_FEATURES, vu.pack_u64(features | Feature.LOG_ALL)),
            M(R.GET_CONFIG, vu.ConfigSpace(0, 0, bytes(24)).pack(), answered=True),
            stop,
            M(R.REM_MEM_REG, vu.pack_single_region(guest.region)),
        ]
        need = vu.FLAG_NEED_REPLY
        self.postcopy = [
            *opening,
            M(R.POSTCOPY_ADVISE, answered=True),
            M(R.POSTCOPY_LISTEN, flags=need, answered=True),
            M(R.SET_MEM_TABLE, table, (guest.fd,), answered=True),
            M(R.SET_MEM_TABLE, vu.pack_u64(0)),
            *rings,
            M(R.POSTCOPY_END, flags=need, answered=True),
            stop,
        ]

    def close(self) -> None:
        os.close(self.log)
        for end in self.sockets:
            end.close()


@contextmanager
def quiet() -> Iterator[None]:
    """Do not keep what hundreds of broken sessions log."""
    log = logging.getLogger("vhostpc")
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(logging.NOTSET)
