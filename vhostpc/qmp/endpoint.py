"""What the monitor drives: the one thing that stands between it and a migration."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

from vhostpc.migration.options import Compat, Options
from vhostpc.migration.state import Status
from vhostpc.migration.uri import Address

PAGE = 4096


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

    def as_qmp(self, compat: Compat) -> dict[str, Any]:
        told: dict[str, Any] = {
            "total": self.total,
            "postcopy-requests": self.postcopy_requests,
            "dirty-sync-count": self.dirty_sync_count,
            "multifd-bytes": 0,
            "pages-per-second": self.pages_per_second,
            "downtime-bytes": self.downtime_bytes,
            "page-size": PAGE,
            "remaining": self.remaining,
            "postcopy-bytes": self.postcopy_bytes,
            "mbps": self.mbps,
            "transferred": self.transferred,
            "dirty-sync-missed-zero-copy": 0,
            "precopy-bytes": self.precopy_bytes,
            "duplicate": self.duplicate,
            "dirty-pages-rate": self.dirty_pages_rate,
            "normal-bytes": self.normal * PAGE,
            "normal": self.normal,
        }
        if compat == "7.2":
            told["skipped"] = 0
        return told


@dataclass(frozen=True)
class MigrationInfo:
    """A look at a migration: what ``query-migrate`` tells. Times in milliseconds; None is not told.

    A destination fills ``status`` and ``socket_address`` only.
    """

    status: Status = Status.NONE
    ram: RamInfo | None = None
    setup_time: int | None = None
    total_time: int | None = None
    downtime: int | None = None
    expected_downtime: int | None = None
    error_desc: str | None = None
    socket_address: list[dict[str, Any]] = field(default_factory=list)
    blocked_reasons: list[str] = field(default_factory=list)

    def as_qmp(self, compat: Compat) -> dict[str, Any]:
        told: dict[str, Any] = {}
        if self.status is not Status.NONE:
            told["status"] = str(self.status)
        for name in ("setup_time", "total_time", "downtime", "expected_downtime", "error_desc"):
            value = getattr(self, name)
            if value is not None:
                told[name.replace("_", "-")] = value
        if self.ram is not None:
            told["ram"] = self.ram.as_qmp(compat)
        if self.socket_address:
            told["socket-address"] = self.socket_address
        if self.blocked_reasons:
            told["blocked-reasons"] = self.blocked_reasons
        return told


class Endpoint(Protocol):
    """The machine and its migration, as the monitor sees them.

    A method that refuses raises :class:`~vhostpc.errors.MigrationRefused` with QEMU's sentence and has changed
    nothing; any other ``VhostpcError`` becomes a GenericError with its text. Methods return as soon as what
    was asked for has begun; what comes of it is told by events and by ``info``. None may wait for a guest page.
    """

    @property
    def options(self) -> Options: ...

    @property
    def run_state(self) -> str:
        """QEMU's RunState: ``running``, ``paused``, ``prelaunch``, ``inmigrate``, ``finish-migrate``,
        ``postmigrate``, ``shutdown``."""
        ...

    def info(self) -> MigrationInfo: ...

    async def stop(self) -> None:
        """Stop the machine; nothing if it is stopped. Emits STOP."""
        ...

    async def cont(self) -> None:
        """Let the machine run; emits RESUME. Refuses where it may run at the other end."""
        ...

    async def migrate(self, address: Address, *, resume: bool) -> None:
        """Begin to send. Owns an ``Fd`` address's descriptor from the call on, also when it refuses."""
        ...

    async def incoming(self, address: Address, *, exit_on_error: bool) -> None:
        """Listen at the address. Owns an ``Fd`` address's descriptor from the call on."""
        ...

    async def cancel(self) -> None:
        """Cancel what is being sent; nothing if nothing is."""
        ...

    async def start_postcopy(self) -> None: ...

    def quit(self) -> None:
        """End the program, once the reply to this has gone out."""
        ...
