"""The command line. Of its modules only this one is for others: a command as a program of its own."""

from typing import NoReturn


def run_only(command: str, name: str) -> NoReturn:
    """Run the subcommand ``command`` of ``vhostpc`` with the arguments of this process, and end it.

    ``name``: what the program is called in its usage line.
    """
    from vhostpc.cli.main import main

    main(command, name)
