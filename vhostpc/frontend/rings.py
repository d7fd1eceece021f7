"""Starting and stopping a ring in QEMU's order of messages."""

from __future__ import annotations

from vhostpc.frontend.client import FrontEnd
from vhostpc.frontend.driver import Driver
from vhostpc.frontend.share import MemoryShare
from vhostpc.wire.vhost_user import Feature, VringAddr


def ring_addr(memory: MemoryShare, index: int, driver: Driver, *, log: bool = False) -> VringAddr:
    """The payload of SET_VRING_ADDR: addresses of our process, the log address is the guest's."""
    at = driver.layout
    return VringAddr(
        index,
        int(log),
        memory.user_addr(at.desc, 16 * at.num),
        memory.user_addr(at.used, 6 + 8 * at.num),
        memory.user_addr(at.avail, 6 + 2 * at.num),
        at.used,
    )


async def start_ring(
    front: FrontEnd, memory: MemoryShare, index: int, driver: Driver, *, base: int = 0, enable: bool = True
) -> None:
    """ENABLE, NUM, BASE, ADDR, KICK, CALL: QEMU's order for net. Touches nothing.

    Enabled first, because a net back-end drops frames that the guest sends into a ring that is started and disabled.
    """
    if enable and front.features & Feature.PROTOCOL_FEATURES:
        await front.set_vring_enable(index, True)
    await front.set_vring_num(index, driver.layout.num)
    await front.set_vring_base(index, base)
    await front.set_vring_addr(ring_addr(memory, index, driver, log=bool(front.features & Feature.LOG_ALL)))
    await front.set_vring_kick(index, driver.kick)
    await front.set_vring_call(index, driver.call)


async def stop_ring(front: FrontEnd, index: int, *, timeout: float | None = None) -> int:
    """GET_VRING_BASE: returns the next available index, from which another back-end continues."""
    return await front.get_vring_base(index, timeout=timeout)
