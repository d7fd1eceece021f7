"""A file that QEMU wrote with the capability background-snapshot: RAM in parts, and no last section of it."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import pytest
import trio

from tests.qemu import peers
from tests.qemu.test_qemu_held_devices import until_final
from tests.qemu.test_qemu_sweep import BIOS, FILLED, STARTING, blocks, complaints, fill, memories
from tests.sequences.nodes import Node, endpoint_node, qemu_node
from vhostpc.dialect import Compat

pytestmark = pytest.mark.qemu
LIMIT = 60
BOARD = ("-M", "pc", "-m", "64M", "-vga", "std")  # userfaultfd write-protects anonymous memory


async def take(node: Node, path: Path) -> None:
    """It comes whole, from the file."""
    events = [{"capability": "events", "state": True}]
    await node.qmp.command("migrate-set-capabilities", capabilities=events)
    await node.qmp.command("migrate-incoming", uri=f"exec:cat {path}")
    assert (await until_final(node, 0))[-1] == "completed", node.process.tail()


@pytest.mark.parametrize("version", peers.VERSIONS)
async def test_a_background_snapshot(version: Compat, tmp_path: Path) -> None:
    """QEMU runs it; the endpoint holds what QEMU loads, and `inspect` finds nothing wrong with it."""
    path = tmp_path / "snapshot"
    with trio.fail_after(LIMIT):
        async with qemu_node(version, "first", board=BOARD, more=BIOS) as first:
            await fill(first)
            await first.process.out.find(r"Booting from|No bootable device")
            wanted = [{"capability": name, "state": True} for name in ("events", "background-snapshot")]
            await first.qmp.command("migrate-set-capabilities", capabilities=wanted)
            await first.qmp.command("migrate-set-parameters", max_bandwidth=0)
            await first.qmp.command("migrate", uri=f"exec:cat > {path}")
            assert (await until_final(first, 0))[-1] == "completed", first.process.tail()
            assert (await first.qmp.command("query-status"))["status"] == "running"
            assert complaints(first) == []
        async with (
            qemu_node(version, "second", board=BOARD, more=BIOS, incoming=True, stopped=True) as second,
            endpoint_node(version, "held", tmp_path) as held,
        ):
            await take(second, path)
            await take(held, path)
            (loaded,) = await memories(second)
            came = await blocks(held)
            assert came["pc.ram"] == loaded
            assert loaded[STARTING : STARTING + FILLED] == random.Random(1).randbytes(FILLED)
            await until_warned(held)
    command = [sys.executable, "-m", "vhostpc", "inspect", str(path), "--json"]
    done = await trio.run_process(command, capture_stdout=True, capture_stderr=True, check=False)
    found = json.loads(done.stdout)
    assert (done.returncode, found["wrong"], found["refused"]) == (0, None, []), done.stderr


async def until_warned(held: Node) -> None:
    await held.process.err.find("the stream ends without the last section of RAM")
