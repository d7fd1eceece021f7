"""``vhostpc demo``: a postcopy migration with traffic on this machine, without QEMU."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import Any

import click
import trio

from vhostpc.cli.common import DONE, FAILED, common_options, start_logging
from vhostpc.cli.demo_run import FRAME, PAGE, Demo, Result, Show
from vhostpc.ufd.client import ClientNumbers


def as_json(result: Result) -> dict[str, Any]:
    """The numbers as one object; times in seconds unless their name says otherwise."""
    numbers = asdict(result)
    numbers |= {"sent": result.sent, "received": result.received, "ok": not result.problems}
    return numbers


def milliseconds(ns: int) -> str:
    return f"{ns / 1e6:.2f} ms"


def print_table(result: Result) -> None:
    """The result for people."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    frames = Table(title=f"frames of {FRAME} bytes, out of the guest and back")
    for name in ("phase", "sent", "received"):
        frames.add_column(name, justify="left" if name == "phase" else "right")
    for p in result.phases:
        frames.add_row(p.name, str(p.sent), str(p.received))
    frames.add_row("all", str(result.sent), str(result.received), style="bold")
    console.print(frames)

    faults = Table(title="page faults served by the front-end")
    columns = ("who", "faults", "distinct pages", "wakes", "p50", "p99", "longest")
    for name in columns:
        faults.add_column(name, justify="left" if name == "who" else "right")
    rows: list[tuple[str, ClientNumbers | None]] = [("bridge", result.bridge), ("guest", result.guest)]
    for who, c in rows:
        if c is not None:
            times = (milliseconds(ns) for ns in (c.waits.p50_ns, c.waits.p99_ns, c.waits.longest_ns))
            faults.add_row(who, str(c.faults), str(c.distinct), str(c.wakes), *times)
    console.print(faults)
    console.print(
        f"{result.placed} of {result.pages} pages of {PAGE} bytes moved, each once "
        f"({result.zero_pages} of them zero); {result.requests} distinct requests; "
        f"{result.withheld_pages} asked-for pages withheld for {result.withheld_s:.1f} s, while the bridge "
        f"answered {result.answered_meanwhile} messages; {result.seconds:.1f} s in all.",
        highlight=False,
    )
    if result.problems:
        console.print("The numbers do not agree: " + "; ".join(result.problems), style="bold red")
    else:
        console.print("Every frame came back whole and once, every page is what it was.", style="bold green")


async def with_progress() -> Result:
    """Run it under a progress bar."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description:36}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=not sys.stderr.isatty()) as progress:
        task = progress.add_task("starting", total=1.0)

        def show(what: str, share: float) -> None:
            progress.update(task, description=what, completed=share)

        return await Demo(show).run()


async def quietly() -> Result:
    show: Show = lambda what, share: None  # noqa: E731
    return await Demo(show).run()


@click.command(short_help="Show a postcopy migration with traffic, without QEMU.")
@click.option("--json", "as_text", is_flag=True, help="Print the numbers as one JSON object.")
@common_options
def demo(as_text: bool) -> int:
    """Move a guest's memory and queues by postcopy while frames flow through a bridge.

    Front-end, page source and bridge are three processes on this machine. Frames flow before, during and after
    the move; pages are withheld for a second and then served. Ends with 1 if the numbers do not agree, with 3
    if this machine can not do it (vhostpc doctor says why).
    """
    start_logging()
    result = trio.run(quietly if as_text else with_progress)
    if as_text:
        click.echo(json.dumps(as_json(result), indent=2))
        for problem in result.problems:
            click.echo(f"vhostpc: {problem}", err=True)
    else:
        print_table(result)
    return FAILED if result.problems else DONE
