"""User-Mode Linux drives our disk and our network card: a stock front-end that is no QEMU."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import trio

from tests.kit.until import until
from tests.peers.uml import BLOCK as DISK
from tests.peers.uml import NET, Uml, uml
from tests.qemu.backend import bridge, disk
from tests.qemu.checks import Account
from tests.qemu.net import FAR_IP, FAR_MAC, GUEST_IP, GUEST_MAC, network
from tests.qemu.test_qemu_disk import BLOCK, BLOCKS, block, generations, requests
from vhostpc.backend import Options, serve
from vhostpc.backend.disk import Disk

pytestmark = pytest.mark.qemu  # a namespace, and what its guests are made of
MOST = 8  # requests under way at a time


def blank(file: Path) -> Path:
    with file.open("wb") as f:
        f.truncate(BLOCKS * BLOCK)
    return file


async def verified(machine: Uml, file: Path) -> None:
    """The guest writes and reads blocks that name themselves, then each is checked by it, and again in the file."""
    at = len(machine.serial)
    await machine.run(f"guest disk /dev/vda {MOST} </dev/null &")
    await machine.serial.find(r"^disk \w+ reads=", at)
    await requests(machine, 100)
    nonce, wanted = await generations(machine)
    assert len(wanted) == BLOCKS
    assert max(wanted) > 1
    content = file.read_bytes()
    wrong = [
        number
        for number, generation in enumerate(wanted)
        if content[number * BLOCK : (number + 1) * BLOCK] != block(number, generation, nonce)
    ]
    assert wrong == []


async def test_disk(tmp_path: Path) -> None:
    """Every block, both ways; and a disk that grows, of which the guest hears by the back-end channel."""
    file = blank(tmp_path / "disk")
    async with disk("disk", file, tmp_path) as back, uml({back.path: DISK}, tmp_path) as machine:
        assert int(await machine.ask("cat /sys/block/vda/size")) * 512 == BLOCKS * BLOCK
        await verified(machine, file)
        os.truncate(file, 2 * BLOCKS * BLOCK)
        with trio.fail_after(30):
            while int(await machine.ask("cat /sys/block/vda/size")) * 512 != 2 * BLOCKS * BLOCK:
                pass
        await machine.power_off()
        await back.process.err.find("disconnected")
        assert back.complaints() == []


@pytest.mark.long
async def test_disk_in_band(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Kicks and calls as messages, which it takes where they are offered."""
    file, path = blank(tmp_path / "disk"), tmp_path / "disk.sock"
    async with trio.open_nursery() as nursery:
        await nursery.start(serve, Disk(str(file), queues=1), path, Options(inband=True))
        async with uml({path: DISK}, tmp_path) as machine:
            await verified(machine, file)
            assert [r for r in caplog.records if r.levelname in ("WARNING", "ERROR")] == []
            await machine.power_off()
        nursery.cancel_scope.cancel()


async def test_network(tmp_path: Path) -> None:
    """A flow of numbered frames in both directions, and pings: each comes whole, and once."""
    async with (
        network(("tap0",)) as net,
        bridge(net, "bridge", "tap0", tmp_path) as back,
        net.far() as far,
        uml({back.path: NET}, tmp_path) as machine,
    ):
        await machine.run(f"ip link set eth0 address {GUEST_MAC}; ip addr add {GUEST_IP}/24 dev eth0")
        await machine.run(f"ip link set eth0 up; guest flow {GUEST_IP} {FAR_IP} {FAR_MAC} </dev/null &")
        await far.received(100)
        await far.acknowledged(100)
        account = await Account.open(far)
        await far.received(account.start.high + 500)
        await far.acknowledged(account.start.next + 500)
        inside, outside, pings = await account.close(far, machine)
        assert inside.rx > 500
        assert outside.rx > 500
        assert pings.rx > 5
        assert back.complaints() == []
        await machine.power_off()
        await until(lambda: back.logged("disconnected"))
        # A kernel that goes down gives the rings' memory away before it hangs up: they may break by then.
        assert [line for line in back.complaints() if " stopped: " not in line] == []
