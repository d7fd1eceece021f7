"""Where the time of a switch goes: every step from the last beat at the source to the first at the destination.

``python -m bench.switch [--repetitions N]``. The migration of M3 between two of our machines, without a back-end and
with a bridge, whose processes note when the steps of the switch begin and end (``switch_endpoint.py``). Both ends are
on one clock. Prints for each step when it was, in milliseconds since the last beat of the vCPU that stopped last, and
how long after the step before it: medians. It is a table for the reader and no row: nothing is compared.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import trio

from .m3 import ours
from .rows import REPETITIONS, console

# Stamps in the order in which they come, and what each says. A step of back-ends is missing where there is none.
SOURCE, TARGET = "source", "target"
LAST, FIRST, FIRST_ALL = "last beat", "first beat", "first beat of all"
STEPS = (
    (SOURCE, "stop>", "the source stops its machine"),
    (SOURCE, LAST, "last beat of a vCPU"),
    (SOURCE, "vcpus<", "vCPUs stand"),
    (SOURCE, "bases<", "the back-end has said where its rings stand"),
    (SOURCE, "rings<", "rings looked at"),
    (SOURCE, "stand<", "machine stopped"),
    (SOURCE, "save>", "its stop is told"),
    (SOURCE, "save<", "devices' state made"),
    (SOURCE, "look>", "last look for written pages is waited for"),
    (SOURCE, "look<", "last look ends"),
    (SOURCE, "package>", "discards and package made"),
    (SOURCE, "package<", "package sent"),
    (SOURCE, "serve>", "pages are sent from here on"),
    (TARGET, "discard>", "first discard is here"),
    (TARGET, "discard<", "all discards done"),
    (TARGET, "split>", "whole package is here"),
    (TARGET, "split<", "package split"),
    (TARGET, "arm<", "own memory registered"),
    (TARGET, "heard<", "LISTEN answered"),
    (TARGET, "listen<", "addresses stored"),
    (TARGET, "load>", "load begins"),
    (TARGET, "net>", "load of the net device begins"),
    (TARGET, "net<", "net device loaded"),
    (TARGET, "run>", "RUN"),
    (TARGET, "go<", "vCPUs let go"),
    (TARGET, FIRST, "first beat of a vCPU"),
    (TARGET, FIRST_ALL, "first beat of all vCPUs"),
    (TARGET, "backend<", "back-end started"),
    (TARGET, "run<", "machine runs"),
)
FIRST_OF = ("discard>", "heard>", "net>", "backend>", "go>")
"""Stamps of which the first counts; of all others the last does, before the machine has run."""
Times = dict[tuple[str, str], int]


def read(side: str, file: Path) -> Times:
    """Nanoseconds of the stamps that one end made."""
    found: Times = {}
    for line in file.read_text().splitlines():
        when, _, what = line.partition(" ")
        if what in FIRST_OF and (side, what) in found:
            continue
        found[side, what] = int(when)
    return found


async def one(backends: int) -> Times:
    """One migration."""
    with tempfile.TemporaryDirectory(prefix="vpc-bench-") as folder:
        files = {side: Path(folder) / side for side in (SOURCE, TARGET)}
        reports: list[dict[str, Any]] = []
        program = [sys.executable, "-m", "bench.switch_endpoint"]
        await ours(
            backends,
            program={side: ["env", f"SWITCH={file}", *program] for side, file in files.items()},
            reports=reports,
        )
        found: Times = {}
        for side, file in files.items():
            found |= read(side, file)
    there, here = (report["vcpus"] for report in reports)
    beats = [vcpu["first-beat-ns"] for vcpu in here]
    found[SOURCE, LAST] = max(vcpu["last-beat-ns"] for vcpu in there)
    found[TARGET, FIRST], found[TARGET, FIRST_ALL] = min(beats), max(beats)
    return found


def table(runs: Sequence[Times]) -> list[str]:
    """Lines of it."""
    lines = ["| at | step | ms | after the one before |", "| --- | --- | --- | --- |"]
    rows = []
    for side, stamp, what in STEPS:
        if all((side, stamp) in run for run in runs):
            when = statistics.median((run[side, stamp] - run[SOURCE, LAST]) / 1e6 for run in runs)
            rows.append((when, side, what))
    rows.sort()
    for number, (when, side, what) in enumerate(rows):
        since = when - rows[max(number - 1, 0)][0]
        lines.append(f"| {side} | {what} | {when:.2f} | {since:.2f} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.switch", description=__doc__)
    parser.add_argument("--repetitions", type=int, default=REPETITIONS)
    args = parser.parse_args()
    for count, what in ((0, "no back-end"), (1, "one bridge")):
        runs = []
        for turn in range(args.repetitions):
            console.print(f"switch, {what}: {turn + 1} of {args.repetitions}")
            runs.append(trio.run(one, count))
        print(f"\n{what}, {len(runs)} switches:\n")
        print("\n".join(table(runs)))


if __name__ == "__main__":
    main()
