"""A front-end takes pages away from under a back-end that serves another one too: only its own session ends.

The back-end is a process of its own: a touch of a page that is gone is a SIGBUS, which ends a process without a guard.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import struct
from collections.abc import Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
import trio

from tests.kit.absent_guest import PAGE, AbsentGuest, prepare
from tests.kit.hugepages import HUGE, none_free
from tests.kit.liar import (
    FIRST,
    REGION,
    SECOND,
    SHRANK,
    TEXT,
    Front,
    absent,
    answer_for_ever,
    far_end,
    faults,
    held_by,
    told,
    working,
)
from tests.kit.raw_front_end import GUEST_BASE, NEXT, WRITE, Guest
from tests.kit.rig import BackendChild, backend_child
from tests.kit.until import until
from vhostpc.memory.mapping import Backing
from vhostpc.memory.strike import Strike, Use

IN_TEXT = f"{TEXT // PAGE:#x}"
"""How an offset in that page begins: which of its bytes is touched first is the C library's choice."""

# --- calm memory -------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [TEXT, 0], ids=["buffers", "everything"])
@pytest.mark.parametrize("device", ["echo", "bridge"])
async def test_memory_is_shrunk(tmp_path: Path, device: str, length: int) -> None:
    """On the trio thread or under a pump. Afterwards the process holds what it held before."""
    with far_end() as sock:
        far = sock if device == "bridge" else None
        async with backend_child(tmp_path, device=device, far=[sock.getsockname()]) as b:
            async with working(b, far=far) as other:
                await other.work()
                async with working(b, far=far) as liar:
                    await liar.work()
                    held = await held_by(b)
                    liar.put(b"gone")
                    liar.offer_on(length)
                    assert await liar.raw.ended()
                    await told(b, f"{SHRANK}memory ({REGION}offset", f", which now ends at {length:#x})")
                await other.work()
                async with working(b, far=far) as third:
                    await third.work()
                    assert await held_by(b) == held
                await other.work()


async def test_memory_is_shrunk_under_a_frame_that_comes_in(tmp_path: Path) -> None:
    """While frames come and go; what is nowhere is not told to the driver."""
    with far_end() as far:
        async with (
            backend_child(tmp_path, device="bridge", far=[far.getsockname()]) as b,
            working(b, far=far) as other,
            working(b, far=far) as liar,
            trio.open_nursery() as nursery,
        ):
            receiver = liar.guest.ring(0)
            for i in range(2):
                receiver.set_desc(i, GUEST_BASE + (TEXT if i else 0x40000), 2048, WRITE)
            receiver.offer(0)
            await receiver.send_setup(liar.raw)
            await answer_for_ever(nursery, other)
            await receiver.until_used(1)
            os.ftruncate(liar.guest.fd, TEXT)
            receiver.offer(1)
            assert await liar.raw.ended()
            await told(b, f"{SHRANK}memory ({REGION}offset {IN_TEXT}")
            assert receiver.used_idx == 1
            nursery.cancel_scope.cancel()
            await other.work()


