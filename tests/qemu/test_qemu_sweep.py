"""Machines of many kinds: from a stock QEMU to the endpoint, held, sent on to another, and from there to a second
endpoint. All memory is the same at each."""

from __future__ import annotations

import contextlib
import os
import random
import re
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio

from tests.qemu import peers
from tests.qemu.test_qemu_held_devices import move
from tests.qemu.vm import HARMLESS
from tests.sequences.nodes import MIB, Node, endpoint_node, qemu_node
from vhostpc.dialect import Compat

pytestmark = pytest.mark.qemu
LIMIT = 120
FILLED = 8 * MIB  # bytes of each memory that nothing shortens
STARTING = 4 * MIB  # where they begin
MEMFD = "memory-backend-memfd,share=on"
BIOS = ("-chardev", "stdio,id=bios,signal=off", "-device", "isa-debugcon,iobase=0x402,chardev=bios")


@dataclass(frozen=True)
class Row:
    """A machine: ``more`` arguments, after those of ``board`` (memory of 64 MiB in a memfd named ``mem``).

    ``only``: the version that has it, if not both.
    """

    more: str = ""
    machine: str = "pc"
    memory: str = f"-m 64M -object {MEMFD},id=mem,size=64M"
    chosen: str = "memory-backend=mem"
    only: str | None = None

    def board(self, folder: Path, name: str) -> list[str]:
        machine = ",".join(filter(None, (self.machine, self.chosen)))
        return f"-M {machine} {self.memory}".replace("FOLDER", str(folder)).replace("NAME", name).split()

    def devices(self, folder: Path) -> list[str]:
        (folder / "rom").write_bytes(b"no program" * 300)
        return [*BIOS, *self.more.replace("FOLDER", str(folder)).split()]


def disk(device: str, *, before: str = "", machine: str = "pc") -> Row:
    """A disk of zeros, which the BIOS reads and does not start."""
    drive = "-blockdev driver=null-co,node-name=d0,size=16777216,read-zeroes=on"
    return Row(f"{drive} {before} -device {device},drive=d0", machine)


def card(device: str) -> Row:
    return Row(f"-netdev user,id=n0 -device {device},netdev=n0,romfile=")


def usb(controller: str) -> Row:
    row = disk("usb-storage,bus=u.0", before=f"-device {controller},id=u -device usb-tablet,bus=u.0")
    return Row(row.more)


