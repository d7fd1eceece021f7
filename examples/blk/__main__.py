"""The disk as a program: its own options, and all those of ``vhostpc backend``."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from vhostpc.cli.main import run


@click.command(
    context_settings={"ignore_unknown_options": True, "help_option_names": ["-h", "--help"]},
    epilog="All other options are those of vhostpc backend: --socket-path PATH, --fd N, --once, …",
)
@click.option("--blk-file", metavar="FILE", help="The disk: a file or block device.")
@click.option("--memory", metavar="SIZE", help="An empty disk in memory instead, such as 64M.")
@click.option("--read-only", is_flag=True, help="The guest can not write.")
@click.option("--queues", type=click.IntRange(1, 64), default=2, show_default=True)
@click.argument("others", nargs=-1, type=click.UNPROCESSED)
def main(
    blk_file: str | None, memory: str | None, read_only: bool, queues: int, others: tuple[str, ...]
) -> None:
    """Serve a disk to vhost-user front-ends."""
    given = {
        "blk_file": blk_file,
        "memory": memory,
        "read_only": "yes" if read_only else None,
        "queues": queues,
    }
    device = f"{Path(__file__).parent / 'blk.py'}:Blk"
    options = [word for key, value in given.items() if value is not None for word in ("-o", f"{key}={value}")]
    sys.exit(run(["backend", device, *options, *others]))


if __name__ == "__main__":
    main()
