"""A machine of our own moves between two endpoints with live traffic: memory and frames whole, nothing left behind."""

from __future__ import annotations

import os
import re
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.kit.hugepages import GIB, hugepages, none_free
from tests.kit.own_machine import STEP, WAIT, End, bridge, check, end, far_side, migrate, pair
from tests.kit.until import until
from tests.qemu.qmp import QmpError
from vhostpc.cli.common import Failure
from vhostpc.cli.endpoint_command import endpoint
from vhostpc.pages.ramblock import RamSet
from vhostpc.pages.service import FaultService

MIB = 1 << 20
#: What a report says of the pages that were sent: programs read these keys, whatever our own names are.
SENT = (
    *(
        "bytes",
        "urgent-bytes",
        "data-pages",
        "zero-pages",
        "requests",
        "requested-pages",
        "background-pages",
        "useless",
    ),
    *("held", "held-ever", "dirty-left", "eos-sent", "pongs", "shut", "heard"),
)
LEFT = {"vpc-fault", "vpc-load", "vpc-source", "vpc-urgent", "vpc-dirty"}
"""Threads that a move leaves behind if it leaks."""
SLOW = {"max_bandwidth": 8 * MIB, "max_postcopy_bandwidth": 24 * MIB}


async def arrived(source: End, destination: End, *, left: Sequence[str] = ()) -> dict[str, Any]:
    """The move is over, the machine works there, nothing of the move is left; its report.

    ``left``: names of devices whose back-end did not live through it.
    """
    sent = await source.until_status("completed", not_these=("failed", "cancelled"))
    await destination.until_status("completed", not_these=("failed",))
    assert await source.state() == "postmigrate"
    assert await destination.state() == "running"
    there = await source.report()
    here = await destination.until_works(without=left)
    check(there)
    check(here, without=left)
    assert not there["running"]
    assert tuple(there["sent"]) == SENT
    assert here["running"]
    assert here["came"]["already"] == 0
    for a, b in zip(there["vcpus"], here["vcpus"], strict=True):
        assert b["step"] > a["step"]
    for device in here["devices"]:
        assert device["faults"]["waiting-now"] == device["faults"]["found-nothing"] == 0
    for one in (source, destination):
        assert one.held()["ufds"] == 0
        await until(
            lambda one=one: not one.held()["threads"] & LEFT  # type: ignore[misc]
        )
    assert (await source.report()) == there  # a stopped machine does nothing
    assert sent["status"] == "completed"
    return here


async def moved(
    folder: Path,
    *,
    when: str,
    fast: bool = False,
    waits: bool = False,
    also: Sequence[str] = (),
    **machine: Any,
) -> tuple[dict[str, Any], dict[str, Any], int]:
    """Move one; the destination's report, the source's last look, and how many host pages postcopy had to bring.

    ``waits``: each back-end waits for a page. ``also``: capabilities besides postcopy-ram.
    """
    async with pair(folder, **machine) as (source, destination):
        await source.until_works()
        postcopy = when != "never"
        if postcopy:
            await source.set("postcopy-ram", *also, **({} if fast else SLOW))
            await destination.set("postcopy-ram", *also)
        await migrate(source, destination, folder)
        if when == "in the middle":
            with trio.fail_after(WAIT):
                while (await source.migration()).get("ram", {}).get("transferred", 0) < 4 * MIB:
                    await trio.sleep(STEP)
        if when == "at the end":
            await source.set(max_bandwidth=0)
            await source.until_status("completed")
        if postcopy:
            if waits:
                await source.set(max_postcopy_bandwidth=1)
            await source.qmp.command("migrate-start-postcopy")
        if waits:  # on a busy machine the background could bring all that a back-end needs before it begins
            with trio.fail_after(WAIT):
                while not all(d["faults"]["faults"] for d in (await destination.report())["devices"]):
                    await trio.sleep(STEP)
            await source.set(**SLOW)
        here = await arrived(source, destination)
        to_come = 0
        if when in ("at once", "in the middle"):
            to_come = int((await destination.process.err.find(r"(\d+) host pages missing"))[1])
        return here, await source.migration(), to_come


