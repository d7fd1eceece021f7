"""A link that is lost in postcopy between the endpoint and a stock QEMU: both pause, recover, and the guest goes on."""

from __future__ import annotations

import contextlib
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.kit.hugepages import hugepages
from tests.qemu import peers, vm
from tests.qemu.test_qemu_endpoint import completed, holding, prepare, send
from tests.qemu.versions import EACH
from tests.sequences.nodes import endpoint_node, replacing_node
from vhostpc.dialect import Compat

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.qemu
TIMES = [pytest.param(3, id="few"), pytest.param(15, id="many", marks=pytest.mark.long)]
LOST = (
    "Detected IO failure for postcopy",
    "error while loading state section id",
    "Unable to shutdown socket",
    "Unable to write to socket",
    "Unable to read from socket",
)
"""Lines of a QEMU whose link was lost."""


async def paused(*sides: Any) -> None:
    for side in sides:
        while (await side.qmp.command("query-migrate"))["status"] != "postcopy-paused":
            await trio.sleep(0.01)


async def recover(source: Any, destination: Any, path: Path) -> None:
    """By the two commands that a person types."""
    since = len(source.qmp.events), len(destination.qmp.events)
    await destination.qmp.command("migrate-recover", uri=f"unix:{path}")
    await source.qmp.command("migrate", uri=f"unix:{path}", resume=True)
    for side, start in zip((source, destination), since, strict=True):
        await side.qmp.event("MIGRATION", start, status="postcopy-active")


async def lost_and_recovered(
    source: Any, destination: Any, folder: Path, *, pauses: Any, times: int, seed: int
) -> None:
    """The link breaks at random moments; ``pauses`` is the end that is told to break it."""
    rng = random.Random(seed)
    for number in range(times):
        await trio.sleep(rng.random() / 5)
        await pauses.qmp.command("migrate-pause")
        await paused(source, destination)
        await recover(source, destination, folder / f"again{number}")


@pytest.mark.parametrize("times", TIMES)
@pytest.mark.parametrize("version", EACH)
async def test_from_qemu(version: Compat, times: int, tmp_path: Path) -> None:
    """The endpoint is the destination. What it holds behind it is the guest, whole: it goes on elsewhere."""
    spec = vm.Spec(peers.qemu(version))
    with trio.fail_after(200):
        async with endpoint_node(version, "held", tmp_path, ram="mem=256M") as node:
            async with vm.vm(spec, "source", vm.Bare(), tmp_path) as source:
                nonce = await source.booted()
                await source.beat(nonce)
                await prepare(node, "postcopy-ram")
                await prepare(source, "postcopy-ram", max_bandwidth=4 << 20, max_postcopy_bandwidth=1 << 20)
                await node.qmp.command("migrate-incoming", uri=f"unix:{tmp_path}/in")
                await source.qmp.command("migrate", uri=f"unix:{tmp_path}/in")
                await source.qmp.event("MIGRATION", 0, status="active")
                await source.qmp.command("migrate-start-postcopy")
                for side in (source, node):
                    await side.qmp.event("MIGRATION", 0, status="postcopy-active")
                await lost_and_recovered(source, node, tmp_path, pauses=source, times=times, seed=1)
                since = len(source.qmp.events)
                await source.qmp.command("migrate-set-parameters", max_postcopy_bandwidth=0)
                await completed(source, since)
                await node.qmp.event("MIGRATION", 0, status="completed")
            async with vm.vm(spec, "target", vm.Bare(), tmp_path, incoming=True) as target:
                await send(node, target, tmp_path / "out", "precopy", nonce)


