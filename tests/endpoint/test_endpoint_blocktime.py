"""Block time of a machine that came by postcopy: in ``query-migrate``, in the text monitor and in the report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trio

from tests.kit.own_machine import STEP, WAIT, End, end, migrate, pair
from vhostpc.dialect import DIALECTS, Compat

MIB = 1 << 20
BLOCKTIME = {"postcopy-blocktime", "postcopy-vcpu-blocktime"}
LATENCY = {"postcopy-latency", "postcopy-latency-dist", "postcopy-vcpu-latency", "postcopy-non-vcpu-latency"}
pytestmark = pytest.mark.ufd


async def switched(source: End, destination: End, folder: Path, *capabilities: str) -> None:
    """The machine runs at the destination, and little comes but what is asked for."""
    await source.set("postcopy-ram", "postcopy-blocktime", max_bandwidth=8 * MIB, max_postcopy_bandwidth=1)
    await destination.set("postcopy-ram", *capabilities)
    await migrate(source, destination, folder)
    await source.qmp.command("migrate-start-postcopy")
    await destination.until_status("postcopy-active", not_these=("failed",))


async def all_have_waited(destination: End) -> dict[str, Any]:
    """Until each vCPU and each back-end has; the report."""
    with trio.fail_after(WAIT):
        while True:
            report = await destination.report()
            found = [one["faults"]["count"] for one in (*report["vcpus"], *report["devices"])]
            if all(found):
                return report
            await trio.sleep(STEP)


async def completed(source: End, destination: End) -> dict[str, Any]:
    await source.set(max_postcopy_bandwidth=0)
    await source.until_status("completed", not_these=("failed",))
    return await destination.until_status("completed", not_these=("failed",))


def told(found: dict[str, Any]) -> set[str]:
    return {name for name in found if name.startswith("postcopy-")}


@pytest.mark.parametrize("compat", DIALECTS)
async def test_fields_and_report_agree(compat: Compat, tmp_path: Path) -> None:
    """Fields when it is completed and not before, at the destination alone."""
    async with pair(tmp_path, vcpus=3, both=["--compat", compat]) as (source, destination):
        await source.until_works()
        await switched(source, destination, tmp_path, "postcopy-blocktime")
        await all_have_waited(destination)
        assert told(await destination.migration()) == set()
        text = "info migrate -a" if DIALECTS[compat].grouped_info else "info migrate"
        assert "locktime" not in await destination.qmp.hmp(text)
        found = await completed(source, destination)
        assert told(await source.migration()) == set()
        expected = BLOCKTIME | LATENCY if DIALECTS[compat].latency else BLOCKTIME
        assert told(found) == expected

        report = await destination.report()
        blocked = report["blocked"]
        each = [vcpu["faults"]["blocked-ns"] for vcpu in report["vcpus"]]
        assert found["postcopy-vcpu-blocktime"] == [ns // 1_000_000 for ns in each]
        assert found["postcopy-blocktime"] == blocked["all-vcpus-ns"] // 1_000_000
        assert 0 <= blocked["all-ns"] <= blocked["all-vcpus-ns"] <= min(each)
        assert blocked["all-ns"] <= report["devices"][0]["faults"]["blocked-ns"]
        for one in (*report["vcpus"], *report["devices"]):
            faults = one["faults"]
            assert 0 < faults["p50-ns"] <= faults["p99-ns"] <= faults["longest-ns"] <= faults["blocked-ns"]
            assert faults["waiting-now"] == 0
        if DIALECTS[compat].latency:
            assert len(found["postcopy-latency-dist"]) == 24
            counts = [vcpu["faults"]["count"] for vcpu in report["vcpus"]]
            counts.append(blocked["drivers"]["count"])
            assert 0 < sum(found["postcopy-latency-dist"]) <= sum(counts)
            averages = [*found["postcopy-vcpu-latency"], found["postcopy-non-vcpu-latency"]]
            assert min(a for a in averages if a) <= found["postcopy-latency"] <= max(averages)
        lines = (await destination.qmp.hmp(text)).lower()
        assert (
            f"blocktime{' (ms)' if DIALECTS[compat].latency else ''}: {found['postcopy-blocktime']}" in lines
        )
        assert ("latency distribution" in lines) == DIALECTS[compat].latency


@pytest.mark.parametrize("compat", DIALECTS)
async def test_without_the_capability_only_the_report_has_it(compat: Compat, tmp_path: Path) -> None:
    async with pair(tmp_path, both=["--compat", compat]) as (source, destination):
        await source.until_works()
        await switched(source, destination, tmp_path)
        await all_have_waited(destination)
        assert told(await completed(source, destination)) == set()
        assert (await destination.report())["vcpus"][0]["faults"]["blocked-ns"] > 0
        # Too late: nothing was to be told of this migration.
        await destination.set("postcopy-blocktime")
        assert told(await destination.migration()) == set()


@pytest.mark.parametrize("compat", DIALECTS)
@pytest.mark.parametrize("advised", [True, False], ids=["advised", "not advised"])
async def test_by_precopy_nobody_was_blocked(advised: bool, compat: Compat, tmp_path: Path) -> None:
    """Some versions say so where postcopy was possible."""
    async with pair(tmp_path, vcpus=2, both=["--compat", compat]) as (source, destination):
        await source.until_works()
        more = ["postcopy-ram"] if advised else []
        await source.set(*more)
        await destination.set("postcopy-blocktime", *more)
        await migrate(source, destination, tmp_path)
        await source.until_status("completed", not_these=("failed",))
        found = await destination.until_status("completed", not_these=("failed",))
        if advised and DIALECTS[compat].blocktime_of_precopy:
            assert {name: found[name] for name in told(found)} == {
                "postcopy-blocktime": 0,
                "postcopy-vcpu-blocktime": [0, 0],
            }
        else:
            assert told(found) == set()
        assert (await source.report())["blocked"] is None


async def test_a_pause_is_time_in_which_its_threads_wait(tmp_path: Path) -> None:
    """What waits when the link is lost waits until its page comes over another, as the threads' own clocks say."""
    async with pair(tmp_path, vcpus=2) as (source, destination):
        await source.until_works()
        await switched(source, destination, tmp_path, "postcopy-blocktime")
        await all_have_waited(destination)
        await destination.qmp.command("migrate-pause")
        for one in (source, destination):
            await one.until_status("postcopy-paused")
        with trio.fail_after(WAIT):
            while True:
                before = await destination.report()
                if all(vcpu["faults"]["waiting-now"] for vcpu in before["vcpus"]):
                    break
                await trio.sleep(STEP)
        began = trio.current_time()
        while trio.current_time() - began < 0.5:  # the pause that is to be counted
            await trio.sleep(STEP)
        held = await destination.report()
        gone_by = held["blocked"]["all-vcpus-ns"] - before["blocked"]["all-vcpus-ns"]
        assert gone_by > 400_000_000
        uri = f"unix:{tmp_path / 'again'}"
        await destination.qmp.command("migrate-recover", uri=uri)
        await source.qmp.command("migrate", uri=uri, resume=True)
        found = await completed(source, destination)
        here = await destination.report()
        assert found["postcopy-blocktime"] >= held["blocked"]["all-vcpus-ns"] // 1_000_000
        for vcpu in here["vcpus"]:
            faults, stalls = vcpu["faults"], vcpu["stalls"]
            assert faults["longest-ns"] > gone_by
            assert faults["longest-ns"] == pytest.approx(stalls["longest-ns"], rel=0.25)


async def test_of_a_held_machine_nothing_is_said(tmp_path: Path) -> None:
    """Its vCPUs are not here: no field, not even one that says 0."""
    async with pair(tmp_path, devices=0) as (source, _):
        await source.until_works(frames=0)
        async with end("held", tmp_path, "--incoming", "defer") as held:
            await source.set("postcopy-ram", max_bandwidth=8 * MIB)
            await held.set("postcopy-ram", "postcopy-blocktime")
            await migrate(source, held, tmp_path)
            await source.qmp.command("migrate-start-postcopy")
            await source.set(max_postcopy_bandwidth=0)
            await source.until_status("completed", not_these=("failed",))
            assert told(await held.until_status("completed", not_these=("failed",))) == set()
            report = await held.report()
            assert not {"blocked", "vcpus", "devices"} & set(report)