@pytest.mark.parametrize("vcpus", [1, 4])
async def test_precopy(vcpus: int, tmp_path: Path) -> None:
    await moved(tmp_path, when="never", vcpus=vcpus)


@pytest.mark.parametrize("also", [[], ["postcopy-preempt", "postcopy-blocktime"]], ids=["one", "two"])
@pytest.mark.parametrize("page", ["4K", "2M"])
@pytest.mark.parametrize("when", ["at once", "in the middle", "at the end"])
async def test_postcopy(when: str, page: str, also: list[str], tmp_path: Path) -> None:
    """Two back-ends and two vCPUs fault on the same pages. With preempt, too, the end comes: QEMU's never does."""
    with hugepages(128 if page == "2M" else 0):
        here, sent, to_come = await moved(
            tmp_path,
            when=when,
            ram=[f"pc.ram=64M,page={page}"],
            vcpus=2,
            devices=2,
            also=also,
            waits=page == "4K" and when != "at the end",
        )  # of huge pages a device has two, and the load of its state needs one
    if when == "at the end":
        assert sent["ram"]["postcopy-requests"] == 0
        return
    assert here["came"]["placed"] == to_come  # each page once
    assert 0 < sent["ram"]["postcopy-requests"] <= to_come
    assert sum(vcpu["faults"]["count"] for vcpu in here["vcpus"])
    if page == "4K":
        assert all(device["faults"]["faults"] for device in here["devices"])


@pytest.mark.parametrize("way", ["wp-async", "wp-sync"])
async def test_blocks_of_all_kinds_and_either_tracking(way: str, tmp_path: Path) -> None:
    ram = ["low=16M", "huge=32M,page=2M", "high=8M"]
    with hugepages(64):
        here, _, _ = await moved(
            tmp_path, when="in the middle", ram=ram, vcpus=3, both=["--dirty-tracking", way]
        )
    assert [block["name"] for block in here["blocks"]] == ["low", "huge", "high"]


@pytest.mark.parametrize("when", ["at once", "in the middle"])
async def test_a_page_of_one_gibibyte(when: str, tmp_path: Path) -> None:
    """Beside small ones: vCPUs wait until all of it has come, and go on."""
    ram = ["low=16M", "huge=1G,page=1G", "high=8M"]
    with hugepages(2 * GIB >> 20, GIB):
        here, _, to_come = await moved(tmp_path, when=when, ram=ram, vcpus=3)
    assert here["came"]["placed"] == to_come  # each page once
    assert [block["page-size"] for block in here["blocks"]] == [4096, GIB, 4096]


async def test_a_load_that_needs_a_page_gets_it(tmp_path: Path) -> None:
    """Nothing but what is asked for comes: so pages that came before the machine ran were requested by the load."""
    async with pair(tmp_path, devices=2) as (source, destination):
        await source.until_works()
        await source.set("postcopy-ram", max_bandwidth=8 * MIB, max_postcopy_bandwidth=1)
        await destination.set("postcopy-ram")
        await migrate(source, destination, tmp_path)
        await source.qmp.command("migrate-start-postcopy")
        to_come = int((await destination.process.err.find(r"(\d+) host pages missing"))[1])
        missing = int((await destination.process.err.find(r"may run here, (\d+) host pages"))[1])
        assert to_come - missing >= 4  # both rings of both devices
        await destination.until_works(frames=50, checks=50)
        await source.set(max_postcopy_bandwidth=0)
        await arrived(source, destination)


async def test_precopy_that_does_not_converge(tmp_path: Path) -> None:
    """Dirtied faster than the link is: it goes on until postcopy is asked for."""
    writes = ["--vcpu-writes", "100000"]
    async with pair(tmp_path, vcpus=2, source=writes) as (source, destination):
        await source.until_works()
        await source.set("postcopy-ram", max_bandwidth=32 * MIB, downtime_limit=1)
        await destination.set("postcopy-ram")
        await migrate(source, destination, tmp_path)
        with trio.fail_after(WAIT):
            while (await source.migration()).get("ram", {}).get("dirty-sync-count", 0) < 4:
                await trio.sleep(STEP)
        found = await source.migration()
        assert found["status"] == "active"
        assert found["ram"]["dirty-pages-rate"] > 0
        await source.qmp.command("migrate-start-postcopy")
        await arrived(source, destination)


