"""``python -m tests.backend_child FD SPEC``: a back-end in a process of its own that watches its own heartbeat.

FD is a control socket: one JSON line a question, one line an answer. SPEC (JSON) names the device: ``bridge``
(a queue pair for each UDP address in ``far``) or ``echo`` (plain Python), and the socket path to listen on.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
from typing import Any

import trio

from tests.confine import become_nobody, die_with_parent
from tests.heart import Heart
from vhostpc.backend import Device, Options, Queue, serve
from vhostpc.backend.net import Bridge
from vhostpc.wire.vhost_user import ProtocolFeature


class Echo(Device):
    """Each chain's readable bytes go back into its writable ones; a plain Python device."""

    num_queues = 2
    config_size = 8

    def __init__(self) -> None:
        self.chains = 0

    async def handle_queue(self, queue: Queue) -> None:
        async for chain in queue:
            data = chain.read()
            self.chains += 1
            if chain.writable:
                chain.write((data or b"\x5a" * chain.writable)[: chain.writable])

    def read_config(self, offset: int, size: int) -> bytes:
        return bytes(range(8))[offset : offset + size]


def state(device: Device) -> dict[str, Any]:
    counters = {}
    if isinstance(device, Bridge):
        counters = {way: n.frames for way, n in device.counters().items()}
    elif isinstance(device, Echo):
        counters = {"chains": device.chains}
    with open("/proc/self/maps") as maps:
        mappings = sum(1 for _ in maps)
    return {"fds": len(os.listdir("/proc/self/fd")), "maps": mappings, "counters": counters}


async def answer(control: trio.SocketStream, device: Device, heart: Heart) -> None:
    buffer = b""
    while data := await control.receive_some(4096):
        *lines, buffer = (buffer + data).split(b"\n")
        for line in lines:
            question = json.loads(line)
            reply: dict[str, Any] = {}
            if question == "beat":
                reply = {"gap": heart.gap, "beats": heart.beats}
                heart.gap, heart.beats = 0.0, 0
            elif question == "state":
                reply = state(device)
            await control.send_all(json.dumps(reply).encode() + b"\n")


async def run(control_fd: int, spec: dict[str, Any]) -> None:
    hide = 0
    for name in spec.get("hide_protocol", []):
        hide |= ProtocolFeature[name]
    device: Device
    if spec["device"] == "bridge":
        links = []
        for address in spec["far"]:
            link = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            link.bind(("127.0.0.1", 0))
            link.connect(tuple(address))
            link.setblocking(False)
            links.append(link)
        device = Bridge([link.fileno() for link in links], pairs=len(links))
    else:
        device = Echo()
    heart = Heart()
    control = trio.SocketStream(trio.socket.from_stdlib_socket(socket.socket(fileno=control_fd)))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(heart.beat)
        await nursery.start(serve, device, spec["path"], Options(hide_protocol_features=hide))
        await control.send_all(b"{}\n")
        await answer(control, device, heart)
        nursery.cancel_scope.cancel()


def main() -> None:
    die_with_parent()
    logging.basicConfig(
        level="DEBUG" if os.environ.get("DEBUG") else "INFO", format="%(levelname)s %(message)s"
    )
    spec = json.loads(sys.argv[2])
    if spec.get("nobody"):
        become_nobody()
    trio.run(run, int(sys.argv[1]), spec)


if __name__ == "__main__":
    main()
