"""Sizes in words, in the units in which people give them."""

from __future__ import annotations

TARGET_PAGE = 4096
"""Bytes of a page as a guest, the migration stream and the dirty log count it. A host page is one or more of them."""

_UNITS = (("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10))


def in_units(count: int) -> str:
    """Bytes, exactly: in the largest unit that divides them."""
    for unit, shift in _UNITS:
        if count >> shift and not count & ((1 << shift) - 1):
            return f"{count >> shift} {unit}"
    return f"{count} bytes" if count != 1 else "1 byte"


def page_sizes(mask: int | None) -> str:
    """Page sizes that a migration stream encodes as bits of one word: ``4 KiB and 2 MiB``. None: none."""
    mask = mask or 0
    found = [in_units(1 << bit) for bit in range(mask.bit_length()) if mask >> bit & 1]
    return " and ".join(found) or "no size"


def sizes_differ(block: str, theirs: int, ours: int) -> str:
    """QEMU's message for a RAM block whose length differs at the source, with the sizes in units."""
    return f"Size mismatch: {block}: {theirs:#x} != {ours:#x} ({in_units(theirs)} at the source, {in_units(ours)} here)"
