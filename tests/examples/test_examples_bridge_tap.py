"""The bridge on a tap device, as a person starts it, when the device is deleted under it."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from tests.examples.test_examples_bridge import PROGRAM
from tests.kit.raw_front_end import Guest, RawFrontEnd
from tests.qemu.net import network
from tests.qemu.proc import child

pytestmark = pytest.mark.qemu  # its namespaces


@pytest.mark.parametrize("pairs", [1, 2])
@pytest.mark.parametrize("served", [False, True], ids=["nobody there", "with a guest"])
async def test_a_tap_that_is_deleted(served: bool, pairs: int, tmp_path: Path) -> None:
    """One sentence, an exit code, and no process that serves nobody."""
    path = tmp_path / "s"
    guest = Guest(4 << 20)
    async with network(["tap0"], multi_queue=pairs > 1) as net:
        argv = [*net.inside(), *PROGRAM, "--tap", "tap0", "--pairs", str(pairs), "-u", str(path)]
        async with child("bridge", argv) as bridge:
            await bridge.err.find("ready on")
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            front = RawFrontEnd(sock)
            if served:
                await front.sock.connect(str(path))
                await front.negotiate()
                await guest.send_memory(front)
                for index in range(2 * pairs):
                    ring = guest.ring(index, 16)
                    await ring.send_setup(front)
                await front.barrier()
            await net.ip("link del tap0")
            assert await bridge.wait() == 1
            front.close()
        errors = [line for line in bridge.err.lines if " INFO " not in line and " WARNING " not in line]
        assert errors[-1] == "vhostpc: tap tap0 was deleted" or "its link is lost" in errors[-1]
        assert not any("Traceback" in line for line in errors)
        assert len(errors) <= 2, errors
        assert not path.exists()
    guest.close()


async def test_a_tap_is_made_when_asked_for(tmp_path: Path) -> None:
    """And goes with the bridge."""
    async with network([]) as net:
        command = [*net.inside(), *PROGRAM, "--tap", "made0", "--make-tap", "-u", str(tmp_path / "s")]
        async with child("bridge", command) as bridge:
            await bridge.err.find("ready on")
            await net.ip("link show made0")  # or it raises
            assert await bridge.stop() == 0
        with pytest.raises(AssertionError, match="failed with 1"):
            await net.ip("link show made0")
