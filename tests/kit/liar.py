"""What tests share whose front-ends take pages away: two sessions of one back-end, one of them a liar's."""

from __future__ import annotations

import os
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import trio

from tests.kit.absent_guest import PAGE, AbsentGuest
from tests.kit.raw_front_end import GUEST_BASE, NEXT, WRITE, Guest, RawFrontEnd, Ring, store16
from tests.kit.rig import BackendChild
from tests.kit.until import until
from vhostpc.wire import vhost_user as vu
from vhostpc.wire.vhost_user import Feature, Request

TEXT, ANSWER = 0x80000, 0x90000
"""Where a chain's bytes are, from the first byte of memory; rings lie below."""
HEADER = 12
SHRANK = "the front-end shrank the file of its "
REGION = "region at guest address 0x10000, "


class Front:
    """A front-end whose guest has one working ring: of the echo device, or one that sends through the bridge."""

    def __init__(self, guest: Guest, raw: RawFrontEnd, ring: Ring, far: socket.socket | None) -> None:
        self.guest, self.raw, self.ring, self.far = guest, raw, ring, far
        self.features = 0
        self.done = 0

    def put(self, text: bytes) -> None:
        """Chain 0 holds ``text``."""
        if self.far is not None:
            self.ring.set_desc(0, self.guest.put(TEXT, bytes(HEADER) + text), HEADER + len(text))
        else:
            self.ring.set_desc(0, self.guest.put(TEXT, text), len(text), NEXT, 1)
            self.ring.set_desc(1, GUEST_BASE + ANSWER, len(text), WRITE)

    async def work(self) -> None:
        """One chain goes through the device."""
        text = b"chain %d" % self.done
        self.put(text)
        self.ring.offer(0)
        self.done += 1
        await self.ring.until_used(self.done)
        if self.far is None:
            assert self.guest.mem[ANSWER : ANSWER + len(text)] == text
        else:
            await trio.lowlevel.wait_readable(self.far)
            assert self.far.recv(2048) == text

    def offer_on(self, length: int) -> None:
        """Shrink the file and offer chain 0, in this order where the ring stays: the device may be looking just now."""
        if length:
            os.ftruncate(self.guest.fd, length)
        store16(self.guest.mem, self.ring.avail + 2, self.ring.avail_idx + 1)
        if not length:
            os.ftruncate(self.guest.fd, length)
        os.eventfd_write(self.ring.kick, 1)


@asynccontextmanager
async def attached(b: BackendChild) -> AsyncIterator[RawFrontEnd]:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.connect(str(b.path))
    raw = RawFrontEnd(sock)
    try:
        yield raw
    finally:
        raw.close()


@asynccontextmanager
async def working(
    b: BackendChild,
    guest: Guest | None = None,
    *,
    queue: int = 1,
    far: socket.socket | None = None,
    log: int | None = None,
) -> AsyncIterator[Front]:
    """A session whose ring runs, with the dirty log ``log`` if there is one."""
    guest = guest or Guest()
    try:
        async with attached(b) as raw:
            f = Front(guest, raw, guest.ring(queue), far)
            f.features, _ = await raw.negotiate()
            await guest.send_memory(raw)
            await f.ring.send_setup(raw, log=log is not None)
            if log is not None:
                await raw.ask(Request.SET_LOG_BASE, vu.LogArea(PAGE, 0).pack(), [log])
                await raw.send(Request.SET_FEATURES, vu.pack_u64(f.features | Feature.LOG_ALL))
            await raw.barrier()
            yield f
    finally:
        guest.close()


@contextmanager
def far_end() -> Iterator[socket.socket]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        sock.setblocking(False)
        yield sock


def errors(b: BackendChild) -> list[str]:
    return [line.removeprefix("ERROR ") for line in b.log().splitlines() if line.startswith("ERROR ")]


async def told(b: BackendChild, *words: str, postcopy: bool = False) -> None:
    """The second front-end's session ended with one line, which has these words; in postcopy one more stands before."""
    await until(lambda: "session ended" in b.log())
    *given_up, line = errors(b)
    assert line.startswith("front-end 2: session ended: "), line
    for word in words:
        assert word in line
    assert ["lost in postcopy" in line for line in given_up] == [True] * postcopy
    assert "Traceback" not in b.log()


async def held_by(b: BackendChild) -> dict[str, Any]:
    """Descriptors and mappings."""
    return {k: v for k, v in (await b.ask("state")).items() if k in ("fds", "maps")}


async def answer_for_ever(nursery: trio.Nursery, front: Front) -> None:
    """From now on frames come to the bridge all the time."""
    front.put(b"where from")
    front.ring.offer(0)
    front.done += 1
    far = front.far
    assert far is not None
    await trio.lowlevel.wait_readable(far)
    _, address = far.recvfrom(2048)

    async def answer() -> None:
        while True:
            far.sendto(b"frame", address)
            await trio.sleep(0.005)

    nursery.start_soon(answer)


@asynccontextmanager
async def absent(b: BackendChild, guest: AbsentGuest) -> AsyncIterator[RawFrontEnd]:
    """A session in postcopy whose rings' own pages are there, and none of their buffers'."""
    async with attached(b) as raw:
        await raw.negotiate()
        await guest.advise(raw)
        await guest.listen(raw)
        await guest.share_table(raw)
        for page in range(0x40):
            guest.place(page)
        for ring in guest.rings:
            await ring.send_setup(raw)
        yield raw


FIRST, SECOND = 0x40, 0x80
"""Pages of the first chain's text in each ring."""


async def faults(guest: AbsentGuest, *pages: int) -> None:
    """Wait until these are waited for."""
    while not set(pages) <= set(guest.requested):
        await guest.next_fault()
