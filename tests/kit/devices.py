"""Small devices for tests of the command line."""

from __future__ import annotations

import os

from vhostpc.backend import Device, Queue


class Rng(Device):
    """virtio 1.2, 5.4."""

    device_id = 4
    capabilities = ("fast",)

    async def handle_queue(self, queue: Queue) -> None:
        async for chain in queue:
            chain.write(os.urandom(min(chain.writable, 65536)))


class Named(Rng):
    def __init__(self, name: str) -> None:
        self.name = name


class OutsideTheSchema(Rng):
    device_id = 41


def not_a_device() -> str:
    return "a text"


def breaks() -> Rng:
    raise OSError(28, "No space left on device", "store.img")
