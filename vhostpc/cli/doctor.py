"""``vhostpc doctor``: whether postcopy can work on this computer, and what to change if not."""

from __future__ import annotations

import json
import os
import shutil
import sys
import textwrap
from dataclasses import asdict

import click

from vhostpc.cli.checks import Check, Level, run_checks
from vhostpc.cli.common import CANNOT, DONE, common_options

MARKS = {
    Level.OK: ("ok", "green"),
    Level.NOTE: ("note", "cyan"),
    Level.WARN: ("warn", "yellow"),
    Level.FAIL: ("FAIL", "red"),
}


LEAST_TEXT = 40
"""The narrowest text, in columns, that is put beside a name."""


def text_report(checks: list[Check], columns: int | None = None) -> str:
    """One line per check, and its remedy on the next. ``columns``: the width at which lines are wrapped."""
    width = max(len(c.name) for c in checks)
    beside = columns is None or columns - width - 8 >= LEAST_TEXT
    lines = []
    for check in checks:
        word, colour = MARKS[check.level]
        mark = click.style(f"{word:4}", fg=colour)
        texts = [check.text, *([f"-> {check.mend}"] if check.mend else [])]
        if beside:
            first, *more = [line for text in texts for line in broken(text, columns and columns - width - 8)]
            lines.append(f"{mark}  {check.name:{width}}  {first}")
            lines += [f"{'':4}  {'':{width}}  {line}" for line in more]
        else:
            lines.append(f"{mark}  {check.name}")
            lines += [f"  {line}" for text in texts for line in broken(text, columns and columns - 2)]
    return "\n".join(lines)


def broken(text: str, columns: int | None) -> list[str]:
    """Wrap between words only, so that a long word, such as a path, can still be copied."""
    if columns is None:
        return [text]
    return textwrap.wrap(text, max(columns, 1), break_long_words=False, break_on_hyphens=False)


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, for programs.")
@common_options
def doctor(as_json: bool) -> int:
    """Say whether postcopy migration of vhost-user devices can work here, and what to change if not.

    Exit code 0 if it can, 3 if it cannot.
    """
    checks = run_checks()
    can = not any(c.level is Level.FAIL for c in checks)
    if as_json:
        found = {"postcopy": can, "checks": [{**asdict(c), "level": c.level.value} for c in checks]}
        click.echo(json.dumps(found, indent=2))
    else:
        columns = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
        plain = bool(os.environ.get("NO_COLOR")) or os.environ.get("TERM", "dumb") == "dumb"
        click.echo(text_report(checks, columns), color=False if plain else None)
        click.echo()
        click.echo("Postcopy can work here." if can else "Postcopy cannot work here; everything else can.")
    return DONE if can else CANNOT
