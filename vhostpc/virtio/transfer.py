"""Pieces of chains between guest memory and private memory, by calls that may wait for pages."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any, Protocol

import trio

from vhostpc._native import check, ffi, lib


class TransferChain(Protocol):
    """The interface of a chain that a transfer uses."""

    @property
    def handle(self) -> Any: ...


class TransferRing(Protocol):
    """The interface of a ring that a transfer uses."""

    stopping: bool

    @property
    def handle(self) -> Any: ...

    async def touch(
        self,
        call: Callable[[int], int],
        *,
        waiting_room: trio.CapacityLimiter | None = None,
        try_first: bool = False,
    ) -> int: ...


class Transfers:
    """The pieces of one ring's chains that are in flight. Raises MemoryLost, OSError.

    A piece waits for its pages as a late chain does: on a thread of ``room``, and only after a call that does not wait
    has met an absent page. All its pages are present before its first byte is copied.
    """

    def __init__(self, ring: TransferRing, room: trio.CapacityLimiter) -> None:
        self._ring = ring
        self._room = room
        #: The chain of each piece.
        self.under_way: list[TransferChain] = []
        self._none = trio.Event()

    async def read(self, chain: TransferChain, skip: int, buffer: bytearray) -> None:
        """Fill ``buffer`` with the chain's readable bytes from ``skip`` on."""
        data = ffi.from_buffer("unsigned char[]", buffer, require_writable=True)
        await self.touch(
            lambda flags: lib.vpc_chain_read(self._ring.handle, chain.handle, skip, data, len(data), flags),
            chain,
        )

    async def write(self, chain: TransferChain, skip: int, buffer: bytes | bytearray | memoryview) -> None:
        """Copy ``buffer`` to the chain's writable bytes from ``skip`` on."""
        data = ffi.from_buffer("unsigned char[]", buffer)
        await self.touch(
            lambda flags: lib.vpc_chain_write(self._ring.handle, chain.handle, skip, data, len(data), flags),
            chain,
        )

    async def touch(self, call: Callable[[int], int], chain: TransferChain) -> None:
        """One C call on a piece, repeated after each pause."""
        self.under_way.append(chain)
        try:
            while True:
                # A pause ends it before its next absent page, and it begins anew. A request in progress when
                # the ring stops goes on.
                goes_on = lib.VPC_UNSTOPPED if self._ring.stopping else 0
                rc = await self._ring.touch(
                    lambda flags, goes_on=goes_on: call(flags | goes_on),  # type: ignore[misc]
                    waiting_room=self._room,
                    try_first=True,
                )
                if rc != -errno.ECANCELED:
                    check(rc, "chain")
                    return
        finally:
            self.under_way.remove(chain)
            if not self.under_way:
                self._none.set()

    async def until_none(self) -> None:
        """Return when none is in flight."""
        while self.under_way:
            self._none = trio.Event()
            await self._none.wait()
