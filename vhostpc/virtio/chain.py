"""One popped descriptor chain, as a device in plain Python sees it: private bytes in, private bytes out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vhostpc._native import ffi


class Chain:
    """A request of the driver.

    The readable bytes were copied by C when the chain was popped; what is written here reaches the guest
    when the queue pushes it. So nothing in this class waits for a page.

    A chain is completed when the device asks its queue for the next one, or by :meth:`complete`. After
    :meth:`keep` only by :meth:`complete`, from any task, in any order.
    """

    __slots__ = (
        "_complete",
        "_parts",
        "_popped",
        "completed",
        "handle",
        "kept",
        "late",
        "readable",
        "writable",
        "written",
    )

    def __init__(self, popped: Any, complete: Callable[[Chain], None]) -> None:
        self.handle = popped.chain
        self._complete = complete
        self._parts: list[bytes] = []
        self.loaded(popped)
        self.written = 0
        self.kept = False
        self.completed = False

    def loaded(self, popped: Any) -> None:
        """Take over what is known of the chain (``struct vpc_popped``)."""
        self.late = bool(popped.late)
        self._popped = popped.data
        self.readable: int = popped.readable
        self.writable: int = popped.writable

    def read(self) -> bytes:
        """All readable bytes, from the first descriptor to the last readable one.

        Raises ValueError when the chain is completed: its bytes are gone.
        """
        if self.completed:
            raise ValueError("this chain is completed")
        return bytes(ffi.buffer(self._popped, self.readable)) if self.readable else b""

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Append ``data`` to what goes into the writable descriptors.

        Raises ValueError when there is not that much room left, or when the chain is completed.
        """
        if self.completed:
            raise ValueError("this chain is completed")
        if self.written + len(data) > self.writable:
            raise ValueError(
                f"{len(data)} bytes do not fit: {self.writable - self.written} writable bytes left"
            )
        self._parts.append(bytes(data))
        self.written += len(data)

    def keep(self) -> None:
        """Do not complete this chain when the next one is asked for; :meth:`complete` will."""
        self.kept = True

    def complete(self) -> None:
        """Give the chain back to the driver with what was written. Returns at once; the queue pushes it."""
        if not self.completed:
            self.completed = True
            self._complete(self)

    def answer(self) -> bytes:
        """What was written so far."""
        return b"".join(self._parts)
