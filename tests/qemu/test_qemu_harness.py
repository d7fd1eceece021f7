"""The harness itself, shown with QEMU's own tap back-end in place of ours: what it measures is true."""

from __future__ import annotations

import itertools
import os
import struct
from pathlib import Path

import pytest

from tests.qemu import net, peers, vm
from tests.qemu.checks import Account, Watch

pytestmark = pytest.mark.qemu


# One of each QEMU, one of each way: the pair is not what is tested here.
@pytest.mark.parametrize(("version", "how"), [("7.2", "postcopy"), ("10.0", "precopy")])
async def test_tap_pair_moves_whole(version: str, how: str, tmp_path: Path) -> None:
    spec = vm.Spec(peers.qemu(version))
    async with net.network() as network:
        inside = network.inside()
        async with (
            vm.vm(spec, "src", vm.Tap("tap0", inside), tmp_path) as src,
            vm.vm(spec, "dst", vm.Tap("tap1", inside), tmp_path, incoming=True) as dst,
        ):
            nonce = await src.booted()
            async with network.far() as far:
                await far.received(500)
                await src.beat(nonce)
                account = await Account.open(far)
                watch = Watch(far, account)
                if how == "precopy":
                    await vm.migrate_precopy(src, dst, tmp_path, on_stop=watch.stopped)
                    await watch.heard()
                else:

                    async def during() -> None:
                        window = await watch.heard()
                        await far.acknowledged(window.moved.next + 300)

                    moved = await vm.migrate_postcopy(
                        src, dst, tmp_path, on_stop=watch.stopped, during=during
                    )
                    assert moved.remaining >= 0.6
                await far.received(account.windows[-1].moved.high + 1000)
                await dst.beat(nonce)
                assert await dst.sweep() == 0
                await account.close(far, dst)
            assert src.complaints() == []
            assert dst.complaints() == []


def spoil_a_page(pid: int, pages: int) -> None:
    """Flip one byte in a page of the checker, through the memfd of a running QEMU."""
    fds = [fd for fd in Path(f"/proc/{pid}/fd").iterdir() if "memory-backend-memfd" in os.readlink(fd)]
    with fds[0].open("r+b", buffering=0) as memory:
        for at in range(0, os.fstat(memory.fileno()).st_size, 4096):
            words = struct.unpack("<8Q", os.pread(memory.fileno(), 64, at))
            steps = {(b - a) % (1 << 64) for a, b in itertools.pairwise(words[2:])}
            if words[0] < pages and words[1] == 1 and len(steps) == 1 and steps != {0}:
                os.pwrite(memory.fileno(), bytes([words[5] & 0xFF ^ 0x10]), at + 40)
                return
    raise AssertionError("no page of the checker found in guest memory")


async def test_checker_finds_a_spoilt_page(tmp_path: Path) -> None:
    """A checker that could not fail would prove nothing."""
    spec = vm.Spec(peers.qemu("10.0"), vm.Memory(size=128))
    async with net.network() as network:
        async with vm.vm(spec, "src", vm.Tap("tap0", network.inside()), tmp_path) as src:
            await src.booted()
            await src.qmp.command("stop")
            spoil_a_page(src.process.pid, 128 << 8)
            await src.qmp.command("cont")
            await src.serial.find("^BAD page=")
            await src.sweep()
            await src.serial.find("^mem .* bad=1$", len(src.serial))
