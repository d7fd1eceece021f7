"""A stock QEMU sends its machine to our destination, and it goes wrong: it runs nowhere twice, its pages stay."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from pathlib import Path

import pytest
import trio

from tests.kit.migration_ends import Received, incoming_of
from tests.kit.until import until
from tests.qemu import peers, vm
from tests.qemu.test_qemu_to_held import MAIN, PAGE, listening
from tests.qemu.versions import EACH
from vhostpc.errors import MemoryLost, StreamError, VhostpcError
from vhostpc.migration.channel import Channel
from vhostpc.migration.held import HeldMachine
from vhostpc.migration.phase import Event
from vhostpc.pages.ramblock import Bits, RamBlock
from vhostpc.wire.migration.elements import DeviceSection

pytestmark = pytest.mark.qemu


class Refusing(HeldMachine):
    async def load(self, section: DeviceSection) -> None:
        if section.idstr == "cpu":
            raise StreamError("the state of 'cpu' is of a newer version")
        await super().load(section)


async def switching(source: vm.Vm, path: Path) -> None:
    """Start a migration that switches to postcopy at once, and brings little by itself."""
    await source.qmp.command("migrate-set-parameters", max_bandwidth=4 << 20, max_postcopy_bandwidth=1 << 20)
    wanted = [{"capability": name, "state": True} for name in ("events", "postcopy-ram")]
    await source.qmp.command("migrate-set-capabilities", capabilities=wanted)
    await source.qmp.command("migrate", uri=f"unix:{path}")


@pytest.mark.parametrize("version", EACH)
async def test_a_link_lost_in_postcopy(version: str, tmp_path: Path) -> None:
    """Both sides pause. Received pages are kept; waiting threads go on waiting, until it is all given up."""
    received = Received()
    spec = vm.Spec(peers.qemu(version))
    with trio.fail_after(120), HeldMachine() as machine:
        async with (
            listening(tmp_path / "in") as listener,
            vm.vm(spec, "src", vm.Bare(), tmp_path) as source,
            trio.open_nursery() as nursery,
        ):
            await source.booted()
            await switching(source, tmp_path / "in")
            async with Channel(await listener.accept()) as channel:
                incoming = incoming_of(channel, machine, postcopy=True, report=received.report)
                lost: list[BaseException] = []

                async def touch() -> None:
                    block = machine.ram[MAIN]
                    last = max(n for n in range(block.pages) if not block.test_bit(Bits.RECEIVED, n))
                    try:
                        await block.read(last * PAGE, PAGE)
                    except MemoryLost as error:
                        lost.append(error)

                async def receive() -> None:
                    with pytest.raises(VhostpcError) as caught:
                        await incoming.receive()
                    assert caught.value is received.error

                nursery.start_soon(receive)
                await source.qmp.event("MIGRATION", 0, status="active")
                await source.qmp.command("migrate-start-postcopy")
                await incoming.running()
                channel.shut_down()
                await until(lambda: received.events[-1:] == [Event.LOSE])
                nursery.start_soon(touch)
                await until(lambda: incoming.service.numbers().waiting_now == 1)
                await source.qmp.event("MIGRATION", 0, status="postcopy-paused")
                missing = incoming.missing()
                assert 0 < missing < sum(block.pages for block in machine.ram.blocks)
                assert lost == []
                incoming.close()
                await until(lambda: lost)
    assert received.events == [Event.PACKAGE, Event.LOSE]


@pytest.mark.parametrize("version", EACH)
async def test_a_device_that_cannot_be_loaded(version: str, tmp_path: Path) -> None:
    """The machine has not run here: our word lets the source run it again, and it hears it."""
    received = Received()
    with trio.fail_after(120), Refusing() as machine:
        async with (
            listening(tmp_path / "in") as listener,
            vm.vm(vm.Spec(peers.qemu(version)), "src", vm.Bare(), tmp_path) as source,
        ):
            await source.booted()
            await switching(source, tmp_path / "in")
            async with Channel(await listener.accept()) as channel, trio.open_nursery() as nursery:
                incoming = incoming_of(channel, machine, postcopy=True, report=received.report)
                await source.qmp.event("MIGRATION", 0, status="active")
                await source.qmp.command("migrate-set-parameters", max_postcopy_bandwidth=0)
                nursery.start_soon(lambda: source.qmp.command("migrate-start-postcopy"))
                with pytest.raises(StreamError, match="of a newer version"):
                    await incoming.receive()
                incoming.close()
            # 10.0 sends all that it has, then takes our word, and runs the guest again; 7.2 breaks off at once.
            await source.qmp.event("MIGRATION", 0, status="failed" if version != "7.2" else "postcopy-paused")
            if version != "7.2":
                await source.qmp.event("RESUME", 0)
            assert (await source.qmp.command("query-status"))["running"] is (version != "7.2")
    assert received.events == [Event.PACKAGE, Event.NEVER_RAN]


@pytest.mark.parametrize("version", EACH)
async def test_a_discard_fails(version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package is in flight, and nothing of it is taken: the source hears so, and its guest runs on."""
    received = Received()

    def fail(block: RamBlock, ranges: Sequence[tuple[int, int]]) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with trio.fail_after(120), HeldMachine() as machine:
        async with (
            listening(tmp_path / "in") as listener,
            vm.vm(vm.Spec(peers.qemu(version)), "src", vm.Bare(), tmp_path) as source,
        ):
            await source.booted()
            await switching(source, tmp_path / "in")
            async with Channel(await listener.accept()) as channel, trio.open_nursery() as nursery:
                incoming = incoming_of(channel, machine, postcopy=True, report=received.report)
                await source.qmp.event("MIGRATION", 0, status="active")
                monkeypatch.setattr(RamBlock, "discard_for", fail)
                await source.qmp.command("migrate-set-parameters", max_postcopy_bandwidth=0)
                nursery.start_soon(lambda: source.qmp.command("migrate-start-postcopy"))
                with pytest.raises(OSError, match="No space left"):
                    await incoming.receive()
                incoming.close()
            # 7.2 has written its package into the socket by then, and does not take our word for it.
            ended = "failed" if version != "7.2" else "postcopy-paused"
            await source.qmp.event("MIGRATION", 0, status=ended)
            if version != "7.2":
                await source.qmp.event("RESUME", 0)
    assert received.events == [Event.FAIL]
