"""``python -m tests.qemu.demo``: a real guest, two real QEMUs, two bridges, one postcopy migration.

Prints what the guest and the far end of its network see before, during and after the move; exits 1 if a
frame was corrupted, came twice or was lost outside of the switch, or if a page was bad.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

import trio
from rich.console import Console
from rich.table import Table

from tests.qemu import net, peers, vm
from tests.qemu.backend import bridge
from tests.qemu.checks import Account, Watch, Window, guest_flow
from tests.qemu.link import Link
from tests.qemu.net import Flow

console = Console(highlight=False)
MOST_CUTS = 20
LEAST_LEFT = 24 << 20
"""Bytes that a source must have left for a cut. QEMU 10.0 runs its guest again where the link is lost once it has
written everything, although the guest runs at the destination."""
ANSWERS = 30.0
"""Seconds in which a guest answers after a recovery."""
LOSSES = (
    "Detected IO failure for postcopy",
    "error while loading state section id",
    "failed to save SaveStateEntry",
    "Unable to shutdown socket",
    "Unable to read from socket",
    "Unable to write to socket",
    "illegal host addr",
)
"""Lines of a QEMU whose link was lost. The last: it does not ask again for a page that a back-end waits for."""


async def show_guest(name: str, machine: vm.Vm, lines: int) -> None:
    """The guest's next lines, as it prints them."""
    at = len(machine.serial)
    for _ in range(lines):
        found = await machine.serial.find(r"^(mem|net) .*", at)
        at = machine.serial.lines.index(found.string, at) + 1
        console.print(f"  [dim]{name}[/] {found.string}", soft_wrap=True)


class Cuts:
    """``count`` losses of the link: at once, while the bridge waits for pages, and as the rest gets less."""

    def __init__(self, count: int, source: vm.Vm, destination: vm.Vm, far: net.Far, account: Account) -> None:
        self.count = count
        self.source = source
        self.destination = destination
        self.far = far
        self.account = account
        self.made = 0
        self.table = Table("pause", "left to send", "both paused after", "both went on after")

    async def left(self) -> int:
        """Bytes that the source has not sent; 0 once it does not send any more."""
        info = await self.source.qmp.command("query-migrate")
        return int(info["ram"]["remaining"]) if info["status"] == "postcopy-active" else 0

    async def make(self, link: Link) -> None:
        """All of them, as long as enough is left; then wait until the guest answers. Frames may be lost until then."""
        while not self.destination.traces(vm.RESOLVED):
            await trio.sleep(0.001)
        _, before = await self.far.mark()
        begin = wanted = await self.left()
        for number in range(1, self.count + 1):
            while (left := await self.left()) > wanted:
                await trio.sleep(0.005)
            if left < LEAST_LEFT:
                break
            await self._cut(link, left)
            wanted = begin - (begin - LEAST_LEFT) * number // self.count
        since = trio.current_time()
        _, now = await self.far.mark()
        with trio.fail_after(ANSWERS):
            await self.far.acknowledged(now.next)
        self.answers = trio.current_time() - since
        self.account.windows.append(Window(before, (await self.far.mark())[1]))

    async def _cut(self, link: Link, left: int) -> None:
        times = await vm.lose_and_recover(self.source, self.destination, link)
        self.made += 1
        self.table.add_row(
            str(self.made), f"{left >> 20} MiB", *(f"{1000 * seconds:.0f} ms" for seconds in times)
        )

    def show(self) -> None:
        console.print(self.table)
        console.print(f"  the guest's network answered {self.answers:.2f} s after the last recovery")
        console.print(
            "  QEMU does not ask again for what a back-end waits for: that comes with the background"
        )
        if self.made < self.count:
            console.print(f"  only {self.made} of {self.count} cuts: too little was left to send for more")


def unexpected(lines: list[str], cuts: int) -> list[str]:
    """Complaints that a lost link does not explain."""
    return [line for line in lines if not (cuts and any(words in line for words in LOSSES))]