async def test_by_itself(tmp_path: Path) -> None:
    more = ["--vcpu-writes", "100000", "--postcopy-after-passes", "2"]
    async with pair(tmp_path, source=more) as (source, destination):
        await source.set("postcopy-ram", max_bandwidth=64 * MIB, downtime_limit=1)
        await destination.set("postcopy-ram")
        await migrate(source, destination, tmp_path)
        await arrived(source, destination)


async def test_cancelled_it_runs_on_and_can_go_later(tmp_path: Path) -> None:
    async with pair(tmp_path) as (source, destination):
        before = source.held()
        await source.until_works()
        await source.set("events", max_bandwidth=4 * MIB)
        uri = f"unix:{tmp_path / 'migration'}"
        await destination.qmp.command("migrate-incoming", uri=uri, exit_on_error=False)
        await source.qmp.command("migrate", uri=uri)
        await source.until_status("active")
        await source.until_works()
        await source.qmp.command("migrate_cancel")
        await source.until_status("cancelled")
        check(await source.until_works())
        assert await source.state() == "running"
        held = source.held()
        assert (held["fds"], held["ufds"], held["maps"]) == (before["fds"], 0, before["maps"])
        await destination.until_status("failed")
        await destination.qmp.command("quit")
        assert await destination.process.wait() == 0
        machine = ["--ram", "pc.ram=64M", "--backend", str(tmp_path / "destination-bridge0")]
        async with end("another", tmp_path, *machine, "--incoming", "defer") as another:
            await source.set(max_bandwidth=0)
            await migrate(source, another, tmp_path)
            await arrived(source, another)


@pytest.mark.parametrize("capability", ["return-path", "postcopy-ram"])
@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"ram": ["other=64M"]}, "RAM block 'pc.ram' arrives, but there is none of that name here"),
        ({"ram": ["pc.ram=64M", "more=4M"]}, "RAM block 'more' of this machine does not come"),
        (
            {"ram": ["pc.ram=32M"]},
            "Size mismatch: pc.ram: 0x4000000 != 0x2000000 (64 MiB at the source, 32 MiB here)",
        ),
        ({"vcpus": 2}, "the incoming machine has 1 vCPUs, this one has 2"),
        ({"devices": 2}, "the incoming machine has 1 network devices, this one has 2"),
        ({"devices": 0}, "the incoming machine has 1 network devices, this one has 0"),
    ],
)
async def test_machines_that_do_not_match(
    more: dict[str, Any], why: str, capability: str, tmp_path: Path
) -> None:
    """Refused with one sentence before it runs there; the source runs on."""
    async with pair(tmp_path, other=more) as (source, destination):
        await source.set(capability)
        await destination.set(capability)
        uri = f"unix:{tmp_path / 'migration'}"
        await destination.qmp.command("migrate-incoming", uri=uri, exit_on_error=False)
        await source.qmp.command("migrate", uri=uri)
        if capability == "postcopy-ram":
            await source.qmp.command("migrate-start-postcopy")
        found = await destination.until_status("failed", not_these=("completed",))
        assert found["error-desc"] == why
        await source.until_status("failed", not_these=("completed", "postcopy-paused"))
        check(await source.until_works())
        assert not (await destination.report())["running"]
        assert await destination.state() == "inmigrate"


async def test_page_sizes_that_do_not_match(tmp_path: Path) -> None:
    with hugepages(64):
        async with pair(tmp_path, other={"ram": ["pc.ram=64M,page=2M"]}) as (source, destination):
            await source.set("postcopy-ram")
            await destination.set("postcopy-ram")
            uri = f"unix:{tmp_path / 'migration'}"
            await destination.qmp.command("migrate-incoming", uri=uri, exit_on_error=False)
            await source.qmp.command("migrate", uri=uri)
            found = await destination.until_status("failed")
            assert found["error-desc"] == "RAM block 'pc.ram' has pages of 4 KiB at the source, not of 2 MiB"
            await source.until_status("failed")
            check(await source.until_works())


