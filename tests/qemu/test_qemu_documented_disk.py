"""The documentation's first device moves with a real guest, as README has it: the very text, by ``vhostpc backend``.

One back-end at each end. The guest reads sectors at random all the while, into pages that only its disk touches; each
must say its own number, before, during and after the move.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.kit import pages
from tests.kit.until import until
from tests.qemu import peers, vm
from tests.qemu.backend import served
from tests.qemu.plays import played

pytestmark = pytest.mark.qemu


def readme_device(tmp_path: Path) -> str:
    """README's first device in a file of its own, as ``vhostpc backend`` takes it."""
    text = next(t for t in pages.blocks(pages.ROOT / "README.md") if "(Device)" in t)
    name = re.match(r"# (\w+\.py)\n", text)
    kind = re.search(r"class (\w+)\(Device\)", text)
    assert name, text
    assert kind, text
    (tmp_path / name[1]).write_text(text)
    return f"{tmp_path / name[1]}:{kind[1]}"


async def sectors(machine: vm.Vm, more: int) -> str:
    """Wait for so many more reads of a disk whose sectors all said their number; the guest's nonce."""

    async def line() -> tuple[str, int]:
        found = await machine.serial.find(r"^sectors (\w+) reads=(\d+) bad=(\d+)", len(machine.serial))
        assert found.group(3) == "0", found.string
        return found.group(1), int(found.group(2))

    nonce, before = await line()
    while (now := await line())[1] < before + more:
        pass
    assert now[0] == nonce
    return nonce


async def move(version: str, way: str, folder: Path, targets: list[vm.Vm]) -> None:
    target = readme_device(folder)
    spec = vm.Spec(peers.qemu(version))
    async with (
        served("disk0", target, folder) as disk0,
        served("disk1", target, folder) as disk1,
        vm.vm(spec, "here", vm.Disk(disk0.path, queues=1, sectors=True), folder) as here,
        vm.vm(spec, "there", vm.Disk(disk1.path, queues=1, sectors=True), folder, incoming=True) as there,
    ):
        targets.append(there)
        await here.booted()
        nonce = await sectors(here, 50)

        async def during() -> None:
            await sectors(there, 50)
            await until(lambda: there.traces(vm.RESOLVED) >= 10, limit=60)

        if way == "precopy":
            await vm.migrate_precopy(here, there, folder)
        else:
            await vm.migrate_postcopy(here, there, folder, during=during)
            await disk1.ended(1)
        assert await sectors(there, 50) == nonce, "another guest"
        assert disk0.complaints() == disk1.complaints() == []


@pytest.mark.parametrize("way", ["precopy", "postcopy"])
@pytest.mark.parametrize("version", [*peers.VERSIONS, peers.NEWEST])
async def test_the_device_of_the_readme_moves(version: str, way: str, tmp_path: Path) -> None:
    async def play(folder: Path, targets: list[vm.Vm]) -> None:
        await move(version, way, folder, targets)

    await played(play, tmp_path)
