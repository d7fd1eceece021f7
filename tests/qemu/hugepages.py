"""Huge pages set aside for a test and given back."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

POOL = Path("/proc/sys/vm/nr_hugepages")


@contextlib.contextmanager
def hugepages(mib: int) -> Iterator[None]:
    """``mib`` MiB more of 2 MiB pages for the length of a block.

    Added to what is there and taken off again, so that others who do the same keep theirs: a page that is free
    now may be somebody's who has not touched it yet.
    """

    def add(pages: int) -> int:
        before = int(POOL.read_text())
        POOL.write_text(str(max(0, before + pages)))
        return int(POOL.read_text()) - before

    got = add(mib // 2)
    try:
        if got < mib // 2:
            pytest.fail(f"the kernel could set aside only {2 * got} MiB of huge pages, not {mib}")
        yield
    finally:
        add(-got)