@pytest.mark.parametrize("how", ["killed", "stalled"])
async def test_a_back_end_that_is_gone_in_mid_postcopy(how: str, tmp_path: Path) -> None:
    """Machine and other back-end go on, the one that is gone is named, and makes no page."""
    async with pair(tmp_path, devices=2, vcpus=2, both=["--backend-timeout", "2"]) as (source, destination):
        await source.until_works()
        await source.set("postcopy-ram", max_bandwidth=8 * MIB, max_postcopy_bandwidth=16 * MIB)
        await destination.set("postcopy-ram")
        await migrate(source, destination, tmp_path)
        await source.qmp.command("migrate-start-postcopy")
        await destination.until_status("postcopy-active")
        await destination.process.err.find("may run here")
        gone, other = destination.bridges
        os.kill(gone.pid, signal.SIGKILL if how == "killed" else signal.SIGSTOP)
        try:
            here = await arrived(source, destination, left=["net0"])
        finally:
            os.kill(gone.pid, signal.SIGKILL)
        assert len(here["problems"]) == 1
        assert here["problems"][0].startswith(f"back-end net0 ({tmp_path / 'destination-bridge0'}): ")
        assert ("closed the connection" if how == "killed" else "no reply within 2 s") in here["problems"][0]
        await destination.process.err.find("back-end net0 .*: the machine goes on without it")
        for fd in Path(f"/proc/{other.pid}/fd").iterdir():  # END has reached it
            assert "userfaultfd" not in os.readlink(fd)


async def test_a_back_end_that_is_gone_at_the_source(tmp_path: Path) -> None:
    """The machine goes on, and moves to where there is a back-end."""
    async with pair(tmp_path, devices=2) as (source, destination):
        await source.until_works()
        source.bridges[1].popen.kill()
        with trio.fail_after(WAIT):
            while not (await source.report())["problems"]:
                await trio.sleep(STEP)
        await source.until_works(without=["net1"])
        await migrate(source, destination, tmp_path)
        await destination.until_status("completed", not_these=("failed",))
        here = await destination.until_works()
        assert all(vcpu["bad"] == 0 for vcpu in here["vcpus"])
        assert here["devices"][1]["damaged"] == here["devices"][1]["doubled"] == 0


async def test_a_source_that_is_gone_in_mid_postcopy(tmp_path: Path) -> None:
    """A pause; threads that wait for a page wait, and the program still ends when it is told to."""
    async with pair(tmp_path, vcpus=2) as (source, destination):
        await source.until_works()
        await source.set("postcopy-ram", max_postcopy_bandwidth=1)
        await destination.set("postcopy-ram")
        await migrate(source, destination, tmp_path)
        await source.qmp.command("migrate-start-postcopy")
        await destination.process.err.find("may run here")
        source.process.popen.kill()
        await destination.until_status("postcopy-paused")
        # Its rings have come first. What waits may be a vCPU, a driver or the back-end.
        with trio.fail_after(WAIT):
            while not (await destination.report())["asked"]["waiting-now"]:
                await trio.sleep(STEP)
        await destination.qmp.command("quit")
        assert await destination.process.wait() == 0


async def test_stopped_it_stays_stopped(tmp_path: Path) -> None:
    async with pair(tmp_path, vcpus=2) as (source, destination):
        await source.until_works()
        await source.qmp.command("stop")
        first = await source.report()
        await trio.sleep(0.2)  # long enough for anything that runs to show
        assert await source.report() == first
        await source.qmp.command("cont")
        check(await source.until_works())
        await source.qmp.command("stop")
        await migrate(source, destination, tmp_path)
        await destination.until_status("completed")
        assert await destination.state() == "paused"
        assert not (await destination.report())["running"]
        await destination.qmp.command("cont")
        check(await destination.until_works())


async def test_held_between_two(tmp_path: Path) -> None:
    """A machine of ours is held as one of QEMU's is, and sent on."""
    async with (
        pair(tmp_path) as (source, destination),
        end("held", tmp_path, "--incoming", "defer") as held,
    ):
        await source.until_works()
        await source.set("events")
        await migrate(source, held, tmp_path)
        await held.until_status("completed")
        await migrate(held, destination, tmp_path)
        await destination.until_status("completed")
        assert await destination.state() == "running"
        check(await destination.until_works())


