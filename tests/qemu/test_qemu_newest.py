"""The newest QEMU as a peer: each way, by precopy and by postcopy, and together with an older one.

A guest that panics is played again (tests/qemu/plays.py); statuses, pages and frames are judged in each play.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import trio

from tests.qemu import peers, vm
from tests.qemu.plays import played
from tests.qemu.test_qemu_endpoint import (
    completed,
    held_and_sent_to_two,
    its_network_goes_on,
    prepare,
    send,
    through_two_endpoints,
)
from tests.sequences.nodes import endpoint_node
from vhostpc.dialect import Compat

pytestmark = pytest.mark.qemu
NEWEST: Compat = "11.1"


@pytest.mark.parametrize(("come", "go"), [("precopy", "postcopy"), ("postcopy", "precopy")])
async def test_its_network_goes_on(come: str, go: str, tmp_path: Path) -> None:
    async def play(folder: Path, targets: list[vm.Vm]) -> None:
        await its_network_goes_on(NEWEST, folder, targets, come=come, go=go)

    await played(play, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("huge", [False, True], ids=["4k", "2M"])
async def test_held_and_sent_to_two(huge: bool, tmp_path: Path) -> None:
    async def play(folder: Path, targets: list[vm.Vm]) -> None:
        await held_and_sent_to_two(NEWEST, huge, folder, targets)

    await played(play, tmp_path)


@pytest.mark.long
async def test_through_two_endpoints(tmp_path: Path) -> None:
    async def play(folder: Path, targets: list[vm.Vm]) -> None:
        await through_two_endpoints(NEWEST, folder, targets)

    await played(play, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("how", ["precopy", "postcopy"])
@pytest.mark.parametrize(
    ("first", "last", "machine"),
    [
        ("10.0", NEWEST, "10.0"),
        (NEWEST, "10.0", "10.0"),
        ("7.2", NEWEST, "7.2"),
        (NEWEST, "7.2", "7.2"),
        ("7.2", "10.0", "7.2"),
        ("10.0", "7.2", "7.2"),
    ],
)
async def test_from_one_version_to_another(
    first: Compat, last: Compat, machine: str, how: str, tmp_path: Path
) -> None:
    """Both have a machine type of the older one; the endpoint speaks as the last one does."""
    extra = ("-machine", f"pc-i440fx-{machine}")

    async def play(folder: Path, targets: list[vm.Vm]) -> None:
        capabilities = ["postcopy-ram"] if how == "postcopy" else []
        spec = vm.Spec(peers.qemu(first), extra=extra)
        with trio.fail_after(180):
            async with endpoint_node(last, "held", folder) as node:
                async with vm.vm(spec, "src", vm.Bare(), folder) as source:
                    nonce = await source.booted()
                    await source.beat(nonce)
                    await prepare(node, *capabilities)
                    await prepare(
                        source, *capabilities, max_bandwidth=(4 << 20) if capabilities else (1 << 30)
                    )
                    await node.qmp.command("migrate-incoming", uri=f"unix:{folder}/in")
                    await source.qmp.command("migrate", uri=f"unix:{folder}/in")
                    if capabilities:
                        await source.qmp.event("MIGRATION", 0, status="active")
                        await source.qmp.command("migrate-start-postcopy")
                    await completed(source)
                    await completed(node)
                there = replace(spec, qemu=peers.qemu(last))
                async with vm.vm(there, "dst", vm.Bare(), folder, incoming=True) as target:
                    targets.append(target)
                    await send(node, target, folder / "out", how, nonce)

    await played(play, tmp_path)
