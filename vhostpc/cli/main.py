"""The command ``vhostpc``: finds the subcommand, and turns an error into one sentence and an exit code.

Exit codes: 0 done, 1 the work failed, 2 wrong usage, 3 this computer cannot do it (``vhostpc doctor`` says
why), 130 interrupted from the keyboard.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from typing import NoReturn

import click
from click.shell_completion import CompletionItem

from vhostpc.cli.common import CANNOT, DONE, FAILED, Settings, common_options
from vhostpc.cli.streams import hold_streams, leave, let_stdout_go
from vhostpc.errors import PostcopyRefused, Shortage, UfdError, VhostpcError, is_foreseen, sentence

INTERRUPTED = 130

# Name: (where it lives, what --help says). A subcommand is imported when it is called.
COMMANDS = {
    "backend": ("vhostpc.cli.backend:backend", "Serve your own device to a vhost-user front-end."),
    "bridge": ("vhostpc.cli.bridge:bridge", "Connect a guest's network card to UDP or to a tap device."),
    "blk": ("vhostpc.cli.blk:blk", "Serve a file, or memory, to a guest as a disk."),
    "demo": (
        "vhostpc.cli.demo.demo:demo",
        "Show a postcopy migration with traffic on this computer, without QEMU.",
    ),
    "endpoint": (
        "vhostpc.cli.endpoint_command:endpoint",
        "Receive, hold and send machines as QEMU does, driven by QEMU's monitor commands.",
    ),
    "inspect": (
        "vhostpc.cli.inspect:inspect",
        "Describe a migration stream of QEMU; name its first wrong byte.",
    ),
    "proxy": (
        "vhostpc.cli.proxy:proxy",
        "Stand between the two ends of a migration, tell what passes, and break it where told.",
    ),
    "doctor": (
        "vhostpc.cli.doctor:doctor",
        "Say whether postcopy can work on this computer, and what to change if not.",
    ),
    "completion": (
        "vhostpc.cli.completion:completion",
        "Print a script with which a shell completes commands, options and file names.",
    ),
}


def load(name: str) -> click.Command:
    """The subcommand of that name."""
    module, attribute = COMMANDS[name][0].split(":")
    command = getattr(importlib.import_module(module), attribute)
    assert isinstance(command, click.Command)
    return command


class LazyGroup(click.Group):
    """A group that imports a subcommand only to run it or to show its own help."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        return load(cmd_name) if cmd_name in COMMANDS else None

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """The names, without loading the subcommands: a person waits at each key press."""
        found = [
            CompletionItem(name, help=text)
            for name, (_, text) in COMMANDS.items()
            if name.startswith(incomplete)
        ]
        return found + click.Command.shell_complete(self, ctx, incomplete)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


def _version(context: click.Context, _: click.Parameter, value: bool) -> None:
    if value and not context.resilient_parsing:
        from importlib.metadata import version

        click.echo(f"vhostpc {version('vhostpc')}")
        context.exit()


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_version, help="Show the version."
)
@common_options
def cli() -> None:
    """vhost-user back-ends that survive postcopy migration."""


def leaves(error: BaseException) -> Iterator[BaseException]:
    """The errors inside nested exception groups, in order."""
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from leaves(inner)
    else:
        yield error


def told(error: BaseException) -> tuple[str, int]:
    """What to say about an error, and the exit code."""
    text = sentence(error)
    if isinstance(error, UfdError | PostcopyRefused | Shortage):
        return text, CANNOT
    return text if is_foreseen(error) else f"{text} (--debug shows the traceback)", FAILED


def report(error: BaseException, debug: bool) -> int:
    """Report the most important error to the user; returns the exit code."""
    found = list(leaves(error))
    # A wrong option and an interrupt come first, then what we raise on purpose, then the rest.
    for kind in (click.ClickException, KeyboardInterrupt, click.Abort, VhostpcError, OSError, BaseException):
        first = next((e for e in found if isinstance(e, kind)), None)
        if first is not None:
            break
    assert first is not None
    if debug:
        import traceback

        traceback.print_exception(error)
    if isinstance(first, click.ClickException):
        first.show()
        return first.exit_code
    if isinstance(first, KeyboardInterrupt | click.Abort):
        return INTERRUPTED
    if isinstance(first, SystemExit):
        return first.code if isinstance(first.code, int) else FAILED
    text, code = told(first)
    click.echo(f"vhostpc: {text}", err=True)
    return code


def run(
    arguments: Sequence[str] | None = None, command: click.Command | None = None, name: str = "vhostpc"
) -> int:
    """Run the command line and return the exit code. ``command``: a single one, called ``name`` in its usage line."""
    options = Settings()
    try:
        # With standalone_mode off, click returns the code given to Context.exit, or what the command returns.
        code = (command or cli).main(
            args=list(arguments) if arguments is not None else None,
            prog_name=name,
            standalone_mode=False,
            obj=options,
        )
    except BrokenPipeError:
        let_stdout_go()
        return FAILED
    except BaseException as error:
        return report(error, options.debug)
    return code if isinstance(code, int) else DONE


def main(only: str | None = None, name: str = "vhostpc") -> NoReturn:
    """Entry point of the installed command. ``only``: of a program that is this one subcommand, called ``name``."""
    hold_streams()
    if only is None:
        leave(run())
    command = load(only)
    command.context_settings = {"help_option_names": ["-h", "--help"]}
    leave(run(command=command, name=name))
