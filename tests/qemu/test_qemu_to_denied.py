"""A destination that may not use userfaultfd: it says so before anything is lost, and the machine runs on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import trio

from tests.kit.own_machine import check, end
from tests.qemu import peers, vm

pytestmark = pytest.mark.qemu
ROOT = Path(__file__).resolve().parents[2]


PROFILES = ["denied", "denied-nobody"]
"""A seccomp filter and no device node, as root and as an ordinary user."""


def needs_root() -> None:
    if os.geteuid() != 0:
        pytest.fail("needs root") if os.environ.get("CI") else pytest.skip("needs root")


def names_the_mend(text: str) -> None:
    assert "postcopy cannot be done here" in text
    assert "to fix it, give this process read and write access to /dev/userfaultfd" in text
    assert "seccomp" in text


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("version", peers.VERSIONS)
async def test_userfaultfd_is_denied(version: str, profile: str, tmp_path: Path) -> None:
    needs_root()
    command = [
        sys.executable,
        "-m",
        "tests.kit.confine",
        profile,
        sys.executable,
        "-m",
        "tests.kit.incoming_child",
    ]
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
            names_the_mend(said["error"])
            await source.qmp.event("MIGRATION", 0, status="failed")
            assert (await source.qmp.command("query-status"))["status"] == "running"
            await source.beat(nonce)


@pytest.mark.parametrize("stays", [True, False], ids=["stays", "exits"])
@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("machine", [("--ram", "mem=64M", "--vcpus", "1"), ()], ids=["own", "held"])
async def test_the_endpoint_is_denied(machine: tuple[str, ...], profile: str, stays: bool) -> None:
    """It fails where postcopy is announced. The machine at the source runs on."""
    needs_root()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.chmod(folder, 0o777)
        through = [sys.executable, "-m", "tests.kit.confine", profile]
        async with (
            end("source", folder, "--ram", "mem=64M", "--vcpus", "1") as source,
            end("destination", folder, *machine, "--incoming", "defer", through=through) as destination,
        ):
            await source.until_works()
            held = destination.held()
            for one in (source, destination):
                await one.set("postcopy-ram")
            uri = f"unix:{folder}/in"
            await destination.qmp.command("migrate-incoming", uri=uri, exit_on_error=not stays)
            await source.qmp.command("migrate", uri=uri)
            await source.until_status("failed", not_these=("completed", "postcopy-active"))
            assert await source.state() == "running"
            check(await source.until_works())
            if not stays:
                assert await destination.process.wait() == 1
                (line,) = [
                    line for line in destination.process.err.lines if "the machine did not arrive" in line
                ]
                names_the_mend(line)
                return
            names_the_mend((await destination.until_status("failed"))["error-desc"])
            now = destination.held()
            assert (now["fds"], now["ufds"], now["maps"]) == (held["fds"], 0, held["maps"])
            assert await destination.state() == "inmigrate"
