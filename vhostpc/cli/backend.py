"""``vhostpc backend``: a user's device as a back-end program that follows the conventions."""

from __future__ import annotations

from collections.abc import Sequence

import click

from vhostpc.cli.common import complete_file
from vhostpc.cli.own_device import find, make
from vhostpc.cli.program import Program, capabilities, program_options


def pairs(_: click.Context, __: click.Parameter, given: Sequence[str]) -> dict[str, str]:
    """``-o KEY=VALUE`` options as keyword arguments."""
    found = {}
    for text in given:
        key, equals, value = text.partition("=")
        if not equals or not key.isidentifier():
            raise click.BadParameter(f"{text!r} is not KEY=VALUE")
        found[key] = value
    return found


@click.command()
@click.argument("target", metavar="MODULE:CLASS", shell_complete=complete_file)
@click.option(
    "-o",
    "--option",
    "arguments",
    multiple=True,
    metavar="KEY=VALUE",
    callback=pairs,
    help="Keyword argument (a string) for CLASS.",
)
@program_options()
def backend(target: str, arguments: dict[str, str], program: Program) -> int:
    """Serve the device MODULE:CLASS (or FILE.py:CLASS) to vhost-user front-ends.

    CLASS is a vhostpc.backend.Device, or a function that makes one. SIGTERM, SIGINT and SIGHUP end the
    program with code 0 and remove its socket.
    """
    factory = find(target)
    if program.print_capabilities:
        click.echo(capabilities(factory if isinstance(factory, type) else make(factory, {})))
        return 0
    program.begin()
    program.serve(make(factory, arguments))
    return 0
