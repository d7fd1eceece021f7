"""A Linux guest is moved by precopy while frames go both ways through our bridge: network and memory whole.

The bridges write into guest memory while it is copied: what the dirty log missed, the far end's frames or the
guest's memory checker would show.
"""

from __future__ import annotations

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
