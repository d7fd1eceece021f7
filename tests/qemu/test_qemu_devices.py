"""The documentation's table of the devices that QEMU moves, against the QEMUs themselves.

Each device stands in a machine that is stopped (no guest is needed to see whether QEMU would send it), with a back-end
of its kind that does nothing, and is migrated into nowhere.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio

from tests.kit.pages import ROOT
from tests.qemu import peers
from tests.qemu.backend import served
from tests.qemu.proc import child
from tests.qemu.qmp import Qmp, QmpClosed, QmpError

pytestmark = pytest.mark.qemu

STUB = """
from vhostpc.backend import Device, Queue


class Stub(Device):
    def __init__(self, kind: str, queues: str, config: str) -> None:
        self.device_id, self.num_queues, self.config_size = int(kind), int(queues), int(config)

    def read_config(self, offset: int, size: int) -> bytes:
        return bytes(size)

    async def handle_queue(self, queue: Queue) -> None:
        async for _ in queue:
            pass
"""


@dataclass(frozen=True)
class Kind:
    """The back-end's virtio device type, queues, bytes of config space; what ``-device NAME,chardev=vu`` needs more."""

    number: int
    queues: int
    config: int = 0
    more: str = ""


CONFIG = 256  # as much as there can be
GPU = 16
KINDS = {
    "virtio-net-pci": Kind(1, 2),
    "vhost-user-blk-pci": Kind(2, 1, CONFIG),
    "vhost-user-scsi-pci": Kind(8, 3),
    "vhost-user-fs-pci": Kind(26, 2, 0, ",tag=t"),
    "vhost-user-gpu-pci": Kind(GPU, 2, CONFIG),
    "vhost-user-vga": Kind(GPU, 2, CONFIG),
    "vhost-user-input-pci": Kind(18, 2, CONFIG),
    "vhost-user-rng-pci": Kind(4, 1),
    "vhost-user-i2c-pci": Kind(34, 1),
    "vhost-user-gpio-pci": Kind(41, 2, CONFIG),
    "vhost-user-vsock-pci": Kind(19, 2, CONFIG),
    "vhost-user-snd-pci": Kind(25, 4, CONFIG),
    "vhost-user-spi-pci": Kind(45, 1, CONFIG),
    "vhost-user-rtc-pci": Kind(17, 1),
    "vhost-user-test-device-pci": Kind(4, 1, CONFIG, ",virtio-id=4,num_vqs=1,config_size=8"),
    "virtio-crypto-pci": Kind(20, 2),
}
ON = {
    "virtio-net-pci": [
        "-netdev",
        "vhost-user,id=n0,chardev=vu",
        "-device",
        "virtio-net-pci,netdev=n0,romfile=",
    ],
    "virtio-crypto-pci": [
        *("-object", "cryptodev-vhost-user,id=c0,chardev=vu"),
        *("-device", "virtio-crypto-pci,cryptodev=c0"),
    ],
}


def table() -> dict[str, dict[str, str]]:
    """What docs/compatibility.md says: by version, by device."""
    section = (ROOT / "docs" / "compatibility.md").read_text().split("\n## Which devices QEMU moves\n")[1]
    rows = re.findall(r"^\| (.*) \|$", section.split("\n## ")[0], re.MULTILINE)
    head, *rest = [row.split(" | ") for row in rows]
    told: dict[str, dict[str, str]] = {version: {} for version in head[1:]}
    for first, *cells in rest:
        name = re.match(r"`([\w-]+)`", first)
        assert name, first
        for version, cell in zip(head[1:], cells, strict=True):
            told[version][name[1]] = cell
    return told


async def seen(version: str, name: str, tmp_path: Path) -> str:
    """What QEMU does with that device, in the table's words."""
    kind, qemu = KINDS[name], peers.qemu(version)
    (tmp_path / "stub.py").write_text(STUB)
    options = [f"-okind={kind.number}", f"-oqueues={kind.queues}", f"-oconfig={kind.config}"]
    ours, theirs = socket.socketpair()
    async with served("stub", f"{tmp_path / 'stub.py'}:Stub", tmp_path, options) as end:
        argv = [*qemu.argv, "-S", "-nodefaults", "-no-user-config", "-display", "none", "-accel", "tcg"]
        argv += ["-object", "memory-backend-memfd,id=mem,size=32M,share=on"]
        argv += ["-machine", "pc,memory-backend=mem", "-m", "32M"]
        argv += ["-chardev", f"socket,id=qmp,fd={theirs.fileno()}", "-qmp", "chardev:qmp"]
        argv += ["-chardev", f"socket,id=vu,path={end.path}"]
        argv += ON.get(name, ["-device", f"{name},chardev=vu{kind.more}"])
        async with child("qemu", argv, env=qemu.env, pass_fds=[theirs.fileno()]) as process:
            theirs.close()
            async with trio.SocketStream(trio.socket.from_stdlib_socket(ours)) as stream:
                async with trio.open_nursery() as nursery:
                    qmp = Qmp(stream, "qemu")
                    nursery.start_soon(qmp.run)
                    said = await migrated(qmp)
                    nursery.cancel_scope.cancel()
            if said == "closed":
                said = (await process.err.find(r"requires kvm|not a valid device model name")).group()
            if said == "failed":
                said = (await process.err.find(r"does not support migration through qemu")).group()
    return {
        "completed": "not refused" if KINDS[name].number == GPU else "moves",
        "does not support migration through qemu": "needs DEVICE_STATE",
        "requires kvm": "needs KVM",
        "not a valid device model name": "absent",
        "State blocked by non-migratable device": "refused",
    }.get(said, said)


async def migrated(qmp: Qmp) -> str:
    """``completed``, ``failed``, ``closed`` where QEMU did not start, or why ``migrate`` was refused."""
    try:
        await qmp.handshake()
        await qmp.command("migrate-set-capabilities", capabilities=[{"capability": "events", "state": True}])
        await qmp.command("migrate", uri="exec:cat >/dev/null")
        at = 0
        while True:
            event = await qmp.event("MIGRATION", at)
            at = qmp.events.index(event, at) + 1
            if event["data"]["status"] in ("completed", "failed"):
                return str(event["data"]["status"])
    except (QmpClosed, trio.BrokenResourceError):
        return "closed"
    except QmpError as e:
        return re.sub(r"^qemu: migrate: (State blocked by non-migratable device) '.*'$", r"\1", str(e))


TABLE = table()


@pytest.mark.parametrize("version", [*peers.VERSIONS, peers.NEWEST])
async def test_the_table_is_what_qemu_does(version: str, tmp_path: Path) -> None:
    found = {name: await seen(version, name, tmp_path) for name in TABLE[version]}
    assert found == TABLE[version]


@pytest.mark.parametrize("version", [*peers.VERSIONS, peers.NEWEST])
def test_no_device_is_left_out(version: str) -> None:
    """``-device help`` names no vhost-user device that is not in the table."""
    qemu = peers.qemu(version)
    command = [*qemu.argv, "-machine", "none", "-device", "help"]
    done = subprocess.run(command, env={**os.environ, **qemu.env}, capture_output=True, text=True, check=True)
    there = set(re.findall(r'name "(vhost-user-[\w-]+-pci|vhost-user-vga)"', done.stdout))
    told = {
        name for name, cell in TABLE[version].items() if cell != "absent" and name.startswith("vhost-user")
    }
    assert there == told
