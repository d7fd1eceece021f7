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
from tests.qemu.checks import Account, Watch, guest_flow
from tests.qemu.net import Flow

console = Console(highlight=False)


async def show_guest(name: str, machine: vm.Vm, lines: int) -> None:
    """The guest's next lines, as it prints them."""
    at = len(machine.serial)
    for _ in range(lines):
        found = await machine.serial.find(r"^(mem|net) .*", at)
        at = machine.serial.lines.index(found.string, at) + 1
        console.print(f"  [dim]{name}[/] {found.string}", soft_wrap=True)


async def demo(version: str, tmp_path: Path) -> None:
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
            await show_guest("source     ", source, 4)
            console.print(
                "[bold]During[/]: postcopy; the guest runs at the destination, most of its pages do not"
            )

            async def during() -> None:
                window = await watch.heard()
                await far.acknowledged(window.moved.next + 300)
                await show_guest("destination", destination, 4)

            moved = await vm.migrate_postcopy(
                source, destination, tmp_path, on_stop=watch.stopped, during=during
            )
            ended = await bridge1.ended(1)
            window = account.windows[0]
            console.print("[bold]After[/]: all pages have arrived, the source is no longer needed")
            await far.received(window.moved.high + 1000)
            await show_guest("destination", destination, 4)
            await destination.beat(nonce)
            bad_pages = await destination.sweep()
            await report(moved, destination, far, window.moved.next - window.stopped.acked)
            console.print(f"  bridge at the destination: {ended.split('postcopy ended: ')[1]}")
            await account.close(far, destination)
            complaints = source.complaints() + destination.complaints()
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


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.qemu.demo", description=__doc__)
    parser.add_argument("--qemu", choices=peers.VERSIONS, default="10.0", help="version (default: 10.0)")
    arguments = parser.parse_args()
    if os.geteuid() != 0:
        print("demo: needs root: it makes a network namespace with taps", file=sys.stderr)
        return 3
    try:
        with tempfile.TemporaryDirectory() as folder:
            trio.run(demo, arguments.qemu, Path(folder))
    except peers.PeerMissing as exc:
        print(f"demo: {exc}", file=sys.stderr)
        return 3
    except AssertionError as exc:
        print(f"demo: {exc}", *getattr(exc, "__notes__", ()), sep="\n", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
