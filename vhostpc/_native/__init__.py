"""The native core, typed. Who may import this is listed in tests/project/test_layers.py."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, cast

from vhostpc._native import _vpc
from vhostpc._native.api_event import EventLib
from vhostpc._native.api_thread import ThreadLib
from vhostpc._native.frontend.api_driver import DriverLib
from vhostpc._native.frontend.api_far import FarLib
from vhostpc._native.guest.api_vcpu import VcpuLib
from vhostpc._native.memory.api_gm import GmLib
from vhostpc._native.memory.api_supply import SupplyLib
from vhostpc._native.pages.api_dirty import DirtyLib
from vhostpc._native.pages.api_fault import FaultLib
from vhostpc._native.pages.api_load import LoadLib
from vhostpc._native.pages.api_ram import RamLib
from vhostpc._native.pages.api_save import SaveLib
from vhostpc._native.pages.api_scan import ScanLib
from vhostpc._native.ufd.api_uffd import UffdLib
from vhostpc._native.virtio.api_inflight import InflightLib
from vhostpc._native.virtio.api_pump import PumpLib
from vhostpc._native.virtio.api_ring import RingLib

if TYPE_CHECKING:

    class Lib(
        ThreadLib,
        EventLib,
        SupplyLib,
        GmLib,
        UffdLib,
        RingLib,
        InflightLib,
        PumpLib,
        RamLib,
        FaultLib,
        LoadLib,
        ScanLib,
        SaveLib,
        DirtyLib,
        FarLib,
        DriverLib,
        VcpuLib,
    ): ...


ffi: Any = _vpc.ffi
lib: Lib = cast("Lib", _vpc.lib)

# cffi completes its types at first use; look at every name once, here, where only one thread runs.
for _name in dir(lib):
    getattr(lib, _name)


def check(rc: int, what: str) -> int:
    """Return ``rc`` if it is not negative, otherwise raise the :class:`OSError` of ``-rc``."""
    if rc < 0:
        raise OSError(-rc, f"{what}: {os.strerror(-rc)}")
    return rc
