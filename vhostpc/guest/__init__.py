"""A machine of our own that runs without QEMU: vCPUs that rewrite and check RAM, network devices with back-ends."""

from typing import TYPE_CHECKING

from vhostpc.lazy import exports

if TYPE_CHECKING:
    from vhostpc.guest.own_machine import Block, OwnMachine, Spec, open_machine
    from vhostpc.guest.vcpu import Area, BadPage, VCpu, VCpuNumbers, stop_all

__all__ = [
    "Area",
    "BadPage",
    "Block",
    "OwnMachine",
    "Spec",
    "VCpu",
    "VCpuNumbers",
    "open_machine",
    "stop_all",
]

if not TYPE_CHECKING:  # for a type checker it would stand for every name
    __getattr__ = exports(
        __name__,
        {
            "vhostpc.guest.own_machine": "Block OwnMachine Spec open_machine",
            "vhostpc.guest.vcpu": "Area BadPage VCpu VCpuNumbers stop_all",
        },
    )
