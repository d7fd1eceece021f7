"""The order in which a page source sends its background, in plain Python: the model that C is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

SIZES = (64 << 10, 256 << 10, 1 << 20, 4 << 20)
GROUPS = TOLD = 32


@dataclass
class ScanOrder:
    """``left``: for each block a byte for each page, 1 while it is to be sent; the caller clears it."""

    left: Sequence[bytearray]
    page_sizes: Sequence[int]
    at: tuple[int, int] = (0, 0)
    told: list[tuple[int, int]] = field(default_factory=list)
    groups: list[list[tuple[int, int, int, int]]] = field(default_factory=lambda: [[] for _ in SIZES])
    """For each size the newest groups, the newest first: block, first page, page behind the last, page asked for."""

    def asked(self, block: int, page: int) -> None:
        """A page is sent because it was asked for."""
        self.at = (block, page + 1)
        self.told = [*self.told, (block, page)][-TOLD:]

    def forget(self) -> None:
        """Another connection."""
        self.told = []
        self.groups = [[] for _ in SIZES]

    def next(self) -> tuple[int, int] | None:
        """The next page of the background, None if there is none."""
        for block, page in self.told:
            self._begin_groups(block, page)
        self.told = []
        for groups in self.groups:
            while groups:
                block, first, end, page = groups[0]
                found = self.left[block].find(1, page, end)
                if found < 0:
                    found = self.left[block].rfind(1, first, page)
                if found >= 0:
                    return block, found
                del groups[0]
        return self._scan()

    def _begin_groups(self, block: int, page: int) -> None:
        for groups, size in zip(self.groups, SIZES, strict=True):
            pages = size // self.page_sizes[block]
            if pages < 2:
                continue
            first = page // pages * pages
            end = min(first + pages, len(self.left[block]))
            groups[:] = [group for group in groups if group[:2] != (block, first)]
            groups.insert(0, (block, first, end, page))
            del groups[GROUPS:]

    def _scan(self) -> tuple[int, int] | None:
        block, page = self.at
        for _ in range(len(self.left) + 1):
            found = self.left[block].find(1, page)
            if found >= 0:
                self.at = (block, found + 1)
                return block, found
            block, page = (block + 1) % len(self.left), 0
        return None
