"""Migration between this package and QEMU: the two ends, the machine that is held between them, addresses, options."""

from typing import TYPE_CHECKING

from vhostpc.lazy import exports

if TYPE_CHECKING:
    from vhostpc.migration.channel import Channel, Listener, connect, listen
    from vhostpc.migration.held import HeldMachine
    from vhostpc.migration.incoming import Incoming, Phase
    from vhostpc.migration.info import MigrationInfo, RamInfo
    from vhostpc.migration.machine import Machine
    from vhostpc.migration.options import Options
    from vhostpc.migration.outgoing import After, NeverRan, Outgoing, Watcher
    from vhostpc.migration.state import Event, Status
    from vhostpc.migration.uri import Address, Exec, Fd, File, Tcp, Unix, parse_address

__all__ = [
    "Address",
    "After",
    "Channel",
    "Event",
    "Exec",
    "Fd",
    "File",
    "HeldMachine",
    "Incoming",
    "Listener",
    "Machine",
    "MigrationInfo",
    "NeverRan",
    "Options",
    "Outgoing",
    "Phase",
    "RamInfo",
    "Status",
    "Tcp",
    "Unix",
    "Watcher",
    "connect",
    "listen",
    "parse_address",
]

if not TYPE_CHECKING:  # for a type checker it would stand for every name
    __getattr__ = exports(
        __name__,
        {
            "vhostpc.migration.channel": "Channel Listener connect listen",
            "vhostpc.migration.held": "HeldMachine",
            "vhostpc.migration.incoming": "Incoming Phase",
            "vhostpc.migration.info": "MigrationInfo RamInfo",
            "vhostpc.migration.machine": "Machine",
            "vhostpc.migration.options": "Options",
            "vhostpc.migration.outgoing": "After NeverRan Outgoing Watcher",
            "vhostpc.migration.state": "Event Status",
            "vhostpc.migration.uri": "Address Exec Fd File Tcp Unix parse_address",
        },
    )
