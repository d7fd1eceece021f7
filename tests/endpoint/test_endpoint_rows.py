"""What ends a device, or a migration, where QEMU is in front of its back-ends: with our endpoint in its place.

docs/compatibility.md lists those bugs of QEMU. Each end is a process, and each back-end. The background of the pages is
held back, so that a page comes when it is asked for.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.endpoint.test_endpoint_machine import arrived
from tests.kit.own_machine import STEP, WAIT, End, bridge, check, far_side, migrate, pair

pytestmark = pytest.mark.ufd
AGAIN = ("--backend-reconnect", "0.05")


async def until_report(it: End, wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    with trio.fail_after(WAIT):
        while not wanted(report := await it.report()):
            await trio.sleep(STEP)
    return report


async def switch(source: End, destination: End, folder: Path, *capabilities: str) -> None:
    """The machine runs at the destination, and nothing comes unasked."""
    await source.set("postcopy-ram", *capabilities, max_bandwidth=8 << 20, max_postcopy_bandwidth=1)
    await destination.set("postcopy-ram", *capabilities)
    await migrate(source, destination, folder)
    await source.qmp.command("migrate-start-postcopy")
    await destination.until_status("postcopy-active")
    await destination.process.err.find("may run here")


async def a_back_end_waits(source: End, destination: End) -> None:
    """The source stands still, and answers no request of a back-end. Where others wait alone, it goes on."""
    with trio.fail_after(WAIT):
        while True:
            os.kill(source.process.pid, signal.SIGSTOP)
            report = await until_report(destination, lambda r: waiting(r) > 0)
            if net(report)["faults"]["waiting-now"] > 0:
                return
            os.kill(source.process.pid, signal.SIGCONT)


def waiting(report: dict[str, Any]) -> int:
    """Threads that wait for a page: of vCPUs, drivers and back-ends."""
    faults = [part["faults"] for part in (*report["vcpus"], *report["devices"])]
    return sum(f["waiting-now"] for f in (*faults, report["blocked"]["drivers"]))


def missing(report: dict[str, Any]) -> int:
    return sum(b["length"] // b["page-size"] - b["received"] for b in report["blocks"])


def net(report: dict[str, Any], index: int = 0) -> dict[str, Any]:
    found: dict[str, Any] = report["devices"][index]
    return found


@contextlib.asynccontextmanager
async def started_again(path: Path) -> AsyncIterator[Any]:
    """Another bridge at this socket, with a network of its own."""
    path.unlink(missing_ok=True)
    async with far_side() as far, bridge(path, far) as process:
        yield process


def check_again(report: dict[str, Any]) -> None:
    """As :func:`check`; but what a bridge had sent and not yet said so when it was killed, the next one sends again."""
    for device in report["devices"]:
        device["doubled"] = max(0, device["doubled"] - 64)
    check(report, moves=2)


async def test_preempt_ends_although_a_back_end_has_faulted(tmp_path: Path) -> None:
    """QEMU 10.0 keeps such a request on its list for ever, and waits at the end until the list is empty."""
    async with pair(tmp_path) as (source, destination):
        await source.until_works()
        await switch(source, destination, tmp_path, "postcopy-preempt")
        report = await until_report(destination, lambda r: net(r)["faults"]["distinct"] > 0)
        assert missing(report) > 0
        assert missing(await destination.until_works()) > 0
        await source.set(max_postcopy_bandwidth=0)
        here = await arrived(source, destination)
        assert net(here)["faults"]["distinct"] > 0


async def test_requests_of_a_back_end_that_are_pending_when_the_link_is_lost(tmp_path: Path) -> None:
    """They are asked for again over the next link; QEMU drops them, and the thread waits for the background."""
    async with pair(tmp_path) as (source, destination):
        await source.until_works()
        await switch(source, destination, tmp_path)
        try:
            await a_back_end_waits(source, destination)
            await destination.qmp.command("migrate-pause")
            await destination.until_status("postcopy-paused")
        finally:
            os.kill(source.process.pid, signal.SIGCONT)
        await source.until_status("postcopy-paused")
        pending = await destination.report()
        assert net(pending)["faults"]["waiting-now"] > 0
        uri = f"unix:{tmp_path / 'again'}"
        await destination.qmp.command("migrate-recover", uri=uri)
        await source.qmp.command("migrate", uri=uri, resume=True)
        await destination.until_status("postcopy-active")
        # Nothing comes unasked: what it waited for was asked for again.
        now = await destination.until_works()
        assert missing(now) > 0
        assert net(now)["faults"]["distinct"] > net(pending)["faults"]["distinct"]
        await source.set(max_postcopy_bandwidth=0)
        await arrived(source, destination)


@pytest.mark.parametrize("when", ["in mid-postcopy", "before the machine arrives"])
async def test_a_back_end_that_connects_in_mid_postcopy(when: str, tmp_path: Path) -> None:
    """Reconnected, or plugged in: it was never advised. It is told on the spot, and its faults are served."""
    async with pair(tmp_path, vcpus=2, destination=AGAIN) as (source, destination):
        await source.until_works()
        path = tmp_path / "destination-bridge0"
        if when == "before the machine arrives":
            destination.bridges[0].popen.kill()
            await until_report(destination, lambda r: not net(r)["works"])
        await switch(source, destination, tmp_path)
        if when == "in mid-postcopy":
            # Most of its buffers are still absent.
            await until_report(destination, lambda r: net(r)["faults"]["distinct"] > 0)
            destination.bridges[0].popen.kill()
            await until_report(destination, lambda r: not net(r)["works"])
        async with started_again(path) as fresh:
            await fresh.err.find("region registered")
            now = await until_report(destination, lambda r: net(r)["works"] and net(r)["reconnected"] == 1)
            assert missing(now) > 0
            now = await destination.until_works()
            assert missing(now) > 0
            assert net(now)["faults"]["distinct"] > 0
            assert net(now)["faults"]["found-nothing"] == 0
            said = fresh.err.lines
            for words in ("postcopy advised", "postcopy listening", "region registered"):
                assert sum(words in line for line in said) == 1
            await source.set(max_postcopy_bandwidth=0)
            await source.until_status("completed", not_these=("failed",))
            await destination.until_status("completed", not_these=("failed",))
            await fresh.err.find("postcopy ended")
            here = await destination.until_works()
            assert here["came"]["already"] == 0  # no page was made by anybody
            check_again(here)
            assert destination.held()["ufds"] == 0


async def test_a_back_end_that_reconnects_while_no_machine_moves(tmp_path: Path) -> None:
    """Again and again; then the machine moves away with the last of them, whose writes are logged."""
    async with pair(tmp_path, source=AGAIN) as (source, destination):
        await source.until_works()
        path, killed = tmp_path / "source-bridge0", source.bridges[0]
        async with contextlib.AsyncExitStack() as stack:
            for count in range(1, 4):
                killed.popen.kill()
                await until_report(source, lambda r: not net(r)["works"])
                killed = await stack.enter_async_context(started_again(path))
                await until_report(source, lambda r: net(r)["works"] and net(r)["reconnected"] == count)  # noqa: B023
                await source.until_works()
            await migrate(source, destination, tmp_path)
            await source.until_status("completed", not_these=("failed",))
            await destination.until_status("completed", not_these=("failed",))
            here = await destination.until_works()
            for vcpu in here["vcpus"]:
                assert vcpu["bad"] == 0
            assert net(here)["damaged"] == net(here)["lost"] == 0