async def demo(version: str, tmp_path: Path, count: int = 0) -> None:
    spec = vm.Spec(peers.qemu(version))
    async with (
        net.network() as network,
        bridge(network, "bridge0", "tap0", tmp_path) as bridge0,
        bridge(network, "bridge1", "tap1", tmp_path) as bridge1,
        vm.vm(spec, "source", vm.VhostUser(bridge0.path), tmp_path) as source,
        vm.vm(spec, "destination", vm.VhostUser(bridge1.path), tmp_path, incoming=True) as destination,
    ):
        console.print(f"[bold]Before[/]: QEMU {version}, a Linux guest of {spec.memory.size} MiB boots")
        nonce = await source.booted()
        async with network.far() as far:
            await far.received(500)
            account = await Account.open(far)
            watch = Watch(far, account)
            cuts = Cuts(count, source, destination, far, account)
            await show_guest("source     ", source, 4)
            console.print(
                "[bold]During[/]: postcopy; the guest runs at the destination, most of its pages do not"
            )

            async def during() -> None:
                window = await watch.heard()
                await far.acknowledged(window.moved.next + 300)
                await show_guest("destination", destination, 4)

            moved = await vm.migrate_postcopy(
                source,
                destination,
                tmp_path,
                on_stop=watch.stopped,
                on_link=cuts.make if count else None,
                during=during,
            )
            ended = await bridge1.ended(1)
            window = watch.window
            console.print("[bold]After[/]: all pages have arrived, the source is no longer needed")
            await far.received(account.windows[-1].moved.high + 1000)
            await show_guest("destination", destination, 4)
            await destination.beat(nonce)
            bad_pages = await destination.sweep()
            await report(moved, destination, far, window.moved.next - window.stopped.acked)
            console.print(f"  bridge at the destination: {ended.split('postcopy ended: ')[1]}")
            await account.close(far, destination)
            if count:
                cuts.show()
            complaints = unexpected(source.complaints() + destination.complaints(), count)
            complaints += bridge0.complaints() + bridge1.complaints()
            if bad_pages or complaints:
                raise AssertionError(f"{bad_pages} bad pages; {complaints}")
    console.print("[bold green]The guest kept its network and every byte of its memory.[/]")


async def report(moved: vm.Moved, destination: vm.Vm, far: net.Far, window: int) -> None:
    inside = await guest_flow(destination)
    outside, pings = await far.report()
    table = Table("", "sent", "received", "corrupt", "twice", "lost")

    def row(name: str, flow: Flow) -> None:
        # What was sent before the other side had come up does not count as sent.
        sent = flow.rx + flow.lost
        table.add_row(name, *(str(n) for n in (sent, flow.rx, flow.bad, flow.dup, flow.lost)))

    row("frames to the guest", inside)
    row("frames of the guest", outside)
    row("pings", pings)
    console.print(table)
    console.print(f"  at the switch {moved.remaining:.0%} of RAM had not been sent")
    console.print(f"  the far end sent {window} frames while the guest was stopped and its address moved")
    faults = destination.traces(vm.RESOLVED)
    console.print(f"  QEMU's trace: {faults} page faults of the bridge resolved")


def cut_count(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) <= MOST_CUTS):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to {MOST_CUTS}")
    return int(text)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.qemu.demo", description=__doc__)
    parser.add_argument("--qemu", choices=peers.VERSIONS, default="10.0", help="version (default: 10.0)")
    parser.add_argument(
        "--cut",
        type=cut_count,
        default=0,
        metavar="N",
        help=f"lose the link N times in postcopy, {MOST_CUTS} at most, and recover (default: 0)",
    )
    arguments = parser.parse_args()
    if os.geteuid() != 0:
        print("demo: needs root: it makes a network namespace with taps", file=sys.stderr)
        return 3
    try:
        with tempfile.TemporaryDirectory() as folder:
            trio.run(demo, arguments.qemu, Path(folder), arguments.cut)
    except peers.PeerMissing as exc:
        print(f"demo: {exc}", file=sys.stderr)
        return 3
    except AssertionError as exc:
        print(f"demo: {exc}", *getattr(exc, "__notes__", ()), sep="\n", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
