"""The text monitor, to come."""

from __future__ import annotations

from vhostpc.qmp.commands import Session
from vhostpc.wire.qmp import QmpError


async def run(session: Session, line: str) -> str:
    raise QmpError("not here yet")