ROWS = {
    "pc": Row(),
    "q35": Row(machine="q35"),
    "pc-i440fx-2.12": Row(machine="pc-i440fx-2.12"),
    "pc-i440fx-3.1": Row(machine="pc-i440fx-3.1"),
    "pc-i440fx-6.2": Row(machine="pc-i440fx-6.2"),
    "pc-q35-2.9": Row(machine="pc-q35-2.9"),
    "pc-q35-4.2": Row(machine="pc-q35-4.2"),
    "4-cpus": Row("-smp 4"),
    "cpu-max": Row("-cpu max"),
    "cpu-qemu32": Row("-cpu qemu32 -smp 2,sockets=2"),
    "e1000": card("e1000"),
    "e1000e": card("e1000e"),
    "rtl8139": card("rtl8139"),
    "vmxnet3": card("vmxnet3"),
    "virtio-net": card("virtio-net-pci,mq=on"),
    "three-cards": Row(
        f"{card('e1000').more} -netdev user,id=n1 -device virtio-net-pci,netdev=n1,romfile="
        " -netdev user,id=n2 -device ne2k_pci,netdev=n2,romfile="
    ),
    "pcnet-i82550-tulip": Row(
        f"{card('pcnet').more} -netdev user,id=n1 -device i82550,netdev=n1,romfile="
        " -netdev user,id=n2 -device tulip,netdev=n2,romfile="
    ),
    "option-rom": Row("-netdev user,id=n0 -device virtio-net-pci,netdev=n0,romfile=FOLDER/rom"),
    "virtio-blk": disk("virtio-blk-pci"),
    "virtio-scsi": disk("scsi-hd", before="-device virtio-scsi-pci"),
    "lsi53c895a": disk("scsi-hd", before="-device lsi53c895a"),
    "megasas": disk("scsi-hd", before="-device megasas"),
    "am53c974": disk("scsi-hd", before="-device am53c974"),
    "sd-card": disk("sd-card", before="-device sdhci-pci"),
    "ide-disk": disk("ide-hd"),
    "ide-cd": Row("-device ide-cd"),
    "ahci": disk("ide-hd", machine="q35"),
    "nvme": disk("nvme,serial=1"),
    "usb-uhci": usb("piix3-usb-uhci"),
    "usb-ehci": usb("usb-ehci"),
    "usb-xhci": usb("qemu-xhci"),
    "usb-uas": disk("scsi-hd,bus=s.0", before="-device qemu-xhci -device usb-uas,id=s"),
    "usb-hub-keyboard-ccid": Row(
        "-device piix3-usb-uhci,id=v -device usb-hub,bus=v.0 -device usb-kbd,bus=v.0"
        " -device usb-ccid,bus=v.0"
    ),
    "usb-audio": Row("-audiodev none,id=a0 -device piix3-usb-uhci -device usb-audio,audiodev=a0"),
    "virtio-rng-balloon-serial": Row(
        "-device virtio-rng-pci -device virtio-balloon-pci -device virtio-serial-pci -device virtconsole,chardev=c0"
        " -chardev null,id=c0"
    ),
    "virtio-input": Row("-device virtio-keyboard-pci -device virtio-tablet-pci"),
    "vga-std": Row("-vga std"),
    "vga-cirrus": Row("-vga cirrus"),
    "vga-qxl": Row("-vga qxl", only="7.2"),
    "virtio-gpu": Row("-device virtio-gpu-pci", only="7.2"),
    "bochs-display": Row("-device bochs-display,edid=on"),
    "intel-hda": Row("-audiodev none,id=a0 -device intel-hda -device hda-duplex,audiodev=a0"),
    "es1370-sb16": Row("-audiodev none,id=a0 -device ES1370,audiodev=a0 -device sb16,audiodev=a0"),
    "ac97": Row("-audiodev none,id=a0 -device AC97,audiodev=a0"),
    "pci-bridge": Row("-device pci-bridge,id=b0,chassis_nr=1 -device virtio-rng-pci,bus=b0,addr=1"),
    "pcie-pci-bridge": Row(
        "-device pcie-pci-bridge,id=b0 -device rtl8139,netdev=n0,bus=b0,addr=1,romfile= -netdev user,id=n0",
        "q35",
    ),
    "switch-ports": Row(
        "-device ioh3420,id=r0,chassis=1 -device x3130-upstream,id=u0,bus=r0"
        " -device xio3130-downstream,id=d1,bus=u0,chassis=2 -device virtio-rng-pci,bus=d1",
        "q35",
    ),
    "virtio-iommu": Row("-device virtio-iommu-pci", "q35"),
    "root-ports": Row(
        "-device pcie-root-port,id=r0,chassis=1 -device pcie-root-port,id=r1,chassis=2"
        " -device virtio-balloon-pci,bus=r0 -netdev user,id=n0 -device e1000e,bus=r1,netdev=n0,romfile=",
        "q35",
    ),
    "intel-iommu": Row(
        "-device intel-iommu -device virtio-rng-pci,iommu_platform=on,disable-legacy=on", "q35"
    ),
    "pc-dimm": Row(
        f"-m 64M,slots=2,maxmem=1G -object {MEMFD},id=m1,size=128M -device pc-dimm,memdev=m1",
    ),
    "virtio-mem": Row(
        f"-m 64M,maxmem=1G -object {MEMFD},id=m1,size=256M -device virtio-mem-pci,memdev=m1,requested-size=128M"
    ),
    "nvdimm": Row(
        f"-m 64M,slots=2,maxmem=1G -object {MEMFD},id=m1,size=128M -device nvdimm,memdev=m1", "pc,nvdimm=on"
    ),
    "virtio-pmem": Row(f"-m 64M,maxmem=1G -object {MEMFD},id=m1,size=128M -device virtio-pmem-pci,memdev=m1"),
    "ivshmem-master": Row(f"-object {MEMFD},id=m1,size=16M -device ivshmem-plain,memdev=m1,master=on"),
    "ivshmem-peer": Row(f"-object {MEMFD},id=m1,size=16M -device ivshmem-plain,memdev=m1,master=off"),
    "virtio-crypto": Row("-object cryptodev-backend-builtin,id=y0 -device virtio-crypto-pci,cryptodev=y0"),
    "virtio-9p": Row(
        "-fsdev local,id=f0,path=FOLDER,security_model=none -device virtio-9p-pci,fsdev=f0,mount_tag=t"
    ),
    "ipmi": Row("-device ipmi-bmc-sim,id=i0 -device isa-ipmi-kcs,bmc=i0"),
    "edu": Row("-device edu"),
    "two-numa-nodes": Row(
        "-smp 2",
        memory=f"-m 64M -object {MEMFD},id=m0,size=40M -object {MEMFD},id=m1,size=24M"
        " -numa node,memdev=m0,cpus=0 -numa node,memdev=m1,cpus=1",
        chosen="",
    ),
    "memory-in-a-file": Row(
        memory="-m 64M -object memory-backend-file,id=mem,mem-path=FOLDER/NAME.ram,size=64M,share=on"
    ),
    "anonymous-memory": Row(memory="-m 64M", chosen=""),
    "above-4-gib": Row(
        machine="pc,max-ram-below-4g=128M", memory=f"-m 256M -object {MEMFD},id=mem,size=256M"
    ),
    "generation-of-its-own": Row("-device vmgenid,guid=auto"),
    "watchdog-panic-generation": Row(
        "-device i6300esb -device pvpanic -device vmgenid,guid=324e6eaf-d1d1-4bf6-bf41-b9bb6c91fb87"
    ),
    "serial-parallel": Row(
        "-chardev null,id=c0 -serial chardev:c0 -chardev null,id=c1 -parallel chardev:c1"
        " -device isa-debug-exit -device pci-serial,chardev=c2 -chardev null,id=c2"
    ),
    "tco-smm-off": Row(machine="q35,smm=off,hpet=off,vmport=off,i8042=on"),
}
ALONE = {
    "nvme": "State blocked by non-migratable device '0000:00:02.0/nvme'",
    "usb-uas": "State blocked by non-migratable device '0000:00:02.0/1/usb-uas'",
    "usb-audio": "State blocked by non-migratable device '0000:00:02.0/1/usb-audio'",
    "virtio-crypto": "State blocked by non-migratable device '0000:00:02.0/virtio-crypto'",
    "ivshmem-peer": "Migration is disabled when using feature 'peer mode' in device 'ivshmem'",
}
"""Machines that QEMU itself does not move, and what it says."""
WRITTEN = ("generation-of-its-own",)
"""Machines into whose memory QEMU writes when they have come."""
LEFT_BEHIND = ("virtio-pmem",)
"""Machines of which QEMU does not send the second memory, whatever is in it."""


