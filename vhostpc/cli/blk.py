"""``vhostpc blk``: a file, or memory, as a virtio disk. The device is ``vhostpc.backend.disk.Disk``."""

from __future__ import annotations

import click

from vhostpc.backend.disk import Disk
from vhostpc.cli.program import Program, capabilities, program_options


@click.command()
@click.option(
    "--blk-file", type=click.Path(), metavar="FILE", help="The disk: an existing file or block device."
)
@click.option("--memory", metavar="SIZE", help="An empty disk in memory instead, such as 64M.")
@click.option("--read-only", is_flag=True, help="The guest cannot write.")
@click.option("--queues", type=click.IntRange(1, 64), default=2, show_default=True, help="Number of queues.")
@click.option(
    "--ring-size",
    type=click.IntRange(4, 32768),
    default=64,
    show_default=True,
    help="Entries in the smallest ring that a guest uses without indirect descriptors.",
)
@program_options()
def blk(
    blk_file: str | None, memory: str | None, read_only: bool, queues: int, ring_size: int, program: Program
) -> int:
    """Serve a disk to vhost-user front-ends.

    In QEMU: -chardev socket,id=blk,path=PATH -device vhost-user-blk-pci,chardev=blk,num-queues=2

    SIGTERM, SIGINT and SIGHUP end the program with code 0 and remove its socket.
    """
    if program.print_capabilities:
        click.echo(capabilities(Disk))
        return 0
    if bool(blk_file) == bool(memory):
        raise click.UsageError("give one of --blk-file and --memory")
    program.begin()
    disk = Disk(blk_file or "", memory or "", read_only=read_only, queues=queues, ring_size=ring_size)
    program.serve(disk)
    return 0
