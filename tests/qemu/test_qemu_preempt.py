"""postcopy-preempt with a stock QEMU at either end: requested pages on a connection of their own, also over a pause."""

from __future__ import annotations

import contextlib
import random
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.kit.migration_ends import incoming_of
from tests.qemu import peers, vm
from tests.qemu.test_qemu_endpoint import completed, holding, prepare
from tests.qemu.test_qemu_recovery import LOST, lost_and_recovered, paused
from tests.qemu.test_qemu_to_held import MAIN, PAGE, compare, listening
from tests.qemu.versions import EACH
from tests.sequences.nodes import Node, endpoint_node
from vhostpc.dialect import Compat
from vhostpc.migration.channel import Channel
from vhostpc.migration.held import HeldMachine
from vhostpc.migration.phase import Event
from vhostpc.pages.ramblock import Bits

pytestmark = pytest.mark.qemu
PREEMPT = ("postcopy-ram", "postcopy-preempt")


async def sent(node: Node) -> dict[str, Any]:
    numbers = (await node.qmp.command("x-vhostpc-report"))["sent"]
    assert isinstance(numbers, dict)
    return numbers


@pytest.mark.parametrize("version", EACH)
async def test_to_qemu(version: Compat, tmp_path: Path) -> None:
    """What its guest touches comes beside the background, whose rate it does not wait for; the link is lost twice."""
    spec = vm.Spec(peers.qemu(version))
    with trio.fail_after(200):
        async with (
            holding(version, tmp_path, "precopy") as (node, nonce),
            vm.vm(spec, "target", vm.Bare(), tmp_path, incoming=True) as target,
        ):
            await prepare(target, *PREEMPT)
            await prepare(node, *PREEMPT, max_bandwidth=4 << 20, max_postcopy_bandwidth=4096)
            await target.qmp.command("migrate-incoming", uri=f"unix:{tmp_path}/out")
            since = len(node.qmp.events)
            await node.qmp.command("migrate", uri=f"unix:{tmp_path}/out")
            await node.qmp.command("migrate-start-postcopy")
            await node.qmp.event("MIGRATION", since, status="postcopy-active")
            await target.qmp.event("RESUME", 0)
            await target.beat(nonce)
            first = await sent(node)
            # Pages of nothing but zeros take some bytes only.
            assert first["urgent-bytes"] > 10 * 8
            assert first["requested-pages"] > 10
            await lost_and_recovered(node, target, tmp_path, pauses=node, times=2, seed=3)
            await target.beat(nonce, 2)
            second = await sent(node)
            assert second["urgent-bytes"] > first["urgent-bytes"]
            assert (await node.qmp.command("query-migrate"))["ram"]["remaining"] > 0
            since = len(node.qmp.events)
            await node.qmp.command("migrate-set-parameters", max_postcopy_bandwidth=0)
            await completed(node, since)
            await target.qmp.event("MIGRATION", 0, status="completed")
            await target.beat(nonce, 3)
            assert await target.sweep() == 0
            assert [line for line in target.complaints() if not any(words in line for words in LOST)] == []


