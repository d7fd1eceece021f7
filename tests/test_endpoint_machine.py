"""A machine of our own moves between two endpoints with live traffic: memory and frames whole, nothing left behind."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from tests.hugepages import hugepages
from tests.own_machine import STEP, WAIT, End, check, migrate, pair

SLOW = {"max_postcopy_bandwidth": 24 << 20}


async def arrived(source: End, destination: End) -> None:
    """The move is over: the machine works there, all came once, and nothing of the move is left."""
    await source.until_status("completed", not_these=("failed", "cancelled"))
    await destination.until_status("completed", not_these=("failed",))
    assert await source.state() == "postmigrate"
    assert await destination.state() == "running"
    there, here = await source.report(), await destination.until_works()
    check(there)
    check(here)
    assert not there["running"]
    assert here["running"]
    assert here["came"]["already"] == 0
    for a, b in zip(there["vcpus"], here["vcpus"], strict=True):
        assert b["step"] > a["step"]
    for device in here["devices"]:
        assert device["faults"]["waiting-now"] == device["faults"]["found-nothing"] == 0
    assert destination.held()["ufds"] == source.held()["ufds"] == 0


async def test_precopy(tmp_path: Path) -> None:
    async with pair(tmp_path) as (source, destination):
        await source.until_works()
        await source.set("events")
        await migrate(source, destination, tmp_path)
        await arrived(source, destination)


@pytest.mark.parametrize("page", ["4K", "2M"])
@pytest.mark.parametrize("when", ["at once", "in the middle"])
async def test_postcopy(when: str, page: str, tmp_path: Path) -> None:
    with hugepages(128 if page == "2M" else 0):
        async with pair(tmp_path, ram=[f"pc.ram=64M,page={page}"], vcpus=2, devices=2) as (source, destination):
            await source.until_works()
            await source.set("postcopy-ram", max_bandwidth=8 << 20, **SLOW)
            await destination.set("postcopy-ram")
            await migrate(source, destination, tmp_path)
            if when == "in the middle":
                with trio.fail_after(WAIT):
                    while (await source.migration()).get("ram", {}).get("transferred", 0) < 4 << 20:
                        await trio.sleep(STEP)
            await source.qmp.command("migrate-start-postcopy")
            await arrived(source, destination)
            here = await destination.report()
            if page == "4K":  # of huge pages a device has two, and the load of its state needs one
                assert all(device["faults"]["faults"] for device in here["devices"])
            assert sum(vcpu["faults"]["count"] for vcpu in here["vcpus"])
            sent = (await source.migration())["ram"]
            assert sent["postcopy-requests"] > 0
            assert here["came"]["placed"] <= here["blocks"][0]["received"]
