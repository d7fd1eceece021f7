"""A request of the driver, as a device sees it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import trio

from vhostpc._native import ffi, lib
from vhostpc.errors import BrokenQueue, QueueEnded
from vhostpc.virtio.transfer import Transfers

LOADED: int = lib.VPC_LOADED


class Chain:
    """A request of the driver.

    The first readable bytes (all, up to 256 KiB) were copied by C when the chain was popped, and data given to
    :meth:`write` reach the guest when the queue pushes the chain: neither waits for a page. Longer requests are read
    and answered in pieces, by :meth:`read_at` and :meth:`write_at`, which may wait. Lengths and offsets are in bytes.

    A chain is completed when the device asks its queue for the next one, or by :meth:`complete`. After
    :meth:`keep` only by :meth:`complete`, from any task, in any order.

    When its ring has stopped, or its session has ended, a chain that was not completed belongs to the driver again.
    From then on everything here but ``completed`` raises QueueEnded.
    """

    __slots__ = (
        "_complete",
        "_data",
        "_handle",
        "_parts",
        "_transfers",
        "_why",
        "again",
        "appended",
        "begun",
        "completed",
        "kept",
        "late",
        "readable",
        "writable",
    )

    def __init__(self, popped: Any, complete: Callable[[Chain], None], transfers: Transfers) -> None:
        self._handle = popped.chain
        self._complete = complete
        self._transfers = transfers
        self._parts: list[bytes] = []
        self._why = ""
        self.again = bool(popped.again)
        self.loaded(popped)
        #: The part of the writable bytes that the queue will push: where it begins, and its length.
        self.begun = self.appended = 0
        self.kept = False
        self.completed = False

    def loaded(self, popped: Any) -> None:
        """Take over the chain's data (``struct vpc_popped``)."""
        self.late = bool(popped.late)
        self.readable: int = popped.readable
        self.writable: int = popped.writable
        # Our own copy: a reader on any thread need not care when the native chain is freed.
        self._data: bytes = (
            ffi.buffer(popped.data, min(popped.readable, LOADED))[:] if popped.readable else b""
        )

    def read(self) -> bytes:
        """All readable bytes, from the first descriptor to the last readable one, of a request up to 256 KiB.

        Raises ValueError when the chain is completed: its bytes are gone. Raises BrokenQueue for a longer one, which
        ends the ring of a device that does not read in pieces.
        """
        if self.completed:
            raise ValueError("this chain is completed")
        if self.readable > LOADED:
            raise BrokenQueue(
                f"a request of {self.readable} bytes, but the device reads none longer than 256 KiB"
            )
        return self._data

    def peek(self, length: int) -> bytes:
        """Up to ``length`` of the first readable bytes, of those that were copied: all, up to 256 KiB.

        Raises ValueError when the chain is completed.
        """
        self._check_open()
        return self._data[: min(length, self.readable)]

    async def read_at(self, offset: int, length: int) -> bytearray:
        """``length`` readable bytes from ``offset`` on; may wait for pages.

        Raises ValueError when there are fewer, when the chain is completed, or when its ring has stopped and it was
        given back; MemoryLost.
        """
        self._check_range("readable", offset, length, self.readable)
        buffer = bytearray(length)
        if offset + length <= LOADED:
            await trio.lowlevel.checkpoint()
            self._check_open()
            buffer[:] = self._data[offset : offset + length]
        else:
            await self._transfers.read(self, offset, buffer)
        return buffer

    async def write_at(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Copy ``data`` to the writable bytes from ``offset`` on, at once; may wait for pages.

        The driver reads them when the chain is completed. The length that it is told ends with the data given to
        :meth:`write`: see :meth:`seek`. Cancelled, it has copied nothing. Errors as :meth:`read_at`.
        """
        self._check_range("writable", offset, len(data), self.writable)
        await self._transfers.write(self, offset, data)

    def seek(self, offset: int) -> None:
        """Let :meth:`write` continue at ``offset`` of the writable bytes.

        The bytes before it are as :meth:`write_at`, or the driver, left them. Raises ValueError outside the writable
        bytes, after a :meth:`write`, or when the chain is completed.
        """
        self._check_range("writable", offset, 0, self.writable)
        if self._parts:
            raise ValueError("data was written already")
        self.begun = offset

    @property
    def written(self) -> int:
        """Bytes that the driver will be told were written."""
        return self.begun + self.appended

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Append ``data`` to the answer in the writable descriptors.

        Raises ValueError when there is not that much room left, or when the chain is completed.
        """
        if self.completed:
            raise ValueError("this chain is completed")
        if len(data) > self.writable - self.begun - self.appended:
            raise ValueError(
                f"{len(data)} bytes do not fit: {self.writable - self.written} writable bytes left"
            )
        self._parts.append(bytes(data))
        self.appended += len(data)

    def keep(self) -> None:
        """Do not complete this chain when the device asks for the next one; :meth:`complete` will."""
        self.kept = True

    def complete(self) -> None:
        """Give the chain back to the driver with the written data. Returns at once; the queue pushes it.

        Raises ValueError while a piece of it is in flight.
        """
        if not self.completed:
            if self._transfers.under_way and self in self._transfers.under_way:
                raise ValueError("a piece of this chain is in flight")
            self.completed = True
            self._complete(self)

    def answer(self) -> bytes:
        """The data written so far, from ``begun`` on."""
        return b"".join(self._parts)

    def _check_open(self) -> None:
        if self.completed:
            raise ValueError("this chain is completed")

    def _check_range(self, what: str, offset: int, length: int, size: int) -> None:
        self._check_open()
        if offset < 0 or offset + length > size:
            raise ValueError(f"{length} bytes at {offset}: the chain has {size} {what} bytes")

    # --- for the queue

    @property
    def handle(self) -> Any:
        """The native chain."""
        return self._handle

    def end(self, why: str) -> None:
        """It is the driver's again, or nobody's: it can no longer be used, not even through a bound method."""
        self._why = why
        self._data = b""
        self._parts = []
        self.__class__ = _Ended

    def take(self) -> Any:
        """The native chain, which is now the caller's; NULL if it is gone. Also of one that has ended."""
        handle, self._handle = self._handle, ffi.NULL
        return handle


class _Ended(Chain):
    """The class of an ended chain: separate, so that live chains need no check."""

    __slots__ = ()

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("_") or name in ("completed", "end", "take"):
            return super().__getattribute__(name)
        raise QueueEnded(self._why)

    def __setattr__(self, name: str, value: object) -> None:
        if not name.startswith("_"):
            raise QueueEnded(self._why)
        super().__setattr__(name, value)
