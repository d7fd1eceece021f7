"""A machine of our own moves while something is short: the shortage ends the migration, never the machine.

Each allocation is refused once, alone and with all that come after it. Whatever it was, the machine
runs on at one end, works, and nothing is left behind at the other.
"""

from __future__ import annotations

import re
import socket
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import (
    AbstractAsyncContextManager,
    AbstractContextManager,
    AsyncExitStack,
    ExitStack,
    asynccontextmanager,
    nullcontext,
)
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.endpoint.test_endpoint_moves import leaves, resources
from tests.kit.own_machine import End, bridge, end, far_side
from tests.kit.shortages import (
    Threads,
    address_space_left,
    as_side,
    descriptors_left,
    open_descriptors,
    threads_left,
)
from tests.kit.until import until
from vhostpc.endpoint import Endpoint
from vhostpc.errors import PostcopyRefused, VhostpcError
from vhostpc.guest.own_machine import Block, OwnMachine, Spec, open_machine
from vhostpc.migration.options import Options
from vhostpc.migration.status import BUSY, Status
from vhostpc.migration.uri import Fd, Unix
from vhostpc.pages.dirty import DirtyWay
from vhostpc.pages.service import FaultService

pytestmark = pytest.mark.ufd
RAM = [Block("pc.ram", 8 << 20)]


class Silent:
    def emit(self, name: str, data: dict[str, Any] | None = None) -> None: ...
    def migration(self, status: Status) -> None: ...
    def migration_pass(self, number: int) -> None: ...
    def stop(self) -> None: ...
    def resume(self) -> None: ...


async def works(machine: OwnMachine) -> None:
    """It goes on: each vCPU checks pages, frames come back."""
    reads = [vcpu.numbers().reads for vcpu in machine.vcpus]
    frames = [device.books().received for device in machine.devices]
    await until(lambda: all(v.numbers().reads > n + 20 for v, n in zip(machine.vcpus, reads, strict=True)))
    await until(lambda: all(d.books().received > n for d, n in zip(machine.devices, frames, strict=True)))
    assert machine.problems == []
    assert all(vcpu.numbers().bad == 0 for vcpu in machine.vcpus)


def pages_have_come(destination: Endpoint) -> bool:
    came = destination.report()["came"]
    return came is not None and came["data-pages"] > 0


Short = Callable[[], AbstractContextManager[Threads | None]]


async def migrate(
    source: Endpoint, there: OwnMachine, *, postcopy: bool, late: bool, short: Short
) -> tuple[bool, str]:
    """Whether it completed, and what both ends say of the failure.

    They are short of something from the begin; ``late``: from when the source has begun to send, and the destination
    has not begun at all.
    """
    ours, theirs = socket.socketpair()
    destination = Endpoint(there, Options(on=set(source.options.on)), Silent(), incoming=True)
    async with trio.open_nursery() as nursery:
        await nursery.start(destination.serve)
        with ExitStack() as shortage:
            if not late:
                threads = shortage.enter_context(short())
            with as_side("source"):
                await source.migrate(Fd("out", ours.detach()), resume=False)
            if late:
                await until(lambda: source.status is Status.ACTIVE)
                threads = shortage.enter_context(short())
            with as_side("destination"):
                await destination.incoming(Fd("in", theirs.detach()), exit_on_error=False)
            if postcopy:  # not before the destination is there to say that it cannot
                await until(lambda: destination.status is Status.FAILED or pages_have_come(destination))
                await source.start_postcopy()
            await until(lambda: source.status not in BUSY and destination.status not in BUSY, what="an end")
            await until(lambda: source.run_state != "finish-migrate")
        destination.quit()
    assert source.status is destination.status in (Status.COMPLETED, Status.FAILED)
    completed = source.status is Status.COMPLETED
    assert threads is None or completed == (not threads.refused)
    told = [str(end.info().error_desc or end._error_desc) for end in (source, destination)]
    return completed, "; ".join(told)


async def every(
    spec: Spec, rounds: Iterable[Sequence[Short]], *, postcopy: bool, late: bool = False
) -> list[str]:
    """Migrate with each shortage in turn, to the first round of them that lets each pass; what the failures told."""
    told: list[str] = []
    async with AsyncExitStack() as stack:
        source: Endpoint | None = None
        for shorts in rounds:
            failed = len(told)
            for short in shorts:
                if source is None:
                    made = await stack.enter_async_context(served(spec, postcopy=postcopy))
                    here, source = made
                before = resources()
                async with open_machine(spec, empty=True) as there:
                    completed, why = await migrate(source, there, postcopy=postcopy, late=late, short=short)
                    assert (here.running, there.running) == (not completed, completed)
                    await works(there if completed else here)
                if completed:
                    await stack.aclose()
                    source = None
                else:  # all of it is given back
                    told.append(why)
                    await until(lambda b=before: resources() == b, what=f"{before}, is {resources()}")  # type: ignore[misc]
            if len(told) == failed:
                return told
    raise AssertionError(f"something is always short: {told}")


