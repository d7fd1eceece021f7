"""Stock QEMUs whose devices send what others do not: taken by the endpoint, held, and sent on to another QEMU."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.qemu.versions import EACH
from tests.sequences.nodes import FINAL, MIB, Node, endpoint_node, qemu_node
from vhostpc.dialect import Compat

pytestmark = pytest.mark.qemu
LIMIT = 60
# Nothing of it is plugged, so none of its pages is ever sent.
VIRTIO_MEM = (
    *("-m", "64M,maxmem=1G", "-object", "memory-backend-memfd,id=more,size=256M,share=on"),
    *("-device", "virtio-mem-pci,id=vm0,memdev=more,requested-size=0"),
)
# In 7.2 both back-ends have the section "slirp", instance 0.
TWO_USERS = (
    *("-netdev", "user,id=a", "-device", "e1000,netdev=a,romfile="),
    *("-netdev", "user,id=b", "-device", "e1000,netdev=b,romfile="),
)


def memory(node: Node) -> bytes:
    """The guest's main memory, out of the process's memfd."""
    for fd in Path(f"/proc/{node.process.pid}/fd").iterdir():
        with suppress(OSError):
            if "memory-backend-memfd" in os.readlink(fd) and fd.stat().st_size == 64 * MIB:
                return fd.read_bytes()
    raise AssertionError(f"{node.name} has no guest memory")


async def move(source: Node, target: Node, path: Path, how: str) -> None:
    """Both are to complete."""
    since = len(source.qmp.events), len(target.qmp.events)
    wanted = [
        {"capability": "events", "state": True},
        {"capability": "postcopy-ram", "state": how == "postcopy"},
    ]
    for node in (source, target):
        await node.qmp.command("migrate-set-capabilities", capabilities=wanted)
    await target.qmp.command("migrate-incoming", uri=f"unix:{path}")
    # Slow at first, so that there is a rest for postcopy.
    await source.qmp.command("migrate-set-parameters", max_bandwidth=4 * MIB if how == "postcopy" else 0)
    await source.qmp.command("migrate", uri=f"unix:{path}")
    if how == "postcopy":
        await source.qmp.event("MIGRATION", since[0], status="active")
        await source.qmp.command("migrate-start-postcopy")
    for node, at in zip((source, target), since, strict=True):
        statuses = await until_final(node, at)
        assert statuses[-1] == "completed", (node.name, statuses, node.process.tail())
        assert ("postcopy-active" in statuses) == (how == "postcopy")


async def until_final(node: Node, at: int) -> list[str]:
    statuses: list[str] = []
    while not statuses or statuses[-1] not in FINAL:
        event = await node.qmp.event("MIGRATION", at, LIMIT)
        at = node.qmp.events.index(event, at) + 1
        statuses.append(event["data"]["status"])
    return statuses


async def held_and_sent_on(
    compat: Compat, folder: Path, how: str, more: Sequence[str], onward: str
) -> dict[str, Any]:
    """What the endpoint reported when it had the machine, and its log. The second QEMU has the first one's memory."""
    with trio.fail_after(2 * LIMIT):
        async with endpoint_node(compat, "held", folder) as held:
            async with qemu_node(compat, "first", more=more) as first:
                await move(first, held, folder / "in", how)
                was = memory(first)
            report: dict[str, Any] = await held.qmp.command("x-vhostpc-report")
            async with qemu_node(compat, "second", more=more, incoming=True, stopped=True) as second:
                await move(held, second, folder / "out", onward)
                assert memory(second) == was
                (plugged,) = [
                    device["data"]["size"] for device in await second.qmp.command("query-memory-devices")
                ] or [0]
                assert plugged == 0
            report["log"] = held.process.err.lines
    return report


@pytest.mark.parametrize(("how", "onward"), [("precopy", "postcopy"), ("postcopy", "precopy")])
@pytest.mark.parametrize("version", EACH)
async def test_virtio_mem(version: Compat, how: str, onward: str, tmp_path: Path) -> None:
    """Its unplugged pages come from nobody, and wait for nobody; in 10.0 its size comes before the pages."""
    report = await held_and_sent_on(version, tmp_path, how, VIRTIO_MEM, onward)
    assert [block["length"] for block in report["blocks"] if block["name"].endswith("more")] == [256 * MIB]
    for block in report["blocks"]:
        assert block["received"] * block["page-size"] == block["length"], block["name"]
    assert any("migration: 65536 host pages were not sent: they are zero" in line for line in report["log"])
    assert not any("the description does not match the sections" in line for line in report["log"])


@pytest.mark.parametrize(("how", "onward"), [("precopy", "postcopy"), ("postcopy", "precopy")])
async def test_two_back_ends_of_one_kind(how: str, onward: str, tmp_path: Path) -> None:
    """QEMU 7.2 takes their sections in the order in which they come."""
    await held_and_sent_on("7.2", tmp_path, how, TWO_USERS, onward)
