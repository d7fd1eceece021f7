"""A machine of our own moves between two sets of back-ends, again and again, inside this process."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.kit.migration_ends import incoming_of, pair
from tests.kit.own_machine import STEP, WAIT, bridge, check, far_side
from tests.kit.thread_names import thread_names
from vhostpc.errors import ChannelLost, GuestMemoryError, StreamError
from vhostpc.guest.own_machine import Block, OwnMachine, Spec, open_machine
from vhostpc.guest.sections import NET, globalstate
from vhostpc.migration.channel import Channel
from vhostpc.migration.incoming import Incoming
from vhostpc.migration.options import Options
from vhostpc.migration.outgoing import NeverRan, Outgoing
from vhostpc.migration.phase import Course, Event, Phase
from vhostpc.migration.watcher import Unwatched
from vhostpc.wire.migration.elements import DeviceSection

MIB = 1 << 20


async def move(source: OwnMachine, destination: OwnMachine, *, postcopy: bool, cut: bool = False) -> None:
    """All of it; the destination runs. Raises what the source does. ``cut``: its link is lost, and recovered."""
    there, here = pair()
    options = Options(on={"postcopy-ram"} if postcopy else {"return-path"})
    if cut:
        options.set_parameters({"max-postcopy-bandwidth": 4 * MIB})

    async def run(_: bool) -> None:
        await destination.cont()

    course = Course("source", options.dialect)
    course.move(Event.START)
    async with Channel(there) as out, Channel(here) as into:
        outgoing = Outgoing(out, source, course, Unwatched(source), options=options)
        incoming = incoming_of(into, destination, postcopy=postcopy, run=run)
        if postcopy:
            outgoing.start_postcopy()
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(incoming.receive)
                if not cut:
                    await outgoing.send()
                    return
                nursery.start_soon(cut_it, incoming, into)
                with pytest.raises(ChannelLost):
                    await outgoing.send()
                await until(lambda: incoming.course.phase is Phase.PAUSED)
                options.set_parameters({"max-postcopy-bandwidth": 0})
                there, here = pair()
                async with Channel(there) as out_again, Channel(here) as into_again:
                    nursery.start_soon(incoming.resume, into_again)
                    course.move(Event.RECOVER)
                    await outgoing.resume(out_again)
        finally:
            incoming.close()
            outgoing.close()


async def cut_it(incoming: Incoming, link: Channel) -> None:
    """In the middle of its pages."""
    await until(lambda: incoming.course.phase is Phase.POSTCOPY and incoming.loads()[-1].placed >= 100)
    link.shut_down()


async def until(condition: Callable[[], bool]) -> None:
    with trio.fail_after(WAIT):
        while not condition():
            await trio.sleep(STEP)


async def works(machine: OwnMachine, frames: int = 100, reads: int = 500) -> None:
    """So many more of each, on each device and each vCPU."""
    seen = [d.books().received for d in machine.devices], [v.numbers().reads for v in machine.vcpus]
    await until(
        lambda: all(d.books().received >= n + frames for d, n in zip(machine.devices, seen[0], strict=True))
        and all(v.numbers().reads >= n + reads for v, n in zip(machine.vcpus, seen[1], strict=True))
    )


def resources() -> dict[str, Any]:
    fds = []
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            fds.append(os.readlink(f"/proc/self/fd/{fd}"))
    maps = Path("/proc/self/maps").read_text().splitlines()
    return {
        "fds": len(fds),
        "ufds": sum("userfaultfd" in name for name in fds),
        "maps": sum("memfd:" in line for line in maps),
        "threads": sorted(n for n in thread_names().values() if n.startswith("vpc-") and n != "vpc-idle"),
    }


@contextlib.asynccontextmanager
async def places(folder: Path, devices: int = 1) -> AsyncIterator[list[list[str]]]:
    """The sockets of two sets of bridges."""
    async with contextlib.AsyncExitStack() as stack:
        far = await stack.enter_async_context(far_side())
        found: list[list[str]] = []
        for side in "ab":
            found.append([str(folder / f"{side}{i}") for i in range(devices)])
            for path in found[-1]:
                await stack.enter_async_context(bridge(Path(path), far))
        yield found


def spec(sockets: Sequence[str], **more: Any) -> Spec:
    return Spec([Block("pc.ram", 32 * MIB)], backends=sockets, **more)


class Life:
    """A machine in a task of its own, since the one that follows is made before it ends."""

    def __init__(self) -> None:
        self._leave, self._left = trio.Event(), trio.Event()

    async def run(
        self,
        made_of: Spec,
        empty: bool,
        *,
        task_status: trio.TaskStatus[OwnMachine] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        async with open_machine(made_of, empty=empty) as machine:
            task_status.started(machine)
            await self._leave.wait()
        self._left.set()

    async def end(self) -> None:
        self._leave.set()
        await self._left.wait()


async def back_and_forth(folder: Path, times: int) -> None:
    async with places(folder) as sockets, trio.open_nursery() as nursery:
        begin = resources()
        life = Life()
        machine: OwnMachine = await nursery.start(life.run, spec(sockets[0], vcpus=2), False)
        await machine.cont()
        await works(machine)
        alone = resources()
        for turn in range(1, times + 1):
            other_life = Life()
            other: OwnMachine = await nursery.start(other_life.run, spec(sockets[turn % 2], vcpus=2), True)
            await move(machine, other, postcopy=turn % 3 != 0, cut=turn % 5 == 0 and turn % 3 != 0)
            await life.end()
            life, machine = other_life, other
            await works(machine)
            check(machine.report(), moves=turn)
            # What a migration used is let go a moment after its last word.
            await until(lambda: {**resources(), "threads": 0} == {**alone, "threads": 0})
            now = resources()
            assert now == {**alone, "threads": now["threads"]}, f"after {turn} moves"
            assert now["threads"].count("vpc-vcpu") == 2
            assert set(now["threads"]) <= {"vpc-vcpu", "vpc-driver", "vpc-far"}, now["threads"]
        await machine.stop()
        for vcpu in machine.vcpus:
            assert await vcpu.sweep() == (0, None)
        await life.end()
        await until(lambda: resources() == begin)


async def test_back_and_forth(tmp_path: Path) -> None:
    await back_and_forth(tmp_path, 50)


@pytest.mark.long
async def test_back_and_forth_many_times(tmp_path: Path) -> None:
    await back_and_forth(tmp_path, 300)


Change = Callable[[DeviceSection], list[DeviceSection]]


def newer(section: DeviceSection) -> list[DeviceSection]:
    return [dataclasses.replace(section, version=section.version + 1)]


def shorter(section: DeviceSection) -> list[DeviceSection]:
    return [dataclasses.replace(section, body=section.body[:-1])]


def longer(section: DeviceSection) -> list[DeviceSection]:
    return [dataclasses.replace(section, body=section.body + b"\0")]


def gone(section: DeviceSection) -> list[DeviceSection]:
    return []


def packed_rings(section: DeviceSection) -> list[DeviceSection]:
    """Offered by nobody here, and not what our driver speaks."""
    values = NET.unpack(section)
    return [
        NET.pack(section.section_id, section.instance, {**values, "features": values["features"] | 1 << 34})
    ]


def further_on(section: DeviceSection) -> list[DeviceSection]:
    values = NET.unpack(section)
    return [NET.pack(section.section_id, section.instance, {**values, "rx_base": values["rx_base"] ^ 0x8000})]


def never_sent(section: DeviceSection) -> list[DeviceSection]:
    values = NET.unpack(section)
    return [
        NET.pack(section.section_id, section.instance, {**values, "flying_end": values["flying_end"] + 1})
    ]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (packed_rings, "does not offer all of the features"),
        (further_on, "a ring continues at"),
        (never_sent, "cannot be those that were in flight"),
    ],
)
@pytest.mark.parametrize("postcopy", [False, True], ids=["precopy", "postcopy"])
async def test_a_device_that_cannot_be(
    postcopy: bool, change: Change, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await check_not_taken("vhost-user-net", change, why, tmp_path, monkeypatch, postcopy=postcopy)


@pytest.mark.parametrize("idstr", ["vhostpc-machine", "vhost-user-net", "vcpu", "globalstate"])
@pytest.mark.parametrize(
    ("change", "why"),
    [
        (newer, "version 2, which is newer"),
        (shorter, "ends after"),
        (longer, "1 bytes behind its last field"),
        (gone, "does not come"),
    ],
)
@pytest.mark.parametrize("postcopy", [False, True], ids=["precopy", "postcopy"])
async def test_a_state_that_is_not_taken(
    postcopy: bool, change: Change, why: str, idstr: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await check_not_taken(idstr, change, why, tmp_path, monkeypatch, postcopy=postcopy)


@pytest.mark.parametrize("postcopy", [False, True], ids=["precopy", "postcopy"])
async def test_a_state_that_comes_twice(
    postcopy: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The last one counts, as at a QEMU."""
    async with (
        places(tmp_path) as (here, there),
        open_machine(spec(here)) as source,
        open_machine(spec(there), empty=True) as destination,
    ):
        save = source.save

        async def doubled() -> tuple[Sequence[DeviceSection], bytes]:
            sections, _ = await save()
            again = [dataclasses.replace(s, section_id=s.section_id + 90) for s in sections]
            return [*sections, *again], described([*sections, *again])

        monkeypatch.setattr(source, "save", doubled)
        await source.cont()
        await works(source, frames=20, reads=50)
        await move(source, destination, postcopy=postcopy)
        await works(destination, frames=20, reads=50)
        check(destination.report())
    assert sum("arrives twice: the last one counts" in message for message in caplog.messages) == 4


