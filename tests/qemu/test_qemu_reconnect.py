"""Our bridge is killed and started again under a guest that runs: QEMU connects again, the network returns."""

from __future__ import annotations

import contextlib
import signal
from pathlib import Path

import pytest
import trio

from tests.qemu import net, peers, vm
from tests.qemu.backend import bridge
from tests.qemu.checks import guest_flow

pytestmark = pytest.mark.qemu
RECONNECT = {"7.2": ",reconnect=1", "10.0": ",reconnect-ms=200"}


async def pings(far: net.Far) -> net.Flow:
    """The account of the pings in the next line about them."""
    found = await far.process.out.find("^ping (.*)", len(far.process.out))
    return net.parse_flow(found.group(1))


async def silent(far: net.Far) -> net.Flow:
    """Wait until no ping is answered for a second."""
    before = await pings(far)
    while (now := await pings(far)).rx > before.rx:
        before = now
    return now


async def goes_on(far: net.Far, guest: vm.Vm, nonce: str, before: net.Flow) -> None:
    """Pings are answered again, frames come and go; nothing is corrupt."""
    _, mark = await far.mark()
    await far.received(mark.high + 500)
    await far.acknowledged(mark.next + 500)
    with trio.fail_after(20):
        while (await pings(far)).rx < before.rx + 10:
            pass
    await guest.beat(nonce)
    for flow in (*await far.report(), await guest_flow(guest)):
        assert flow.bad == 0, flow


@pytest.mark.parametrize("version", peers.VERSIONS)
async def test_killed_and_started_again(version: str, tmp_path: Path) -> None:
    spec = vm.Spec(peers.qemu(version))
    async with contextlib.AsyncExitStack() as stack:
        network = await stack.enter_async_context(net.network())
        end = await stack.enter_async_context(bridge(network, "bridge", "tap0", tmp_path))
        device = vm.VhostUser(end.path, chardev=RECONNECT[version])
        guest = await stack.enter_async_context(vm.vm(spec, "guest", device, tmp_path))
        nonce = await guest.booted()
        far = await stack.enter_async_context(network.far())
        await far.received(500)
        for _ in range(2):
            await end.process.stop(signal.SIGKILL)
            before = await silent(far)
            end = await stack.enter_async_context(bridge(network, "bridge", "tap0", tmp_path))
            await goes_on(far, guest, nonce, before)
            assert end.process.alive
            assert end.complaints() == []
        assert await guest.sweep() == 0
