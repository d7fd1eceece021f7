"""A source that is killed in postcopy, and replaced by a process that has nothing but its memory's files."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import trio

from tests.kit.own_machine import End, check, end, migrate, pair
from tests.qemu.proc import child

pytestmark = pytest.mark.ufd
PYTHON = (sys.executable,)
RAM = "pc.ram=64M"


@pytest.fixture
def shm() -> Iterator[Path]:
    """A folder in memory."""
    folder = Path(tempfile.mkdtemp(dir="/dev/shm"))
    yield folder
    shutil.rmtree(folder)


@contextlib.asynccontextmanager
async def moving(folder: Path, shm: Path, *also: str) -> AsyncIterator[tuple[End, End]]:
    """A machine with traffic, in the middle of its postcopy; the source keeps its memory in ``shm``.

    ``also``: capabilities of both.
    """
    more = ("--ram-dir", str(shm), "--vcpu-checks", "2000")
    async with pair(folder, ram=[RAM], source=more, destination=("--vcpu-checks", "500")) as (source, there):
        await source.until_works(50, 50)
        for side in (source, there):
            await side.set("postcopy-ram", *also)
        await source.set(max_postcopy_bandwidth=256 << 10)
        await migrate(source, there, folder)
        await source.qmp.command("migrate-start-postcopy")
        await there.until_status("postcopy-active")
        await there.until_works(1, 1)
        yield source, there


async def kill(side: End) -> None:
    os.kill(side.process.pid, signal.SIGKILL)
    await side.process.wait()


async def test_killed_again_and_again(tmp_path: Path, shm: Path) -> None:
    """Five times in one migration, with traffic; every page and every frame is accounted for."""
    with trio.fail_after(120):
        async with moving(tmp_path, shm) as (source, there):
            await kill(source)
            for number in range(5):
                await there.until_status("postcopy-paused")
                async with end(f"again{number}", tmp_path, "--ram-dir", str(shm)) as again:
                    assert (await again.migration())["status"] == "postcopy-paused"
                    refused = await again.qmp.reply("cont")
                    assert "may be running at the destination" in refused["error"]["desc"]
                    uri = f"unix:{tmp_path}/again{number}.link"
                    await there.qmp.command("migrate-recover", uri=uri)
                    if number < 4:
                        await again.set(max_postcopy_bandwidth=256 << 10)
                    await again.qmp.command("migrate", uri=uri, resume=True)
                    if number < 4:
                        await there.until_status("postcopy-active")
                        await there.until_works(5, 5)
                        await kill(again)
                    else:
                        await again.until_status("completed")
                        await there.until_status("completed")
                        await again.qmp.command("quit")
                        assert await again.process.wait() == 0
            check(await there.until_works())
            await there.qmp.command("stop")
            assert (await there.qmp.command("x-vhostpc-verify"))["bad"] == 0
    assert [path.name for path in shm.iterdir()] == [".lock"]  # all else is removed at a good end


async def test_killed_with_two_connections(tmp_path: Path, shm: Path) -> None:
    """postcopy-preempt: the process that replaces it makes the second one, too, for which the destination waits."""
    with trio.fail_after(120):
        async with moving(tmp_path, shm, "postcopy-preempt") as (source, there):
            await kill(source)
            for number in range(2):
                await there.until_status("postcopy-paused")
                async with end(f"again{number}", tmp_path, "--ram-dir", str(shm)) as again:
                    on = await again.qmp.command("query-migrate-capabilities")
                    assert {"capability": "postcopy-preempt", "state": True} in on
                    uri = f"unix:{tmp_path}/again{number}.link"
                    await there.qmp.command("migrate-recover", uri=uri)
                    await again.set(max_postcopy_bandwidth=256 << 10)
                    await again.qmp.command("migrate", uri=uri, resume=True)
                    await there.until_status("postcopy-active")
                    await there.until_works(5, 5)
                    if number == 0:
                        await kill(again)
                        continue
                    await again.set(max_postcopy_bandwidth=0)
                    for side in (again, there):
                        await side.until_status("completed")
            check(await there.until_works())
            await there.qmp.command("stop")
            assert (await there.qmp.command("x-vhostpc-verify"))["bad"] == 0


async def test_the_wrong_memory(tmp_path: Path, shm: Path) -> None:
    """Refused with a sentence, and nothing is changed by it."""

    async def refused(*arguments: str) -> str:
        argv = ["-m", "vhostpc", "endpoint", "--qmp", f"unix:{tmp_path}/q", *arguments]
        async with child("wrong", [*PYTHON, *argv]) as process:
            assert await process.wait() == 1
            return "\n".join(process.err.lines)

    with trio.fail_after(120):
        async with moving(tmp_path, shm) as (source, there):
            at = ("--ram-dir", str(shm))
            assert "of another process that runs" in await refused(*at)
            await kill(source)
            await there.until_status("postcopy-paused")
            assert "its RAM is not as in --ram" in await refused(*at, "--ram", "pc.ram=32M")
            assert "guest memory needs tmpfs or hugetlbfs" in await refused(
                "--ram", RAM, "--ram-dir", "/proc/self"
            )
            note = json.loads((shm / "migration.json").read_text())
            (shm / "migration.json").write_text("{}")
            assert "it is not of this version" in await refused(*at)
            (shm / "migration.json").unlink()
            assert "was not moving when its process ended" in await refused(*at, "--ram", RAM)
            # Another machine's blocks: the destination does not know them.
            other = {**note, "blocks": [{**note["blocks"][0], "name": "elsewhere"}]}
            (shm / "migration.json").write_text(json.dumps(other))
            (shm / "ram-pc.ram").rename(shm / "ram-elsewhere")
            async with end("other", tmp_path, *at) as wrong:
                uri = f"unix:{tmp_path}/other.link"
                await there.qmp.command("migrate-recover", uri=uri)
                await wrong.qmp.command("migrate", uri=uri, resume=True)
                await wrong.until_status("postcopy-paused")
                await there.until_status("postcopy-paused")
                await kill(wrong)
            (shm / "migration.json").write_text(json.dumps(note))
            (shm / "ram-elsewhere").rename(shm / "ram-pc.ram")
            async with end("right", tmp_path, *at) as right:
                uri = f"unix:{tmp_path}/right.link"
                await there.qmp.command("migrate-recover", uri=uri)
                await right.qmp.command("migrate", uri=uri, resume=True)
                await there.until_status("completed")
                await right.until_status("completed")


async def test_a_failure_leaves_no_note(tmp_path: Path, shm: Path) -> None:
    """The machine runs on: its memory is nobody's to take."""
    with trio.fail_after(60):
        async with end("source", tmp_path, "--ram", RAM, "--ram-dir", str(shm)) as source:
            await source.set("postcopy-ram")
            await source.qmp.command("migrate", uri=f"unix:{tmp_path}/nobody")
            await source.until_status("failed")
            assert not (shm / "migration.json").exists()
            assert (shm / "ram-pc.ram").stat().st_size == 64 << 20
            await source.qmp.command("quit")
            assert await source.process.wait() == 0
        assert [path.name for path in shm.iterdir()] == [".lock"]