async def test_a_uuid_that_is_not_compared(caplog: pytest.LogCaptureFixture) -> None:
    """A machine of ours has none, like a QEMU without ``-uuid``: it is told."""
    async with open_machine(Spec([Block("ram", MIB)]), empty=True) as machine:
        machine.accept(dataclasses.replace(machine.configuration, uuid=bytes(range(16))))
    assert caplog.messages == [
        "UUID is received 00010203-0405-0607-0809-0a0b0c0d0e0f, but local uuid isn't set"
    ]


async def test_a_run_state_that_it_cannot_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def debug(section: DeviceSection) -> list[DeviceSection]:
        return [globalstate(section.section_id, "debug")]

    await check_not_taken("globalstate", debug, "arrives 'debug'", tmp_path, monkeypatch, postcopy=False)


async def check_not_taken(
    idstr: str, change: Change, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, postcopy: bool
) -> None:
    """Refused before it runs there, with one sentence; the source is told, and runs on."""
    async with (
        places(tmp_path) as (here, there),
        open_machine(spec(here)) as source,
        open_machine(spec(there), empty=True) as destination,
    ):
        save = source.save

        async def changed() -> tuple[Sequence[DeviceSection], bytes]:
            sections, _ = await save()
            out = [new for s in sections for new in (change(s) if s.idstr == idstr else [s])]
            # Precopy: the JSON says where they end. It is not ours that is looked at here.
            return out, described(out)

        monkeypatch.setattr(source, "save", changed)
        await source.cont()
        await works(source, frames=20, reads=50)
        caught: list[BaseException] = []
        try:
            await move(source, destination, postcopy=postcopy)
        except* (StreamError, ChannelLost) as group:
            caught += leaves(group)
        assert any(isinstance(e, StreamError) and not isinstance(e, NeverRan) for e in caught), caught
        assert any(re.search(why, str(e)) for e in caught), caught
        assert not destination.running
        await source.cont()
        await works(source, frames=20, reads=50)
        check(source.report())


