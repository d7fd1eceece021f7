"""The back-end of a guest's disk is killed, again and again, while its requests overtake each other.

The guest writes and re-reads blocks that name themselves, with many requests of each queue at a time. A request that
is lost never ends, and its thread with it; one that is done again after a younger one leaves an old block behind.
"""

from __future__ import annotations

import contextlib
import signal
from pathlib import Path

import pytest

from tests.qemu import peers, vm
from tests.qemu.backend import disk
from tests.qemu.test_qemu_disk import BLOCK, BLOCKS, block, generations, requests
from tests.qemu.test_qemu_reconnect import RECONNECT

pytestmark = pytest.mark.qemu
THREADS = 16
#: The disk then answers in ring order, and the used index tells the next one what was done.
WITHOUT_REGION = ("--hide-protocol-feature", "INFLIGHT_SHMFD")


async def killed(version: str, tmp_path: Path, kills: int, *options: str) -> None:
    """``kills`` times: wait for requests, kill the back-end, start it again. Then check every block."""
    spec = vm.Spec(peers.qemu(version), vm.Memory(size=128))
    file = tmp_path / "disk"
    with file.open("wb") as f:
        f.truncate(BLOCKS * BLOCK)
    async with contextlib.AsyncExitStack() as stack:
        end = await stack.enter_async_context(disk("disk", file, tmp_path, options))
        device = vm.Disk(end.path, chardev=RECONNECT[version], threads=THREADS)
        guest = await stack.enter_async_context(vm.vm(spec, "guest", device, tmp_path))
        nonce = await guest.booted()
        for _ in range(kills):
            await requests(guest, 50)
            await end.process.stop(signal.SIGKILL)
            end = await stack.enter_async_context(disk("disk", file, tmp_path, options))
        await requests(guest, 50)
        await guest.beat(nonce)
        disk_nonce, wanted = await generations(guest)
        assert end.complaints() == []
    assert len(wanted) == BLOCKS
    content = file.read_bytes()
    wrong = [
        number
        for number, generation in enumerate(wanted)
        if content[number * BLOCK : (number + 1) * BLOCK] != block(number, generation, disk_nonce)
    ]
    assert wrong == []


@pytest.mark.parametrize("version", peers.VERSIONS)
async def test_killed_under_writes(version: str, tmp_path: Path) -> None:
    await killed(version, tmp_path, 2)


@pytest.mark.long
@pytest.mark.parametrize("version", peers.VERSIONS)
@pytest.mark.parametrize("options", [(), WITHOUT_REGION], ids=["region", "ring-order"])
async def test_killed_a_hundred_times(version: str, options: tuple[str, ...], tmp_path: Path) -> None:
    await killed(version, tmp_path, 100, *options)
