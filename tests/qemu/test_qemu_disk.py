"""A Linux guest keeps its disk, through examples/blk, over a postcopy migration and back.

One back-end at each end, both with the same file, two queues.  The guest writes and re-reads blocks that name
themselves all the while, into and from pages that only its disk touches; at the end each block is checked by
the guest, and again in the file.
"""

from __future__ import annotations

import re
import struct
from pathlib import Path

import pytest

from tests.kit.until import until
from tests.qemu import peers, vm
from tests.qemu.backend import Backend, disk

pytestmark = pytest.mark.qemu
TABLE = ("--hide-protocol-feature", "CONFIGURE_MEM_SLOTS")
# As tests/guest/disk.c has them.
BLOCK, BLOCKS = 4096, 2048
MASK = (1 << 64) - 1


def mix64(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & MASK
    x = ((x ^ x >> 30) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ x >> 27) * 0x94D049BB133111EB) & MASK
    return x ^ x >> 31


def block(number: int, generation: int, nonce: int) -> bytes:
    """What the guest wrote there (tests/guest/disk.c)."""
    seed = mix64(nonce ^ mix64(number) ^ generation << 32)
    words = [number, generation, nonce]
    words += [(seed * (2 * i + 1) + (seed >> 7)) & MASK for i in range(3, BLOCK // 8)]
    return struct.pack(f"<{BLOCK // 8}Q", *words)


async def requests(machine: vm.Talking, more: int) -> None:
    """Wait for so many more reads, and for more writes, of a disk without a bad block."""

    async def line() -> tuple[int, int]:
        found = await machine.serial.find(
            r"^disk \w+ reads=(\d+) writes=(\d+) bad=(\d+)", len(machine.serial)
        )
        assert found.group(3) == "0", found.string
        return int(found.group(1)), int(found.group(2))

    before = now = await line()
    while now[0] < before[0] + more or now[1] == before[1]:
        now = await line()


async def generations(machine: vm.Talking) -> tuple[int, list[int]]:
    """End the checker; the guest's nonce, and for each block which generation the disk must hold."""
    at = len(machine.serial)
    await machine.process.send("touch disk-stop\n")
    verified = await machine.serial.find(r"^disk (\w+) verified blocks=(\d+) bad=(\d+)", at, limit=120)
    assert (verified.group(2), verified.group(3)) == (str(BLOCKS), "0"), verified.string
    told = [
        number
        for line in machine.serial.lines[at:]
        if (found := re.match(r"disk \w+ generations \d+ (.*)", line))
        for number in found.group(1).split()
    ]
    return int(verified.group(1), 16), [int(n) for n in told]


async def postcopy(src: vm.Vm, dst: vm.Vm, end: Backend, tmp_path: Path) -> None:
    ended = len(end.logged("postcopy ended"))

    async def during() -> None:
        """The disk goes on while most pages are absent."""
        await requests(dst, 100)
        await until(lambda: dst.traces(vm.RESOLVED) >= 10, limit=20)

    moved = await vm.migrate_postcopy(src, dst, tmp_path, during=during)
    assert moved.remaining >= 0.6
    assert dst.traces("vhost_user_postcopy_end_exit") == 1
    await end.ended(ended + 1)


@pytest.mark.parametrize(
    ("version", "options"),
    [("7.2", ()), ("10.0", TABLE)],
    ids=["7.2-slots", "10.0-table"],
)
async def test_disk_there_and_back(version: str, options: tuple[str, ...], tmp_path: Path) -> None:
    spec = vm.Spec(peers.qemu(version))
    file = tmp_path / "disk"
    with file.open("wb") as f:
        f.truncate(BLOCKS * BLOCK)
    async with (
        disk("disk0", file, tmp_path, options) as disk0,
        disk("disk1", file, tmp_path, options) as disk1,
        vm.vm(spec, "there", vm.Disk(disk1.path), tmp_path, incoming=True) as there,
    ):
        async with vm.vm(spec, "here", vm.Disk(disk0.path), tmp_path) as here:
            nonce = await here.booted()
            await requests(here, 100)
            await postcopy(here, there, disk1, tmp_path)
            await requests(there, 100)
            await there.beat(nonce)
            assert here.complaints() == []
            await here.quit()
        async with vm.vm(spec, "back", vm.Disk(disk0.path), tmp_path, incoming=True) as back:
            await postcopy(there, back, disk0, tmp_path)
            await requests(back, 100)
            await back.beat(nonce)
            assert await back.sweep() == 0
            disk_nonce, wanted = await generations(back)
            assert back.complaints() == there.complaints() == []
        assert disk0.complaints() == disk1.complaints() == []
        print(version, *disk1.logged("postcopy ended"), *disk0.logged("postcopy ended"), sep="\n  ")
    assert len(wanted) == BLOCKS
    assert max(wanted) > 1
    content = file.read_bytes()
    wrong = [
        number
        for number, generation in enumerate(wanted)
        if content[number * BLOCK : (number + 1) * BLOCK] != block(number, generation, disk_nonce)
    ]
    assert wrong == []
