"""An entropy device (virtio 1.2, 5.4) in plain Python: the shortest device there is.

    vhostpc backend examples/rng/rng.py:Rng --socket-path /tmp/rng.sock

In QEMU: -chardev socket,id=rng,path=/tmp/rng.sock -device vhost-user-rng-pci,chardev=rng

QEMU (7.2 to 11.1) does not migrate a guest that has one, whatever its back-end can do: docs/compatibility.md.
"""

from __future__ import annotations

import os

from vhostpc.backend import Device, Queue

MOST = 64 * 1024  # bytes that one request gets at most


class Rng(Device):
    device_id = 4

    async def handle_queue(self, queue: Queue) -> None:
        async for chain in queue:  # ends by itself when the ring stops
            chain.write(os.urandom(min(chain.writable, MOST)))