def _opened(node: Node) -> list[tuple[str, int]]:
    """Files that are a QEMU's memory, and their sizes."""
    found: dict[int, tuple[str, int]] = {}
    for fd in Path(f"/proc/{node.process.pid}/fd").iterdir():
        with suppress(OSError):
            where = os.readlink(fd)
            if "memory-backend-memfd" in where or where.endswith(".ram"):
                about = fd.stat()
                found[about.st_ino] = (str(fd), about.st_size)
    return sorted(found.values(), key=lambda each: each[1])


async def _main(node: Node) -> int:
    """Where memory that is in no file is in the QEMU's own address space."""
    told = await node.qmp.hmp("gpa2hva 0")
    found = re.search(r"is (0x[0-9a-f]+)", told)
    assert found, told
    return int(found.group(1), 16)


def _write(path: str, at: int, data: bytes) -> None:
    with Path(path).open("r+b", buffering=0) as memory:
        memory.seek(at)
        assert memory.write(data) == len(data)


def _read(path: str, at: int, length: int) -> bytes:
    with Path(path).open("rb") as memory:
        memory.seek(at)
        return memory.read(length)


async def fill(node: Node, *, smallest: bool = False) -> None:
    """Put data that nothing shortens into each memory, or into the smallest."""
    data = random.Random(1).randbytes(FILLED)
    if files := _opened(node):
        for path, _ in files[: 1 if smallest else None]:
            _write(path, STARTING, data)
    else:
        _write(f"/proc/{node.process.pid}/mem", await _main(node) + STARTING, data)


async def memories(node: Node) -> list[bytes]:
    """A stopped QEMU's memories, the smallest first."""
    if files := _opened(node):
        return [_read(path, 0, size) for path, size in files]
    return [_read(f"/proc/{node.process.pid}/mem", await _main(node), 64 * MIB)]


async def blocks(node: Node) -> dict[str, bytes]:
    """What an endpoint holds, by name of a block."""
    found = {}
    for fd in Path(f"/proc/{node.process.pid}/fd").iterdir():
        with suppress(OSError):
            where = os.readlink(fd)
            if where.startswith("/memfd:"):
                name = where.removeprefix("/memfd:").removesuffix(" (deleted)")
                found[name] = str(fd)
    report = await node.qmp.command("x-vhostpc-report")
    held = {}
    for block in report["blocks"]:
        (path,) = [path for name, path in found.items() if name.endswith(block["name"])]
        held[block["name"]] = Path(path).read_bytes()
        assert len(held[block["name"]]) == block["length"]
        assert block["received"] * block["page-size"] == block["length"]
    return held


def main_blocks(held: dict[str, bytes]) -> list[bytes]:
    """Those that are the guest's memory, the smallest first."""
    names = [name for name in held if re.search(r"(^|/)(mem|m0|m1|pc\.ram)$", name)]
    return sorted((held[name] for name in names), key=len)


def differing(ours: list[bytes], theirs: list[bytes]) -> list[int]:
    """Which of them differ. (No more is told: they are large.)"""
    return [at for at, (mine, other) in enumerate(zip(ours, theirs, strict=True)) if mine != other]


