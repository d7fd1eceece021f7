"""``vhostpc completion``: the script with which a shell asks this program for completions."""

from __future__ import annotations

import click
from click.shell_completion import ShellComplete, get_completion_class

from vhostpc.cli.common import common_options

SHELLS = ["bash", "zsh", "fish"]
NAME, VARIABLE = "vhostpc", "_VHOSTPC_COMPLETE"


@click.command()
@click.argument("shell", type=click.Choice(SHELLS))
@common_options
def completion(shell: str) -> int:
    """Print a script for bash, zsh or fish that completes commands, options and file names.

    \b
    bash: vhostpc completion bash > ~/.local/share/bash-completion/completions/vhostpc
    zsh:  vhostpc completion zsh > _vhostpc, in a folder of $fpath
    fish: vhostpc completion fish > ~/.config/fish/completions/vhostpc.fish
    """
    kind = get_completion_class(shell)
    assert kind is not None
    # Not the class's own source(): bash's would start a bash to find its version.
    click.echo(ShellComplete.source(kind(click.Command(NAME), {}, NAME, VARIABLE)))
    return 0
