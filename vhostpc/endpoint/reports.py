"""What a monitor is told of an endpoint beyond QEMU's words: counts of pages, answered faults, a map of its memory."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

from vhostpc.migration.incoming import Incoming
from vhostpc.migration.machine import Machine
from vhostpc.migration.outgoing import Outgoing
from vhostpc.pages.ramblock import Bits

_KEYS = {"withheld": "held", "withheld_ever": "held-ever"}
"""Keys of the report that differ from the names of their fields: programs read them."""


def _numbers(numbers: Any) -> dict[str, Any]:
    """The fields of a dataclass of numbers, named as a monitor does."""
    return {_KEYS.get(name, name.replace("_", "-")): value for name, value in asdict(numbers).items()}


def sent(outgoing: Outgoing | None) -> dict[str, Any]:
    """What the last migration from here has sent."""
    return {"sent": None if outgoing is None else _numbers(outgoing.numbers())}


def came(incoming: Incoming | None) -> dict[str, Any]:
    """What a migration to here brought: in its last phase, in the one before (precopy), and on which faults.

    ``kept``: host pages of precopy that were not sent again. All None before there was such a thing.
    """
    loads = [] if incoming is None else incoming.loads()
    return {
        "came": _numbers(loads[-1]) if loads else None,
        "came-before": _numbers(loads[-2]) if len(loads) > 1 else None,
        "kept": None if incoming is None else incoming.kept,
        "asked": None if incoming is None else _numbers(incoming.asked()),
    }


def trace_of(incoming: Incoming | None, start: int) -> dict[str, Any]:
    """Answered faults from number ``start`` on, at most some thousand; the names of their clients."""
    following, rows = (start, []) if incoming is None else incoming.service.traced(start)
    clients = {row.client for row in rows}
    return {
        "next": following,
        "clients": {str(n): incoming.service.name_of(n) for n in clients} if incoming is not None else {},
        "faults": [row.row() for row in rows],
    }


def map_of(machine: Machine, cells: int) -> dict[str, Any]:
    """Host pages that have arrived, in each of ``cells`` equal parts of each block."""
    return {
        "time-ns": time.monotonic_ns(),
        "blocks": [
            {
                "name": b.name,
                "pages": b.pages,
                "received": b.count_cells(Bits.RECEIVED, min(cells, b.pages)),
            }
            for b in machine.ram.blocks
        ],
    }
