"""Parts common to the subcommands: options, exit codes, one-sentence errors."""

from __future__ import annotations

import errno
import logging
import os
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import click
from click.shell_completion import CompletionItem

DONE, FAILED, USAGE, CANNOT = 0, 1, 2, 3
"""Exit codes: done; the work failed; wrong usage; this machine cannot do it."""

#: Descriptors that a session of a device with two queues, a migration and a few monitors need together.
LEAST_DESCRIPTORS = 32
LEVELS = ["debug", "info", "warning", "error"]
F = TypeVar("F", bound=Callable[..., Any])


@dataclass
class Settings:
    """The values of the options common to all commands."""

    debug: bool = False
    log_level: str = "info"


class Failure(click.ClickException):
    """The work failed; the message says what failed and why. Exit code 1."""

    exit_code = FAILED

    def show(self, file: Any = None) -> None:
        click.echo(f"vhostpc: {self.format_message()}", err=True)


class CannotHere(Failure):
    """This computer, or this process's privileges, do not allow it. Exit code 3."""

    exit_code = CANNOT


def ending_signals() -> list[signal.Signals]:
    """The signals that end a program in good order, as they end QEMU, except one that ``nohup`` makes us ignore."""
    ignores_hangup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return [signal.SIGTERM, signal.SIGINT, *([] if ignores_hangup else [signal.SIGHUP])]


@contextmanager
def ended_in_order() -> Iterator[None]:
    """A block whose clean-up is done when one of :func:`ending_signals` ends it. For a program without tasks."""

    def end(number: int, _: object) -> None:
        sys.exit(128 + number)  # as a shell reports a program that a signal has ended

    before = {number: signal.signal(number, end) for number in ending_signals() if number != signal.SIGINT}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def settings() -> Settings:
    """The settings of the running command."""
    context = click.get_current_context(silent=True)
    found = context.find_root().obj if context is not None else None
    return found if isinstance(found, Settings) else Settings()


def complete_file(_: click.Context, __: click.Parameter, begun: str) -> list[CompletionItem]:
    """For a value that is, or begins with, a file name: a shell completes it as one."""
    return [CompletionItem(begun, type="file")]


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
        type=click.Choice(LEVELS, case_sensitive=False),
        expose_value=False,
        callback=_note_level,
        help=f"How much to log on stderr.  [default: {Settings.log_level}]",
    )
    debug = click.option(
        "--debug",
        is_flag=True,
        expose_value=False,
        callback=_note_debug,
        help="Show the traceback of an error.",
    )
    return debug(level(command))


class Log(Protocol):
    """A destination for log lines."""

    def write(self, text: str) -> object: ...

    def flush(self) -> None: ...


def start_logging(to: Log | None = None) -> None:
    """Log to stderr, or to its substitute, at the chosen level."""
    handler: logging.StreamHandler[Any] = logging.StreamHandler(to or sys.stderr)
    logging.basicConfig(
        handlers=[handler],
        level=settings().log_level.upper(),
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )


MORE_DESCRIPTORS = "raise the limit (ulimit -n, LimitNOFILE= in a unit)"


def few_descriptors() -> str:
    """An error message if a first session would hit the limit of open files (RLIMIT_NOFILE, getrlimit(2)), or ""."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        used = len(os.listdir("/proc/self/fd"))
    except OSError as e:
        if e.errno not in (errno.EMFILE, errno.ENFILE):
            return ""  # without /proc they cannot be counted
        used = limit  # not one more
    if limit == resource.RLIM_INFINITY or limit - used >= LEAST_DESCRIPTORS:
        return ""
    return f"this process may have {limit} open files, of which {used} are taken; it needs {LEAST_DESCRIPTORS} more"


def need_descriptors() -> None:
    """Raises CannotHere if a first session would hit the limit of open files."""
    if problem := few_descriptors():
        raise CannotHere(f"{problem}: {MORE_DESCRIPTORS}")
