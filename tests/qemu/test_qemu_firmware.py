"""UEFI firmware boots a long image from our disk: it reads the file in one request."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.peers import packages
from tests.qemu import firmware, peers, vm
from tests.qemu.proc import child
from vhostpc.backend import Chain, serve
from vhostpc.backend.disk import Disk

pytestmark = pytest.mark.qemu
LONG = 48 << 20


@pytest.mark.parametrize("version", ["7.2", pytest.param("10.0", marks=pytest.mark.long)])
async def test_image_of_48_mebibytes(version: str, tmp_path: Path) -> None:
    """The image looks at all of its bytes, so every piece was right."""
    requests: list[int] = []

    class Seen(Disk):
        def parse(self, chain: Chain) -> Any:
            requests.append(chain.writable)
            return super().parse(chain)

    image, variables, path = tmp_path / "disk", tmp_path / "variables", tmp_path / "blk.sock"
    image.write_bytes(firmware.file_system(firmware.program(LONG)))
    code, fresh = packages.firmware()
    shutil.copy(fresh, variables)
    qemu = peers.qemu(version)
    argv = [*qemu.argv, "-nodefaults", "-no-user-config", "-display", "none", "-accel", "tcg", "-no-reboot"]
    argv += vm.Memory().argv()
    argv += ["-drive", f"if=pflash,format=raw,readonly=on,file={code}"]
    argv += ["-drive", f"if=pflash,format=raw,file={variables}", "-serial", "stdio"]
    device = "vhost-user-blk-pci,chardev=vu,num-queues=1,vectors=0,bootindex=0"
    argv += ["-chardev", f"socket,id=vu,path={path}", "-device", device]
    async with trio.open_nursery() as nursery:
        await nursery.start(serve, Seen(str(image), queues=1), path)
        async with child("firmware", argv, env=qemu.env) as machine:
            await machine.out.find(f"{firmware.WHOLE}|{firmware.BROKEN}")
            assert await machine.wait() == 0
            assert any(firmware.WHOLE in line for line in machine.out.lines), machine.tail()
        nursery.cancel_scope.cancel()
    assert max(requests) > 32 << 20, sorted(requests)[-5:]
