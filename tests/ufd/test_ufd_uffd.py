"""``vhostpc.ufd`` against the running kernel: real memory, real faults, real denials.

Needs only pytest and trio, so that it also runs inside a small guest.
"""

from __future__ import annotations

import ctypes
import errno
import json
import mmap
import os
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.kit.hugepages import HUGE, hugepages
from vhostpc._native import lib
from vhostpc.errors import UfdError
from vhostpc.ufd import (
    POSTCOPY_FEATURES,
    FaultFlags,
    Features,
    Ioctls,
    PageFault,
    RegisterMode,
    Userfaultfd,
    Way,
    kernel_version,
    names,
    probe,
)
from vhostpc.ufd.probe import explain

pytestmark = pytest.mark.ufd

ROOT = Path(__file__).resolve().parents[2]
PAGE = mmap.PAGESIZE
LIMIT = 30.0

LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.mmap.restype = ctypes.c_void_p
LIBC.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
LIBC.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
LIBC.memcpy.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]


class Memory:
    """A mapping at an address that Python knows only as a number; ctypes calls release the GIL."""

    def __init__(self, length: int, fd: int = -1) -> None:
        flags = mmap.MAP_SHARED if fd >= 0 else mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        address = LIBC.mmap(None, length, mmap.PROT_READ | mmap.PROT_WRITE, flags, fd, 0)
        assert address not in (None, ctypes.c_void_p(-1).value), os.strerror(ctypes.get_errno())
        self.address, self.length, self.fd = int(address), length, fd

    def read(self, offset: int, length: int) -> bytes:
        """Bytes from the mapping, by memcpy(3) without the GIL: may wait for a page."""
        out = ctypes.create_string_buffer(length)
        LIBC.memcpy(out, self.address + offset, length)
        return out.raw

    def write(self, offset: int, data: bytes) -> None:
        LIBC.memcpy(self.address + offset, data, len(data))

    def close(self) -> None:
        LIBC.munmap(self.address, self.length)
        if self.fd >= 0:
            os.close(self.fd)


def memfd(length: int, flags: int = 0) -> int:
    fd = os.memfd_create("test", os.MFD_CLOEXEC | flags)
    os.ftruncate(fd, length)
    return fd


@pytest.fixture(params=["anonymous", "memfd"])
def memory(request: pytest.FixtureRequest) -> Iterator[Memory]:
    found = Memory(8 * PAGE, memfd(8 * PAGE) if request.param == "memfd" else -1)
    yield found
    found.close()


@pytest.fixture
def huge_memory() -> Iterator[Memory]:
    with hugepages(4):
        found = Memory(2 * HUGE, memfd(2 * HUGE, os.MFD_HUGETLB))
        yield found
        found.close()


class Touch:
    """One waiting touch on its own thread."""

    def __init__(self, call: Callable[[], object]) -> None:
        self.done = trio.Event()
        self.thread = 0
        self.result: object = None
        self._call = call

    def _run(self) -> object:
        self.thread = threading.get_native_id()
        return self._call()

    async def run(self) -> None:
        self.result = await trio.to_thread.run_sync(self._run)
        self.done.set()


async def events(ufd: Userfaultfd, count: int = 1) -> list[PageFault]:
    found: list[PageFault] = []
    while len(found) < count:
        await trio.lowlevel.wait_readable(ufd)
        for event in ufd.events():
            assert isinstance(event, PageFault)
            found.append(event)
    return found


def served(
    body: Callable[[trio.Nursery, Userfaultfd], Awaitable[None]],
    optional: Features = Features.THREAD_ID,
    ways: tuple[Way, ...] = tuple(Way),
) -> None:
    """Run ``body``. The ufd is closed before the nursery waits for its threads, so none stays waiting."""

    async def main() -> None:
        with trio.fail_after(LIMIT):
            async with trio.open_nursery() as nursery:
                with Userfaultfd.open(optional=optional, ways=ways) as ufd:
                    await body(nursery, ufd)

    trio.run(main)


