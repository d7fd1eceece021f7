"""A move that is played again where the guest has panicked, which is QEMU's own fault.

Under TCG the guest of the newest one panics after about one postcopy of four also between two of them, where nothing
of ours has a part.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from pathlib import Path

from tests.qemu import vm

PLAYS = 4
PANIC = re.compile(r"Kernel panic|BUG: |Oops: |general protection fault")

Play = Callable[[Path, list[vm.Vm]], Awaitable[None]]


async def played(play: Play, tmp_path: Path) -> None:
    """Play it, again where a guest has panicked after it had moved.

    ``play`` is given a folder, and a list to which it adds the machines that the guest moves to.
    """
    for number in range(PLAYS):
        folder = tmp_path / str(number)
        folder.mkdir()
        targets: list[vm.Vm] = []
        try:
            await play(folder, targets)
        except Exception:
            lines = [line for target in targets for line in target.serial.lines]
            if number == PLAYS - 1 or not any(map(PANIC.search, lines)):
                raise
            continue
        return
