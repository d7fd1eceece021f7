"""``python -m tests.kit.ram_client FD``: a process that maps RAM blocks, lends its ufd and touches every page.

Over the unix socket FD comes one JSON line with the memfds; back go one line with our addresses and the ufd.
After a line "go" every page is verified, in random order, by several threads in C.
"""

from __future__ import annotations

import json
import random
import socket
import sys

import trio

from tests.kit.confine import die_with_parent
from vhostpc.pages.ramblock import RamSet
from vhostpc.ufd import Userfaultfd


async def touch(ram: RamSet, blocks: list[tuple[str, int, int]], seed: int, orders: list[int]) -> int:
    bad = 0

    async def one(order: int) -> None:
        nonlocal bad
        pages = [(name, page, step) for name, count, step in blocks for page in range(0, count, step)]
        random.Random(order).shuffle(pages)
        for name, page, step in pages:
            wrong, _ = await ram[name].verify(seed, page, step)
            bad += wrong

    async with trio.open_nursery() as nursery:
        for order in orders:
            nursery.start_soon(one, order)
    return bad


def main() -> None:
    die_with_parent()
    sock = socket.socket(fileno=int(sys.argv[1]))
    line, fds, _, _ = socket.recv_fds(sock, 65536, 16)
    spec = json.loads(line)
    with RamSet() as ram, Userfaultfd.open() as ufd:
        for block, fd in zip(spec["blocks"], fds, strict=True):
            ram.add(block["name"], fd, block["length"], block["page_size"])
        for b in ram.blocks:
            ufd.register(b.base, b.length)
        answer = json.dumps([b.base for b in ram.blocks]).encode()
        socket.send_fds(sock, [answer], [ufd.fileno()])
        assert sock.recv(2) == b"go"
        blocks = [(b.name, b.length // 4096, b.page_size // 4096) for b in ram.blocks]
        bad = trio.run(touch, ram, blocks, spec["seed"], spec["orders"])
        sock.send(json.dumps({"bad": bad}).encode())


if __name__ == "__main__":
    main()
