"""The interface that the two ends of a migration need from their caller."""

from __future__ import annotations

from typing import Protocol

from vhostpc.migration.machine import Machine


class Watcher(Protocol):
    """The caller that started the migration stops and starts the machine. On the trio thread."""

    def passed(self, number: int) -> None:
        """The source has read the dirty log for the ``number``-th time. Must not raise."""
        ...

    async def stop_to_send(self) -> None:
        """The source: stop the machine now, because the rest fits into the downtime or postcopy begins."""
        ...

    async def let_run(self, postcopy: bool) -> None:
        """The destination: the machine may run here. If it raises, the machine has not run."""
        ...


class Unwatched:
    """The watcher of a migration that nobody watches: a source's machine is stopped, a destination's is not started."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine

    def passed(self, number: int) -> None:
        pass

    async def stop_to_send(self) -> None:
        await self.machine.stop()

    async def let_run(self, postcopy: bool) -> None:
        pass
