"""Migration between this package and QEMU: the two ends, the machine that is held between them, addresses, options."""

from typing import TYPE_CHECKING

from vhostpc.lazy import exports

if TYPE_CHECKING:
    from vhostpc.migration.channel import Channel, Listener, connect, listen
    from vhostpc.migration.held import HeldMachine
    from vhostpc.migration.incoming import Incoming
    from vhostpc.migration.info import MigrationInfo, RamInfo
    from vhostpc.migration.machine import Machine
    from vhostpc.migration.options import Options
    from vhostpc.migration.outgoing import After, NeverRan, Outgoing
    from vhostpc.migration.phase import Course, Event, Phase
    from vhostpc.migration.runstate import RunState
    from vhostpc.migration.status import Status
    from vhostpc.migration.uri import Address, Exec, Fd, File, Tcp, Unix, parse_address
    from vhostpc.migration.watcher import Watcher

__all__ = [
    "Address",
    "After",
    "Channel",
    "Course",
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
    "RunState",
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
            "vhostpc.migration.incoming": "Incoming",
            "vhostpc.migration.info": "MigrationInfo RamInfo",
            "vhostpc.migration.machine": "Machine",
            "vhostpc.migration.options": "Options",
            "vhostpc.migration.outgoing": "After NeverRan Outgoing",
            "vhostpc.migration.phase": "Course Event Phase",
            "vhostpc.migration.runstate": "RunState",
            "vhostpc.migration.status": "Status",
            "vhostpc.migration.uri": "Address Exec Fd File Tcp Unix parse_address",
            "vhostpc.migration.watcher": "Watcher",
        },
    )
