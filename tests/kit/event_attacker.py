"""A peer that keeps an eventfd full and blocking, so that a writer between two looks stays there.

``python -m tests.kit.event_attacker EVENTFD MEMFD SECONDS``: the memfd's first word counts what the other side has
done. It leaves the counter full as soon as that stands still, or when the time is over.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import sys
import time

FULL = ((1 << 64) - 2).to_bytes(8, "little")
STANDS_STILL = 0.05  # seconds


def attack(event: int, memfd: int, seconds: float) -> None:
    with mmap.mmap(memfd, mmap.PAGESIZE) as page, memoryview(page) as raw, raw.cast("Q") as words:
        end = time.monotonic() + seconds
        taken = bytearray(8)
        while time.monotonic() < end:
            with contextlib.suppress(BlockingIOError):
                os.preadv(event, [taken], -1, os.RWF_NOWAIT)
            os.set_blocking(event, False)
            with contextlib.suppress(BlockingIOError):
                os.write(event, FULL)
            os.set_blocking(event, True)
            seen, since = words[0], time.monotonic()
            while words[0] == seen and time.monotonic() - since < STANDS_STILL:
                pass
            if words[0] == seen:
                return


if __name__ == "__main__":
    attack(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))
