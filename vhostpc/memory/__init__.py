"""Guest memory: RAM blocks in memory files and their bitmaps, and vCPUs that work on them.

Below that, for the rest of the package: mappings, the region table, the gate, the dirty log.
"""

from typing import TYPE_CHECKING

from vhostpc.lazy import exports

if TYPE_CHECKING:
    from vhostpc.memory.ramblock import Bits, RamBlock, RamSet, make_memfd, total_pages
    from vhostpc.memory.vcpu import Area, BadPage, VCpu, VCpuNumbers, stop_all
    from vhostpc.units import TARGET_PAGE

__all__ = [
    "TARGET_PAGE",
    "Area",
    "BadPage",
    "Bits",
    "RamBlock",
    "RamSet",
    "VCpu",
    "VCpuNumbers",
    "make_memfd",
    "stop_all",
    "total_pages",
]

if not TYPE_CHECKING:  # for a type checker it would stand for every name
    __getattr__ = exports(
        __name__,
        {
            "vhostpc.memory.ramblock": "Bits RamBlock RamSet make_memfd total_pages",
            "vhostpc.units": "TARGET_PAGE",
            "vhostpc.memory.vcpu": "Area BadPage VCpu VCpuNumbers stop_all",
        },
    )