@pytest.mark.parametrize(
    ("hidden", "why"),
    [
        (
            "LOG_SHMFD",
            "Migration disabled: vhost-user backend lacks VHOST_USER_PROTOCOL_F_LOG_SHMFD feature.",
        ),
        ("PAGEFAULT", "Postcopy is not supported: vhost-user backend not capable of postcopy (net0)"),
    ],
)
async def test_features_that_a_back_end_lacks(hidden: str, why: str, tmp_path: Path) -> None:
    machine = ["--ram", "pc.ram=16M", "--backend", str(tmp_path / "bridge")]
    more = ["--incoming", "defer"] if hidden == "PAGEFAULT" else []
    async with (
        far_side() as far,
        bridge(tmp_path / "bridge", far, hide=hidden),
        end("one", tmp_path, *machine, *more) as one,
    ):
        if hidden == "PAGEFAULT":
            with pytest.raises(QmpError) as refused:
                await one.set("postcopy-ram")
        else:
            assert (await one.migration())["blocked-reasons"] == [why]
            with pytest.raises(QmpError) as refused:
                await one.qmp.command("migrate", uri="tcp:127.0.0.1:1")
            await one.until_works()
        assert str(refused.value).endswith(why)


async def test_a_back_end_that_stalls_while_the_machine_stops(tmp_path: Path) -> None:
    """Waited for as long as was said, then left."""
    async with pair(tmp_path, devices=2, source=["--backend-timeout", "1"]) as (source, _):
        await source.until_works()
        os.kill(source.bridges[0].pid, signal.SIGSTOP)
        try:
            await source.qmp.command("stop")
            found = await source.report()
            assert not found["running"]
            assert len(found["problems"]) == 1
            assert "net0" in found["problems"][0]
            assert "GET_VRING_BASE: no answer within 1 s" in found["problems"][0]
            await source.qmp.command("cont")
            check(await source.until_works(without=["net0"]), without=["net0"])
        finally:
            os.kill(source.bridges[0].pid, signal.SIGCONT)


async def test_stop_in_postcopy_waits_for_pages_and_not_for_time(tmp_path: Path) -> None:
    """A back-end that waits for a page has all the time that the page takes."""
    async with pair(tmp_path, vcpus=2, destination=["--backend-timeout", "0.2"]) as (source, destination):
        await source.until_works()
        await source.set("postcopy-ram", max_postcopy_bandwidth=1)
        await destination.set("postcopy-ram")
        await migrate(source, destination, tmp_path)
        await source.qmp.command("migrate-start-postcopy")
        await destination.process.err.find("may run here")
        await destination.qmp.command("stop")
        assert (await destination.report())["problems"] == []
        assert await destination.state() == "paused"
        await source.set(max_postcopy_bandwidth=0)
        await source.until_status("completed")
        await destination.until_status("completed")
        await destination.qmp.command("cont")
        check(await destination.until_works())


async def test_no_huge_page_is_free(tmp_path: Path) -> None:
    """Small ones do not take their place, in a machine of its own nor in one that is held."""
    mend = "; reserve 32 in /sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages"
    huge = ["--ram", "mem=64M,page=2M"]
    with none_free():
        argv = [sys.executable, "-m", "vhostpc", "endpoint", "--qmp", f"unix:{tmp_path / 'qmp'}", *huge]
        done = await trio.run_process(argv, capture_stderr=True, check=False)
        assert done.returncode == 1
        assert done.stderr.decode().endswith(f"{mend}\n")
        async with (
            end("source", tmp_path, "--ram", "mem=64M") as source,
            end("held", tmp_path, *huge, "--incoming", "defer") as held,
        ):
            uri = f"unix:{tmp_path / 'migration'}"
            await held.qmp.command("migrate-incoming", uri=uri, exit_on_error=False)
            await source.set("return-path")
            await source.qmp.command("migrate", uri=uri)
            found = await held.until_status("failed", not_these=("completed",))
            assert found["error-desc"].endswith(mend)
            await source.until_status("failed")
            check(await source.until_works())


