"""A snapshot of a migration: the numbers that ``query-migrate`` reports."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from vhostpc.dialect import Dialect
from vhostpc.migration.status import Status
from vhostpc.pages.blocktime import Blocktime, ThreadWaits
from vhostpc.units import TARGET_PAGE


@dataclass(frozen=True)
class RamInfo:
    """Numbers of the RAM part. Bytes; ``duplicate`` and ``normal`` are target pages."""

    total: int
    transferred: int = 0
    remaining: int = 0
    duplicate: int = 0
    normal: int = 0
    dirty_pages_rate: int = 0
    mbps: float = 0
    pages_per_second: int = 0
    dirty_sync_count: int = 0
    postcopy_requests: int = 0
    precopy_bytes: int = 0
    downtime_bytes: int = 0
    postcopy_bytes: int = 0

    def as_qmp(self, dialect: Dialect) -> dict[str, Any]:
        told: dict[str, Any] = {
            "total": self.total,
            "postcopy-requests": self.postcopy_requests,
            "dirty-sync-count": self.dirty_sync_count,
            "multifd-bytes": 0,
            "pages-per-second": self.pages_per_second,
            "downtime-bytes": self.downtime_bytes,
            "page-size": TARGET_PAGE,
            "remaining": self.remaining,
            "postcopy-bytes": self.postcopy_bytes,
            "mbps": self.mbps,
            "transferred": self.transferred,
            "dirty-sync-missed-zero-copy": 0,
            "precopy-bytes": self.precopy_bytes,
            "duplicate": self.duplicate,
            "dirty-pages-rate": self.dirty_pages_rate,
            "normal-bytes": self.normal * TARGET_PAGE,
            "normal": self.normal,
        }
        if dialect.skipped_pages:
            told["skipped"] = 0
        return told


@dataclass(frozen=True)
class MigrationInfo:
    """A snapshot of a migration, for ``query-migrate``. Times in milliseconds; None is not reported.

    A destination fills ``status``, ``error_desc``, ``blocked_reasons``, ``socket_address`` and ``blocktime`` only.
    """

    status: Status = Status.NONE
    ram: RamInfo | None = None
    setup_time: int | None = None
    total_time: int | None = None
    downtime: int | None = None
    expected_downtime: int | None = None
    remaining: int | None = None
    """Bytes that have not been sent."""
    error_desc: str | None = None
    socket_address: list[dict[str, Any]] = field(default_factory=list)
    blocked_reasons: list[str] = field(default_factory=list)
    blocktime: Blocktime | None = None
    advice: str | None = None
    """What a person can do next; not part of QEMU's answer."""

    def as_qmp(self, dialect: Dialect) -> dict[str, Any]:
        told: dict[str, Any] = {}
        if self.status is not Status.NONE:
            told["status"] = str(self.status)
        for name in ("setup_time", "total_time", "downtime", "expected_downtime", "error_desc"):
            value = getattr(self, name)
            if value is not None:
                told[name.replace("_", "-")] = value
        if self.ram is not None:
            told["ram"] = self.ram.as_qmp(dialect)
        if self.remaining is not None and dialect.remaining:
            told["remaining"] = self.remaining
        if self.socket_address:
            told["socket-address"] = self.socket_address
        if self.blocked_reasons:
            told["blocked-reasons"] = self.blocked_reasons
        if self.blocktime is not None:
            told |= _blocktime(self.blocktime, dialect)
        return told


def _blocktime(found: Blocktime, dialect: Dialect) -> dict[str, Any]:
    """In milliseconds, as all versions have it. Averages in nanoseconds; of the threads of this process only."""
    told: dict[str, Any] = {
        "postcopy-blocktime": found.all_vcpus_ns // 1_000_000,
        "postcopy-vcpu-blocktime": [vcpu.blocked_ns // 1_000_000 for vcpu in found.vcpus],
    }
    if dialect.latency:
        all_threads = (*found.vcpus, found.others)
        told |= {
            "postcopy-latency": _average(*all_threads),
            "postcopy-latency-dist": list(found.latency),
            "postcopy-vcpu-latency": [_average(vcpu) for vcpu in found.vcpus],
            "postcopy-non-vcpu-latency": _average(found.others),
        }
    return told


def _average(*threads: ThreadWaits) -> int:
    return sum(one.remote_ns for one in threads) // max(1, sum(one.remote for one in threads))
