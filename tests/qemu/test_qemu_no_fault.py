"""QEMU with postcopy-preempt in front of our bridge: it ends where the bridge never faults, and never where it did.

QEMU notes a back-end's fault under the back-end's address and takes off the list what has arrived under its own; with
preempt it waits at the end until the list is empty. So ``--no-fault`` waits for pages without a fault.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.kit.hugepages import hugepages
from tests.kit.until import until
from tests.qemu import net, peers, vm
from tests.qemu.backend import Backend, bridge
from tests.qemu.checks import Account, Watch
from tests.qemu.plays import played
from tests.qemu.versions import EACH

pytestmark = pytest.mark.qemu
CAPABILITIES = ("postcopy-ram", "postcopy-preempt")
TRACES = ("postcopy_ram_incoming_cleanup_*", "postcopy_page_req_*", "postcopy_ram_listen_thread_*")
# Bytes a second behind the switch: the guest runs on its memory for some seconds while most of it is absent.
SLOW = 40 << 20


@dataclass
class Stage:
    """A guest with a flow of frames, and where it is to move."""

    here: vm.Vm
    there: vm.Vm
    end: Backend
    far: net.Far
    account: Account
    watch: Watch
    nonce: str

    async def switch(self, tmp_path: Path, slow: int) -> None:
        """Begin a postcopy with preempt, so early that most pages are absent; the guest runs at the destination."""
        uri = f"unix:{tmp_path}/incoming"
        await vm.prepare(self.here, self.there, uri, CAPABILITIES)
        await self.here.qmp.command(
            "migrate-set-parameters", max_bandwidth=4 << 20, max_postcopy_bandwidth=slow
        )
        await self.here.qmp.command("migrate", uri=uri)
        await self.here.qmp.event("MIGRATION", status="active")
        await self.here.qmp.command("migrate-start-postcopy")
        await self.here.qmp.event("STOP")
        await self.watch.stopped()
        await self.there.qmp.event("RESUME")


@asynccontextmanager
async def stage(
    version: str,
    tmp_path: Path,
    options: Sequence[str],
    memory: vm.Memory | None = None,
    pairs: int = 1,
) -> AsyncIterator[Stage]:
    traces = tuple(word for event in TRACES for word in ("-trace", event))
    spec = vm.Spec(peers.qemu(version), memory or vm.Memory(), extra=traces)
    async with AsyncExitStack() as stack:
        enter = stack.enter_async_context
        network = await enter(net.network(multi_queue=pairs > 1))
        queues = ("--pairs", str(pairs))
        first = await enter(bridge(network, "bridge0", "tap0", tmp_path, queues))
        end = await enter(bridge(network, "bridge1", "tap1", tmp_path, (*queues, *options)))
        there = await enter(vm.vm(spec, "there", vm.VhostUser(end.path, pairs), tmp_path, incoming=True))
        here = await enter(vm.vm(spec, "here", vm.VhostUser(first.path, pairs), tmp_path))
        nonce = await here.booted()
        far = await enter(network.far())
        await far.received(500)
        await here.beat(nonce)
        account = await Account.open(far)
        yield Stage(here, there, end, far, account, Watch(far, account), nonce)


def requested(machine: vm.Vm) -> int:
    """Pages that QEMU's list of requested pages still has, by its trace."""
    added, removed = (machine.traces(f"postcopy_page_req_{what}") for what in ("add", "del"))
    return added - removed


async def ends(version: str, tmp_path: Path, targets: list[vm.Vm], memory: vm.Memory, pairs: int = 1) -> None:
    options = ["--no-fault", *(["--answer-each-pair"] if pairs > 1 else [])]
    async with stage(version, tmp_path, options, memory, pairs) as s:
        targets.append(s.there)
        await s.switch(tmp_path, SLOW)
        for side in (s.here, s.there):
            await side.qmp.event("MIGRATION", status="completed", limit=120)
        # The network is back, both ways, and nothing was lost or changed that the move does not explain.
        window = await s.watch.heard()
        await s.far.acknowledged(window.moved.next + 300)
        await s.far.received(window.moved.high + 1000)
        await s.there.beat(s.nonce)
        assert await s.there.sweep() == 0
        await s.account.close(s.far, s.there)
        assert (
            s.there.traces(vm.RESOLVED) == 0
        )  # the bridge met absent pages, and no fault of it came to QEMU
        told = await s.end.ended(1)
        assert int(re.findall(r"(\d+) touches waited", told)[0]) > 0, told
        assert len(s.end.logged("postcopy without faults")) == 1
        assert s.end.complaints() == []
        assert s.here.complaints() == s.there.complaints() == []
        print(version, memory, told)


@pytest.mark.parametrize("version", EACH)
async def test_preempt_ends_where_the_bridge_never_faults(version: str, tmp_path: Path) -> None:
    async def play(folder: Path, targets: list[vm.Vm]) -> None:
        await ends(version, folder, targets, vm.Memory())

    await played(play, tmp_path)


@pytest.mark.long
async def test_preempt_ends_with_two_queue_pairs(tmp_path: Path) -> None:
    """Both options together."""
    await ends("10.0", tmp_path, [], vm.Memory(), pairs=2)


async def test_preempt_ends_on_huge_pages(tmp_path: Path) -> None:
    """Whether a huge page is here is asked in another way."""
    memory = vm.Memory(huge=True, size=512)
    with hugepages(2 * memory.size + 16):
        await ends("10.0", tmp_path, [], memory)


@pytest.mark.parametrize("version", ["10.0", pytest.param(peers.NEWEST, marks=pytest.mark.long)])
async def test_preempt_never_ends_once_the_bridge_has_faulted(version: str, tmp_path: Path) -> None:
    """All pages are there, and QEMU waits for its list of requested pages, from which nothing is taken any more."""
    async with stage(version, tmp_path, []) as s:
        await s.switch(tmp_path, SLOW)
        await until(lambda: s.there.traces(vm.RESOLVED) > 0, limit=60)
        # QEMU has read the source's last word, and is inside the wait for its list.
        await until(lambda: s.there.traces("postcopy_ram_incoming_cleanup_entry") > 0, limit=120)
        source = await s.here.qmp.command("query-migrate")
        assert source["ram"]["remaining"] == 0  # every page is there
        if version == "10.0":  # 11.1 waits in its main loop: neither its guest nor its monitor goes on
            window = await s.watch.heard()
            await s.far.received(window.moved.high + 1000)
            await s.there.beat(s.nonce, more=2)
            assert await s.there.sweep() == 0
            assert (await s.there.qmp.command("query-migrate"))["status"] == "postcopy-active"
        assert requested(s.there) > 0
        assert s.there.traces("postcopy_ram_incoming_cleanup_exit") == 0
        assert source["status"] == "postcopy-active"
        assert s.end.logged("postcopy ended") == []
        print(f"{requested(s.there)} pages are on QEMU's list for ever")


async def test_preempt_of_qemu_7_2_ends_although_the_bridge_has_faulted(tmp_path: Path) -> None:
    """It knows the end of its second connection by a word, not by its list."""
    async with stage("7.2", tmp_path, []) as s:
        await s.switch(tmp_path, SLOW)
        for side in (s.here, s.there):
            await side.qmp.event("MIGRATION", status="completed", limit=120)
        assert s.there.traces(vm.RESOLVED) > 0
        await s.end.ended(1)
