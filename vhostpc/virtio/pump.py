"""The native pump of a queue: its configuration, counts and lifetime."""

from __future__ import annotations

import os
import socket
import stat
from dataclasses import dataclass
from typing import Any

from vhostpc._native import ffi, lib
from vhostpc._native.entries import Thread
from vhostpc._native.handles import Handle, Owner, made
from vhostpc._native.numbers import numbers_of
from vhostpc._native.threads import KeptThread


@dataclass(frozen=True)
class PumpStats:
    """Counts of a queue's pumps since the session began; ``calls``: interrupts sent to the driver."""

    frames: int = 0
    bytes: int = 0
    dropped: int = 0
    discarded: int = 0
    batches: int = 0
    syscalls: int = 0
    calls: int = 0


class Pump(Owner):
    """Connects a virtqueue (a native handle) to a file descriptor, one direction at a time.

    Raises ValueError after :meth:`close`.
    """

    def __init__(self, queue: Any, index: int) -> None:
        """``index``: the queue's. Raises Shortage, OSError."""
        raw = made("pump", f"pump of queue {index}", lib.vpc_pump_new, queue)
        self._native = Handle(raw, lib.vpc_pump_free, "this pump is closed", needs=[queue])
        # Kept while the queue is paused, too: a message of the front-end must not end a running pump.
        self.thread = KeptThread(Thread.PUMP, f"the pump of queue {index}")

    def run(self, inward: bool, config: Any) -> int:
        """The pump's long C call. Waits for guest pages: only on a thread of its own."""
        pump = self.handle
        return lib.vpc_pump_in(pump, config) if inward else lib.vpc_pump_out(pump, config)

    def stop(self) -> None:
        """Make the running call return soon, or the next one at once, until :meth:`clear`."""
        lib.vpc_pump_stop(self.handle)

    def clear(self) -> None:
        lib.vpc_pump_clear(self.handle)

    def drop(self) -> None:
        """The ring stops: drop a frame that waits for more buffers than the guest has posted."""
        lib.vpc_pump_drop(self.handle)

    @property
    def stats(self) -> PumpStats:
        out = ffi.new("struct vpc_pump_stats *")
        lib.vpc_pump_stats(self.handle, out)
        return numbers_of(PumpStats, out)

    def close(self) -> None:
        self._native.close()
        self.thread.close()


def pump_config(fd: int, to: tuple[Any, ...] | None, header: int, mergeable: bool, batch: int) -> Any:
    """``struct vpc_pump_config`` for a datagram socket or a file; kick and discard are set at each run."""
    config = ffi.new("struct vpc_pump_config *")
    config.fd = fd
    config.kind = lib.VPC_FAR_SOCKET if stat.S_ISSOCK(os.fstat(fd).st_mode) else lib.VPC_FAR_FILE
    config.header, config.mergeable, config.max_batch = header, mergeable, batch
    if to is not None:
        packed = pack_address(to)
        ffi.memmove(config.addr, packed, len(packed))  # private memory
        config.addr_len = len(packed)
    return config


def pack_address(address: tuple[Any, ...]) -> bytes:
    """``struct sockaddr_in`` or ``sockaddr_in6`` of a Python address with a numeric host."""
    host, port = str(address[0]), int(address[1])
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    packed = int(family).to_bytes(2, "little") + port.to_bytes(2, "big")
    if family == socket.AF_INET:
        return packed + socket.inet_aton(host) + bytes(8)
    flow, scope = (*address[2:], 0, 0)[:2]
    packed += socket.htonl(flow).to_bytes(4, "little") + socket.inet_pton(family, host)
    return packed + int(scope).to_bytes(4, "little")
