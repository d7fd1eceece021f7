"""``vhostpc endpoint`` between stock QEMUs: a machine is taken, held, and sent on; the guest goes on."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.kit.hugepages import hugepages
from tests.kit.until import until
from tests.qemu import net, peers, vm
from tests.qemu.backend import bridge
from tests.qemu.checks import Account, Watch
from tests.sequences.nodes import Node, endpoint_node
from vhostpc.dialect import Compat

pytestmark = pytest.mark.qemu


async def prepare(side: Any, *capabilities: str, **parameters: int) -> None:
    wanted = [{"capability": name, "state": True} for name in ("events", *capabilities)]
    await side.qmp.command("migrate-set-capabilities", capabilities=wanted)
    if parameters:
        await side.qmp.command("migrate-set-parameters", **parameters)


async def completed(side: Any, since: int = 0) -> None:
    at = since
    while True:
        event = await side.qmp.event("MIGRATION", at, 120)
        at = side.qmp.events.index(event, at) + 1
        status = event["data"]["status"]
        assert status not in ("failed", "postcopy-paused", "cancelled"), await side.qmp.command(
            "query-migrate"
        )
        if status == "completed":
            return


@contextlib.asynccontextmanager
async def holding(
    version: Compat,
    tmp_path: Path,
    how: str,
    *,
    huge: bool = False,
    name: str = "held",
    more: Sequence[str] = (),
) -> AsyncIterator[tuple[Node, str]]:
    """An endpoint that took a booted guest from a QEMU, which is gone; the guest's nonce."""
    spec = vm.Spec(peers.qemu(version), vm.Memory(huge=huge, size=256))
    page = "2M" if huge else "4K"
    async with endpoint_node(version, name, tmp_path, ram=f"mem=256M,page={page}", more=more) as node:
        async with vm.vm(spec, f"{name}-source", vm.Bare(), tmp_path) as source:
            nonce = await source.booted()
            await source.beat(nonce)
            capabilities = ["postcopy-ram"] if how == "postcopy" else []
            await prepare(node, *capabilities)
            await prepare(source, *capabilities, max_bandwidth=(4 << 20) if capabilities else (1 << 30))
            await node.qmp.command("migrate-incoming", uri=f"unix:{tmp_path}/{name}.in")
            await source.qmp.command("migrate", uri=f"unix:{tmp_path}/{name}.in")
            if capabilities:
                await source.qmp.event("MIGRATION", 0, status="active")
                await source.qmp.command("migrate-start-postcopy")
            await completed(source)
            await completed(node)
            assert source.complaints() == []
        assert (await node.qmp.command("query-status"))["status"] == "paused"
        yield node, nonce


async def send(node: Node, target: vm.Vm, path: Path, how: str, nonce: str) -> None:
    """The guest runs there, and is the one that it was; every page of it is right."""
    capabilities = ["postcopy-ram"] if how == "postcopy" else []
    await prepare(target, *capabilities)
    # Little but what the guest asks for, until it has been seen to run.
    off = [{"capability": "postcopy-ram", "state": how == "postcopy"}]
    await node.qmp.command("migrate-set-capabilities", capabilities=off)
    slow = 4 << 20 if how == "postcopy" else 0  # in bytes a second; 0 is no limit
    await prepare(node, max_bandwidth=slow, max_postcopy_bandwidth=1 << 20)
    await target.qmp.command("migrate-incoming", uri=f"unix:{path}")
    since = len(node.qmp.events)
    await node.qmp.command("migrate", uri=f"unix:{path}")
    if how == "postcopy":
        await node.qmp.command("migrate-start-postcopy")
        await node.qmp.event("MIGRATION", since, status="postcopy-active")
        await target.qmp.event("RESUME", 0)
        await target.beat(nonce)
        ram = (await node.qmp.command("query-migrate"))["ram"]
        assert ram["postcopy-requests"] >= 10
        assert ram["remaining"] > 0
        await node.qmp.command("migrate-set-parameters", max_postcopy_bandwidth=0)
    await completed(node, since)
    await completed(target)
    await target.beat(nonce, 2)
    assert await target.sweep() == 0
    assert target.complaints() == []


async def held_and_sent_to_two(version: Compat, huge: bool, folder: Path, targets: list[vm.Vm]) -> None:
    """Taken by precopy, sent by postcopy; taken back, and the same machine sent again, by precopy.

    ``targets``, here and below: gets the QEMUs in which the guest goes on.
    """
    spec = vm.Spec(peers.qemu(version), vm.Memory(huge=huge, size=256))
    with hugepages(3 * 256 + 16) if huge else contextlib.nullcontext(), trio.fail_after(240):
        async with holding(version, folder, "precopy", huge=huge) as (node, nonce):
            for number, how in enumerate(("postcopy", "precopy")):
                async with vm.vm(spec, f"dst{number}", vm.Bare(), folder, incoming=True) as target:
                    targets.append(target)
                    await send(node, target, folder / f"out{number}", how, nonce)
                again = await node.qmp.reply("migrate", uri=f"unix:{folder}/nowhere")
                assert "paused due to previous migration" in again["error"]["desc"]
                await node.qmp.command("stop")