def described(sections: Sequence[DeviceSection]) -> bytes:
    import json

    devices = [
        {"name": s.idstr, "instance_id": s.instance, "version": s.version, "size": len(s.body)}
        for s in sections
    ]
    return json.dumps({"page_size": 4096, "devices": devices}).encode()


def leaves(error: BaseException) -> list[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        return [leaf for inner in error.exceptions for leaf in leaves(inner)]
    return [error]


async def test_other_vcpu_areas_are_refused(tmp_path: Path) -> None:
    """Blocks alike, but for their order."""
    blocks = [Block("a", 4 * MIB), Block("b", 4 * MIB)]
    async with (
        open_machine(Spec(blocks)) as source,
        open_machine(Spec(blocks[::-1]), empty=True) as destination,
    ):
        with pytest.raises(BaseExceptionGroup) as caught:
            await move(source, destination, postcopy=False)
        assert any("work on other areas" in str(e) for e in leaves(caught.value))


@pytest.mark.parametrize(
    ("blocks", "more", "why"),
    [
        ([], {}, "needs memory"),
        ([Block("a", 4096)], {"vcpus": 2}, "2 vCPUs need a page of memory each"),
        (
            [Block("a", MIB)],
            {"backends": ["/nowhere"]},
            "need 4 MiB of the first RAM block, 'a', which has 1",
        ),
        (
            [Block("a", 1 << 40, 2 * MIB)],
            {},
            "cannot be created: .*; reserve 524288 in .*2048kB/nr_hugepages",
        ),
    ],
)
async def test_memory_that_cannot_be_had(blocks: list[Block], more: dict[str, Any], why: str) -> None:
    with pytest.raises(GuestMemoryError, match=why):
        async with open_machine(Spec(blocks, **more)):
            pass