@asynccontextmanager
async def served(spec: Spec, *, postcopy: bool) -> AsyncIterator[tuple[OwnMachine, Endpoint]]:
    """A source that runs."""
    # In a precopy without downtime it never ends before it is to switch.
    never = {"downtime-limit": 0} if postcopy else {}
    options = Options(on={"postcopy-ram" if postcopy else "return-path"}, values=never)
    async with open_machine(spec) as machine, trio.open_nursery() as nursery:
        await machine.cont()
        await works(machine)
        source = Endpoint(machine, options, Silent())
        await nursery.start(source.serve)
        yield machine, source
        source.quit()


@asynccontextmanager
async def bridged(folder: Path) -> AsyncIterator[Spec]:
    """A machine with a back-end; its destination takes the same one."""
    async with far_side() as far, bridge(folder / "bridge", far):
        yield Spec(RAM, vcpus=2, backends=[str(folder / "bridge")])


by_each_way = pytest.mark.parametrize("postcopy", [False, True], ids=["precopy", "postcopy"])


def named(told: Sequence[str], *wanted: str) -> None:
    """Each of these was short once, and each failure names one."""
    for what in wanted:
        assert any(re.search(what, why) for why in told), f"{what} not in {told}"
    for why in told:
        assert any(re.search(what, why) for what in wanted), why


@by_each_way
@pytest.mark.parametrize("side", ["source", "destination"])
async def test_no_thread_is_left(side: str, postcopy: bool, tmp_path: Path) -> None:
    rounds = [[partial(threads_left, n, side=side, once=once) for once in (False, True)] for n in range(20)]
    async with bridged(tmp_path) as with_one:
        told = await every(with_one, rounds, postcopy=postcopy)
    alone = await every(Spec(RAM, vcpus=2, tracking=DirtyWay.WP_SYNC), rounds, postcopy=postcopy)
    if side == "source":
        source = [
            "^no thread for the page source: the limit of",
            "^no thread for dirty tracking: the limit of",
        ]
        named(told, *source)
        named(alone, *source, "^no thread for the loop of dirty tracking: the limit of")
    else:
        cannot = "; this machine cannot run here: "
        vcpus = [f"{cannot}no thread for vCPU {i}: the limit" for i in (0, 1)]
        there = [
            "; no thread for the fault loop: the limit",
            "; no thread for loading RAM: the limit",
            *vcpus,
        ]
        named(told, *there, f"{cannot}net0: no thread for the driver of a ring: the limit")
        named(alone, *there)


@by_each_way
@pytest.mark.parametrize("late", [False, True], ids=["from the begin", "while the source sends"])
async def test_no_descriptor_is_left(late: bool, postcopy: bool, tmp_path: Path) -> None:
    short = ["page source", "memory file probe", "userfaultfd open", "dirty tracking"] if not late else []
    short += ["fault service", "RAM channel", "net0: eventfd of a ring", "net0: driver of a ring"]
    if late:
        short += ["return path", *(["userfaultfd open"] if postcopy else [])]
    async with bridged(tmp_path) as spec:
        rounds = [[partial(descriptors_left, count)] for count in range(60)]
        told = await every(spec, rounds, postcopy=postcopy, late=late)
    assert all("Too many open files" in why for why in told)
    assert {what for what in short if not any(f"{what}: Too many" in why for why in told)} == set(), told


async def test_cont_behind_a_completed_precopy_lacks_nothing(tmp_path: Path) -> None:
    """A person lets it run here again, as with QEMU: all that it ran with before it was sent is still there."""
    async with bridged(tmp_path) as spec, served(spec, postcopy=False) as (here, source):
        async with open_machine(spec, empty=True) as there:
            completed, _ = await migrate(source, there, postcopy=False, late=False, short=nullcontext)
            assert completed
            await there.stop()
            assert not here.running
            with threads_left(0), descriptors_left(0):
                await source.cont()
                assert source.run_state == "running"
                await works(here)
            assert not there.running


