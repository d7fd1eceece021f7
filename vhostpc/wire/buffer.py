"""Bytes of a stream that have arrived and were not consumed yet, with their offset."""

from __future__ import annotations

_COMPACT = 1 << 20


class Buffer:
    """``data`` from index ``at`` on is unread. The feeder bounds it."""

    __slots__ = ("_base", "at", "data")

    def __init__(self, offset: int = 0) -> None:
        self._base = offset
        self.data = bytearray()
        self.at = 0

    @property
    def offset(self) -> int:
        """The stream offset of the next unread byte."""
        return self._base + self.at

    def __len__(self) -> int:
        return len(self.data) - self.at

    def feed(self, data: bytes) -> None:
        if self.at >= _COMPACT or self.at == len(self.data):
            self._base += self.at
            del self.data[: self.at]
            self.at = 0
        self.data += data

    def take(self, count: int) -> bytes:
        """The next ``count`` bytes, which must have arrived."""
        out = bytes(self.data[self.at : self.at + count])
        self.at += count
        return out

    def swap(self, data: bytes, offset: int) -> bytes:
        """Replace the unread bytes by ``data``, from byte ``offset`` on; returns the old ones."""
        out = bytes(self.data[self.at :])
        self.data = bytearray(data)
        self._base, self.at = offset, 0
        return out
