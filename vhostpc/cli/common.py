"""What the subcommands share: options, exit codes, one-sentence errors."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import click

DONE, FAILED, USAGE, CANNOT = 0, 1, 2, 3
"""Exit codes: done; the work failed; wrong usage; this machine can not do it."""

LEVELS = ["debug", "info", "warning", "error"]
F = TypeVar("F", bound=Callable[..., Any])


@dataclass
class Settings:
    """What the options that every command takes said."""

    debug: bool = False
    log_level: str = "info"


class Failure(click.ClickException):
    """The work failed; the text names what and why. Exit code 1."""

    exit_code = FAILED

    def show(self, file: Any = None) -> None:
        click.echo(f"vhostpc: {self.format_message()}", err=True)


class CannotHere(Failure):
    """This machine, or this process's rights, do not allow it. Exit code 3."""

    exit_code = CANNOT


def settings() -> Settings:
    """The settings of the running command."""
    context = click.get_current_context(silent=True)
    found = context.find_root().obj if context is not None else None
    return found if isinstance(found, Settings) else Settings()


def _note_debug(context: click.Context, _: click.Parameter, value: bool) -> None:
    if value:
        context.find_root().ensure_object(Settings).debug = True


def _note_level(context: click.Context, _: click.Parameter, value: str | None) -> None:
    if value is not None:
        context.find_root().ensure_object(Settings).log_level = value


def common_options(command: F) -> F:
    """``--debug`` and ``--log-level``, which may stand before or after the subcommand's name."""
    level = click.option(
        "--log-level",
        type=click.Choice(LEVELS),
        expose_value=False,
        callback=_note_level,
        help="How much to log on stderr (default: info).",
    )
    debug = click.option(
        "--debug",
        is_flag=True,
        expose_value=False,
        callback=_note_debug,
        help="Show the traceback of an error.",
    )
    return debug(level(command))


def start_logging() -> None:
    """Log to stderr at the level asked for."""
    logging.basicConfig(
        stream=sys.stderr,
        level=settings().log_level.upper(),
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