@pytest.mark.parametrize("version", EACH)
async def test_from_qemu(version: str, tmp_path: Path) -> None:
    """Each page that is touched comes by the second connection, also by the next one behind a pause."""
    spec = vm.Spec(peers.qemu(version))
    path = tmp_path / "in"
    with HeldMachine() as machine:
        async with (
            contextlib.AsyncExitStack() as stack,
            listening(path) as listener,
            vm.vm(spec, "src", vm.Bare(), tmp_path) as source,
        ):

            async def take() -> Channel:
                return await stack.enter_async_context(Channel(await listener.accept()))

            await source.booted()
            await prepare(source, *PREEMPT, max_bandwidth=4 << 20, max_postcopy_bandwidth=1 << 20)
            await source.qmp.command("migrate", uri=f"unix:{path}")
            incoming = incoming_of(await take(), machine, postcopy=True, second=take)
            rng = random.Random(version)
            touched: dict[int, bytes] = {}

            async def touch(count: int) -> None:
                await incoming.running()
                block = machine.ram[MAIN]
                absent = [n for n in range(block.pages) if not block.test_bit(Bits.RECEIVED, n)]
                for page in rng.sample(absent, count):
                    touched[page * PAGE] = await block.read(page * PAGE, PAGE)

            def urgent() -> int:
                return incoming._link._urgent_pages.numbers().bytes  # type: ignore[union-attr]

            with trio.fail_after(120):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(incoming.receive)
                    await source.qmp.event("MIGRATION", 0, status="active")
                    await source.qmp.command("migrate-start-postcopy")
                    await touch(20)
                    assert urgent() >= 20 * 9
                    await source.qmp.event(
                        "MIGRATION", 0, status="postcopy-active"
                    )  # 11.1 is in postcopy-device before
                    await source.qmp.command("migrate-pause")
                    await paused(source)
                    while not incoming.course.allows(Event.RECOVER):
                        await trio.sleep(0.01)
                    nursery.start_soon(touch, 5)  # while there is no link
                    since = len(source.qmp.events)
                    await source.qmp.command("migrate", uri=f"unix:{path}", resume=True)
                    nursery.start_soon(incoming.resume, await take(), 60, take)
                    await source.qmp.event("MIGRATION", since, status="postcopy-active")
                    await touch(20)
                    assert urgent() >= 20 * 9
                    await source.qmp.command("migrate-set-parameters", max_postcopy_bandwidth=0)
                await completed(source, since)
                assert len(touched) == 45
                await compare(source, machine, tmp_path)
                for offset, data in touched.items():
                    assert await machine.ram[MAIN].read(offset, PAGE) == data
                incoming.close()


@pytest.mark.parametrize("version", EACH)
async def test_qemu_without_it(version: Compat, tmp_path: Path) -> None:
    """A destination that takes one connection: the source says so before its machine has stopped."""
    spec = vm.Spec(peers.qemu(version))
    with trio.fail_after(120):
        async with (
            holding(version, tmp_path, "precopy") as (node, _),
            vm.vm(spec, "target", vm.Bare(), tmp_path, incoming=True) as target,
        ):
            await prepare(target, "postcopy-ram")
            await prepare(node, *PREEMPT, max_bandwidth=4 << 20)
            await target.qmp.command("migrate-incoming", uri=f"unix:{tmp_path}/out")
            since = len(node.qmp.events)
            await node.qmp.command("migrate", uri=f"unix:{tmp_path}/out")
            await node.qmp.command("migrate-start-postcopy")
            await node.qmp.event("MIGRATION", since, status="failed")
            error = (await node.qmp.command("query-migrate"))["error-desc"]
            assert "no connection for requested pages" in error or "is postcopy-preempt on there?" in error
            assert (await node.qmp.command("query-status"))["status"] == "paused"


@pytest.mark.parametrize("version", EACH)
async def test_from_qemu_without_it(version: Compat, tmp_path: Path) -> None:
    """A source that makes one connection: it is told, and its guest runs on."""
    spec = vm.Spec(peers.qemu(version))
    with trio.fail_after(120):
        async with (
            endpoint_node(version, "held", tmp_path) as node,
            vm.vm(spec, "src", vm.Bare(), tmp_path) as source,
        ):
            await source.booted()
            await prepare(node, *PREEMPT)
            await prepare(source, "postcopy-ram", max_bandwidth=4 << 20)
            await node.qmp.command("migrate-incoming", uri=f"unix:{tmp_path}/in")
            await source.qmp.command("migrate", uri=f"unix:{tmp_path}/in")
            await source.qmp.event("MIGRATION", 0, status="active")
            await source.qmp.command("migrate-start-postcopy")
            await node.process.err.find("the source has made no second connection")
