"""``vhostpc demo``: a machine moves between two endpoints on this computer, without QEMU."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import trio

from vhostpc.cli.common import DONE, FAILED, common_options, start_logging
from vhostpc.cli.demo_books import Result
from vhostpc.cli.demo_run import MIB, SIZE, Demo
from vhostpc.cli.endpoint import size as size_of

if TYPE_CHECKING:
    from rich.progress import TaskID

SMALLEST = 32 * MIB
HARM = "VHOSTPC_DEMO_CORRUPT"
"""An environment variable for tests: one byte of one page is damaged on its way, which must be found."""


def as_json(result: Result) -> dict[str, Any]:
    """The numbers as one object; a unit stands in the name, bytes and seconds in none."""
    return asdict(result) | {"ok": not result.problems}


def duration(ns: int) -> str:
    return f"{ns / 1e6:.2f} ms"


def volume(count: int) -> str:
    return f"{count / MIB:.1f} MiB" if count >= MIB else f"{count / 1024:.0f} KiB"


def tables(result: Result) -> list[tuple[str, list[str], list[list[str]]]]:
    """What is told of a run: titles, heads and rows, numbers as text. For the terminal and the report."""
    p, b = result.pages, result.bytes
    share = 100 / max(p.total, 1)
    came = [
        ["precopy", f"{p.precopy}", f"{p.precopy * share:.1f} %"],
        ["postcopy, in the background", f"{p.background}", f"{p.background * share:.1f} %"],
        ["postcopy, because somebody waited", f"{p.requested}", f"{p.requested * share:.1f} %"],
        ["all", f"{p.total}", ""],
        ["bad", f"{p.bad}", ""],
    ]
    waits = [
        [
            w.name,
            str(w.faults),
            *(duration(ns) if w.faults else "-" for ns in (w.p50_ns, w.p99_ns, w.longest_ns)),
            "-" if w.standstill_ns is None else duration(w.standstill_ns),
        ]
        for w in result.waits
    ]
    frames = [
        [f.name, *map(str, (f.sent, f.received, f.lost_at_switch, f.lost, f.flying))] for f in result.frames
    ]
    times = [
        ["downtime, as QEMU counts it", f"{result.downtime_ms} ms"],
        ["whole migration", f"{result.total_ms} ms"],
        ["bytes by precopy", volume(b.precopy)],
        ["bytes while the machine stood", volume(b.downtime)],
        ["bytes by postcopy", volume(b.postcopy)],
    ]
    return [
        ("how the pages came", ["way", "pages", "share"], came),
        (
            "who waited for pages",
            ["who", "faults", "p50", "p99", "longest", "stood at the switch"],
            waits,
        ),
        (
            "network frames",
            ["device", "sent", "came back", "lost at the switch", "lost else", "on their way"],
            frames,
        ),
        ("times and bytes", ["what", "how much"], times),
    ]


GOOD = "Every frame and every page is accounted for, each page came once and is what it should be."


def print_tables(result: Result) -> None:
    """The result for people."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for title, heads, rows in tables(result):
        table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
        for i, head in enumerate(heads):
            table.add_column(head, justify="right" if i else "left")
        for row in rows:
            table.add_row(*row)
        console.print(table)
    if result.problems:
        console.print("The books do not balance:", style="bold red")
        for problem in result.problems:
            console.print(f"- {problem}", style="red", highlight=False)
    else:
        console.print(GOOD, style="bold green")


async def with_progress(demo: Demo) -> Result:
    """Run it under a bar for each phase, on stderr."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description:40}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
    )
    tasks: dict[str, TaskID] = {}
    with Progress(*columns, console=Console(stderr=True)) as progress:

        def show(what: str, share: float) -> None:
            if what not in tasks:
                tasks[what] = progress.add_task(what, total=1.0)
            progress.update(tasks[what], completed=share)

        demo.show = show
        return await demo.run()


def memory(_: click.Context, __: click.Parameter, text: str) -> int:
    size = size_of(text)
    if size < SMALLEST or size % 4096:
        raise click.BadParameter(f"{text!r} is not whole pages of 4096 bytes, {SMALLEST // MIB}M at least")
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
    "--report",
    "page",
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    metavar="FILE",
    help="Write the run in pictures: an HTML page that needs nothing else.",
)
@common_options
def demo(as_text: bool, size: int, page: Path | None) -> int:
    """Move a machine from one endpoint to another, by precopy and then by postcopy, while it works.

    Five processes: two endpoints, a bridge at each, and this one, which drives their monitors and sends back each
    network frame that comes out of a bridge. The machine's two vCPUs rewrite and check its memory all the time. Ends
    with 1 if the numbers do not agree, with 3 if this machine can not do it (vhostpc doctor says why).
    """
    start_logging()
    work = Demo(size=size, harm=bool(os.environ.get(HARM)))
    result = trio.run(with_progress, work)
    if page is not None:
        from vhostpc.cli.report import html

        page.write_text(html(result, work.story), encoding="utf-8")
        click.echo(f"vhostpc: the report is in {page}", err=True)
    if as_text:
        click.echo(json.dumps(as_json(result), indent=2))
        for problem in result.problems:
            click.echo(f"vhostpc: {problem}", err=True)
    else:
        print_tables(result)
    return FAILED if result.problems else DONE
