"""One guest moves fifty times by postcopy, back and forth between the same two bridges.

At the end they have what they had after the first moves: no descriptor, mapping or thread more, no memory.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio

from tests.kit.until import until
from tests.qemu import net, peers, vm
from tests.qemu.backend import Backend, bridge
from tests.qemu.checks import Account, Watch

pytestmark = [pytest.mark.qemu, pytest.mark.long]
MOVES = 50
SLACK = 2 << 20  # bytes: the allocator's and the interpreter's own


@dataclass(frozen=True)
class Holdings:
    """What a process has: descriptors, mappings, threads; bytes of its own memory."""

    fds: int
    maps: int
    threads: int
    memory: int

    @classmethod
    def of(cls, pid: int) -> Holdings:
        process = Path(f"/proc/{pid}")
        rollup = (process / "smaps_rollup").read_text()
        private = sum(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Private_"))
        return cls(
            len(list((process / "fd").iterdir())),
            len((process / "maps").read_text().splitlines()),
            len(list((process / "task").iterdir())),
            private << 10,
        )


async def held_without(end: Backend, front_ends: int) -> Holdings:
    """When its last front-end has gone."""
    await until(lambda: len(end.logged("disconnected")) >= front_ends, limit=20)
    return Holdings.of(end.process.pid)


class Alone:
    """A machine in a task of its own, so that it may be left before one that was started earlier."""

    def __init__(self) -> None:
        self._leave, self._left = trio.Event(), trio.Event()

    async def run(
        self,
        machine: contextlib.AbstractAsyncContextManager[vm.Vm],
        task_status: trio.TaskStatus[vm.Vm] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        async with machine as running:
            task_status.started(running)
            await self._leave.wait()
        self._left.set()

    async def leave(self) -> None:
        self._leave.set()
        await self._left.wait()


@pytest.mark.parametrize("version", peers.VERSIONS)
async def test_fifty_moves(version: str, tmp_path: Path) -> None:
    spec = vm.Spec(peers.qemu(version))
    async with (
        net.network() as network,
        bridge(network, "bridge0", "tap0", tmp_path) as bridge0,
        bridge(network, "bridge1", "tap1", tmp_path) as bridge1,
        trio.open_nursery() as nursery,
    ):
        ends = (bridge0, bridge1)

        async def start(move: int, *, incoming: bool) -> tuple[vm.Vm, Alone]:
            alone, device = Alone(), vm.VhostUser(ends[move % 2].path)
            machine = vm.vm(spec, f"m{move}", device, tmp_path, incoming=incoming)
            return await nursery.start(alone.run, machine), alone

        here, task = await start(0, incoming=False)
        nonce = await here.booted()
        async with network.far() as far:
            await far.received(500)
            account = await Account.open(far)
            watch = Watch(far, account)
            history: list[list[Holdings]] = [[], []]

            async def during() -> None:
                window = await watch.heard()
                await far.acknowledged(window.moved.next + 100)

            for move in range(1, MOVES + 1):
                there, next_task = await start(move, incoming=True)
                await vm.migrate_postcopy(here, there, tmp_path, on_stop=watch.stopped, during=during)
                await ends[move % 2].ended((move + 1) // 2)
                await there.beat(nonce)
                assert here.complaints() == []
                await task.leave()
                left = (move - 1) % 2
                history[left].append(await held_without(ends[left], len(history[left]) + 1))
                (tmp_path / f"m{move - 1}.trace").unlink()
                here, task = there, next_task
            await far.received(account.windows[-1].moved.high + 1000)
            assert await here.sweep() == 0
            await account.close(far, here)
        await task.leave()
    for end, held in zip(ends, history, strict=True):
        first, last = held[1], held[-1]
        print(end.path.name, first, last)
        assert end.complaints() == []
        assert (last.fds, last.maps, last.threads) == (first.fds, first.maps, first.threads)
        assert last.memory <= first.memory + SLACK
