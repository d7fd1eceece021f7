"""Pairs of QEMU through the proxy: it changes nothing by itself, and what it breaks QEMU recovers."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest
import trio

from tests.qemu import peers, vm
from tests.qemu.versions import EACH
from vhostpc.proxy import Proxy, open_proxy

pytestmark = pytest.mark.qemu

LIMIT = 180


@contextlib.asynccontextmanager
async def pair(version: str, folder: Path) -> AsyncIterator[tuple[vm.Vm, vm.Vm, str]]:
    """A source whose checker beats, a destination, and the nonce of the guest."""
    spec = vm.Spec(peers.qemu(version), vm.Memory(size=128))
    with trio.fail_after(LIMIT):
        async with (
            vm.vm(spec, "src", vm.Bare(), folder) as source,
            vm.vm(spec, "dst", vm.Bare(), folder, incoming=True, oob=True) as destination,
        ):
            yield source, destination, await source.booted()


@contextlib.asynccontextmanager
async def between(
    source: vm.Vm,
    destination: vm.Vm,
    folder: Path,
    faults: Sequence[str] = (),
    capabilities: Sequence[str] = (),
    tcp: bool = False,
) -> AsyncIterator[Proxy]:
    """A proxy that a migration has begun to go through."""
    listen_at, target = f"unix:{folder}/proxy", f"unix:{folder}/incoming"
    if tcp:
        # Of the ports that no connection gets by itself: in a pause, when nobody listens, it must not be taken.
        listen_at, target = "tcp:127.0.0.1:0", "tcp:127.0.0.1:20100,to=20999"
    await vm.prepare(source, destination, target, capabilities)
    if tcp:
        told = (await destination.qmp.command("query-migrate"))["socket-address"][0]
        target = f"tcp:127.0.0.1:{told['port']}"
    async with open_proxy(listen_at, target, faults) as proxy:
        await source.qmp.command("migrate", uri=proxy.uri)
        yield proxy


async def stopped(source: vm.Vm) -> None:
    """In a precopy under TCG, 7.2 may not notice that its guest has written a page, with a fast link most of all."""
    if source.spec.qemu.version == "7.2":
        await source.qmp.command("stop")


async def switch(source: vm.Vm) -> None:
    """To postcopy, with most of the memory still to come."""
    await source.qmp.event("MIGRATION", 0, status="active")
    await source.qmp.command("migrate-start-postcopy")


async def completed(source: vm.Vm, destination: vm.Vm, nonce: str) -> None:
    """Both say so, and the guest and all its memory are at the destination, where it goes on."""
    for side in (source, destination):
        await side.qmp.event("MIGRATION", 0, 120, status="completed")
    if not (await destination.qmp.command("query-status"))["running"]:
        await destination.qmp.command("cont")
    await destination.beat(nonce)
    assert await destination.sweep() == 0


def passed(proxy: Proxy, way: str, connection: int = 1) -> list[str]:
    """Names of elements, without those of the volume."""
    return [
        event.name
        for event in proxy.events
        if event.way == way
        and event.connection == connection
        and event.offset >= 0
        and event.name not in ("round", "request", "section", "discard")
    ]


@pytest.mark.parametrize("version", EACH)
async def test_precopy(version: str, tmp_path: Path) -> None:
    async with pair(version, tmp_path) as (source, destination, nonce):
        await stopped(source)
        async with between(source, destination, tmp_path) as proxy:
            await completed(source, destination, nonce)
            end = await proxy.wait("end", connection=1)
            info = await source.qmp.command("query-migrate")
    assert end.details["how"] == "closed"
    assert end.details["back"] == 0
    newer = ["switchover"] if version != "7.2" else []
    head = ["head", "configuration", "start", "blocks"]
    assert passed(proxy, "forward") == [*head, *newer, "eof", "description"]
    rounds = [event.details for event in proxy.events if event.name == "round"]
    assert [row["last"] for row in rounds] == [False] * (len(rounds) - 1) + [True]
    assert sum(row["pages"].get("data", 0) for row in rounds) == info["ram"]["normal"]
    assert sum(row["pages"].get("zero", 0) for row in rounds) == info["ram"]["duplicate"]
    sections = [event.details["section"] for event in proxy.events if event.name == "section"]
    assert {"timer", "cpu", "globalstate"} <= set(sections)


@pytest.mark.parametrize("version", EACH)
async def test_postcopy(version: str, tmp_path: Path) -> None:
    async with pair(version, tmp_path) as (source, destination, nonce):
        await source.qmp.command("migrate-set-parameters", max_bandwidth=4 << 20)
        async with between(source, destination, tmp_path, capabilities=["postcopy-ram"]) as proxy:
            await switch(source)
            await completed(source, destination, nonce)
            await proxy.wait("end", connection=1, how="closed")
            info = await source.qmp.command("query-migrate")
    newer = ["switchover"] if version != "7.2" else []
    assert passed(proxy, "forward") == [
        *("head", "configuration", "open-return-path", "ping", "advise", "start", "blocks", *newer, "ping"),
        *("package", "listen", "ping", *(["ping"] if version == peers.NEWEST else []), "run", "ping", "eof"),
    ]
    back = passed(proxy, "back")
    assert back[0] == "pong"
    assert back[-1] == "shut"
    assert (
        len([event for event in proxy.events if event.name == "request"]) == info["ram"]["postcopy-requests"]
    )
    assert (await proxy.wait("blocks")).details["total"] == info["ram"]["total"]
    assert not [event for event in proxy.events if event.name == "unreadable"]


@pytest.mark.parametrize("version", EACH)
async def test_preempt(version: str, tmp_path: Path) -> None:
    """Two connections, told apart by the destination by their order."""
    async with pair(version, tmp_path) as (source, destination, nonce):
        await source.qmp.command("migrate-set-parameters", max_bandwidth=4 << 20)
        wanted = ["postcopy-ram", "postcopy-preempt"]
        async with between(source, destination, tmp_path, capabilities=wanted) as proxy:
            await switch(source)
            await completed(source, destination, nonce)
            for number in (1, 2):
                await proxy.wait("end", connection=number)
    kinds = {event.connection: event.details["kind"] for event in proxy.events if event.name == "kind"}
    assert kinds == {1: "main", 2: "preempt"}
    urgent = [event for event in proxy.events if event.name == "round" and event.connection == 2]
    assert urgent[-1].details["pages"]["data"] > 0
    assert not [event for event in proxy.events if event.name == "unreadable"]


@pytest.mark.parametrize("version", EACH)
async def test_multifd(version: str, tmp_path: Path) -> None:
    """Its channels are carried unread; the destination takes each for what it is."""
    async with pair(version, tmp_path) as (source, destination, nonce):
        await stopped(source)
        async with between(source, destination, tmp_path, capabilities=["multifd"]) as proxy:
            await completed(source, destination, nonce)
            for number in (1, 2, 3):
                await proxy.wait("end", connection=number)
    kinds = [event.details["kind"] for event in proxy.events if event.name == "kind"]
    assert sorted(kinds) == ["main", "multifd", "multifd"]
    assert "eof" in passed(proxy, "forward", 1)
    sent = {event.connection: event.details["forward"] for event in proxy.events if event.name == "end"}
    assert min(sent[2], sent[3]) > 1 << 20


async def recovered(source: vm.Vm, destination: vm.Vm, proxy: Proxy, number: int) -> None:
    """Both are paused; reconnect them, through the same proxy."""
    for side in (source, destination):
        at = 0
        for _ in range(number):
            event = await side.qmp.event("MIGRATION", at, status="postcopy-paused")
            at = side.qmp.events.index(event, at) + 1
    # Its main loop may wait for a page that only the recovery brings.
    await destination.qmp.out_of_band("migrate-recover", uri=proxy.target)
    await source.qmp.command("migrate", uri=proxy.uri, resume=True)


@pytest.mark.parametrize("version", EACH)
async def test_a_cut_is_recovered(version: str, tmp_path: Path) -> None:
    newest = version == peers.NEWEST
    slow = 16 << 20 if newest else 0
    async with pair(version, tmp_path) as (source, destination, nonce):
        await source.qmp.command("migrate-set-parameters", max_bandwidth=4 << 20, max_postcopy_bandwidth=slow)
        faults = [] if newest else ["cut@postcopy-page=1000,on=main"]
        async with between(source, destination, tmp_path, faults, ["postcopy-ram"]) as proxy:
            await switch(source)
            if newest:  # before it has heard its last PONG it takes the guest back
                await source.qmp.event("MIGRATION", 0, status="postcopy-active")
                proxy.add("cut@time=0")
            await proxy.wait("end", connection=1, how="cut")
            await recovered(source, destination, proxy, 1)
            await completed(source, destination, nonce)
            await proxy.wait("end", connection=2, how="closed")
    blocks = [*(await proxy.wait("blocks")).details["blocks"]]
    assert passed(proxy, "forward", 2) == ["recv-bitmap"] * len(blocks) + ["resume", "eof"]
    assert passed(proxy, "back", 2) == ["bitmap"] * len(blocks) + ["resume-ack", "shut"]
    answers = [event.details["block"] for event in proxy.events if event.name == "bitmap"]
    assert answers == blocks
    assert not [event for event in proxy.events if event.name == "unreadable"]
    assert proxy.pending == []


async def test_a_cut_on_tcp(tmp_path: Path) -> None:
    """Both ends get a reset; what was delivered before is read."""
    async with pair("10.0", tmp_path) as (source, destination, nonce):
        await source.qmp.command("migrate-set-parameters", max_bandwidth=4 << 20)
        async with between(
            source, destination, tmp_path, ["cut@request"], ["postcopy-ram"], tcp=True
        ) as proxy:
            await switch(source)
            end = await proxy.wait("end", connection=1, how="cut")
            assert "undelivered" not in end.details
            await recovered(source, destination, proxy, 1)
            await completed(source, destination, nonce)
            assert (await source.qmp.command("query-migrate"))["ram"]["postcopy-requests"] > 0


async def test_a_recovery_is_broken_too(tmp_path: Path) -> None:
    """In the middle of a bitmap, before RESUME, behind the ACK: QEMU 10.0 pauses each time, and recovers at last.

    (7.2 stays in recover for ever at the source, and ends with a signal at the destination.)
    """
    faults = [
        "cut@postcopy-page=1000,on=main",
        "cut@bitmap,at=middle,on=recovery-1",
        "cut@resume,at=before,on=recovery-2",
        "cut@resume-ack,on=recovery-3",
    ]
    async with pair("10.0", tmp_path) as (source, destination, nonce):
        await source.qmp.command("migrate-set-parameters", max_bandwidth=4 << 20)
        async with between(source, destination, tmp_path, faults, ["postcopy-ram"]) as proxy:
            await switch(source)
            for number in range(1, 5):
                await proxy.wait("end", connection=number, how="cut")
                await recovered(source, destination, proxy, number)
            await completed(source, destination, nonce)
    assert proxy.pending == []
    done = [event.details["fault"] for event in proxy.events if event.name == "fault"]
    assert len(done) == 4
