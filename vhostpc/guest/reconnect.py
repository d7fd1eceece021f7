"""A back-end of our own machine that is gone comes again: another connection at its socket, for the same device.

In mid-postcopy it is advised, told to listen and registered on the spot: memory that it mapped otherwise would give it
zeros for pages that have yet to arrive, and create them. QEMU does not do that for a back-end that reconnects.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

import trio

from vhostpc.errors import VhostpcError
from vhostpc.frontend import GuestRegion
from vhostpc.guest.backends import BackEnd, open_backend
from vhostpc.guest.netdev import NetDevice
from vhostpc.logs import rationed_logger

log = rationed_logger(__name__)


async def keep_connected(
    device: NetDevice,
    regions: Sequence[GuestRegion],
    take_over: Callable[[NetDevice, BackEnd], Awaitable[None]],
    *,
    pause: float,
    timeout: float,
) -> None:
    """Each time that the device's back-end is gone, connect to its socket until one answers. Never returns.

    ``pause``: seconds before each attempt. ``take_over`` makes the connection the device's.
    """
    told = ""
    while True:
        await device.backend.gone.wait()
        path, name = device.backend.path, device.backend.name
        await trio.sleep(pause)
        try:
            async with open_backend(path, name, regions, timeout=timeout) as fresh:
                await take_over(device, fresh)
                if fresh.works:
                    log.info("%s: the back-end at %s serves it again", name, path)
                    told = ""
                    await fresh.gone.wait()
        except (VhostpcError, OSError) as error:
            if str(error) != told:
                log.error("%s: no back-end serves it again: %s", name, error)
            told = str(error)
