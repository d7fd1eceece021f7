"""Our side of F1: ``python -m bench.f1_service SOCKET`` serves one ``fault_touch`` by the fault service.

``--spin-us N`` polls so long after each event; ``--busy`` has a thread that computes in plain Python meanwhile.
"""

from __future__ import annotations

import argparse
import os
import socket
import struct
import sys
import threading

import trio

from vhostpc.pages.faultclient import ClientRange
from vhostpc.pages.ramblock import RamSet, make_memfd
from vhostpc.pages.service import FaultService

PAGE = 4096
HELLO = struct.Struct("=QQ")  # base, length: struct ufd_hello in native/ufd_pass.h


def ready_pages(length: int) -> int:
    """A memfd with the pages that the toucher expects: each begins with ``page_word`` of its number."""
    fd = make_memfd("pages", length)
    write_pages(fd, 0, length // PAGE)
    return fd


def write_pages(fd: int, first: int, count: int) -> None:
    """Such pages into a file, page n at n * 4096."""
    with os.fdopen(os.dup(fd), "wb") as file:
        file.seek(first * PAGE)
        for page in range(first, first + count):
            word = (page + 1) * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
            file.write(word.to_bytes(8, sys.byteorder) + bytes([page & 0xFF]) * (PAGE - 8))


def compute() -> None:
    """Takes the GIL and never gives it away but when it is asked to."""
    number = 1
    while True:
        number = number * 69069 & 0xFFFFFFFF


async def serve(path: str, spin_us: int, busy: bool) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(1)
        print("ready", flush=True)
        conn, _ = listener.accept()
    with conn, RamSet() as ram:
        data, fds, _, _ = socket.recv_fds(conn, HELLO.size, 2)
        base, length = HELLO.unpack(data)
        ufd, memfd = fds
        block = ram.add("ram", memfd, length)
        stream = trio.SocketStream(trio.socket.from_stdlib_socket(conn.dup()))
        with FaultService(ram, spin_us=spin_us) as service:
            service.arm()
            pages = ready_pages(length)
            service.answer_from(block, pages)
            os.close(pages)
            client = service.add_client(ufd, "toucher")
            client.set_ranges([ClientRange(base, length, block, 0)])
            async with stream, trio.open_nursery() as nursery:
                nursery.start_soon(service.run)
                if busy:
                    threading.Thread(target=compute, daemon=True).start()
                await stream.send_all(b"g")
                await stream.receive_some(1)
                nursery.cancel_scope.cancel()
            print(client.numbers(), file=sys.stderr)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("path")
    parser.add_argument("--spin-us", type=int, default=0)
    parser.add_argument("--busy", action="store_true")
    args = parser.parse_args()
    trio.run(serve, args.path, args.spin_us, args.busy)