@pytest.mark.parametrize("left", [threads_left, descriptors_left])
async def test_a_machine_that_cannot_be_made(
    left: Callable[[int], AbstractContextManager[Any]], tmp_path: Path
) -> None:
    """What it lacks is said, and what it had is given back."""
    told: list[str] = []
    async with bridged(tmp_path) as spec:
        await until(lambda: resources()["threads"] == ["vpc-far"])
        before = resources()
        for count in range(60):
            try:
                with left(count):
                    async with open_machine(spec) as machine:
                        await machine.cont()
                        await works(machine)
            except* (VhostpcError, OSError) as group:
                found = leaves(group)
                told += [str(error) for error in found]
            else:
                break
            await until(lambda: resources() == before, what=f"{before}, is {resources()}")
    assert count > 4
    if left is threads_left:
        short = [
            f"^no thread for {what}: the limit of" for what in ("vCPU 0", "vCPU 1", "the driver of a ring")
        ]
        named(
            told,
            *short,
            *[f"^this machine cannot run here: no thread for vCPU {i}: the limit" for i in (0, 1)],
        )
    else:
        assert all(re.search(r"\w: Too many open files$", why) for why in told), told


async def test_no_descriptor_is_left_for_the_faults_of_a_back_end(tmp_path: Path) -> None:
    """What the back-end sent is closed, and the back-end is not to blame."""
    async with bridged(tmp_path) as spec, open_machine(spec, empty=True) as there:
        with FaultService(there.ram) as service:
            before = open_descriptors()
            with (
                descriptors_left(1),
                pytest.raises(PostcopyRefused, match="the faults of net0 cannot be read here"),
            ):
                await there.advise(service)
            assert open_descriptors() == before
            await there.advise(service)
            assert there.problems == []


# --- real ones, of a whole process

STACK = 64 << 20
"""Bytes of a thread's stack, so that room for one is much more than all else takes."""
KINDS: dict[str, Callable[[int, int], AbstractContextManager[None]]] = {
    "threads": lambda count, pid: address_space_left(STACK // 2 + count * STACK, pid),
    "descriptors": descriptors_left,
}
of_each_kind = pytest.mark.parametrize("kind", KINDS)


def process(name: str, folder: Path, *more: str) -> AbstractAsyncContextManager[End]:
    through = ["sh", "-c", f'ulimit -s {STACK >> 10} && exec "$@"', "sh"]
    return end(name, folder, "--ram", "pc.ram=8M", "--vcpus", "2", *more, through=through)


@of_each_kind
async def test_a_source_that_can_have_no_more(kind: str, tmp_path: Path) -> None:
    spec = Spec(RAM, vcpus=2)
    async with process("source", tmp_path) as source:
        await source.set("return-path")
        for count in range(20):
            uri = tmp_path / f"in{count}"
            async with open_machine(spec, empty=True) as there, trio.open_nursery() as nursery:
                destination = Endpoint(there, Options(on={"return-path"}), Silent(), incoming=True)
                await nursery.start(destination.serve)
                await destination.incoming(Unix(str(uri)), exit_on_error=False)
                with KINDS[kind](count, source.process.pid):
                    await source.qmp.command("migrate", uri=f"unix:{uri}")
                    found = await source.until_status("failed", "completed")
                if found["status"] == "failed":
                    assert re.search("no thread for|Too many open files", found["error-desc"]), found
                    assert not there.running
                    await source.until_works(checks=20)
                else:
                    await works(there)
                destination.quit()
            if found["status"] == "completed":
                break
        assert found["status"] == "completed"
        assert count >= 2
        assert await source.state() == "postmigrate"


@of_each_kind
async def test_a_destination_that_can_have_no_more(kind: str, tmp_path: Path) -> None:
    """It ends, having said why; the machine runs on where it was."""
    async with served(Spec(RAM, vcpus=2), postcopy=False) as (here, source):
        for count in range(0, 40, 2 if kind == "threads" else 5):
            uri = f"{tmp_path}/in{count}"
            async with process(f"destination{count}", tmp_path, "--incoming", "defer") as destination:
                await destination.set("return-path")
                await destination.qmp.command("migrate-incoming", uri=f"unix:{uri}", exit_on_error=False)
                with KINDS[kind](count, destination.process.pid):
                    await source.migrate(Unix(uri), resume=False)
                    await until(lambda: source.status not in BUSY and source.run_state != "finish-migrate")
                    found = await destination.until_status("failed", "completed")
                if source.status is Status.COMPLETED:
                    assert found["status"] == "completed"
                    await destination.until_works(checks=20)
                    break
                assert found["status"] == "failed"
                assert re.search("no thread for|Too many open files", destination.process.tail())
                assert await destination.state() != "running"
            await works(here)
        assert source.status is Status.COMPLETED
        assert count > 0
