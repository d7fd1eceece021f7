"""The monitor: QMP on trio with QEMU's names, and the text monitor on top of it."""

from vhostpc.migration.info import MigrationInfo, RamInfo
from vhostpc.qmp.endpoint import Endpoint
from vhostpc.qmp.events import Events
from vhostpc.qmp.server import Monitor
from vhostpc.qmp.terminal import TextMonitor

__all__ = ["Endpoint", "Events", "MigrationInfo", "Monitor", "RamInfo", "TextMonitor"]
