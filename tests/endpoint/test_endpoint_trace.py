"""What a monitor tells of a move besides QEMU's numbers: each fault, how memory fills, whether every page is right."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.kit.own_machine import migrate, pair
from tests.qemu.qmp import QmpError
from vhostpc.guest.own_machine import Block, Spec, open_machine
from vhostpc.units import TARGET_PAGE

MIB = 1 << 20
PAGES = 64 * MIB // TARGET_PAGE
pytestmark = pytest.mark.ufd


async def test_faults_and_memory_of_a_move(tmp_path: Path) -> None:
    async with pair(tmp_path, destination=["--trace-faults"]) as (source, destination):
        ask = destination.qmp.command
        assert (await ask("x-vhostpc-trace"))["faults"] == []
        with pytest.raises(QmpError, match="stands still and is all here"):
            await ask("x-vhostpc-verify")
        await source.until_works()
        await source.set("postcopy-ram", max_postcopy_bandwidth=24 * MIB)
        await destination.set("postcopy-ram")
        await migrate(source, destination, tmp_path)
        await source.qmp.command("migrate-start-postcopy")
        await source.until_status("completed", not_these=("failed",))
        await destination.until_status("completed", not_these=("failed",))

        with pytest.raises(QmpError, match="stands still"):
            await ask("x-vhostpc-verify")
        there, here = await source.report(), await destination.report()
        rows, at = [], 0
        while (found := await ask("x-vhostpc-trace", **{"from": at}))["faults"]:
            assert set(found["clients"].values()) <= {"own mapping", "net0"}
            rows += found["faults"]
            at = found["next"]
        asked = here["asked"]
        assert len(rows) == at == asked["events"] == asked["wakes"]
        assert sum(way == "asked" for *_, way, _, _ in rows) == asked["requests"] == there["sent"]["requests"]
        vcpu = here["vcpus"][0]
        assert sum(row[1] == vcpu["thread"] for row in rows) == vcpu["faults"]["count"]

        assert here["kept"] + here["came"]["placed"] == PAGES
        before = here["came-before"]["placed"] if here["came-before"] else 0
        sent = there["sent"]
        assert sent["background-pages"] + sent["requested-pages"] == here["came"]["placed"] + before

        for cells in (1, 100):
            told = (await ask("x-vhostpc-map", cells=cells))["blocks"]
            assert [(b["name"], b["pages"], sum(b["received"])) for b in told] == [("pc.ram", PAGES, PAGES)]
            assert len(told[0]["received"]) == cells
        for wrong in (0, 1 << 20):
            with pytest.raises(QmpError, match="'cells' expects a number from 1"):
                await ask("x-vhostpc-map", cells=wrong)
        await ask("stop")
        assert (await ask("x-vhostpc-verify"))["bad"] == 0


async def test_a_wrong_page_is_found() -> None:
    async with open_machine(Spec([Block("mem", 4 * MIB)], vcpus=3)) as machine:
        assert await machine.verify() == {"pages": 1024, "bad": 0, "first-bad": None}
        await machine.ram["mem"].write(17 * TARGET_PAGE + 3000, b"\x01\x02")
        found = await machine.verify()
        assert (found["pages"], found["bad"]) == (1024, 1)
        assert "page 17 of mem" in found["first-bad"]
