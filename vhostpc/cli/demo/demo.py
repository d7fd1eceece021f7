"""``vhostpc demo``: a machine moves between two endpoints on this computer, without QEMU."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import trio

from vhostpc.cli.common import (
    DONE,
    FAILED,
    CannotHere,
    common_options,
    ending_signals,
    need_descriptors,
    start_logging,
)
from vhostpc.cli.demo.books import Result
from vhostpc.cli.demo.outages import MOST_CUTS, RECOVER_FOR
from vhostpc.cli.demo.run import MIB, SIZE, Demo
from vhostpc.cli.demo.tables import GOOD, tables
from vhostpc.cli.endpoint_command import size as size_of
from vhostpc.memory.available import available_memory
from vhostpc.units import TARGET_PAGE, in_units

SMALLEST = 32 * MIB
BESIDES = 400 * MIB
"""Memory of the five processes themselves, at most."""
HARM = "VHOSTPC_DEMO_CORRUPT"
"""An environment variable for tests: one byte of one page is damaged in transit, which must be detected."""
RECOVERY = "VHOSTPC_DEMO_RECOVER_FOR"
"""An environment variable for tests: seconds for which both ends recover. With 0 they do not, which ends the run."""


def as_json(result: Result) -> dict[str, Any]:
    """The numbers as one object; names include the unit, except for bytes and seconds."""
    told = asdict(result) | {"ok": not result.problems}
    if not result.pauses:
        del told["pauses"], told["steps"], told["requests"]["again"]
    return told


def print_tables(result: Result) -> None:
    """The result for people."""
    from vhostpc.cli.demo.output import print_table, screen

    console = screen()
    for title, heads, rows in tables(result):
        print_table(console, title, heads, rows)
    if result.problems:
        console.print("The numbers do not agree:", style="bold red")
        for problem in result.problems:
            console.print(f"- {problem}", style="red", markup=False)
    else:
        console.print(GOOD, style="bold green")


async def with_progress(demo: Demo) -> Result:
    """Run it, and show its phases on stderr."""
    from vhostpc.cli.demo.output import phases

    with phases() as demo.show:
        async with trio.open_nursery() as nursery:
            with trio.open_signal_receiver(*(n for n in ending_signals() if n != signal.SIGINT)) as signals:
                nursery.start_soon(_end, signals)
                result = await demo.run()
                nursery.cancel_scope.cancel()
        return result


async def _end(signals: AsyncIterator[int]) -> None:
    """Remove all processes and files, then end the program as the signal would have."""
    async for number in signals:
        raise SystemExit(128 + number)


def must_fit(size: int) -> None:
    """Raises CannotHere: there are two machines of that size for a while."""
    needs, free = 2 * size + BESIDES, available_memory()
    if needs > free:
        raise CannotHere(
            f"a machine of {in_units(size)} at both ends needs {needs // MIB} MiB of memory, and {free // MIB} MiB are"
            " free: --size makes it smaller"
        )


def page_path(_: click.Context, __: click.Parameter, page: Path | None) -> Path | None:
    """Check that the report can be written, before the run."""
    if page is not None and not (page.parent.is_dir() and os.access(page.parent, os.W_OK | os.X_OK)):
        raise click.BadParameter(f"the folder {str(page.parent)!r} is not there, or cannot be written to")
    return page


def memory(_: click.Context, __: click.Parameter, text: str) -> int:
    size = size_of(text)
    if size < SMALLEST or size % TARGET_PAGE:
        raise click.BadParameter(f"{text!r} is not whole pages of 4 KiB, {SMALLEST // MIB}M at least")
    return size


@click.command(short_help="Show a migration by precopy and postcopy with traffic, without QEMU.")
@click.option("--json", "as_text", is_flag=True, help="Print the numbers as one JSON object.")
@click.option(
    "--size",
    default=f"{SIZE // MIB}M",
    show_default=True,
    callback=memory,
    metavar="SIZE",
    help="Memory of the machine.",
)
@click.option(
    "--cut",
    "cuts",
    type=click.IntRange(0, MOST_CUTS),
    default=0,
    show_default=True,
    metavar="N",
    help=f"Lose the link N times in postcopy, {MOST_CUTS} at most: both ends pause and recover.",
)
@click.option(
    "--report",
    "page",
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    callback=page_path,
    metavar="FILE",
    help="Draw the run as a self-contained HTML page.",
)
@common_options
def demo(as_text: bool, size: int, cuts: int, page: Path | None) -> int:
    """Move a machine from one endpoint to another, by precopy and then by postcopy, while it works.

    Five processes: two endpoints, a bridge at each, and this one, which drives their monitors and sends back each
    network frame that comes out of a bridge. The machine's two vCPUs rewrite and check its memory all the time. Ends
    with 1 if the numbers do not agree, with 3 if this computer cannot do it (vhostpc doctor says why).
    """
    start_logging()
    need_descriptors()
    must_fit(size)
    recover_for = float(os.environ.get(RECOVERY, RECOVER_FOR))
    work = Demo(size=size, harm=bool(os.environ.get(HARM)), cuts=cuts, recover_for=recover_for)
    result = trio.run(with_progress, work)
    if as_text:
        click.echo(json.dumps(as_json(result), indent=2))
        for problem in result.problems if not sys.stdout.isatty() else ():
            click.echo(f"vhostpc: {problem}", err=True)
    else:
        print_tables(result)
    if page is not None:
        from vhostpc.cli.demo.report import html

        page.write_text(html(result, work.story), encoding="utf-8")
        click.echo(f"vhostpc: the report is in {page}", err=True)
    return FAILED if result.problems else DONE
