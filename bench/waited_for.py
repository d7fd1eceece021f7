"""How many pages a guest waits for in a real postcopy. ``python -m bench.waited_for [--rate MB/S] PYTHON ... ``.

Each PYTHON has a vhostpc whose endpoint is the source: two checkouts are compared in turn, ``--runs`` times, for the
guests of ``bench.record_faults``. Each run takes the same guest from a file, which goes on in a QEMU 10.0 by postcopy,
over a unix socket. ``--rate``: ``max-postcopy-bandwidth``; requested pages are beside it.

*Served*: pages that were sent because they were requested. *Waits*: from a fault that QEMU reads to its page in place,
by the destination's trace. That has a line for each page, which slows the destination down for all.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import trio

from tests.qemu import peers, vm
from tests.qemu.test_qemu_endpoint import completed, prepare
from tests.sequences import nodes

from .record_faults import GUESTS, SIZE, TRACING, initrd, traced

SETTLED = 4  # seconds


@dataclass(frozen=True)
class Run:
    served: int
    useless: int
    waits: list[int]
    """In microseconds."""
    blocktime: int
    """In milliseconds, of all processors."""

    def quantile(self, share: float) -> float:
        found = sorted(self.waits)
        return found[min(len(found) - 1, int(share * len(found)))] if found else 0.0


@dataclass(frozen=True)
class Saved:
    """A guest in a file, as QEMU writes it."""

    path: Path
    spec: vm.Spec


async def save(name: str, folder: Path) -> Saved:
    processors, _, script = GUESTS[name]
    append = "console=ttyS0 quiet panic=-1" + (" vm.run=/work" if script else "")
    extra = (
        "-initrd",
        str(initrd(peers.kernel(), script, folder)),
        "-append",
        append,
        "-smp",
        str(processors),
    )
    spec = vm.Spec(peers.qemu("10.0"), vm.Memory(size=SIZE >> 20), extra)
    path = folder / "guest"
    with trio.fail_after(240):
        async with vm.vm(spec, "here", vm.Bare(), folder) as source:
            await source.serial.find("working" if script else "beat=", limit=120)
            await trio.sleep(SETTLED)
            await prepare(source, max_bandwidth=0)
            await source.qmp.command("migrate", uri=f"exec:cat > {path}")
            await completed(source)
    return Saved(path, spec)


async def run(python: str, saved: Saved, rate: int) -> Run:
    with tempfile.TemporaryDirectory(prefix="vpc-bench-") as text, trio.fail_after(120):
        folder = Path(text)
        there = replace(saved.spec, extra=(*saved.spec.extra, *TRACING))
        sys.executable = python  # what endpoint_node starts
        async with (
            nodes.endpoint_node("10.0", "held", folder, ram=f"mem={SIZE >> 20}M") as node,
            vm.vm(there, "there", vm.Bare(), folder, incoming=True) as target,
        ):
            await prepare(node)
            await node.qmp.command("migrate-incoming", uri=f"exec:cat {saved.path}")
            await completed(node)
            await prepare(target, "postcopy-ram", "postcopy-blocktime")
            await prepare(node, "postcopy-ram", max_bandwidth=1 << 20, max_postcopy_bandwidth=rate)
            await target.qmp.command("migrate-incoming", uri=f"unix:{folder}/out")
            since = len(node.qmp.events)
            await node.qmp.command("migrate", uri=f"unix:{folder}/out")
            await node.qmp.command("migrate-start-postcopy")
            await completed(node, since)
            await completed(target)
            told = await target.qmp.command("query-migrate")
            sent = (await node.qmp.command("x-vhostpc-report"))["sent"]
            seen = target.trace_file.read_text(errors="replace")
        waits = [end - begin for _, _, begin, end in traced(seen, "mem")]
        blocked = sum(told.get("postcopy-vcpu-blocktime", []))
        return Run(sent["requested-pages"], sent["useless"], waits, blocked)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rate", type=int, default=0, help="MB a second in the background")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--guests", default="quiet,reads,works,two")
    parser.add_argument("python", nargs="+")
    given = parser.parse_args()
    os.environ["PYTHONSAFEPATH"] = "1"  # each has its own package, not that of the folder in which this runs
    for name in given.guests.split(","):
        found: dict[str, list[Run]] = {python: [] for python in given.python}
        with tempfile.TemporaryDirectory(prefix="vpc-bench-") as folder:
            saved = trio.run(save, name, Path(folder))
            for _ in range(given.runs):
                for python in given.python:
                    found[python].append(trio.run(run, python, saved, given.rate * 1_000_000))
        for python, runs in found.items():
            print(f"{name}, {python}:")
            for what, values in (
                ("served", [float(r.served) for r in runs]),
                ("useless", [float(r.useless) for r in runs]),
                ("waits", [float(len(r.waits)) for r in runs]),
                ("wait p50, us", [r.quantile(0.5) for r in runs]),
                ("wait p99, us", [r.quantile(0.99) for r in runs]),
                ("waited, ms", [sum(r.waits) / 1000 for r in runs]),
                ("block time, ms", [float(r.blocktime) for r in runs]),
            ):
                each = " ".join(f"{value:.0f}" for value in values)
                print(f"  {what}: {statistics.median(values):.0f} ({each})", flush=True)


if __name__ == "__main__":
    main()