async def test_a_file_on_disk_is_shrunk(tmp_path: Path) -> None:
    """Its memory is touched on borrowed threads."""
    fd = os.open(tmp_path / "guest", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
    async with (
        backend_child(tmp_path, device="echo") as b,
        working(b) as other,
        working(b, Guest(fd=fd)) as liar,
    ):
        await liar.work()
        liar.offer_on(TEXT)
        assert await liar.raw.ended()
        await told(b, f"{SHRANK}memory ({REGION}offset {IN_TEXT}")
        await other.work()


@pytest.mark.parametrize("device", ["echo", "bridge"])
async def test_the_dirty_log_is_shrunk(tmp_path: Path, device: str) -> None:
    log = os.memfd_create("log", os.MFD_CLOEXEC)
    os.ftruncate(log, PAGE)
    with far_end() as sock:
        far = sock if device == "bridge" else None
        async with backend_child(tmp_path, device=device, far=[sock.getsockname()]) as b:
            async with working(b, far=far) as other:
                async with working(b, far=far, log=log) as liar:
                    await liar.work()
                    held = await held_by(b)
                    os.ftruncate(log, 0)
                    liar.ring.offer(0)
                    assert await liar.raw.ended()
                    await told(b, f"{SHRANK}dirty log (offset", ", which now ends at 0x0)")
                    assert liar.ring.used_idx == 1
                os.ftruncate(log, PAGE)
                async with working(b, far=far, log=log) as third:
                    await third.work()
                    assert await held_by(b) == held
                await other.work()
    os.close(log)


# --- huge pages --------------------------------------------------------------------------------------


def huge_guest(pages: int, mapped: int) -> Guest:
    """A guest on huge pages, of which Python reserves ``mapped``: one for the rings, one for the buffers."""
    huge = 0x4 | 21 << 26  # MFD_HUGETLB | MFD_HUGE_2MB
    return Guest(pages * HUGE, os.memfd_create("huge", os.MFD_CLOEXEC | huge), mapped * HUGE)


@pytest.mark.parametrize("why", ["shrunk", "none is free"])
async def test_huge_pages(tmp_path: Path, huge_pages: int, why: str) -> None:
    """Our mappings reserve none, so an empty pool is met by a touch, as is the end of the file."""
    guest = huge_guest(2, 1)
    async with (
        backend_child(tmp_path, device="echo") as b,
        working(b) as other,
        working(b, guest) as liar,
    ):
        liar.ring.set_desc(0, GUEST_BASE + HUGE + 0x5000, 8, NEXT, 1)
        liar.ring.set_desc(1, GUEST_BASE + TEXT, 8, WRITE)
        if why == "shrunk":
            liar.offer_on(HUGE)
            assert await liar.raw.ended()
            await told(b, f"{SHRANK}memory ({REGION}offset 0x205000 of its file, which now ends at 0x200000)")
        else:
            with none_free():
                liar.ring.offer(0)
                assert await liar.raw.ended()
            await told(b, "a page of the front-end's memory is not available", REGION, "no huge page is free")
        await other.work()


@pytest.fixture
def guest() -> Iterator[AbsentGuest]:
    guest = AbsentGuest()
    yield guest
    guest.close()


@pytest.mark.ufd
@pytest.mark.parametrize("device", ["echo", "unordered", "bridge"])
async def test_memory_is_shrunk_where_threads_wait(tmp_path: Path, guest: AbsentGuest, device: str) -> None:
    """Whose page is behind the new end finds nothing, whose is before it is let go; no page is made."""
    prepare(guest, 0)
    prepare(guest, 1)
    if device == "bridge":  # the first ring has buffers for frames
        guest.rings[0].set_desc(0, GUEST_BASE + FIRST * PAGE, 2048, WRITE)
    with far_end() as sock:
        far = sock if device == "bridge" else None
        async with (
            backend_child(tmp_path, device=device, far=[sock.getsockname()]) as b,
            working(b, far=far) as other,
        ):
            await other.work()
            async with absent(b, guest) as raw, trio.open_nursery() as nursery:
                if far is not None:
                    await answer_for_ever(nursery, other)
                # The other chains of an unordered ring wait, too: one that came later would find the end by itself.
                chains = (0, 2, 4) if device == "unordered" else (0,)
                await faults(guest, *(page + i for page in (FIRST, SECOND) for i in chains))
                holes = guest.holes()
                os.ftruncate(guest.fd, SECOND * PAGE)
                guest.size = SECOND * PAGE
                (ufd, base) = guest.clients[0]
                ufd.wake(base + SECOND * PAGE, PAGE)
                assert await raw.ended()
                await told(b, f"{SHRANK}memory ({REGION}offset {SECOND * PAGE:#x}", postcopy=True)
                assert guest.holes() == {page for page in holes if page < SECOND}
                nursery.cancel_scope.cancel()
            await other.work()


UFFDIO_POISON = 0xC020AA08  # since Linux 6.6: _IOWR(0xAA, 8, 32 bytes)


@pytest.mark.ufd
async def test_a_page_is_poisoned(tmp_path: Path, guest: AbsentGuest) -> None:
    """The server of a userfaultfd may say that a page is broken: a kernel that cannot finds the file shrunk."""
    prepare(guest, 0)
    async with backend_child(tmp_path, device="echo") as b, working(b) as other, absent(b, guest) as raw:
        await faults(guest, FIRST)
        (ufd, base) = guest.clients[0]
        words = ["a page of the front-end's memory", "poisoned"]
        try:
            fcntl.ioctl(ufd.fileno(), UFFDIO_POISON, struct.pack("QQQq", base + FIRST * PAGE, PAGE, 0, 0))
        except OSError as e:
            if e.errno != errno.EINVAL:
                raise
            words = [f"{SHRANK}memory"]
            os.ftruncate(guest.fd, FIRST * PAGE)
            ufd.wake(base + FIRST * PAGE, PAGE)
        assert await raw.ended()
        await told(b, *words, f"{REGION}offset {FIRST * PAGE:#x}", postcopy=True)
        await other.work()


# --- other people's SIGBUS ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("orders", "dumped"),
    [
        # Enabled before the first session, as by -X faulthandler.
        (["faulthandler on", "session", "strike", "touch"], 1),
        # Enabled above us: it tells of a fault that it hands on, and stays away after that.
        (["session", "faulthandler on", "strike", "touch"], 1),
        # The next session puts us on top of it: only what is not ours is told.
        (["session", "faulthandler on", "session", "strike", "touch"], 1),
        # It takes us away with it, for as long as no session comes.
        (["faulthandler on", "session", "faulthandler off", "session", "strike", "touch"], 0),
        (["session", "strike", "touch"], 0),
        # Not by a touch, but by kill(2), or by a thread that means it.
        (["session", "strike", "kill"], 0),
        (["faulthandler on", "session", "kill"], 1),
        (["session", "raise"], 0),
        (["faulthandler on", "session", "raise"], 1),
    ],
    ids=lambda v: "-".join(v).replace(" ", "_") if isinstance(v, list) else "",
)
async def test_a_bus_error_elsewhere_ends_the_process(tmp_path: Path, orders: list[str], dumped: int) -> None:
    """Whether Python's faulthandler was there before us, came after us, or went away."""
    b = BackendChild(tmp_path, {"device": "echo"})
    try:
        await b.answer()
        async with AsyncExitStack() as stack:
            fronts: list[Front] = []
            for order in orders:
                if order == "session":
                    fronts.append(await stack.enter_async_context(working(b)))
                elif order == "strike":
                    liar = fronts[-1]
                    liar.put(b"gone")
                    liar.offer_on(TEXT)
                    assert await liar.raw.ended()
                    await until(lambda: f"{SHRANK}memory" in b.log())
                elif order == "kill":
                    b.process.send_signal(signal.SIGBUS)
                elif order in ("touch", "raise"):
                    await b.control.send_all(json.dumps(order).encode() + b"\n")
                else:
                    await b.ask(order)
        await until(lambda: b.process.poll() is not None)
        assert b.process.returncode == -signal.SIGBUS
        assert b.log().count("Fatal Python error: Bus error") == dumped, b.log()
    finally:
        b.end()
        await trio.aclose_forcefully(b.control)