async def test_a_file_takes_no_postcopy(tmp_path: Path) -> None:
    """Refused at once where only postcopy needs the way back; with return-path it fails. The machine runs on."""
    async with end("one", tmp_path, "--ram", "mem=16M") as one:
        uri = f"file:{tmp_path / 'stream'}"
        await one.set("postcopy-ram")
        with pytest.raises(
            QmpError, match="Postcopy requires a migration channel that goes both ways, a file"
        ):
            await one.qmp.command("migrate", uri=uri)
        assert "status" not in await one.migration()
        assert not (tmp_path / "stream").exists()
        off = [{"capability": "postcopy-ram", "state": False}, {"capability": "return-path", "state": True}]
        await one.qmp.command("migrate-set-capabilities", capabilities=off)
        await one.qmp.command("migrate", uri=uri)
        found = await one.until_status("failed", not_these=("completed",))
        assert "goes both ways" in found["error-desc"]
        assert await one.state() == "running"
        check(await one.until_works())


@pytest.mark.long
@pytest.mark.parametrize("ram", [["pc.ram=1G"], ["low=1G", "high=3G"]], ids=["1G", "4G"])
@pytest.mark.parametrize("when", ["never", "at once", "in the middle"])
async def test_large(when: str, ram: list[str], tmp_path: Path) -> None:
    here, _, to_come = await moved(tmp_path, when=when, ram=ram, vcpus=4, devices=2, fast=True)
    if to_come:
        assert here["came"]["placed"] == to_come


@pytest.mark.parametrize(
    ("arguments", "code", "why"),
    [
        (["--vcpus", "1"], 2, "give --ram for a machine of its own, or --incoming alone"),
        (["--ram", "a=64M", "--vcpus", "0"], 2, "--vcpus"),
        (["--ram", "a=64M", "--dirty-tracking", "magic"], 2, "wp-async"),
        (["--ram", "a=64M,page=1G"], 2, "not a whole number of pages"),
        (["--ram", "a=8388608T"], 2, "'8388608T' is more than the largest file size"),
        (["--ram", "a=16777216T"], 2, "'16777216T' is more than the largest file size"),
        (["--ram", "a=64M", "--vcpu-writes", "18446744073709551616"], 2, "vcpu-writes"),
        (["--ram", "a=64M", "--backend-timeout", "nan"], 2, "'nan' is not a number"),
        (["--ram", "a=64M", "--postcopy-after-seconds", "nan"], 2, "'nan' is not a number"),
        (["--ram", "a=1024G,page=2M"], 1, "RAM block 'a', .* cannot be created: .*; reserve 524288 in"),
        (["--ram", "a=1M", "--backend", "x"], 1, "need 4 MiB of the first RAM block, 'a', which has 1"),
        (
            ["--ram", "a=64M", "--backend", "/nowhere/x", "--backend-timeout", "0.2"],
            1,
            "no back-end listens on /nowhere/x",
        ),
    ],
)
async def test_mistakes_get_one_sentence(arguments: list[str], code: int, why: str, tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "vhostpc", "endpoint", "--qmp", f"unix:{tmp_path / 'qmp'}", *arguments]
    done = await trio.run_process(argv, capture_stderr=True, check=False)
    text = done.stderr.decode()
    assert done.returncode == code, text
    assert re.search(why, text), text
    assert "Traceback" not in text
    if code == 1:
        assert text.count("\n") == 1, text


def test_how_long_it_looks_on_reaches_both_loops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``--spin-us`` is the fault service's, from which the load has it."""
    seen: list[int] = []
    made = FaultService.__init__

    def recorded(self: FaultService, ram: RamSet, **options: int) -> None:
        made(self, ram, **options)
        seen.append(self.spin_ns)

    monkeypatch.setattr(FaultService, "__init__", recorded)
    here, there = socket.socketpair()
    there.close()  # the stream ends at once
    here.set_inheritable(True)
    arguments = ["--qmp", f"unix:{tmp_path / 'qmp'}", "--ram", "a=64M", "--vcpus", "1", "--spin-us", "70"]
    with pytest.raises(Failure, match="the machine did not arrive"):
        endpoint([*arguments, "--incoming", f"fd:{here.detach()}"], standalone_mode=False)
    assert seen == [70_000]
