"""When a precopy may end: how much is left, how fast it is sent, how long the machine may stop.

The rule is QEMU's: the bandwidth is measured over windows of a tenth of a second or more, and as many bytes may be left
as can be sent in ``downtime-limit`` milliseconds at that bandwidth. Before the end of the first window none may be.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

WINDOW = 0.1
"""Seconds over which bytes and pages are counted."""


@dataclass
class Pace:
    """``now``: a clock in seconds. All sizes in bytes."""

    now: Callable[[], float]
    bandwidth: float = 0
    """Bytes a second of the last window, 0 before the first."""
    pages_per_second: int = 0
    dirty_rate: int = 0
    """Target pages that became dirty per second, between the last two syncs."""
    _begin: float = field(init=False)
    _bytes: int = 0
    _pages: int = 0
    _synced: float = field(init=False)

    def __post_init__(self) -> None:
        self._begin = self._synced = self.now()

    def sent(self, total_bytes: int, total_pages: int) -> None:
        """Note how much has been sent since the beginning."""
        passed = self.now() - self._begin
        if passed < WINDOW:
            return
        self.bandwidth = (total_bytes - self._bytes) / passed
        self.pages_per_second = int((total_pages - self._pages) / passed)
        self._begin, self._bytes, self._pages = self.now(), total_bytes, total_pages

    def synced(self, dirty_pages: int) -> None:
        """Note that ``dirty_pages`` target pages have become dirty since the last call."""
        passed = self.now() - self._synced
        if passed > 0:
            self.dirty_rate = int(dirty_pages / passed)
        self._synced = self.now()

    def threshold(self, downtime_ms: int, switchover_bandwidth: int) -> float:
        """Bytes that may be left when the machine stops. ``switchover_bandwidth``: bytes a second, 0 as measured."""
        return (switchover_bandwidth or self.bandwidth) * downtime_ms / 1000

    def expected_downtime(self, remaining: int, downtime_ms: int, switchover_bandwidth: int) -> int:
        """Milliseconds that ``remaining`` would take; the limit itself before anything was measured."""
        bandwidth = switchover_bandwidth or self.bandwidth
        return int(remaining * 1000 / bandwidth) if bandwidth else downtime_ms