def complaints(node: Node) -> list[str]:
    return [
        line for line in node.process.err.lines if not (HARMLESS.search(line) or "max_ram_below_4g" in line)
    ]


def cases() -> list[object]:
    return [
        pytest.param(version, name, id=f"{version}-{name}")
        for version in peers.VERSIONS
        for name in ROWS
        if ROWS[name].only in (None, version) and name not in (*ALONE, *WRITTEN)
    ]


@pytest.mark.long
@pytest.mark.parametrize(("version", "name"), cases())
async def test_held_and_sent_on(version: Compat, name: str, tmp_path: Path) -> None:
    """In by one way, out by the other: each second row begins with postcopy."""
    row = ROWS[name]
    ways = ("precopy", "postcopy")
    number = list(ROWS).index(name)
    into, onward = ways[number % 2], ways[1 - number % 2]
    more = row.devices(tmp_path)
    compared = 1 if name in LEFT_BEHIND else None
    with trio.fail_after(LIMIT):
        async with endpoint_node(version, "held", tmp_path) as held:
            async with qemu_node(version, "first", board=row.board(tmp_path, "first"), more=more) as first:
                # What a virtio-mem device has not plugged is nobody's, and is not sent.
                await fill(first, smallest=name == "virtio-mem")
                await first.process.out.find(r"Booting from|No bootable device")
                await move(first, held, tmp_path / "in", into)
                was = (await memories(first))[:compared]
                assert complaints(first) == []
            plugged = was[:1] if name == "virtio-mem" else was
            assert all(any(data) for data in plugged)
            came = await blocks(held)
            assert differing(main_blocks(came), was) == []
            board = row.board(tmp_path, "second")
            async with (
                qemu_node(version, "second", board=board, more=more, incoming=True, stopped=True) as second,
                endpoint_node(version, "again", tmp_path) as again,
            ):
                await move(held, second, tmp_path / "out", onward)
                assert differing((await memories(second))[:compared], was) == []
                # What is no main memory shows in what QEMU itself sends.
                await move(second, again, tmp_path / "again", into)
                assert complaints(second) == []
                back = await blocks(again)
                assert back.keys() == came.keys()
                assert [block for block in came if came[block] != back[block]] == []


@contextlib.asynccontextmanager
async def pair(version: Compat, name: str, folder: Path) -> AsyncIterator[tuple[Node, Node]]:
    """Two QEMUs, without ours; the BIOS of the first is through."""
    row = ROWS[name]
    here, there = (row.board(folder, node) for node in ("first", "second"))
    more = row.devices(folder)
    async with (
        qemu_node(version, "first", board=here, more=more) as first,
        qemu_node(version, "second", board=there, more=more, incoming=True, stopped=True) as second,
    ):
        await first.process.out.find(r"Booting from|No bootable device")
        yield first, second


@pytest.mark.long
@pytest.mark.parametrize("name", ALONE)
@pytest.mark.parametrize("version", peers.VERSIONS)
async def test_what_qemu_itself_does_not_move(version: Compat, name: str, tmp_path: Path) -> None:
    """The control of the rows that are not in the sweep."""
    async with pair(version, name, tmp_path) as (first, second):
        await second.qmp.command("migrate-incoming", uri=f"unix:{tmp_path}/in")
        reply = await first.qmp.reply("migrate", uri=f"unix:{tmp_path}/in")
        assert ALONE[name] in reply["error"]["desc"]


@pytest.mark.long
@pytest.mark.parametrize("name", LEFT_BEHIND)
@pytest.mark.parametrize("version", peers.VERSIONS)
async def test_what_qemu_itself_leaves_behind(version: Compat, name: str, tmp_path: Path) -> None:
    """The control of the rows in which one memory is not compared."""
    async with pair(version, name, tmp_path) as (first, second):
        await fill(first)
        await move(first, second, tmp_path / "in", "precopy")
        was, came = await memories(first), await memories(second)
        assert differing(came, was) == [1]
        assert not any(came[1])


@pytest.mark.long
@pytest.mark.parametrize("name", WRITTEN)
@pytest.mark.parametrize("version", peers.VERSIONS)
async def test_what_qemu_itself_writes(version: Compat, name: str, tmp_path: Path) -> None:
    """The control of a row that is in the sweep with a generation that is the same at both ends."""
    async with pair(version, name, tmp_path) as (first, second):
        await move(first, second, tmp_path / "in", "precopy")
        ((was,), (came,)) = await memories(first), await memories(second)
        differ = [at for at in range(0, len(was), 16) if was[at : at + 16] != came[at : at + 16]]
        assert 1 <= len(differ) <= 2
