"""A machine goes from QEMU to us and on to other QEMUs: the guest goes on, by precopy and by postcopy."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import trio

from tests.hugepages import hugepages
from tests.qemu import peers, vm
from tests.test_qemu_to_held import listening, migrate
from vhostpc.migration.held import HeldMachine
from vhostpc.migration.outgoing import Outgoing
from vhostpc.migration.state import Status

pytestmark = pytest.mark.qemu


async def hold(spec: vm.Spec, tmp_path: Path, how: str) -> tuple[str, HeldMachine]:
    """Boot a guest, take it; its nonce."""
    async with listening(tmp_path / "in") as listener, vm.vm(spec, "src", vm.Bare(), tmp_path) as source:
        nonce = await source.booted()
        await source.beat(nonce)
        await source.qmp.command(
            "migrate-set-parameters", max_bandwidth=1 << 30 if how == "precopy" else 4 << 20
        )
        capabilities = ["postcopy-ram"] if how == "postcopy" else []
        machine = HeldMachine()
        incoming = await migrate(source, listener, tmp_path / "in", capabilities, machine)
        async with incoming.channel, trio.open_nursery() as nursery:
            if how == "postcopy":
                await source.qmp.event("MIGRATION", 0, status="active")
                nursery.start_soon(lambda: source.qmp.command("migrate-start-postcopy"))
            await incoming.receive()
        incoming.close()
        return nonce, machine


async def send(machine: HeldMachine, target: vm.Vm, path: Path, how: str, nonce: str) -> None:
    """The guest runs there, and is the one that it was; every page of it is right."""
    wanted = [{"capability": "events", "state": True}]
    if how == "postcopy":
        wanted.append({"capability": "postcopy-ram", "state": True})
    await target.qmp.command("migrate-set-capabilities", capabilities=wanted)
    await target.qmp.command("migrate-incoming", uri=f"unix:{path}")
    async with await trio.open_unix_socket(str(path)) as stream:
        outgoing = Outgoing(machine, stream)
        async with trio.open_nursery() as nursery:
            if how == "postcopy":

                async def while_it_comes() -> None:
                    """The guest runs and asks for pages while others have not even been sent."""
                    await target.qmp.event("RESUME", 0)
                    await target.beat(nonce)
                    assert outgoing.source
                    numbers = outgoing.source.numbers()
                    assert numbers.requested_pages >= 10
                    assert numbers.dirty_left > 0
                    outgoing.source.set_rate(1 << 32)

                nursery.start_soon(while_it_comes)
                await outgoing.send(postcopy=True, rate=1 << 20)
            else:
                await outgoing.send()
    assert outgoing.status is Status.COMPLETED
    await target.beat(nonce, 2)
    assert await target.sweep() == 0
    assert target.complaints() == []


@pytest.mark.parametrize("pages", ["4k", "2M"])
@pytest.mark.parametrize("version", peers.VERSIONS)
async def test_held_and_sent_to_two(version: str, pages: str, tmp_path: Path) -> None:
    """Taken by precopy, sent by postcopy; and the same machine sent again, by precopy."""
    huge = pages == "2M"
    spec = vm.Spec(peers.qemu(version), vm.Memory(huge=huge, size=256))
    with hugepages(3 * 256 + 16) if huge else contextlib.nullcontext(), trio.fail_after(240):
        nonce, machine = await hold(spec, tmp_path, "precopy")
        with machine:
            for number, how in enumerate(("postcopy", "precopy")):
                async with vm.vm(spec, f"dst{number}", vm.Bare(), tmp_path, incoming=True) as target:
                    await send(machine, target, tmp_path / f"out{number}", how, nonce)


@pytest.mark.parametrize("version", peers.VERSIONS)
async def test_taken_by_postcopy_and_sent_on(version: str, tmp_path: Path) -> None:
    """What came by postcopy has no description of its devices: it goes on all the same."""
    spec = vm.Spec(peers.qemu(version))
    with trio.fail_after(120):
        nonce, machine = await hold(spec, tmp_path, "postcopy")
        with machine:
            assert machine.description == b""
            async with vm.vm(spec, "dst", vm.Bare(), tmp_path, incoming=True) as target:
                await send(machine, target, tmp_path / "out", "precopy", nonce)
