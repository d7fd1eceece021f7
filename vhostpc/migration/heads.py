"""The demands of a stream's head on its destination, beside memory and devices, compared with what this one has.

The sentences are QEMU's, as recorded from 7.2 and 10.0. Only :func:`check_head` raises, so that a reader that is no
destination can report them, too.
"""

from __future__ import annotations

from vhostpc.dialect import DIALECTS
from vhostpc.migration.options import SUPPORTED
from vhostpc.units import TARGET_PAGE
from vhostpc.wire.migration.elements import BadStream, Configuration, RamBlocks

_BITS = TARGET_PAGE.bit_length() - 1
_KNOWN = frozenset().union(*(dialect.capabilities for dialect in DIALECTS.values()))


def refusals(event: Configuration | RamBlocks) -> list[str]:
    """Why a destination here refuses a stream with this element, a sentence for each reason."""
    if isinstance(event, RamBlocks):
        if event.flush:
            return ["Capability multifd is off, but the source sends RAM over further channels"]
        return []
    found = []
    if event.target_page_bits not in (None, _BITS):
        found.append(f"Received TARGET_PAGE_BITS is {event.target_page_bits} but local is {_BITS}")
    for name in event.capabilities or ():
        if name not in _KNOWN:
            found.append(f"Received unknown capability {name}")
        elif name not in SUPPORTED:
            found.append(f"Capability {name} is off, but received capability is on")
    return found


def check_head(event: Configuration | RamBlocks) -> None:
    """Raises BadStream: the first refusal."""
    for why in refusals(event):
        raise BadStream(event.offset, why)
