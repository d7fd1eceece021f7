"""Two endpoints with a machine of their own, through the proxy: nothing is changed, and a cut is recovered."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import trio

from tests.kit.own_machine import End, check, pair
from vhostpc.proxy import Proxy, open_proxy

pytestmark = pytest.mark.ufd

LIMIT = 120


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("how", ["precopy", "postcopy"])
async def test_nothing_is_changed(how: str, tmp_path: Path) -> None:
    target = f"unix:{tmp_path}/incoming"
    before = descriptors()
    with trio.fail_after(LIMIT):
        async with pair(tmp_path, destination=["--stopped"]) as (source, destination):
            if how == "postcopy":
                for side in (source, destination):
                    await side.set("postcopy-ram")
            await destination.qmp.command("migrate-incoming", uri=target)
            async with open_proxy(f"unix:{tmp_path}/proxy", target) as proxy:
                await source.qmp.command("migrate", uri=proxy.uri)
                if how == "postcopy":
                    await source.qmp.command("migrate-start-postcopy")
                for side in (source, destination):
                    await side.until_status("completed", not_these=["failed", "postcopy-paused"])
                end = await proxy.wait("end", how="closed")
                assert end.details["forward"] > 0
                names = {event.name for event in proxy.events}
                assert ("package" in names) is (how == "postcopy")
                assert "unreadable" not in names
            if how == "precopy":
                await destination.qmp.command("cont")
            check(await destination.report(), moves=1)
    assert descriptors() == before


async def again(proxy: Proxy, source: End, destination: End, target: str) -> None:
    """Reconnect both by the commands that a person types."""
    for side in (source, destination):
        await side.until_status("postcopy-paused", not_these=["failed", "completed"])
    await destination.qmp.command("migrate-recover", uri=target)
    await source.qmp.command("migrate", uri=proxy.uri, resume=True)


@pytest.mark.parametrize("tcp", [False, True], ids=["unix", "tcp"])
async def test_cuts_are_recovered(tcp: bool, tmp_path: Path) -> None:
    """In the middle of it all, and in the recoveries."""
    faults = [
        "cut@request=10,on=main",
        "cut@bitmap,at=middle,on=recovery",
        "cut@resume,at=before",
        "cut@postcopy-page=100..300,on=recovery-3",
    ]
    listen_at = "tcp:127.0.0.1:0" if tcp else f"unix:{tmp_path}/proxy"
    target = f"unix:{tmp_path}/incoming"
    with trio.fail_after(LIMIT):
        async with (
            pair(tmp_path, ram=("pc.ram=32M",)) as (source, destination),
            open_proxy(listen_at, target, faults, seed=1) as proxy,
        ):
            for side in (source, destination):
                await side.set("postcopy-ram", max_postcopy_bandwidth=8 << 20)
            await destination.qmp.command("migrate-incoming", uri=target)
            await source.qmp.command("migrate", uri=proxy.uri)
            await source.qmp.command("migrate-start-postcopy")
            for number in range(1, len(faults) + 1):
                await proxy.wait("end", connection=number, how="cut")
                await again(proxy, source, destination, target)
            await source.set(max_postcopy_bandwidth=0)
            for side in (source, destination):
                await side.until_status("completed", not_these=["failed"])
            report = await destination.until_works(without=["net0"])
            assert [vcpu["bad"] for vcpu in report["vcpus"]] == [0]
            assert proxy.pending == []
            assert "unreadable" not in {event.name for event in proxy.events}


@pytest.mark.parametrize("way", ["both", "forward"])
async def test_silence(way: str, tmp_path: Path) -> None:
    """The link swallows everything: both ends notice it by themselves, and a new connection through the same proxy is
    a good one."""
    target = f"unix:{tmp_path}/incoming"
    with trio.fail_after(LIMIT):
        async with (
            pair(tmp_path, ram=("pc.ram=32M",), both=["--link-timeout", "1"]) as (source, destination),
            open_proxy(f"unix:{tmp_path}/proxy", target, [f"drop@request=10,on=main,way={way}"]) as proxy,
        ):
            for side in (source, destination):
                await side.set("postcopy-ram", max_postcopy_bandwidth=8 << 20)
            await destination.qmp.command("migrate-incoming", uri=target)
            await source.qmp.command("migrate", uri=proxy.uri)
            await source.qmp.command("migrate-start-postcopy")
            await proxy.wait("fault")
            await again(proxy, source, destination, target)
            await source.set(max_postcopy_bandwidth=0)
            for side in (source, destination):
                await side.until_status("completed", not_these=["failed"])
            report = await destination.until_works(without=["net0"])
            assert [vcpu["bad"] for vcpu in report["vcpus"]] == [0]


async def test_a_link_that_breaks_all_the_time(tmp_path: Path) -> None:
    """Ends that recover by themselves need nobody."""
    target = f"unix:{tmp_path}/incoming"
    faults = ["cut@request=10,on=main", "cut@time=0.2,on=recovery,times=5"]
    with trio.fail_after(LIMIT):
        async with (
            pair(tmp_path, ram=("pc.ram=32M",), both=["--recover-for", "60"]) as (source, destination),
            open_proxy(f"unix:{tmp_path}/proxy", target, faults) as proxy,
        ):
            for side in (source, destination):
                await side.set("postcopy-ram", max_postcopy_bandwidth=4 << 20)
            await destination.qmp.command("migrate-incoming", uri=target)
            await source.qmp.command("migrate", uri=proxy.uri)
            await source.qmp.command("migrate-start-postcopy")
            for number in range(1, 7):
                await proxy.wait("end", connection=number)
            await source.set(max_postcopy_bandwidth=0)
            for side in (source, destination):
                await side.until_status("completed", not_these=["failed"])
            assert proxy.pending == []
