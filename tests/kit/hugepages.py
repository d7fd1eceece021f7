"""Huge pages set aside for a test and given back."""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

HUGE = 2 << 20
GIB = 1 << 30


@contextlib.contextmanager
def none_free() -> Iterator[None]:
    """For the length of a block no huge page of 2 MiB is available: those that are free are spoken for."""
    pool = Path("/sys/kernel/mm/hugepages/hugepages-2048kB")
    free = int((pool / "free_hugepages").read_text()) - int((pool / "resv_hugepages").read_text())
    if not free:
        yield
        return
    huge = 0x40000 | 21 << 26  # MAP_HUGETLB | MAP_HUGE_2MB: a mapping reserves its pages
    with mmap.mmap(-1, free * HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | huge):
        yield


@contextlib.contextmanager
def hugepages(mib: int, page: int = HUGE) -> Iterator[None]:
    """``mib`` MiB more in pages of ``page`` bytes for the length of a block.

    Added to what is there and taken off again, so that others who do the same keep theirs: a page that is free
    now may belong to a process that has not touched it. An ordinary user's test is skipped, but not where CI is set.
    """
    pool = Path(f"/sys/kernel/mm/hugepages/hugepages-{page >> 10}kB/nr_hugepages")
    each = page >> 20
    if not os.access(pool, os.W_OK):
        why = f"needs {mib} MiB of huge pages, and {pool} may not be written"
        pytest.fail(why) if os.environ.get("CI") else pytest.skip(why)

    def add(pages: int) -> int:
        before = int(pool.read_text())
        pool.write_text(str(max(0, before + pages)))
        return int(pool.read_text()) - before

    got = add(mib // each)
    try:
        if got < mib // each:
            pytest.fail(f"the kernel could set aside only {each * got} MiB of huge pages, not {mib}")
        yield
    finally:
        add(-got)
