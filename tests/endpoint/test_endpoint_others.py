"""A machine of our own with programs that are not ours: DPDK as a back-end; readers of its stream."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest

from tests.cli.test_cli_inspect import inspect
from tests.kit.own_machine import bridge, check, end, far_side, migrate
from tests.peers.dpdk import needs_dpdk, net_vhost


@pytest.mark.dpdk
@pytest.mark.parametrize("postcopy", [False, True], ids=["precopy", "postcopy"])
async def test_one_of_two_back_ends_is_dpdks(postcopy: bool, tmp_path: Path) -> None:
    """It faults on pages as ours does, and marks in the dirty log what it writes."""
    needs_dpdk()
    dpdk = 0 if postcopy else 1  # it is where faults are, or where the log is
    async with contextlib.AsyncExitStack() as stack:
        far = await stack.enter_async_context(far_side())
        sockets: list[list[str]] = []
        for side in range(2):
            paths = [tmp_path / f"{side}-{i}" for i in range(2)]
            sockets.append([part for path in paths for part in ("--backend", str(path))])
            await stack.enter_async_context(bridge(paths[0], far))
            if side == dpdk:
                await stack.enter_async_context(bridge(paths[1], far))
            else:
                testpmd = await stack.enter_async_context(net_vhost(paths[1], forward="io"))
                await testpmd.start()
        machine = ["--ram", "pc.ram=64M", "--vcpus", "2"]
        source = await stack.enter_async_context(end("source", tmp_path, *machine, *sockets[0]))
        destination = await stack.enter_async_context(
            end("destination", tmp_path, *machine, *sockets[1], "--incoming", "defer")
        )
        check(await source.until_works())
        if postcopy:
            await source.set("postcopy-ram", max_postcopy_bandwidth=24 << 20)
            await destination.set("postcopy-ram")
        await migrate(source, destination, tmp_path)
        if postcopy:
            await source.qmp.command("migrate-start-postcopy")
        await source.until_status("completed", not_these=("failed",))
        await destination.until_status("completed", not_these=("failed",))
        here = await destination.until_works()
        check(here)
        assert here["came"]["already"] == 0
        if postcopy:
            assert all(device["faults"]["faults"] for device in here["devices"])


async def test_inspect_reads_its_stream(tmp_path: Path) -> None:
    """Every section is told, as long as its description says."""
    async with (
        far_side() as far,
        bridge(tmp_path / "bridge", far),
        end("one", tmp_path, "--ram", "pc.ram=16M", "--backend", str(tmp_path / "bridge")) as one,
    ):
        await one.until_works()
        await one.qmp.command("migrate", uri=f"file:{tmp_path / 'stream'}")
        await one.until_status("completed")
        check(await one.report())
    told = inspect(str(tmp_path / "stream"))
    assert (told.returncode, told.stderr) == (0, "")
    assert "machine vhostpc-1" in told.stdout
    assert "about 4 device sections, all with the lengths that it gives" in told.stdout
    assert told.stdout.endswith("\nNothing wrong.\n")
    elements = json.loads(inspect(str(tmp_path / "stream"), "--json").stdout)["elements"]
    names = [e["name"] for e in elements if e["kind"] == "device"]
    assert names == ["vhostpc-machine", "vhost-user-net", "vcpu", "globalstate"]
