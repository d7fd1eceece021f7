"""Abnormal ends in the middle of faults: the guest may live on, so no page may be made that nobody sent.

Whatever is lost (the page source, the front-end, only its socket), the file behind guest memory keeps exactly
the holes it had, nothing that never came leaves the device, and a process that goes on with the memory finds all of
it as it was.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from tests.kit.rig import HIGH, SEED, BackendChild, Guest, backend_child, far_side, missing, moving
from tests.kit.thread_names import asleep_for_a_page
from tests.kit.until import until
from vhostpc.errors import ChannelLost, PeerClosed
from vhostpc.frontend import Driver, FarSide, Mode
from vhostpc.frontend.source import SourceProcess, start_source
from vhostpc.pages.ramblock import Bits, RamSet
from vhostpc.pages.service import FaultService

pytestmark = pytest.mark.ufd
FRAMES = 16
FIRST_WITHHELD = 6
"""Buffers from this one on are withheld."""


@pytest.fixture
def guest() -> Iterator[Guest]:
    guest = Guest()
    yield guest
    guest.close()


@asynccontextmanager
async def loaded_guest(guest: Guest) -> AsyncIterator[list[Driver]]:
    """A receiving queue (0) and a sending one (1), both full."""
    await guest.fill()
    with ExitStack() as stack:
        drivers = []
        for index in (0, 1):
            layout = guest.layout(4 * guest.page_size * index, slots=FRAMES)
            driver = Driver(guest.source, guest.regions(guest.source), layout, receive=index == 0)
            drivers.append(stack.enter_context(driver))
            await driver.reset()
            assert await driver.post(FRAMES, 700) == FRAMES
        yield drivers


@asynccontextmanager
async def bridge(tmp_path: Path) -> AsyncIterator[tuple[BackendChild, FarSide]]:
    async with AsyncExitStack() as stack:
        far, address = await stack.enter_async_context(far_side(echo=True))
        yield await stack.enter_async_context(backend_child(tmp_path, device="bridge", far=[address])), far


async def hold_buffers(source: SourceProcess, guest: Guest, driver: Driver) -> None:
    first = (driver.layout.buffers - HIGH) // guest.page_size
    await source.withhold("high.ram", first + FIRST_WITHHELD, FRAMES - FIRST_WITHHELD)


async def place_the_rest(guest: Guest, ram: RamSet) -> None:
    """A new source brings what is missing in ``ram``; then all of memory is compared.

    What the guest's device wrote before the loss (used ring, received frames) is where it belongs, and may
    differ from the source: those pages are looked at one by one.
    """
    sent = [b.pages - sum(n for _, n in b.holes()) // b.page_size for b in ram.blocks]
    before = {b.name: b.holes() for b in ram.blocks}
    for b in ram.blocks:  # a new set knows nothing of received pages
        b.set_bits(Bits.RECEIVED)
        for offset, length in before[b.name]:
            b.set_bits(Bits.RECEIVED, offset // b.page_size, length // b.page_size, value=False)
    with FaultService(ram) as service:
        service.arm()
        async with start_source(guest.source.blocks, background_rate=1 << 40) as source:
            service.set_return_path(source.sock.fileno())
            numbers = await service.load(source.sock.fileno())
    assert numbers.already == sum(sent), "pages that had come were there, and were left alone"
    assert numbers.placed == sum(n for holes in before.values() for _, n in holes) // guest.page_size
    p = guest.page_size
    for name, ours, theirs in zip(
        ("low.ram", "high.ram"), guest.bytes_of(ram), guest.bytes_of(guest.source), strict=True
    ):
        different = {
            i for i in range(len(ours) // p) if ours[i * p : (i + 1) * p] != theirs[i * p : (i + 1) * p]
        }
        allowed = pages_a_device_writes(guest) if name == "low.ram" else received_pages(guest)
        assert different <= allowed, f"{name}: pages {sorted(different - allowed)} are not what they were"
        # A page that was lost and came anew is the source's, whatever it is for.
        lost = {o // p + i for o, n in before[name] for i in range(n // p)}
        assert not different & lost


def pages_a_device_writes(guest: Guest) -> set[int]:
    """In low memory: the used rings of both queues."""
    return {guest.layout(4 * guest.page_size * i).used // guest.page_size for i in (0, 1)}


def received_pages(guest: Guest) -> set[int]:
    first = (guest.layout(0).buffers - HIGH) // guest.page_size
    return set(range(first, first + FRAMES))


async def pump_waits(backend: BackendChild) -> None:
    """For a page: not only those that are asked for ahead are missing."""
    await until(lambda: "vpc-pump" in asleep_for_a_page(backend.process.pid))


async def released(backend: BackendChild) -> None:
    """The back-end has let all waiters go and closed the session, and lives."""
    await until(lambda: "disconnected" in backend.log() or "session ended" in backend.log())
    assert backend.process.poll() is None
    assert (await backend.gap()) < 1


def check_unchanged(guest: Guest, holes: list[tuple[str, int, int]]) -> None:
    assert guest.holes() == holes, "a page was made that nobody sent"


def check_far(far: FarSide) -> None:
    """Nothing left the guest but frames whose pages had come."""
    numbers = far.numbers()
    assert (numbers.bad, numbers.duplicates) == (0, 0)
    assert numbers.frames <= FIRST_WITHHELD


# --- the front-end is this process ------------------------------------------------------------------


@pytest.mark.parametrize("mode", list(Mode))
@pytest.mark.parametrize("stopping", [False, True], ids=["", "stopping"])
@pytest.mark.parametrize("queue", [0, 1], ids=["rx", "tx"])
async def test_only_the_socket_is_closed(
    tmp_path: Path, guest: Guest, mode: Mode, stopping: bool, queue: int
) -> None:
    with trio.fail_after(60):
        async with bridge(tmp_path) as (backend, far), loaded_guest(guest) as drivers:
            async with moving(guest, backend, mode=mode) as m:
                await hold_buffers(m.source, guest, drivers[queue])
                before = m.service.numbers().requests
                await m.start(0, drivers[0])
                await until(lambda: m.service.numbers().requests > before)
                await m.start(1, drivers[1])
                await m.source.wait_withheld(1)
                await pump_waits(backend)
                if stopping:
                    m.nursery.start_soon(ask_and_be_cut, m.front, queue)
                    await wait_all_tasks_blocked()  # it was asked
                await settled(guest)
                holes = guest.holes()
                assert holes
                m.front.close()
                await released(backend)
                check_unchanged(guest, holes)
                assert m.postcopy.client is not None
            check_unchanged(guest, holes)
            if queue == 1:
                check_far(far)
            with RamSet() as ram:
                for b in guest.ram.blocks:
                    ram.add(b.name, b.fd, b.length, b.page_size)
                await place_the_rest(guest, ram)
            # The same back-end serves the next front-end.
            state = await backend.ask("state")
            assert state["fds"] < 40


async def ask_and_be_cut(front: Any, queue: int) -> None:
    with pytest.raises(PeerClosed):
        await front.get_vring_base(queue, timeout=30)


async def settled(guest: Guest) -> None:
    """Until nothing has come for a while: what can move has moved, the rest waits."""
    last, same = missing(guest.ram), 0
    while same < 20:
        await trio.sleep(0.01)
        now = missing(guest.ram)
        same, last = (same + 1 if now == last else 0), now


@pytest.mark.parametrize("stopping", [False, True], ids=["", "stopping"])
async def test_the_page_source_is_killed(tmp_path: Path, guest: Guest, stopping: bool) -> None:
    """Pages stop coming, but the front-end lives: the back-end waits, answers, and goes on with another source."""
    with trio.fail_after(60):
        async with bridge(tmp_path) as (backend, far), loaded_guest(guest) as drivers:
            async with moving(guest, backend) as m:
                await hold_buffers(m.source, guest, drivers[1])
                await m.start(1, drivers[1])
                await m.source.wait_withheld(1)
                await pump_waits(backend)
                base: list[int] = []

                async def stop() -> None:
                    base.append(await m.front.get_vring_base(1, timeout=60))

                async with trio.open_nursery() as nursery:
                    if stopping:
                        nursery.start_soon(stop)
                        await wait_all_tasks_blocked()  # it was asked
                    await settled(guest)
                    holes = guest.holes()
                    m.source.kill()
                    await m.load_ended.wait()
                    assert isinstance(m.lost, ChannelLost)
                    assert m.service.waiting()
                    if not stopping:
                        await m.front.barrier()
                    assert (await backend.gap()) < 1
                    check_unchanged(guest, holes)
                    assert not base
                    # Another source brings the rest; it does not matter which pages had been asked for.
                    async with start_source(guest.source.blocks, background_rate=1 << 40) as again:
                        m.service.set_return_path(again.sock.fileno())
                        numbers = await m.service.load(again.sock.fileno())
                    assert numbers.placed == sum(n for _, _, n in holes) // guest.page_size
                await m.postcopy.end()
                expect = base[0] if stopping else FRAMES
                await until(lambda: far.numbers().frames == expect)
                assert (far.numbers().bad, far.numbers().duplicates) == (0, 0)
            await released(backend)


@pytest.mark.parametrize("stopping", [False, True], ids=["", "stopping"])
async def test_source_killed_then_the_session_is_given_up(
    tmp_path: Path, guest: Guest, stopping: bool
) -> None:
    with trio.fail_after(60):
        async with bridge(tmp_path) as (backend, far), loaded_guest(guest) as drivers:
            async with moving(guest, backend, mode=Mode.SLOTS) as m:
                await hold_buffers(m.source, guest, drivers[1])
                await m.start(1, drivers[1])
                await m.source.wait_withheld(1)
                await pump_waits(backend)
                if stopping:
                    m.nursery.start_soon(ask_and_be_cut, m.front, 1)
                    await wait_all_tasks_blocked()  # it was asked
                await settled(guest)
                holes = guest.holes()
                m.source.kill()
                await m.load_ended.wait()
                m.front.close()
                await released(backend)
                check_unchanged(guest, holes)
            check_unchanged(guest, holes)
            check_far(far)
            with RamSet() as ram:
                for b in guest.ram.blocks:
                    ram.add(b.name, b.fd, b.length, b.page_size)
                await place_the_rest(guest, ram)


async def test_the_back_end_is_killed(tmp_path: Path, guest: Guest) -> None:
    """Its faults are served no more; the guest's memory comes all the same, and another back-end goes on."""
    with trio.fail_after(60):
        async with loaded_guest(guest) as drivers:
            async with far_side(echo=False) as (far, address):
                backend = BackendChild(tmp_path, {"device": "bridge", "far": [address]})
                try:
                    await backend.answer()
                    async with moving(guest, backend) as m:
                        await hold_buffers(m.source, guest, drivers[1])
                        await m.start(1, drivers[1])
                        await m.source.wait_withheld(1)
                        assert m.postcopy.client is not None
                        assert m.postcopy.client.numbers().waiting_now
                        backend.end()
                        await m.front.closed.wait()
                        assert m.postcopy.client.removed
                        assert m.service.waiting() == []
                        with pytest.raises(PeerClosed):
                            await m.front.barrier()
                        loaded = await m.rest()
                        assert (loaded.placed, loaded.already) == (sum(b.pages for b in guest.ram.blocks), 0)
                        with pytest.raises(PeerClosed):
                            await m.postcopy.end()
                    # What it had taken and not given back is there to be done: the used index tells.
                    assert drivers[1].numbers().completed == 0
                    assert far.numbers().frames <= FIRST_WITHHELD
                finally:
                    backend.end()
                    await trio.aclose_forcefully(backend.control)
            for ours, theirs in zip(guest.bytes_of(guest.ram), guest.bytes_of(guest.source), strict=True):
                p = guest.page_size
                different = {
                    i
                    for i in range(len(ours) // p)
                    if ours[i * p : (i + 1) * p] != theirs[i * p : (i + 1) * p]
                }
                assert different <= pages_a_device_writes(guest)


# --- the front-end is a process of its own ----------------------------------------------------------


@asynccontextmanager
async def frontend_child(
    guest: Guest, backend: BackendChild, source: SourceProcess, drivers: dict[int, Driver], tmp_path: Path
) -> AsyncIterator[tuple[subprocess.Popen[bytes], trio.SocketStream]]:
    ours, theirs = socket.socketpair()
    spec = {
        "path": str(backend.path),
        "mode": "table",
        "blocks": [
            {"name": b.name, "length": b.length, "page_size": b.page_size, "guest_addr": at}
            for b, at in zip(guest.ram.blocks, (0, HIGH), strict=True)
        ],
        "rings": {i: {"layout": asdict(d.layout), "receive": d.receive} for i, d in drivers.items()},
    }
    errors = tmp_path / "frontend.err"
    with theirs, errors.open("wb") as err:
        process = subprocess.Popen(  # noqa: ASYNC220  it is not waited for
            [sys.executable, "-m", "tests.kit.frontend_child", str(theirs.fileno()), json.dumps(spec)],
            pass_fds=[theirs.fileno()],
            stderr=err,
        )
    socket.send_fds(ours, [b"m"], [*(b.fd for b in guest.ram.blocks), source.sock.fileno()])
    ours.setblocking(False)
    control = trio.SocketStream(trio.socket.from_stdlib_socket(ours))
    try:
        assert await control.receive_some(64) == b"ready\n", errors.read_text()
        yield process, control
    finally:
        process.kill()
        process.wait()
        await trio.aclose_forcefully(control)


@pytest.mark.parametrize("stopping", [False, True], ids=["", "stopping"])
@pytest.mark.parametrize("how", ["kill", "close"])
async def test_the_front_end_is_killed(tmp_path: Path, guest: Guest, how: str, stopping: bool) -> None:
    with trio.fail_after(60):
        async with bridge(tmp_path) as (backend, far), loaded_guest(guest) as drivers:
            async with start_source(guest.source.blocks) as source:
                await hold_buffers(source, guest, drivers[1])
                async with frontend_child(guest, backend, source, {1: drivers[1]}, tmp_path) as child:
                    process, control = child
                    await source.wait_withheld(1)
                    if stopping:
                        await control.send_all(b"stop 1\n")
                        assert await control.receive_some(64) == b"asked\n"
                        await wait_all_tasks_blocked()  # it was asked
                    await holes_settled(guest)
                    holes = guest.holes()
                    assert holes
                    if how == "kill":
                        process.kill()
                        process.wait()
                    else:
                        await control.send_all(b"close\n")
                    await released(backend)
                    check_unchanged(guest, holes)
                check_unchanged(guest, holes)
            check_far(far)
            with RamSet() as ram:
                for b in guest.ram.blocks:
                    ram.add(b.name, b.fd, b.length, b.page_size)
                await place_the_rest(guest, ram)
                for b in ram.blocks:
                    assert b.count_bits(Bits.RECEIVED) == b.pages
                    # Verified where no ring was: pages that name themselves.
                assert (await ram["high.ram"].verify(SEED, 200, 56)) == (0, None)


async def holes_settled(guest: Guest) -> None:
    last, same = guest.holes(), 0
    while same < 20:
        await trio.sleep(0.01)
        now = guest.holes()
        same, last = (same + 1 if now == last else 0), now
