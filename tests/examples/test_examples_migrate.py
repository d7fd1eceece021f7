"""``examples/migrate`` between stock QEMUs: the machine is taken, shown and sent on; the guest goes on."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import trio

from tests.kit.pages import ROOT
from tests.peers.child import open_child
from tests.qemu import peers, vm
from tests.qemu.test_qemu_endpoint import completed, prepare
from tests.qemu.versions import EACH
from vhostpc.dialect import Compat

EXAMPLE = "examples/migrate"


@pytest.mark.qemu
@pytest.mark.parametrize(("how", "onward"), [("precopy", "postcopy"), ("postcopy", "precopy")])
@pytest.mark.parametrize("version", EACH)
async def test_taken_shown_and_sent_on(version: Compat, how: str, onward: str, tmp_path: Path) -> None:
    spec = vm.Spec(peers.qemu(version))
    come, go = (f"unix:{tmp_path}/{name}" for name in ("in", "out"))
    more = ["--postcopy"] if onward == "postcopy" else []
    argv = [sys.executable, EXAMPLE, come, go, *more]
    with trio.fail_after(240):
        async with open_child(argv, name=EXAMPLE, cwd=ROOT) as example:
            await example.until(f"waiting for a machine at {come}\n")
            async with vm.vm(spec, "first", vm.Bare(), tmp_path) as first:
                nonce = await first.booted()
                await first.beat(nonce)
                coming = ["postcopy-ram"] if how == "postcopy" else []
                # Slow at first where postcopy is to follow, so that there is a rest for it.
                await prepare(first, *coming, max_bandwidth=4 << 20 if coming else 1 << 30)
                await first.qmp.command("migrate", uri=come)
                if coming:
                    await first.qmp.event("MIGRATION", 0, status="active")
                    await first.qmp.command("migrate-start-postcopy")
                await completed(first)
                await example.until("press Enter to send it on\n", limit=60)
                assert first.complaints() == []
            assert f"pc-i440fx-{version} is held\n" in example.said
            length = spec.memory.size << 10
            assert f"  RAM block mem: {length} KiB in pages of 4 KiB\n" in example.said
            sections = re.findall(r"  device section (\S+ \d+): version \d+, (\d+) bytes\n", example.said)
            assert {"timer 0", "cpu 0", "apic 0", "globalstate 0"} <= {name for name, _ in sections}
            assert all(int(size) > 0 for _, size in sections)
            async with vm.vm(spec, "second", vm.Bare(), tmp_path, incoming=True) as second:
                await prepare(second, *(["postcopy-ram"] if more else []))
                await second.qmp.command("migrate-incoming", uri=go)
                await example.send("\n")
                await second.qmp.event("RESUME", 0, limit=60)
                await completed(second)
                await second.beat(nonce, 2)
                assert await second.sweep() == 0
                statuses = [e["data"]["status"] for e in second.qmp.events if e["event"] == "MIGRATION"]
                assert ("postcopy-active" in statuses) == bool(more)
                assert second.complaints() == []
            assert await example.wait() == 0, example.said
            assert re.search(rf"sent to {re.escape(go)}: \d+ KiB\n$", example.said), example.said


def test_without_addresses_it_says_how_it_is_used() -> None:
    done = subprocess.run(
        [sys.executable, EXAMPLE], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    assert "python examples/migrate unix:/tmp/in unix:/tmp/out [--postcopy]" in done.stderr


def test_what_cannot_be_is_one_sentence(tmp_path: Path) -> None:
    argv = [sys.executable, EXAMPLE, f"unix:{tmp_path}/none/in", f"unix:{tmp_path}/out"]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    why = f"migrate: Failed to bind socket to {tmp_path}/none/in: No such file or directory\n"
    assert done.stderr == why
