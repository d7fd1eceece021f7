"""Recorded first touches of a machine's pages after a postcopy switch: the files of ``bench/faults``."""

from __future__ import annotations

import gzip
import json
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

FAULTS = Path(__file__).parent / "faults"


class Touch(NamedTuple):
    """``think``: microseconds that the thread ran since its touch before was answered."""

    thread: int
    page: int
    think: int


@dataclass(frozen=True)
class Recording:
    """``zeros``: runs of pages of zeros, as first page and count. ``touches``: in the order in which they were made."""

    what: str
    pages: int
    zeros: list[tuple[int, int]]
    touches: list[Touch]

    def packed(self) -> bytes:
        """The content of its file, always the same for the same recording."""
        head = json.dumps({"what": self.what, "pages": self.pages, "zeros": self.zeros})
        rows = "".join(f"{t.thread} {t.page} {t.think}\n" for t in self.touches)
        return gzip.compress(f"{head}\n{rows}".encode(), 9, mtime=0)


def unpacked(data: bytes) -> Recording:
    head, *rows = gzip.decompress(data).decode().splitlines()
    fields = json.loads(head)
    zeros = [(first, count) for first, count in fields["zeros"]]
    touches = [Touch(*map(int, row.split())) for row in rows]
    return Recording(fields["what"], fields["pages"], zeros, touches)


def recordings() -> dict[str, Recording]:
    """By name."""
    return {path.stem: unpacked(path.read_bytes()) for path in sorted(FAULTS.glob("*.gz"))}
