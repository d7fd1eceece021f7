"""A destination that may not use userfaultfd: it says so before anything is lost, and QEMU's machine runs on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import trio

from tests.qemu import peers, vm

pytestmark = pytest.mark.qemu
ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("profile", ["denied", "denied-nobody"])
@pytest.mark.parametrize("version", peers.VERSIONS)
async def test_userfaultfd_is_denied(version: str, profile: str, tmp_path: Path) -> None:
    """A seccomp filter and no device node, as root and as an ordinary user."""
    if os.geteuid() != 0:
        pytest.fail("needs root") if os.environ.get("CI") else pytest.skip("needs root")
    command = [sys.executable, "-m", "tests.confine", profile, sys.executable, "-m", "tests.incoming_child"]
    # pytest's own folder is closed to others.
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o777)
        path = Path(folder) / "in"
        with subprocess.Popen([*command, path], cwd=ROOT, stdout=subprocess.PIPE, text=True) as child:  # noqa: ASYNC220
            try:
                await refused(child, path, version, tmp_path)
            finally:
                child.kill()


async def refused(child: subprocess.Popen[str], path: Path, version: str, tmp_path: Path) -> None:
    assert child.stdout is not None
    with trio.fail_after(120):
        assert await trio.to_thread.run_sync(child.stdout.readline) == "{}\n"
        async with vm.vm(vm.Spec(peers.qemu(version)), "src", vm.Bare(), tmp_path) as source:
            nonce = await source.booted()
            wanted = [{"capability": name, "state": True} for name in ("events", "postcopy-ram")]
            await source.qmp.command("migrate-set-capabilities", capabilities=wanted)
            await source.qmp.command("migrate", uri=f"unix:{path}")
            said = json.loads(await trio.to_thread.run_sync(child.stdout.readline))
            assert said["events"] == ["fail"]
            assert "postcopy can not be done here" in said["error"]
            assert "to mend it, give this process read and write access to /dev/userfaultfd" in said["error"]
            assert "seccomp" in said["error"]
            await source.qmp.event("MIGRATION", 0, status="failed")
            assert (await source.qmp.command("query-status"))["status"] == "running"
            await source.beat(nonce)
