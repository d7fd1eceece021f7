"""What must hold of the guest's network over a series of moves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tests.qemu.net import Far, Flow, Mark, Ranges, parse_flow
from tests.qemu.vm import Talking


@dataclass(frozen=True)
class Window:
    """One move as the far end saw it: when the guest had stopped, and when it was heard again.

    Between the two, what the far end sends may be lost: the guest is stopped, and the Linux bridge sends
    its frames to the old port until it hears the guest from the new one.  What the guest had not
    acknowledged when it stopped may not have reached it yet.  A loss that began in the window ends
    with the first frame that the guest receives afterwards: its two queues do not start in one instant, and
    the one that receives leaves out what had waited in the tap before it started.
    """

    stopped: Mark
    moved: Mark


async def guest_flow(vm: Talking) -> Flow:
    """The guest's own account, from the next line it prints."""
    found = await vm.serial.find(r"^net \w+ (.*)", len(vm.serial))
    return parse_flow(found.group(1))


def _outside(gaps: Ranges, windows: Sequence[tuple[int, int]]) -> Ranges:
    return tuple(g for g in gaps if not any(first <= g[0] < end for first, end in windows))


class Account:
    """Compares both ends' accounts with the windows in which loss is allowed."""

    def __init__(self, start: Mark) -> None:
        self.start = start
        self.windows: list[Window] = []

    @classmethod
    async def open(cls, far: Far) -> Account:
        """Begin to count: nothing before this moment (the guest's boot) is looked at."""
        return cls((await far.mark())[1])

    async def close(self, far: Far, vm: Talking) -> tuple[Flow, Flow, Flow]:
        """Check everything; gives the guest's flow, the far end's flow, the far end's pings."""
        inside = await guest_flow(vm)
        outside, pings = await far.report()
        for what, flow in (("guest", inside), ("far end", outside), ("ping", pings)):
            assert flow.bad == 0, f"{what}: corrupt frames: {flow}"
            assert flow.dup == 0, f"{what}: frames received twice: {flow}"
        to_guest = _outside(
            inside.gaps_after(self.start.acked), [(w.stopped.acked, w.moved.next) for w in self.windows]
        )
        assert (
            not to_guest
        ), f"frames to the guest lost outside of the moves: {to_guest}\n{self.windows}\n{inside}"
        from_guest = _outside(
            outside.gaps_after(self.start.high), [(w.stopped.high, w.moved.high) for w in self.windows]
        )
        assert not from_guest, f"frames of the guest lost outside of the moves: {from_guest}\n{self.windows}"
        echoes = _outside(
            pings.gaps_after(self.start.echoed), [(w.stopped.echoed, w.moved.pings) for w in self.windows]
        )
        for window in self.windows[-1:]:
            assert (
                outside.acked >= window.moved.next + 500
            ), f"the guest receives no more: {outside}\n{window}"
        assert not echoes, f"pings lost outside of the moves: {echoes}\n{self.windows}\n{pings}"
        return inside, outside, pings


class Watch:
    """The two moments of a move: give ``stopped`` to the migration as its ``on_stop`` hook, then await
    ``heard`` when the guest runs again."""

    def __init__(self, far: Far, account: Account) -> None:
        self._far = far
        self._account = account
        self._stopped: tuple[str, Mark] | None = None

    async def stopped(self) -> None:
        self._stopped = await self._far.mark()

    async def heard(self) -> Window:
        assert self._stopped, "the guest was never stopped"
        name, mark = self._stopped
        self.window = Window(mark, await self._far.moved(name))
        self._account.windows.append(self.window)
        return self.window
