"""The interface that the monitor drives: all that it knows of a migration."""

from __future__ import annotations

from typing import Any, Protocol

from vhostpc.migration.info import MigrationInfo
from vhostpc.migration.options import Options
from vhostpc.migration.runstate import RunState
from vhostpc.migration.uri import Address


class Endpoint(Protocol):
    """The machine and its migration, as the monitor sees them.

    A method that refuses raises :class:`~vhostpc.errors.MigrationRefused` with QEMU's sentence and has changed
    nothing; any other ``VhostpcError`` becomes a GenericError with its text. Methods return as soon as what
    was asked for has begun; the outcome is reported by events and by ``info``. ``stop`` and
    ``verify`` wait for pages that the machine's threads or back-ends wait for, as QEMU's stop does; the others do
    not.
    """

    @property
    def options(self) -> Options: ...

    @property
    def run_state(self) -> RunState: ...

    @property
    def has_listened(self) -> bool:
        """Whether it has listened for a machine, which it does once."""
        ...

    def info(self) -> MigrationInfo: ...

    def report(self) -> dict[str, Any]:
        """The machine's report: ``x-vhostpc-report``. JSON's types only."""
        ...

    def trace(self, start: int) -> dict[str, Any]:
        """``x-vhostpc-trace``: answered faults from number ``start`` on, some thousand at most."""
        ...

    def map(self, cells: int) -> dict[str, Any]:
        """``x-vhostpc-map``: host pages that have arrived, in each of ``cells`` parts of each RAM block."""
        ...

    async def verify(self) -> dict[str, Any]:
        """``x-vhostpc-verify``: check every page of a stopped machine that has arrived completely."""
        ...

    def postcopy_refusal(self) -> str | None:
        """Why a machine cannot arrive by postcopy, one sentence; None: it can."""
        ...

    async def stop(self) -> None:
        """Stop the machine; nothing if it is stopped. Emits STOP."""
        ...

    async def cont(self) -> None:
        """Let the machine run; emits RESUME. Refuses where it may run at the other end."""
        ...

    async def migrate(self, address: Address, *, resume: bool) -> None:
        """Begin to send, or go on with what is paused (``resume``).

        Owns an ``Fd`` address's descriptor from the call on, also when it refuses.
        """
        ...

    async def incoming(self, address: Address, *, exit_on_error: bool) -> None:
        """Listen at the address. Owns an ``Fd`` address's descriptor from the call on."""
        ...

    async def cancel(self) -> None:
        """Cancel what is being sent; nothing if nothing is. Refuses where the guest may run there by postcopy."""
        ...

    async def pause(self) -> None:
        """Break the link of a postcopy. Refuses where there is none."""
        ...

    def check_recover(self) -> None:
        """Raises MigrationRefused where no source is waited for, because nothing is paused here."""
        ...

    async def recover(self, address: Address) -> None:
        """Listen for the source of a postcopy that is paused. Owns an ``Fd`` address's descriptor from the call on."""
        ...

    async def start_postcopy(self) -> None: ...

    def parameters_changed(self) -> None:
        """``options`` has new parameters: a running migration takes its new limits."""
        ...

    def quit(self, why: str = "quit") -> None:
        """End the program, once the reply to this has gone out. ``why``: for the log."""
        ...
