"""``vhostpc doctor``: can this machine do it, and what to change if not."""

from __future__ import annotations

import json
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


def text_report(checks: list[Check]) -> str:
    """One line a check; what to do about it on the next."""
    width = max(len(c.name) for c in checks)
    lines = []
    for check in checks:
        word, colour = MARKS[check.level]
        lines.append(f"{click.style(f'{word:4}', fg=colour)}  {check.name:{width}}  {check.text}")
        if check.mend:
            lines.append(f"{'':4}  {'':{width}}  -> {check.mend}")
    return "\n".join(lines)


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, for machines.")
@common_options
def doctor(as_json: bool) -> int:
    """Say whether postcopy migration of vhost-user devices can work here, and what to change if not.

    Exit code 0 if it can, 3 if it can not.
    """
    checks = run_checks()
    can = not any(c.level is Level.FAIL for c in checks)
    if as_json:
        found = {"postcopy": can, "checks": [{**asdict(c), "level": c.level.value} for c in checks]}
        click.echo(json.dumps(found, indent=2))
    else:
        click.echo(text_report(checks))
        click.echo()
        click.echo("Postcopy can work here." if can else "Postcopy can not work here; everything else can.")
    return DONE if can else CANNOT
