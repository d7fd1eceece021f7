"""The monitor: QMP on trio with QEMU's names, the text monitor on top of it, and a client of such a monitor."""

from typing import TYPE_CHECKING

from vhostpc.lazy import exports

if TYPE_CHECKING:
    from vhostpc.migration.info import MigrationInfo, RamInfo
    from vhostpc.qmp.events import Events
    from vhostpc.qmp.monitored import Endpoint
    from vhostpc.qmp.qmp_client import open_monitor
    from vhostpc.qmp.qmp_server import Monitor
    from vhostpc.qmp.terminal import TextMonitor

__all__ = ["Endpoint", "Events", "MigrationInfo", "Monitor", "RamInfo", "TextMonitor", "open_monitor"]

if not TYPE_CHECKING:  # for a type checker it would stand for every name
    __getattr__ = exports(
        __name__,
        {
            "vhostpc.migration.info": "MigrationInfo RamInfo",
            "vhostpc.qmp.qmp_client": "open_monitor",
            "vhostpc.qmp.monitored": "Endpoint",
            "vhostpc.qmp.events": "Events",
            "vhostpc.qmp.qmp_server": "Monitor",
            "vhostpc.qmp.terminal": "TextMonitor",
        },
    )
