"""A Linux guest keeps its network, through our bridge, over a postcopy migration and back.

One bridge process at each end, each with a tap on the same Linux bridge, so that the guest's address really
moves.  The guest rewrites and checks its memory all the while; a UDP flow of numbered frames runs both ways.
"""

from __future__ import annotations

import contextlib
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from tests.kit.hugepages import hugepages
from tests.kit.until import until
from tests.qemu import net, peers, vm
from tests.qemu.backend import Backend, bridge
from tests.qemu.checks import Account, Watch

pytestmark = pytest.mark.qemu


@dataclass(frozen=True)
class Case:
    version: str
    memory: Literal["slots", "table"]  # how QEMU sends memory: ADD_MEM_REG or SET_MEM_TABLE
    pages: Literal["4k", "2M"]
    backing: Literal["memfd", "file"]
    announce: Literal["guest", "rarp"]  # who tells the network where the guest is now

    def __str__(self) -> str:
        return "-".join((self.version, self.memory, self.pages, self.backing, self.announce))

    def options(self) -> list[str]:
        """For the bridges: QEMU does its default unless a bit is hidden from it."""
        words = ["--hide-protocol-feature", "CONFIGURE_MEM_SLOTS"] if self.memory == "table" else []
        return words + (["--hide-feature", "GUEST_ANNOUNCE"] if self.announce == "rarp" else [])

    def spec(self) -> vm.Spec:
        # Enough huge pages that those of the guest's first steps are not all there are.
        huge = self.pages == "2M"
        return vm.Spec(peers.qemu(self.version), vm.Memory(self.backing, huge, 768 if huge else 256))

    def nic(self, end: Backend) -> vm.VhostUser:
        # On huge pages more buffers: those of a small ring may lie in a few pages.
        return vm.VhostUser(end.path, rx_size=1024 if self.pages == "2M" else 256)


# Every value of every column with each QEMU, each table of memory with each page size.
SHORT = (
    Case("7.2", "slots", "4k", "file", "rarp"),
    Case("7.2", "table", "2M", "memfd", "guest"),
    Case("10.0", "table", "4k", "file", "guest"),
    Case("10.0", "slots", "2M", "memfd", "rarp"),
)
ALL = tuple(
    Case(version, memory, pages, backing, announce)  # type: ignore[arg-type]
    for version, memory, (pages, backing), announce in itertools.product(
        peers.VERSIONS,
        ("slots", "table"),
        (("4k", "memfd"), ("4k", "file"), ("2M", "memfd")),
        ("guest", "rarp"),
    )
)
CASES = [pytest.param(c, id=str(c), marks=() if c in SHORT else pytest.mark.long) for c in ALL]


async def postcopy(
    case: Case, src: vm.Vm, dst: vm.Vm, far: net.Far, end: Backend, watch: Watch, tmp_path: Path
) -> None:
    """One postcopy migration, with what must be true of each."""
    ended = len(end.logged("postcopy ended"))

    async def during() -> None:
        """The flow goes on while most pages are still absent, in more frames than the guest has buffers."""
        window = await watch.heard()
        await far.acknowledged(window.moved.next + 300)
        await until(lambda: dst.traces(vm.RESOLVED) >= 10, limit=20)

    moved = await vm.migrate_postcopy(src, dst, tmp_path, on_stop=watch.stopped, during=during)
    assert moved.remaining >= 0.6
    # END was answered: QEMU left the call that sends it, and the bridge has ended its part.
    assert dst.traces("vhost_user_postcopy_end_exit") == 1
    await end.ended(ended + 1)
    # QEMU sent memory in the way that this case is about: ADD_MEM_REG is 37, SET_MEM_TABLE 5.
    by_slots, by_table = dst.traces("vhost_user_write req:37 "), dst.traces("vhost_user_write req:5 ")
    assert (by_slots > 0, by_table > 0) == (case.memory == "slots", case.memory == "table")


@pytest.mark.parametrize("case", CASES)
async def test_postcopy_there_and_back(case: Case, tmp_path: Path) -> None:
    spec, options = case.spec(), case.options()
    with hugepages(2 * spec.memory.size + 16) if spec.memory.huge else contextlib.nullcontext():
        async with (
            net.network() as network,
            bridge(network, "bridge0", "tap0", tmp_path, options) as bridge0,
            bridge(network, "bridge1", "tap1", tmp_path, options) as bridge1,
            vm.vm(spec, "there", case.nic(bridge1), tmp_path, incoming=True) as there,
        ):
            async with vm.vm(spec, "here", case.nic(bridge0), tmp_path) as here:
                nonce = await here.booted()
                async with network.far() as far:
                    await far.received(500)
                    await here.beat(nonce)
                    account, quiet = await Account.open(far), len(far.process.out)
                    watch = Watch(far, account)
                    await postcopy(case, here, there, far, bridge1, watch, tmp_path)
                    await far.received(account.windows[-1].moved.high + 1000)
                    await there.beat(nonce)
                    assert await there.sweep() == 0
                    await account.close(far, there)
                    assert here.complaints() == []
                    await here.quit()

                    # The bridges stay; a fresh QEMU at the first end takes the guest back.
                    async with vm.vm(spec, "back", case.nic(bridge0), tmp_path, incoming=True) as back:
                        await postcopy(case, there, back, far, bridge0, watch, tmp_path)
                        await far.received(account.windows[-1].moved.high + 1000)
                        await back.beat(nonce)
                        assert await back.sweep() == 0
                        flows = await account.close(far, back)
                        announced = far.announcements(quiet)
                        assert back.complaints() == there.complaints() == []
            assert bridge0.process.alive
            assert bridge1.process.alive
            assert bridge0.complaints() == bridge1.complaints() == []
            assert announced == {"rarp" if case.announce == "rarp" else "arp"}, announced
            print(
                case, *flows, *bridge1.logged("postcopy ended"), *bridge0.logged("postcopy ended"), sep="\n  "
            )
