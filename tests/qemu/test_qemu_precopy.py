"""A Linux guest is moved by precopy while frames go both ways through our bridge: network and memory whole.

The bridges write into guest memory while it is copied: what the dirty log missed, the far end's frames or the
guest's memory checker would show.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from tests.qemu import net, peers, vm
from tests.qemu.backend import bridge
from tests.qemu.checks import Account, Watch

pytestmark = pytest.mark.qemu

TABLE = ("--hide-protocol-feature", "CONFIGURE_MEM_SLOTS")


@pytest.mark.parametrize(
    ("version", "options"), [("7.2", TABLE), ("10.0", ())], ids=["7.2-table", "10.0-slots"]
)
async def test_precopy_with_traffic(version: str, options: tuple[str, ...], tmp_path: Path) -> None:
    spec = vm.Spec(peers.qemu(version))
    async with (
        net.network() as network,
        bridge(network, "bridge0", "tap0", tmp_path, options) as bridge0,
        bridge(network, "bridge1", "tap1", tmp_path, options) as bridge1,
        vm.vm(spec, "here", vm.VhostUser(bridge0.path), tmp_path) as here,
        vm.vm(spec, "there", vm.VhostUser(bridge1.path), tmp_path, incoming=True) as there,
    ):
        nonce = await here.booted()
        async with network.far() as far:
            await far.received(500)
            await here.beat(nonce)
            account = await Account.open(far)
            watch = Watch(far, account)
            await vm.migrate_precopy(here, there, tmp_path, on_stop=watch.stopped)
            window = await watch.heard()
            await far.received(window.moved.high + 1500)
            await there.beat(nonce)
            assert await there.sweep() == 0
            await account.close(far, there)
        # Writes of the bridge were logged: SET_LOG_BASE is 6.
        assert here.traces("vhost_user_write req:6 ") > 0
        assert here.complaints() == there.complaints() == []
        assert bridge0.complaints() == bridge1.complaints() == []
        assert bridge0.process.alive
        assert bridge1.process.alive


async def pages_that_differ(version: str, through: tuple[str, ...], tmp_path: Path) -> int:
    """Move a guest under heavy traffic to a QEMU that leaves it stopped; how many pages of RAM are not the
    source's."""
    # A large ring: its buffers are cleared by the guest long before the device writes them.
    spec = vm.Spec(peers.qemu(version))
    stopped = dataclasses.replace(spec, extra=("-S",))
    async with (
        net.network() as network,
        bridge(network, "bridge0", "tap0", tmp_path, through=through) as bridge0,
        bridge(network, "bridge1", "tap1", tmp_path) as bridge1,
        vm.vm(spec, "here", vm.VhostUser(bridge0.path, rx_size=1024), tmp_path) as here,
        vm.vm(stopped, "there", vm.VhostUser(bridge1.path, rx_size=1024), tmp_path, incoming=True) as there,
    ):
        nonce = await here.booted()
        async with network.far() as far, network.flood():
            await far.received(500)
            await here.beat(nonce)
            # Slow enough that the guest receives much while its memory is copied.
            await here.qmp.command("migrate-set-parameters", max_bandwidth=64 << 20)
            await vm.migrate_precopy(here, there, tmp_path, resumes=False)
        for side in (here, there):
            assert (await side.qmp.command("query-status"))["running"] is False
            await side.save_ram(tmp_path / f"{side.name}.ram")
        assert here.traces("vhost_user_write req:6 ") > 0
        assert bridge0.complaints() == bridge1.complaints() == []
    size = spec.memory.size << 20
    differing = 0
    with (tmp_path / "here.ram").open("rb") as source, (tmp_path / "there.ram").open("rb") as copy:
        for _ in range(0, size, 4096):
            page = source.read(4096)
            assert len(page) == 4096
            differing += page != copy.read(4096)
    return differing


@pytest.mark.parametrize("version", peers.VERSIONS)
async def test_every_page_is_the_same(version: str, tmp_path: Path) -> None:
    assert await pages_that_differ(version, (), tmp_path) == 0


async def test_without_the_log_pages_differ(tmp_path: Path) -> None:
    """What the test above would see if the bridge did not log its writes."""
    through = (str(peers.REPO / "tests/qemu/unlogged.py"),)
    assert await pages_that_differ("10.0", through, tmp_path) > 0