async def test_a_start_that_fails_leaves_no_files(tmp_path: Path, shm: Path) -> None:
    """The corrected command finds the folder as it was."""
    argv = ["-m", "vhostpc", "endpoint", "--qmp", f"unix:{tmp_path}/q", "--ram-dir", str(shm)]
    argv += ["--ram", "a=1M", "--ram", "b=4M,page=2M"]
    with trio.fail_after(60):
        async with child("wrong", [*PYTHON, *argv]) as process:
            assert await process.wait() == 1
    assert [path.name for path in shm.iterdir()] == [".lock"]


async def test_others_are_killed_in_the_pause(tmp_path: Path, shm: Path) -> None:
    """A back-end of the destination, and a client of its monitor: neither has a part in the recovery of the rest."""
    with trio.fail_after(120):
        async with moving(tmp_path, shm) as (source, there):
            await source.qmp.command("migrate-pause")
            for side in (source, there):
                await side.until_status("postcopy-paused")
            client = await trio.open_unix_socket(tmp_path / "destination.qmp")
            await client.receive_some(1)
            await client.aclose()
            os.kill(there.bridges[0].pid, signal.SIGKILL)
            await there.bridges[0].wait()
            uri = f"unix:{tmp_path}/again"
            await there.qmp.command("migrate-recover", uri=uri)
            await source.set(max_postcopy_bandwidth=0)
            await source.qmp.command("migrate", uri=uri, resume=True)
            for side in (source, there):
                await side.until_status("completed")
            report = await there.until_works(without=["net0"])
            assert [vcpu["bad"] for vcpu in report["vcpus"]] == [0]
