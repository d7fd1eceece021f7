"""QEMU's own monitor clients drive whole migrations of our endpoint: in from a QEMU, on to another."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import trio
from qemu.qmp import ExecuteError, QMPClient

from tests.qemu import peers
from tests.qemu.proc import child
from tests.qemu.versions import EACH
from tests.sequences.nodes import FINAL, Node, endpoint_node, qemu_node
from vhostpc.dialect import DIALECTS, Compat

pytestmark = pytest.mark.qemu

ON = [{"capability": name, "state": True} for name in ("events", "postcopy-ram")]


@contextlib.asynccontextmanager
async def between_two(compat: Compat, folder: Path) -> AsyncIterator[tuple[Node, Node, Node]]:
    """A QEMU with a paused machine, our endpoint, and a QEMU that waits at ``folder/last``."""
    async with (
        qemu_node(compat, "first") as first,
        endpoint_node(compat, "middle", folder) as middle,
        qemu_node(compat, "last", incoming=True) as last,
    ):
        await first.qmp.command("stop")
        for node in (first, last):
            await node.qmp.command("migrate-set-capabilities", capabilities=ON)
        await first.qmp.command("migrate-set-parameters", max_bandwidth=1 << 30)
        await last.qmp.command("migrate-incoming", uri=f"unix:{folder}/last")
        yield first, middle, last


async def library(folder: Path) -> dict[str, Any]:
    """Both moves, by the client of ``qemu.qmp`` (it runs on asyncio); the first is begun when ``in`` is there."""
    qmp = QMPClient("test")
    told: dict[str, Any] = {"heard": []}
    await qmp.connect(str(folder / "middle.qmp"))
    with qmp.listener(("MIGRATION", "STOP", "RESUME")) as listener:

        async def until(*wanted: str) -> None:
            async for event in listener:
                told["heard"].append(event.get("data", {}).get("status", event["event"]))  # type: ignore[attr-defined]
                if told["heard"][-1] in wanted:
                    return

        await qmp.execute("migrate-set-capabilities", {"capabilities": ON})
        await qmp.execute("migrate-incoming", {"uri": f"unix:{folder}/in"})
        await until(*FINAL)
        told["held"] = await qmp.execute("query-status")
        try:
            await qmp.execute("cont")
        except ExecuteError as exc:
            told["refusal"] = exc.error_class
        slow = {"max-bandwidth": 4 << 20, "max-postcopy-bandwidth": 0}
        await qmp.execute("migrate-set-parameters", slow)
        await qmp.execute("migrate", {"uri": f"unix:{folder}/last"})
        await until("active")
        await qmp.execute("migrate-start-postcopy")
        await until(*FINAL)
        told["info"] = await qmp.execute("query-migrate")
        told["left"] = await qmp.execute("query-status")
    await qmp.disconnect()
    return told


async def send_when_it_listens(first: Node, folder: Path) -> None:
    while not (folder / "in").exists():
        await trio.sleep(0.01)
    await first.qmp.command("migrate", uri=f"unix:{folder}/in")


@pytest.mark.parametrize("compat", EACH)
async def test_the_library_of_qemu_moves_a_machine(compat: Compat, tmp_path: Path) -> None:
    told: dict[str, Any] = {}
    async with between_two(compat, tmp_path) as (first, _, last):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(send_when_it_listens, first, tmp_path)
            told = await trio.to_thread.run_sync(lambda: asyncio.run(library(tmp_path)))
        assert await last.until_status(*FINAL) == "completed"
        assert (await last.statuses())[0] == "running"  # so it does by postcopy, even a paused machine
    coming = ["setup", "active", "completed"]
    dialect = DIALECTS[compat]
    switch = [
        *(["device"] if dialect.device_status else []),
        *(["postcopy-device"] if dialect.loaded_ping else []),
        "postcopy-active",
    ]
    assert told["heard"] == [*coming, "setup", "active", *switch, "completed"]
    assert told["held"]["status"] == "paused"
    assert told["refusal"] == "GenericError"
    assert told["info"]["status"] == "completed"
    assert told["info"]["ram"]["postcopy-bytes"] > 16 << 20
    assert told["left"]["status"] == "postmigrate"


@pytest.mark.parametrize("compat", peers.VERSIONS)
async def test_qmp_shell_moves_a_machine(compat: Compat, tmp_path: Path) -> None:
    shell = [str(Path(sys.executable).parent / "qmp-shell"), str(tmp_path / "middle.qmp")]
    home = {"HOME": str(tmp_path), "PYTHONUNBUFFERED": "1"}
    async with between_two(compat, tmp_path) as (first, middle, last):
        async with child("qmp-shell", shell, env=home) as process:

            async def type_in(line: str, answer: str) -> None:
                at = len(process.out)
                await process.send(line + "\n")
                await process.out.find(answer, at)

            on = '[{"capability":"events","state":true},{"capability":"postcopy-ram","state":true}]'
            await type_in(f"migrate-set-capabilities capabilities={on}", '"return": {}')
            await type_in(f"migrate-incoming uri=unix:{tmp_path}/in", '"return": {}')
            await first.qmp.command("migrate", uri=f"unix:{tmp_path}/in")
            assert await middle.until_status(*FINAL) == "completed"
            await type_in("query-status", '"status": "paused"')
            await type_in("cont", '"class": "GenericError"')
            await type_in("migrate-set-parameters max-bandwidth=1073741824", '"return": {}')
            await type_in(f"migrate uri=unix:{tmp_path}/last", '"return": {}')
            assert await middle.until_status(*FINAL) == "completed"
            await type_in("query-migrate", '"status": "completed"')
            await type_in("query-status", '"status": "postmigrate"')
            await type_in("quit", '"return": {}')
            assert await middle.process.wait() == 0
        assert await last.until_status(*FINAL) == "completed"
        assert (await last.statuses())[0] == "paused"
