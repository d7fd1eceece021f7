"""How regularly a trio loop gets its turn."""

from __future__ import annotations

from pathlib import Path

import trio

BEAT = 0.005


def starved() -> float:
    """Seconds that this thread has been ready to run while the machine ran others (proc(5), schedstat)."""
    return int(Path("/proc/thread-self/schedstat").read_text().split()[1]) / 1e9


class Heart:
    """Largest gap between two beats of the trio loop since the last question, in seconds.

    What the machine took, by running others while this thread was ready, does not count: a loop that waits
    for a page, a lock or the GIL sleeps.
    """

    def __init__(self) -> None:
        self.gap = 0.0
        self.beats = 0

    async def beat(self) -> None:
        last, taken = trio.current_time(), starved()
        while True:
            await trio.sleep(BEAT)
            now, more = trio.current_time(), starved()
            self.gap = max(self.gap, now - last - (more - taken))
            last, taken = now, more
            self.beats += 1

    def take(self) -> float:
        """The largest gap since the last call."""
        gap, self.gap, self.beats = self.gap, 0.0, 0
        return gap