@pytest.mark.parametrize("times", TIMES)
@pytest.mark.parametrize("version", EACH)
async def test_to_qemu(version: Compat, times: int, tmp_path: Path) -> None:
    """The endpoint is the source; the guest asks for pages of its own."""
    spec = vm.Spec(peers.qemu(version))
    with trio.fail_after(200):
        async with (
            holding(version, tmp_path, "precopy") as (node, nonce),
            vm.vm(spec, "target", vm.Bare(), tmp_path, incoming=True) as target,
        ):
            await prepare(target, "postcopy-ram")
            await prepare(node, "postcopy-ram", max_bandwidth=4 << 20, max_postcopy_bandwidth=1 << 20)
            await target.qmp.command("migrate-incoming", uri=f"unix:{tmp_path}/out")
            since = len(node.qmp.events)
            await node.qmp.command("migrate", uri=f"unix:{tmp_path}/out")
            await node.qmp.command("migrate-start-postcopy")
            await node.qmp.event("MIGRATION", since, status="postcopy-active")
            await target.qmp.event("RESUME", 0)
            await lost_and_recovered(node, target, tmp_path, pauses=node, times=times, seed=2)
            await target.beat(nonce)
            assert (await node.qmp.command("query-migrate"))["ram"]["remaining"] > 0
            since = len(node.qmp.events)
            await node.qmp.command("migrate-set-parameters", max_postcopy_bandwidth=0)
            await completed(node, since)
            await target.qmp.event("MIGRATION", 0, status="completed")
            await target.beat(nonce, 2)
            assert await target.sweep() == 0
            assert [line for line in target.complaints() if not any(words in line for words in LOST)] == []


@contextlib.contextmanager
def memory_folders(huge: bool) -> Iterator[list[Path]]:
    """A folder on tmpfs, and one on a hugetlbfs."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as ordinary:
        if not huge:
            yield [Path(ordinary)]
            return
        with hugepages(3 * 256 + 16), tempfile.TemporaryDirectory() as pages:
            subprocess.run(["mount", "-t", "hugetlbfs", "-o", "pagesize=2M", "none", pages], check=True)
            try:
                yield [Path(ordinary), Path(pages)]
            finally:
                subprocess.run(["umount", pages], check=True)


@pytest.mark.parametrize("huge", [False, True], ids=["4k", "2M"])
@pytest.mark.parametrize("version", EACH)
async def test_a_killed_holder_is_replaced(version: Compat, huge: bool, tmp_path: Path) -> None:
    """A held machine, whose process is killed in postcopy: another one with its memory's files sends the rest."""
    spec = vm.Spec(peers.qemu(version), vm.Memory(huge=huge, size=256))
    uri = f"unix:{tmp_path}/out"
    with trio.fail_after(200), memory_folders(huge) as folders:
        more = [part for folder in folders for part in ("--ram-dir", str(folder))]
        async with vm.vm(spec, "target", vm.Bare(), tmp_path, incoming=True) as target:
            async with holding(version, tmp_path, "precopy", huge=huge, more=more) as (node, nonce):
                await prepare(target, "postcopy-ram")
                await prepare(node, "postcopy-ram", max_bandwidth=4 << 20, max_postcopy_bandwidth=1 << 20)
                await target.qmp.command("migrate-incoming", uri=uri)
                await node.qmp.command("migrate", uri=uri)
                await node.qmp.command("migrate-start-postcopy")
                await target.qmp.event("RESUME", 0)
                await target.beat(nonce)
                node.process.popen.kill()
                await node.process.wait()
                await paused(target)
                async with replacing_node(version, "again", tmp_path, more) as again:
                    await paused(again)
                    await recover(again, target, tmp_path / "again.link")
                    await again.qmp.event("MIGRATION", 0, status="completed")
                    await target.qmp.event("MIGRATION", 0, status="completed")
                    await target.beat(nonce, 2)
                    assert await target.sweep() == 0


async def test_the_demonstration_loses_its_link() -> None:
    """A pair of QEMUs with our bridges; what they do not ask for again comes with the background."""
    argv = [sys.executable, "-m", "tests.qemu.demo", "--cut", "2"]
    with trio.fail_after(200):
        done = await trio.run_process(argv, cwd=ROOT, capture_stdout=True, capture_stderr=True, check=False)
    told = " ".join(done.stdout.decode().split())
    assert done.returncode == 0, told + done.stderr.decode()
    assert "The guest kept its network and every byte of its memory." in told
    assert "answered" in told.partition("both went on after")[2]
    assert "QEMU does not ask again for what a back-end waits for" in told


@pytest.mark.parametrize("count", ["-1", "21", "x"])
async def test_cuts_that_cannot_be(count: str) -> None:
    argv = [sys.executable, "-m", "tests.qemu.demo", f"--cut={count}"]
    done = await trio.run_process(argv, cwd=ROOT, capture_stderr=True, check=False)
    assert done.returncode == 2
    assert f"'{count}' is not a number from 0 to 20" in done.stderr.decode()
