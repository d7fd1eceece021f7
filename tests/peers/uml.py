"""User-Mode Linux: a kernel as a process, with a vhost-user front-end of its own. It needs neither QEMU nor KVM."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import os
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

from tests.peers.packages import user_mode_linux
from tests.qemu import guest
from tests.qemu.peers import cache_dir
from tests.qemu.proc import Child, Lines, child

NET, BLOCK = 1, 2  # virtio 1.2, 5
MODULES = ("failover", "net_failover", "virtio_net", "virtio_blk")


def initrd() -> Path:
    """The guest's user space, built once per state of what it holds: the static program, busybox, modules."""
    files = guest.base_files(user_mode_linux(), MODULES)
    files["init"] = guest.Entry(0o100755, (guest.SOURCES / "init_uml.sh").read_bytes())
    files["bin/guest"] = guest.Entry(0o100755, guest.program().read_bytes())
    digest = hashlib.sha256(repr(sorted(files.items())).encode()).hexdigest()[:16]
    target = cache_dir() / f"initrd-uml-{digest}.gz"
    if not target.exists():
        fresh = target.with_suffix(f".{os.getpid()}")
        fresh.write_bytes(gzip.compress(guest.archive(files), 1))
        fresh.rename(target)
    return target


class Uml:
    """A running guest: ``serial`` has what it says."""

    def __init__(self, process: Child) -> None:
        self.process = process

    @property
    def serial(self) -> Lines:
        return self.process.out

    async def run(self, command: str) -> None:
        """Have the guest's shell run a line."""
        await self.process.send(command + "\n")

    async def ask(self, command: str, pattern: str = "(.*)") -> str:
        """Run a line, and give what its output has at the pattern's first group."""
        at = len(self.serial)
        await self.run(f'echo "answer $({command})"')
        return (await self.serial.find(f"^answer {pattern}$", at)).group(1)

    async def power_off(self) -> None:
        """Its devices are given back; returns when it has ended."""
        await self.run("poweroff -f")
        assert await self.process.wait() == 0, self.process.tail()


@contextlib.asynccontextmanager
async def uml(
    devices: Mapping[Path, int], tmp_path: Path, inside: tuple[str, ...] = ()
) -> AsyncIterator[Uml]:
    """Boot a guest with a device for each socket, given with its virtio type; it is up when this returns.

    ``inside``: words that enter a namespace.
    """
    # It adds the gap behind its program to its memory and describes it page by page: laid out as is, that is small. It
    # may have a thread for each 128 KiB, and with 96 MiB came up without some, or not at all, once in a hundred times.
    # Its processes would outlive it if it were killed: in a namespace they do not.
    argv = [*inside, "unshare", "--pid", "--fork", "--kill-child", "setarch", "-R"]
    argv += [str(user_mode_linux().image), "mem=256M"]
    argv += [f"initrd={initrd()}", f"uml_dir={tmp_path}"]
    argv += [
        "con=null",
        "con0=fd:0,fd:1",
        *(f"virtio_uml.device={path}:{kind}" for path, kind in devices.items()),
    ]
    async with child("uml", argv, env={"TMPDIR": "/dev/shm"}) as process:
        machine = Uml(process)
        await machine.serial.find("^guest is up$")
        yield machine