def test_a_missing_page_is_reported_with_thread_and_placed_once(memory: Memory) -> None:
    async def body(nursery: trio.Nursery, ufd: Userfaultfd) -> None:
        granted = ufd.register(memory.address, memory.length)
        assert Ioctls.WAKE | Ioctls.COPY | Ioctls.ZEROPAGE in granted
        touch = Touch(lambda: memory.read(3 * PAGE + 5, 4))
        nursery.start_soon(touch.run)
        (fault,) = await events(ufd)
        assert fault == PageFault(memory.address + 3 * PAGE, FaultFlags(0), touch.thread)
        assert ufd.waiting() == (0, 1)
        assert not touch.done.is_set()
        assert ufd.events() == []
        assert ufd.copy(memory.address + 3 * PAGE, b"abcdefgh" * (PAGE // 8)) == PAGE
        await touch.done.wait()
        assert touch.result == b"fgha"
        assert ufd.waiting() == (0, 0)

    served(body)


def test_a_write_fault_says_so(memory: Memory) -> None:
    async def body(nursery: trio.Nursery, ufd: Userfaultfd) -> None:
        ufd.register(memory.address, memory.length)
        touch = Touch(lambda: memory.write(PAGE, b"new"))
        nursery.start_soon(touch.run)
        (fault,) = await events(ufd)
        assert fault.flags == FaultFlags.WRITE
        assert ufd.zeropage(memory.address + PAGE, PAGE) == PAGE
        await touch.done.wait()
        assert memory.read(PAGE, 4) == b"new\0"

    served(body)


def test_thread_is_zero_unless_asked_for(memory: Memory) -> None:
    async def body(nursery: trio.Nursery, ufd: Userfaultfd) -> None:
        assert Features.THREAD_ID not in ufd.features
        assert Features.THREAD_ID in ufd.offered
        ufd.register(memory.address, memory.length)
        touch = Touch(lambda: memory.read(0, 1))
        nursery.start_soon(touch.run)
        (fault,) = await events(ufd)
        assert fault.thread == 0
        ufd.zeropage(memory.address, PAGE)
        await touch.done.wait()

    served(body, optional=Features(0))


def test_zero_page(memory: Memory) -> None:
    async def body(nursery: trio.Nursery, ufd: Userfaultfd) -> None:
        ufd.register(memory.address, memory.length)
        touch = Touch(lambda: memory.read(0, 8 * PAGE))
        nursery.start_soon(touch.run)
        await events(ufd)
        assert ufd.zeropage(memory.address, 8 * PAGE) == 8 * PAGE
        await touch.done.wait()
        assert touch.result == bytes(8 * PAGE)

    served(body)


def test_a_run_stops_at_a_page_that_is_there_and_leaves_it(memory: Memory) -> None:
    async def body(_: trio.Nursery, ufd: Userfaultfd) -> None:
        ufd.register(memory.address, memory.length)
        assert ufd.copy(memory.address + 2 * PAGE, b"2" * PAGE) == PAGE
        run = b"".join(bytes([ord("a") + n]) * PAGE for n in range(8))
        assert ufd.copy(memory.address, run) == 2 * PAGE
        with pytest.raises(UfdError, match="a page is there already") as caught:
            ufd.copy(memory.address + 2 * PAGE, run[2 * PAGE :])
        assert caught.value.errno == errno.EEXIST
        assert ufd.copy(memory.address + 3 * PAGE, run[3 * PAGE : 5 * PAGE]) == 2 * PAGE
        assert ufd.zeropage(memory.address + 5 * PAGE, 3 * PAGE) == 3 * PAGE
        with pytest.raises(UfdError) as caught:
            ufd.zeropage(memory.address + 4 * PAGE, 2 * PAGE)
        assert caught.value.errno == errno.EEXIST
        now = memory.read(0, 8 * PAGE)
        assert now[::PAGE] == b"ab2de\0\0\0"

    served(body)


def test_copy_without_wake_leaves_the_waiter_until_wake(memory: Memory) -> None:
    async def body(nursery: trio.Nursery, ufd: Userfaultfd) -> None:
        ufd.register(memory.address, memory.length)
        touch = Touch(lambda: memory.read(0, 2))
        nursery.start_soon(touch.run)
        await events(ufd)
        assert ufd.copy(memory.address, b"xy" * (PAGE // 2), wake=False) == PAGE
        assert ufd.waiting() == (0, 1)
        ufd.wake(memory.address + PAGE, PAGE)
        assert ufd.waiting() == (0, 1)
        ufd.wake(memory.address, PAGE)
        await touch.done.wait()
        assert touch.result == b"xy"

    served(body)


def test_wake_without_a_page_reports_the_fault_again(memory: Memory) -> None:
    async def body(nursery: trio.Nursery, ufd: Userfaultfd) -> None:
        ufd.register(memory.address, memory.length)
        touch = Touch(lambda: memory.read(0, 1))
        nursery.start_soon(touch.run)
        (first,) = await events(ufd)
        ufd.wake(memory.address, PAGE)
        (second,) = await events(ufd)
        assert first == second
        ufd.zeropage(memory.address, PAGE)
        await touch.done.wait()

    served(body)


def test_two_waiters_of_one_page_are_two_events_and_one_copy(memory: Memory) -> None:
    async def body(nursery: trio.Nursery, ufd: Userfaultfd) -> None:
        ufd.register(memory.address, memory.length)
        touches = [Touch(partial(memory.read, n, 1)) for n in range(2)]
        for touch in touches:
            nursery.start_soon(touch.run)
        found = await events(ufd, 2)
        assert {f.thread for f in found} == {t.thread for t in touches}
        assert {f.address for f in found} == {memory.address}
        assert ufd.copy(memory.address, b"pq" * (PAGE // 2)) == PAGE
        for touch in touches:
            await touch.done.wait()
        assert [t.result for t in touches] == [b"p", b"q"]

    served(body)


def test_unregister_releases_onto_zeros(memory: Memory) -> None:
    async def body(nursery: trio.Nursery, ufd: Userfaultfd) -> None:
        ufd.register(memory.address, memory.length)
        touch = Touch(lambda: memory.read(0, 1))
        nursery.start_soon(touch.run)
        await events(ufd)
        ufd.unregister(memory.address, memory.length)
        await touch.done.wait()
        assert touch.result == b"\0"
        assert memory.read(PAGE, 1) == b"\0"
        with pytest.raises(UfdError) as caught:
            ufd.copy(memory.address + 4 * PAGE, bytes(PAGE))
        assert caught.value.errno == errno.ENOENT

    served(body)


def test_a_range_that_ends_outside_is_refused_in_words(memory: Memory) -> None:
    with Userfaultfd.open() as ufd, Userfaultfd.open() as other:
        with pytest.raises(UfdError, match="in whole pages"):
            ufd.register(memory.address + 1, PAGE)
        ufd.register(memory.address, 4 * PAGE)
        with pytest.raises(UfdError, match="another userfaultfd"):
            other.register(memory.address, memory.length)
        with pytest.raises(UfdError, match="not registered"):
            ufd.copy(memory.address, bytes(8 * PAGE))
        with pytest.raises(UfdError, match="whole pages"):
            ufd.copy(memory.address, bytes(PAGE - 1))
        for start, length in ((memory.address, 0), ((1 << 64) - PAGE, 2 * PAGE)):
            with pytest.raises(UfdError):
                ufd.zeropage(start, length)
        with pytest.raises(UfdError):
            ufd.wake(memory.address + 1, PAGE)


def test_huge_pages_are_placed_whole(huge_memory: Memory) -> None:
    async def body(nursery: trio.Nursery, ufd: Userfaultfd) -> None:
        granted = ufd.register(huge_memory.address, huge_memory.length)
        assert Ioctls.COPY in granted
        assert Ioctls.ZEROPAGE not in granted
        touch = Touch(lambda: huge_memory.read(HUGE + 77 * PAGE + 1, 3))
        nursery.start_soon(touch.run)
        (fault,) = await events(ufd)
        assert fault.address == huge_memory.address + HUGE
        with pytest.raises(UfdError, match="whole pages"):
            ufd.copy(huge_memory.address + HUGE, bytes(PAGE))
        with pytest.raises(UfdError, match="no zero page"):
            ufd.zeropage(huge_memory.address + HUGE, HUGE)
        assert ufd.copy(huge_memory.address + HUGE, b"wxyz" * (HUGE // 4)) == HUGE
        await touch.done.wait()
        assert touch.result == b"xyz"

    served(body)


def test_user_mode_only_serves_the_program_and_refuses_the_kernel(memory: Memory) -> None:
    async def body(nursery: trio.Nursery, ufd: Userfaultfd) -> None:
        assert ufd.user_mode_only
        ufd.register(memory.address, memory.length)
        source = memfd(PAGE)
        buffer = (ctypes.c_char * PAGE).from_address(memory.address)
        try:
            with pytest.raises(OSError, match="Bad address"):
                os.preadv(source, [buffer], 0)
        finally:
            os.close(source)
        touch = Touch(lambda: memory.read(0, 1))
        nursery.start_soon(touch.run)
        await events(ufd)
        ufd.copy(memory.address, b"u" * PAGE)
        await touch.done.wait()
        assert touch.result == b"u"

    served(body, ways=(Way.USER_MODE_ONLY,))


def test_a_ufd_that_a_peer_sent(memory: Memory) -> None:
    with Userfaultfd.open(optional=Features.THREAD_ID) as ufd:
        ufd.register(memory.address, memory.length)
        copy = ufd.dup()
        assert os.get_inheritable(copy) is False
        os.set_blocking(copy, True)
        with Userfaultfd.from_fd(copy) as lent:
            assert lent.way is None
            assert lent.features == Features.THREAD_ID
            assert os.get_blocking(copy) is False
            assert lent.events() == []
            assert lent.zeropage(memory.address, PAGE) == PAGE
    assert memory.read(0, 1) == b"\0"


def test_what_a_peer_sends_is_looked_at() -> None:
    pipe = os.pipe()
    fresh = -1
    try:
        with pytest.raises(UfdError, match="not a userfaultfd"):
            Userfaultfd.from_fd(pipe[0])
        fresh = lib.vpc_uffd_open(Way.SYSCALL)
        if fresh < 0:
            fresh = lib.vpc_uffd_open(Way.USER_MODE_ONLY)
        with pytest.raises(UfdError, match="handshake"):
            Userfaultfd.from_fd(fresh)
    finally:
        for fd in (*pipe, fresh):
            os.close(fd)


def test_close_and_detach() -> None:
    ufd = Userfaultfd.open()
    assert os.get_inheritable(ufd.fileno()) is False
    assert os.get_blocking(ufd.fileno()) is False
    fd = ufd.detach()
    assert ufd.closed
    ufd.close()
    os.close(fd)
    for call in (ufd.fileno, ufd.dup, ufd.events):
        with pytest.raises(UfdError, match="closed"):
            call()


def test_features_are_named_and_unknown_bits_survive() -> None:
    with Userfaultfd.open() as ufd:
        assert POSTCOPY_FEATURES in ufd.offered
        assert ufd.ioctls & Ioctls.REGISTER
    odd = Features.MISSING_SHMEM | Features(1 << 40)
    assert names(odd) == ["MISSING_SHMEM", "bit 40"]
    assert names(RegisterMode.MISSING) == ["MISSING"]
    with pytest.raises(UfdError, match="does not know bit 62"):
        Userfaultfd.open(features=Features(1 << 62))
    with Userfaultfd.open(optional=Features(1 << 62) | Features.THREAD_ID) as ufd:
        assert ufd.features == Features.THREAD_ID


def test_probe_of_this_machine() -> None:
    found = probe()
    assert found.ok, found.problem
    assert found.kernel_ok
    assert found.best is not None
    assert [w.way for w in found.ways] == list(Way)
    assert POSTCOPY_FEATURES in found.features


def test_kernel_versions_are_read() -> None:
    assert kernel_version("5.10.0-28-amd64") == (5, 10)
    assert kernel_version("6.18.44-x") == (6, 18)
    assert kernel_version("odd") == (0, 0)


def test_each_reason_names_its_mend() -> None:
    text = explain({Way.DEVICE: errno.EACCES, Way.SYSCALL: errno.EPERM})
    assert "/dev/userfaultfd may not be opened by this user" in text
    assert "vm.unprivileged_userfaultfd=1" in text
    assert "CAP_SYS_PTRACE" in text
    text = explain({Way.DEVICE: errno.ENOENT, Way.SYSCALL: errno.ENOSYS, Way.USER_MODE_ONLY: errno.ENOSYS})
    assert "CONFIG_USERFAULTFD" in text
    assert "\n" not in text


def test_an_old_kernel_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.release", lambda: "5.4.0-generic")
    with pytest.raises(UfdError, match=r"needs Linux 5\.11 or later, this is 5\.4\.0-generic"):
        Userfaultfd.open()
    assert not probe().kernel_ok


# With fewer rights, in a child.


def child(case: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.kit.confine", case, sys.executable, "-m", "tests.kit.ufd_child"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert isinstance(answer, dict)
    return answer


@pytest.fixture
def as_root() -> None:
    if os.geteuid() != 0:
        pytest.fail("needs root") if os.environ.get("CI") else pytest.skip("needs root")


@pytest.fixture
def sysctl_off(as_root: None) -> Iterator[None]:
    knob = Path("/proc/sys/vm/unprivileged_userfaultfd")
    before = knob.read_text()
    if before.strip() != "0":
        knob.write_text("0")
    yield
    if before.strip() != "0":
        knob.write_text(before)


@pytest.mark.usefixtures("sysctl_off")
def test_an_ordinary_user_gets_user_mode_only() -> None:
    answer = child("nobody")
    assert answer["best"] == "USER_MODE_ONLY", answer
    assert answer["user_mode_only"] is True
    assert answer["problem"] == ""
    assert answer["ways"] == {"DEVICE": answer["ways"]["DEVICE"], "SYSCALL": "EPERM", "USER_MODE_ONLY": ""}
    assert answer["ways"]["DEVICE"] in ("EACCES", "ENOENT")


@pytest.mark.usefixtures("as_root")
@pytest.mark.parametrize("case", ["denied", "denied-nosys", "denied-nobody"])
def test_denied_everywhere_says_what_to_change(case: str) -> None:
    answer = child(case)
    assert answer["best"] is None, answer
    text = answer["error"]
    assert isinstance(text, str)
    assert text == answer["problem"]
    assert "/dev/userfaultfd" in text
    assert "allow the system call userfaultfd in the seccomp profile" in text
    assert "seccomp filter" in text
    assert len(text.splitlines()) == 1
