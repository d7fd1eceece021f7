"""``python -m tests.kit.backend_child FD SPEC``: a back-end in a process of its own that watches its own heartbeat.

FD is a control socket: one JSON line a question, one line an answer. SPEC (JSON) names the device: ``bridge``
(a queue pair for each UDP address in ``far``), ``echo`` (plain Python), ``unordered`` (the same, each chain by
itself) or ``shuffle`` (younger answers first), and the socket path to listen on. It ends when the control socket is
closed.
"""

from __future__ import annotations

import errno
import faulthandler
import json
import logging
import mmap
import os
import random
import signal
import socket
import sys
from contextlib import suppress
from typing import Any

import trio

from tests.kit.confine import become_nobody, deny_mapping_over, die_with_parent
from tests.kit.heart import Heart
from vhostpc.backend import Chain, Device, Options, Queue, serve, session
from vhostpc.backend.net import Bridge
from vhostpc.wire.vhost_user import ProtocolFeature

KEPT: list[mmap.mmap] = []
# So that the interpreter maps no more memory for small objects while mappings are counted: it has room in some twenty
# of its arenas of 1 MiB, and something in each of them.
ROOM = [bytes(400) for _ in range(40_000)][::2000]


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


class Unordered(Echo):
    """No chain waits for another's missing page."""

    async def handle_queue(self, queue: Queue) -> None:
        async for chain in queue.unordered():
            data = chain.read()
            self.chains += 1
            if chain.writable:
                chain.write(data[: chain.writable])


class Shuffle(Device):
    """Each chain is answered with what it reads, younger ones before older ones."""

    num_queues = 2

    async def handle_queue(self, queue: Queue) -> None:
        async with trio.open_nursery() as nursery:
            async for chain in queue:
                chain.keep()
                nursery.start_soon(self.answer, chain)

    async def answer(self, chain: Chain) -> None:
        for _ in range(random.randrange(20)):
            await trio.lowlevel.checkpoint()
        chain.write(chain.read()[: chain.writable])
        chain.complete()


def touch_what_is_gone() -> None:
    """SIGBUS in memory that no session has."""
    fd = os.memfd_create("gone", os.MFD_CLOEXEC)
    os.ftruncate(fd, 4096)
    with mmap.mmap(fd, 4096) as memory:
        os.ftruncate(fd, 0)
        memory[0] = 1


def map_all_that_may_be() -> None:
    """Until the process has as many mappings as it may (/proc/sys/vm/max_map_count)."""
    page, other = mmap.PAGESIZE, mmap.PROT_READ
    with suppress(OSError):
        while True:  # by turns readable and not, so that no two are joined
            other ^= mmap.PROT_READ
            KEPT.append(mmap.mmap(-1, page, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, other))


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
            elif question == "faulthandler on":
                faulthandler.enable()
            elif question == "faulthandler off":
                faulthandler.disable()
            elif question == "map all":
                map_all_that_may_be()
            elif question == "touch":
                touch_what_is_gone()
            elif question == "raise":
                while True:
                    signal.raise_signal(signal.SIGBUS)
            elif question in ("deny private", "deny all"):
                deny_mapping_over(errno.ENOMEM, private_only=question == "deny private")
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
        device = {"echo": Echo, "unordered": Unordered, "shuffle": Shuffle}[spec["device"]]()
    session.GIVE_UP_TRIES = spec.get("give_up_tries", session.GIVE_UP_TRIES)
    heart = Heart()
    control = trio.SocketStream(trio.socket.from_stdlib_socket(socket.socket(fileno=control_fd)))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(heart.beat)
        options = Options(hide_protocol_features=hide, no_fault=spec.get("no_fault", False))
        await nursery.start(serve, device, spec["path"], options)
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
