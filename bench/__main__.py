"""``python -m bench [ROW ...] [--repetitions N] [--no-write]``: run rows, print the table, keep it."""

from __future__ import annotations

import argparse
import datetime
import importlib
import os
import platform
import shlex
import sys
from pathlib import Path

import trio
from rich.table import Table

from tests.qemu.peers import PeerMissing

from . import ROOT
from .peers import PeerError, bridge_version, dpdk_version
from .rows import HEAD, REPETITIONS, Row, console

ROWS = ["n1", "n2", "n3", "n4", "f1", "f2", "f3", "f4", "p1", "m0", "m1", "m2", "m3", "m4", "r3", "d1", "i1"]
RESULT = ROOT / "docs" / "benchmarks.md"
TEXT = """# Benchmarks

Every figure is a ratio of two programs run in turn on one machine; the absolute figures are for scale. A cell
is the median of {repetitions} runs, with the smallest and the largest. Frames are counted where they arrive,
by the same native program for both sides (in N4 by each receiver itself). Losses on the way are stated,
and "sender" is the sender's own rate. Less is better where the unit is a time or a size.

- date: {date}
- machine: {machine}
- other work on the machine at the start: load average {load:.1f} (above 0.5 the spreads are wide)
- command: `{command}`
- peers: vhost-user-bridge of Debian's QEMU source package {bridge}, its output discarded
  ("no dump": built without its dump of every frame); DPDK {dpdk}; Debian's QEMU 10.0
- guest: DPDK's testpmd on virtio-user, which polls on core 1; all else runs on core 0

{table}

What limits each figure:

- N1: the kernel's UDP path. The pump spends all but a few hundredths of its time in `sendmmsg`, one call for up to 64
  messages. Frames of one size are joined (UDP_SEGMENT): the kernel carries up to 64 of them as one, and the receiver
  gets them so. That is most of the difference. Mixed sizes mostly cannot be joined, so there the lead over a bridge
  without a dump is smallest.
- N2: the sender, where nothing is lost and its rate equals ours: it cannot send faster. Sent one by one, each
  datagram costs sender and receiver a pass through the kernel of its own, and that pass is most of the cost.
- N2, in and out again: the guest's transmit ring of 256. The pump into the guest can go on until that ring is full
  while the pump out of it waits for a turn on the same core; the guest then drops. A yield after each publishing was
  tried. It helped little here, and a sender that never pauses then kept the core: an eighth of the frames arrived.
- N4: where both figures are equal, the sender.
- F1: the kernel's fault and wake-up. p99 across two cores is the scheduler's: with other work on the machine it is
  milliseconds for both sides. The busy Python thread costs no GIL, only a processor: with two cores, where it is
  bound to the handler's core while the toucher has the other, some wake-ups wait for the end of its time slice.
- F2: idle, four wake-ups of sleeping threads: fault loop, source, load, and the toucher; `python -m bench.stages`
  shows where each microsecond goes. While pages flow without preempt, the data queued ahead of the requested page: in
  the source's output, in the socket, in the load's input. With preempt a requested page waits for none of it; then the
  wake-ups take longer, because the two threads that carry the flow want both cores. They have nice 10 and make short
  calls. Spinning needs idle cores: on two it takes them from threads that have work to do, so p50 stays and p99 grows;
  each touch costs the destination both cores until the next.
- F3: a processor. The fault loop and the load need no GIL, but with two cores a wake-up may wait for the end of the
  busy thread's time slice, some 3 ms, which makes p99 in some runs and not in others. With the busy thread at nice 19
  none of three runs had it. While pages flow, the busy thread and the two that carry the flow are three for two
  cores.
- F4: together, the start of 64 threads (23 us each here), which wait so that their pages are reported, and a wake-up
  for each page. The rest is the start of the ring, message by message, some 1 ms on both sides.
- P1: the pause between two questions whether the page has come, an eighth of the wait so far and at most 2 ms: a page
  lies there for half a pause on average. The fault's side is the kernel's wake-up. docs/postcopy.md has figures.
- M1: the kernel's allocation of pages for a memfd. Touched through a mapping, each costs a fault and a clearing. That
  is nearly all of it, for pages of data as for marks of zeros.
- M2: full pages: the copies into the socket and out of it, and the first read of each page in memory; zero pages: the
  read. A source whose pages are not mapped yet also pays one fault for every 16 of them.
- M3: the turns of the loop. At the source the last look for written pages (half a millisecond for 256 MiB) and the
  back-end's answer with its ring positions; at the destination some ten steps of 0.1 to 0.2 ms in Python from the
  package to the first vCPU, with two processors for four busy threads. Everything that does not depend on the package
  is done before the machine stops: `python -m bench.switch` shows each step. Loading before the next pages are read
  made no difference, nor did keeping pages back that nobody asks for until the machine runs (tried with a bridge).
  QEMU's reported downtime ends
  when the package has been sent; it excludes the destination's work on the package.
- M4: as M1 and M2. Creating pages through a mapping takes more than twice as long per page at 4 GiB as at 1 GiB on
  such a machine, also in a program of ten lines; writing them into the file does not.
- R3: Python. Both ends make the recovery's steps in some twenty turns of the loop, 4 to 5 ms of processor time each;
  the bitmaps, the pages and their requests are C's and cost little, so the size makes no difference. On a busy machine
  each turn may wait for a processor; a QEMU needs few.
- M0: the interpreter and its modules.
- D1: plain Python, a batch at a time; a device with bulk data uses a pump.

The docstrings of `bench/n1.py` and its neighbours describe the rows and how they are counted.
"""


def machine() -> str:
    model = "unknown processor"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.split(":", 1)[1].strip()
            break
    return f"{os.cpu_count()} cores ({model}), Linux {platform.release()}, Python {platform.python_version()}"


def markdown(table: list[Row]) -> str:
    lines = ["| " + " | ".join(HEAD) + " |", "|" + " --- |" * len(HEAD)]
    lines += ["| " + " | ".join(row.cells()) + " |" for row in table]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"of {', '.join(ROWS)}; default: all")
    parser.add_argument("--repetitions", type=int, default=REPETITIONS)
    parser.add_argument("--no-write", action="store_true", help=f"leave {RESULT.relative_to(ROOT)} as it is")
    args = parser.parse_args()
    wanted = [name.lower() for name in args.rows] or ROWS
    if unknown := set(wanted) - set(ROWS):
        parser.error(f"no such row: {', '.join(sorted(unknown))}; there are {', '.join(ROWS)}")
    table: list[Row] = []
    load = os.getloadavg()[0]
    try:
        for name in wanted:
            table += trio.run(importlib.import_module(f"bench.{name}").rows, args.repetitions)
    except (PeerError, PeerMissing) as err:
        print(err, file=sys.stderr)
        return 3
    shown = Table(*HEAD)
    for row in table:
        shown.add_row(*row.cells())
    console.__class__(width=max(console.width, 160)).print(shown)
    if not args.no_write and wanted == ROWS:
        RESULT.parent.mkdir(exist_ok=True)
        RESULT.write_text(
            TEXT.format(
                repetitions=args.repetitions,
                date=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
                machine=machine(),
                load=load,
                command=shlex.join(["python", "-m", "bench", *sys.argv[1:]]),
                bridge=bridge_version(),
                dpdk=dpdk_version(),
                table=markdown(table),
            )
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