async def through_two_endpoints(version: Compat, folder: Path, targets: list[vm.Vm]) -> None:
    """QEMU to endpoint to endpoint to QEMU: in by postcopy, between them by postcopy, out by precopy."""
    spec = vm.Spec(peers.qemu(version))
    with trio.fail_after(180):
        async with (
            holding(version, folder, "postcopy") as (first, nonce),
            endpoint_node(version, "second", folder) as second,
        ):
            for node in (first, second):
                await prepare(node, "postcopy-ram")
            path = f"unix:{folder}/between"
            await second.qmp.command("migrate-incoming", uri=path)
            since = len(first.qmp.events)
            await first.qmp.command("migrate", uri=path)
            await first.qmp.command("migrate-start-postcopy")
            await completed(first, since)
            await completed(second)
            async with vm.vm(spec, "dst", vm.Bare(), folder, incoming=True) as target:
                targets.append(target)
                await send(second, target, folder / "out", "precopy", nonce)


async def its_network_goes_on(
    version: Compat, folder: Path, targets: list[vm.Vm], *, come: str = "precopy", go: str = "postcopy"
) -> None:
    """A guest with a vhost-user card is taken, held, and sent on to where another bridge is. In a postcopy that one's
    faults go to us by way of QEMU. Every frame outside of the move comes."""
    spec = vm.Spec(peers.qemu(version))
    coming, going = (["postcopy-ram"] if how == "postcopy" else [] for how in (come, go))
    with trio.fail_after(180):
        async with (
            net.network() as network,
            bridge(network, "bridge0", "tap0", folder) as bridge0,
            bridge(network, "bridge1", "tap1", folder) as bridge1,
            endpoint_node(version, "held", folder) as node,
            vm.vm(spec, "there", vm.VhostUser(bridge1.path), folder, incoming=True) as there,
            vm.vm(spec, "here", vm.VhostUser(bridge0.path), folder) as here,
        ):
            targets.append(there)
            nonce = await here.booted()
            async with network.far() as far:
                await far.received(500)
                await here.beat(nonce)
                account = await Account.open(far)
                watch = Watch(far, account)
                await prepare(node, *coming)
                await prepare(here, *coming, max_bandwidth=(4 << 20) if coming else (1 << 30))
                await node.qmp.command("migrate-incoming", uri=f"unix:{folder}/in")
                await here.qmp.command("migrate", uri=f"unix:{folder}/in")
                if coming:
                    await here.qmp.event("MIGRATION", 0, status="active")
                    await here.qmp.command("migrate-start-postcopy")
                await here.qmp.event("STOP", 0)
                await watch.stopped()
                await completed(here)
                await completed(node)

                await prepare(there, *going)
                off = [{"capability": "postcopy-ram", "state": bool(going)}]
                await node.qmp.command("migrate-set-capabilities", capabilities=off)
                slow = 4 << 20 if going else 0  # in bytes a second; 0 is no limit
                await prepare(node, max_bandwidth=slow, max_postcopy_bandwidth=1 << 20)
                await there.qmp.command("migrate-incoming", uri=f"unix:{folder}/out")
                since = len(node.qmp.events)
                await node.qmp.command("migrate", uri=f"unix:{folder}/out")
                if going:
                    await node.qmp.command("migrate-start-postcopy")
                await there.qmp.event("RESUME", 0, limit=60)
                window = await watch.heard()
                await far.acknowledged(window.moved.next + 300)
                if going:
                    await until(lambda: there.traces(vm.RESOLVED) >= 10, limit=20)
                    await node.qmp.command("migrate-set-parameters", max_postcopy_bandwidth=0)
                await completed(node, since)
                await completed(there)
                if going:
                    await bridge1.ended(1)
                await far.received(window.moved.high + 1000)
                await there.beat(nonce)
                assert await there.sweep() == 0
                await account.close(far, there)
            assert here.complaints() == there.complaints() == []
            assert bridge0.complaints() == bridge1.complaints() == []


@pytest.mark.parametrize("pages", ["4k", "2M"])
@pytest.mark.parametrize("version", peers.VERSIONS)
async def test_held_and_sent_to_two(version: Compat, pages: str, tmp_path: Path) -> None:
    await held_and_sent_to_two(version, pages == "2M", tmp_path, [])


@pytest.mark.parametrize("version", peers.VERSIONS)
async def test_through_two_endpoints(version: Compat, tmp_path: Path) -> None:
    await through_two_endpoints(version, tmp_path, [])


@pytest.mark.parametrize("version", peers.VERSIONS)
async def test_its_network_goes_on(version: Compat, tmp_path: Path) -> None:
    await its_network_goes_on(version, tmp_path, [])