# --- what is told ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("strike", "sentence"),
    [
        (
            Strike(0x5000, 0x3000, 0x2000, Backing.TMPFS, use=Use.MEMORY, poisoned=False),
            "the front-end shrank the file of its memory (offset 0x3000 of its file, which now ends at 0x2000)",
        ),
        (
            Strike(0x5000, 0x3000, 0x4000, Backing.TMPFS, use=Use.DIRTY_LOG, poisoned=False),
            "a page of the front-end's dirty log is not available (offset 0x3000 of its file): its file system is full,"
            " its file was shrunk, or it was poisoned",
        ),
        (
            Strike(0x5000, 0x3000, 0x4000, Backing.OTHER, use=Use.MEMORY, poisoned=False),
            "a page of the front-end's memory is not available (offset 0x3000 of its file): its disk fails,"
            " its file was shrunk, or it was poisoned",
        ),
        (
            Strike(0x5000, 0x3000, 0x4000, Backing.TMPFS, use=Use.MEMORY, poisoned=True),
            "a page of the front-end's memory is poisoned, by UFFDIO_POISON or because the machine's memory fails"
            " (offset 0x3000 of its file)",
        ),
    ],
)
def test_what_is_told(strike: Strike, sentence: str) -> None:
    """Where no region is known, because it was taken away meanwhile, its file's offset is told."""
    assert strike.sentence([]) == sentence
