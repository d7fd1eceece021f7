"""A back-end by others: QEMU's storage daemon, whose library does postcopy wrongly, and is found out in time."""

from __future__ import annotations

import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from tests.kit.rig import Guest
from tests.kit.until import until
from tests.qemu import peers
from vhostpc.errors import PostcopyRefused
from vhostpc.frontend import (
    BackendPostcopy,
    Driver,
    FrontEnd,
    MemoryShare,
    Mode,
    connect,
    start_ring,
    stop_ring,
)
from vhostpc.pages.service import FaultService
from vhostpc.wire.vhost_user import ProtocolFeature

pytestmark = pytest.mark.qemu
SIZE = 4 << 20


@asynccontextmanager
async def storage_daemon(tmp_path: Path) -> AsyncIterator[FrontEnd]:
    """A session with qemu-storage-daemon's vhost-user-blk."""
    disk, path, log = tmp_path / "disk", tmp_path / "blk.sock", tmp_path / "daemon.log"
    disk.write_bytes(bytes(SIZE))
    qemu = peers.qemu("7.2")
    program = Path(qemu.argv[0]).with_name("qemu-storage-daemon")
    with log.open("wb") as out:
        process = subprocess.Popen(  # noqa: ASYNC220  not waited for
            [
                str(program),
                "--blockdev",
                f"driver=file,node-name=d0,filename={disk}",
                "--export",
                f"type=vhost-user-blk,id=e0,addr.type=unix,addr.path={path},node-name=d0,writable=on",
            ],
            env={"PATH": "/usr/bin:/bin", **qemu.env},
            stdout=out,
            stderr=out,
        )
    try:
        await until(lambda: path.exists() or process.poll() is not None)
        assert process.poll() is None, log.read_text()
        async with connect(path) as front:
            yield front
        assert process.poll() is None, log.read_text()
    finally:
        process.kill()
        process.wait()


async def test_session_config_and_ring(tmp_path: Path) -> None:
    guest = Guest()
    try:
        with trio.fail_after(60):
            async with storage_daemon(tmp_path) as front:
                await front.negotiate()
                capacity = int.from_bytes(await front.get_config(0, 8), "little")
                assert capacity * 512 == SIZE
                memory = MemoryShare(front, guest.regions(guest.source))
                await memory.share()
                layout = guest.layout(0)
                with Driver(guest.source, guest.regions(guest.source), layout, event_idx=True) as ring:
                    await ring.reset()
                    await start_ring(front, memory, 0, ring)
                    await front.barrier()
                    assert await stop_ring(front, 0) == 0
    finally:
        guest.close()


async def test_its_postcopy_is_refused_before_it_can_hang(tmp_path: Path) -> None:
    """libvhost-user answers with our own addresses: its faults could be found in no region."""
    guest = Guest()
    try:
        with trio.fail_after(60):
            async with storage_daemon(tmp_path) as front:
                # With memory slots it would die of the last step, with no way to know it before.
                await front.negotiate(hide_protocol=ProtocolFeature.CONFIGURE_MEM_SLOTS)
                assert ProtocolFeature.PAGEFAULT in front.protocol_features
                with FaultService(guest.ram) as service:
                    postcopy = BackendPostcopy(front, service, name="qemu-storage-daemon")
                    await postcopy.advise()
                    await postcopy.listen()
                    memory = MemoryShare(front, guest.regions(guest.ram), Mode.TABLE)
                    with pytest.raises(PostcopyRefused, match="repeats our own address"):
                        await postcopy.share(memory)
                    assert guest.holes() == [
                        (b.name, 0, b.length) for b in guest.ram.blocks
                    ], "nothing was touched"
    finally:
        guest.close()
