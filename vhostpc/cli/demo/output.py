"""The output of ``vhostpc demo`` on a screen of any width, or without one: its phases, and the numbers.

No number is cut: where a table does not fit, its rows are printed as lists.
"""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import click
from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table
from rich.text import Text

from vhostpc.qmp.screen import is_dumb

WIDE, MIDDLING, NARROW = 72, 44, 24
"""Columns from which a phase is described in a sentence, has a bar, has its time."""
Show = Callable[[str, float], None]


def screen(*, stderr: bool = False) -> Console:
    """A console of the terminal's width, for any terminal."""
    width, height = shutil.get_terminal_size()
    stream = sys.stderr if stderr else sys.stdout
    fixed = stream.isatty() and is_dumb()  # otherwise determined by the library, and again when it changes
    return Console(
        stderr=stderr,
        highlight=False,
        width=width if fixed else None,
        height=height if fixed else None,
        force_terminal=False if fixed else None,
    )


def fitting(
    console: Console, heads: Sequence[str], rows: Sequence[Sequence[str]], title: str
) -> Table | None:
    """A table no wider than the screen, its heads in as few lines as that allows; None if there is none."""
    for most in range(max(map(len, heads)), 0, -1):
        shown = ["\n".join(textwrap.wrap(head, most, break_long_words=False)) for head in heads]
        table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
        for i, head in enumerate(shown):
            table.add_column(head, justify="right" if i else "left", no_wrap=True)
        for row in rows:
            table.add_row(*row)
        if console.measure(table, options=console.options.update(width=10_000)).maximum <= console.width:
            return table
    return None


def print_rows(console: Console, title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """``head: value``, one per line; if that is too long, the value, which is never wrapped, on the next."""
    console.print(Text(title, "bold"))
    for first, *values in rows:
        told = [(head, value) for head, value in zip(heads[1:], values, strict=True) if value]
        if len(heads) == 2:
            told, margin = [(first, value) for _, value in told], ""
        else:
            console.print(Text(first))
            margin = "  "
        for head, value in told:
            line = f"{margin}{head}: {value}"
            for part in (line,) if len(line) <= console.width else (f"{margin}{head}:", f"{margin}  {value}"):
                console.print(Text(part))
    console.print()


def print_table(console: Console, title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    table = fitting(console, heads, rows, title)
    if table is None:
        print_rows(console, title, heads, rows)
    else:
        console.print(table)


def columns(width: int) -> list[ProgressColumn]:
    """The columns that fit."""
    name = "{task.description:40}" if width >= WIDE else "{task.fields[short]:9}"
    found: list[ProgressColumn] = [TextColumn(name)]
    if width >= MIDDLING:
        found.append(BarColumn(40 if width >= WIDE + 16 else 14))
    found.append(TaskProgressColumn())
    if width >= NARROW:
        found.append(TimeElapsedColumn())
    return found


def short(phase: str) -> str:
    """A phase in a word."""
    return phase.partition(":")[0].partition(" ")[0]


@contextmanager
def phases() -> Iterator[Show]:
    """Shows the progress of each phase on stderr: as a growing bar, or as a line when it is over."""
    console = screen(stderr=True)
    if not console.is_terminal:
        over: set[str] = set()

        def tell(what: str, share: float) -> None:
            if share >= 1 and what not in over:
                over.add(what)
                click.echo(f"{what:40} 100%", err=True)

        yield tell
        return
    tasks: dict[str, TaskID] = {}
    with Progress(*columns(console.width), console=console) as progress:

        def show(what: str, share: float) -> None:
            if what not in tasks:
                tasks[what] = progress.add_task(what, total=1.0, short=short(what))
            progress.update(tasks[what], completed=share)

        yield show
