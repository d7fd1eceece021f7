"""Block time as a real QEMU's destination tells it, and as it is told here: names, types, when, and in its text."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.kit.fake_endpoint import FakeEndpoint
from tests.kit.qmp_wire import client, ours, qemu
from tests.qemu import peers, vm
from tests.qemu.plays import played
from vhostpc.dialect import DIALECTS, Compat, Dialect
from vhostpc.migration.phase import Event
from vhostpc.pages.blocktime import NOBODY, Blocktime
from vhostpc.qmp import MigrationInfo

pytestmark = pytest.mark.qemu
COUNT = 3
"""vCPUs."""
HERE = MigrationInfo(blocktime=Blocktime((NOBODY,) * COUNT, NOBODY, 0, 0, (0,) * 24))


@dataclass(frozen=True)
class Recorded(MigrationInfo):
    """What a QEMU told."""

    answer: dict[str, Any] = field(default_factory=dict)

    def as_qmp(self, dialect: Dialect) -> dict[str, Any]:
        return self.answer


def shape(told: dict[str, Any]) -> dict[str, Any]:
    """Names and types of what is told of block time, and how long the lists are."""
    return {
        name: [type(one) for one in value] if isinstance(value, list) else type(value)
        for name, value in told.items()
        if name.startswith("postcopy-")
    }


async def texts(wire: Any) -> list[str]:
    """Each in the form that the version has."""
    return [await wire.hmp(line) for line in ("info migrate", "info migrate -a")]


async def own_texts(compat: Compat, answer: dict[str, Any], folder: Path) -> list[str]:
    """The same, of our monitor, given QEMU's numbers."""
    endpoint = FakeEndpoint(compat, incoming=True)
    for event in (
        Event.START,
        Event.CONNECT,
        Event.SWITCH,
        Event.PACKAGE,
        Event.RUN,
        Event.RAN,
        Event.FINISH,
    ):
        endpoint.move(event)
    endpoint.extra = Recorded(answer=answer)
    async with ours(endpoint, folder), client(folder) as own:
        await own.ready()
        return await texts(own)


@pytest.mark.parametrize("compat", DIALECTS)
@pytest.mark.parametrize("how", ["postcopy", "precopy", "precopy that nothing follows"])
async def test_when_a_destination_tells_it(how: str, compat: Compat, tmp_path: Path) -> None:
    """A machine without a guest: no vCPU waits."""
    dialect = DIALECTS[compat]
    smp = ("-smp", str(COUNT))
    async with qemu(compat, *smp) as source, qemu(compat, *smp, "-incoming", "defer") as destination:
        names = ["postcopy-blocktime", *([] if "nothing" in how else ["postcopy-ram"])]
        uri = f"unix:{tmp_path / 'in'}"
        for wire in (source, destination):
            await wire.ready()
            wanted = [{"capability": name, "state": True} for name in names]
            assert await wire.command("migrate-set-capabilities", capabilities=wanted) == {"return": {}}
        if how == "postcopy":
            await source.command("migrate-set-parameters", **{"max-bandwidth": 1 << 20})
        await destination.command("migrate-incoming", uri=uri)
        await source.command("migrate", uri=uri)
        if how == "postcopy":
            await source.command("migrate-start-postcopy")
            await source.command("migrate-set-parameters", **{"max-bandwidth": 0})
        with trio.fail_after(60):
            while True:
                answer = (await destination.command("query-migrate"))["return"]
                if answer.get("status") == "completed":
                    break
                assert shape(answer) == {}
                await trio.sleep(0.02)
        told = how == "postcopy" or (how == "precopy" and dialect.blocktime_of_precopy)
        assert shape(answer) == (shape(HERE.as_qmp(dialect)) if told else {})
        assert shape((await source.command("query-migrate"))["return"]) == {}
        assert await own_texts(compat, answer, tmp_path) == await texts(destination)


@pytest.mark.parametrize("compat", DIALECTS)
async def test_what_a_guest_waited_is_written_as_qemu_does(compat: Compat, tmp_path: Path) -> None:
    dialect = DIALECTS[compat]

    async def play(folder: Path, targets: list[vm.Vm]) -> None:
        spec = vm.Spec(peers.qemu(compat), extra=("-smp", str(COUNT)))
        with trio.fail_after(240):
            async with (
                vm.vm(spec, "source", vm.Bare(), folder) as source,
                vm.vm(spec, "destination", vm.Bare(), folder, incoming=True) as destination,
            ):
                targets.append(destination)
                nonce = await source.booted()

                async def during() -> None:
                    await destination.beat(nonce)
                    assert shape(await destination.qmp.command("query-migrate")) == {}

                await vm.migrate_postcopy(
                    source, destination, folder, capabilities=["postcopy-blocktime"], during=during
                )
                answer = await destination.qmp.command("query-migrate")
                theirs = [await destination.qmp.hmp(line) for line in ("info migrate", "info migrate -a")]
        assert shape(answer) == shape(HERE.as_qmp(dialect))
        assert sum(answer["postcopy-vcpu-blocktime"]) > 0
        assert answer["postcopy-blocktime"] <= min(answer["postcopy-vcpu-blocktime"]) + 1
        if dialect.latency:
            assert sum(answer["postcopy-latency-dist"]) > 0
        assert await own_texts(compat, answer, folder) == theirs

    await played(play, tmp_path)
