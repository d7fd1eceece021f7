"""Huge pages of 2 MiB set aside for a test and given back."""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

HUGE = 2 << 20
POOL = Path("/proc/sys/vm/nr_hugepages")


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
def hugepages(mib: int) -> Iterator[None]:
    """``mib`` MiB more of 2 MiB pages for the length of a block.

    Added to what is there and taken off again, so that others who do the same keep theirs: a page that is free
    now may belong to a process that has not touched it. An ordinary user's test is skipped, but not where CI is set.
    """
    if not os.access(POOL, os.W_OK):
        why = f"needs {mib} MiB of huge pages, and {POOL} may not be written"
        pytest.fail(why) if os.environ.get("CI") else pytest.skip(why)

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
