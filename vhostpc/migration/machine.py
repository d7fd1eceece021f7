"""What migrates, as the two ends of a migration see it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from vhostpc.migration.runstate import RunState
from vhostpc.pages.ramblock import RamBlock, RamSet
from vhostpc.pages.service import FaultService
from vhostpc.wire.migration.elements import Configuration, DeviceSection, RamBlocks


def nobody() -> None:
    """Nobody is to be told."""


class Machine(Protocol):
    """RAM blocks, device state, running or not. All on the trio thread; C threads of its own touch its memory.

    Leaving, the source calls ``start_tracking``, ``sync_dirty`` before each pass, ``stop``, ``sync_dirty``,
    ``save``, and at the end ``stop_tracking``. After a failure it may call ``cont`` again.

    Arriving, the destination calls ``accept``; in a stream that may switch to postcopy ``advise``;
    ``accept_blocks``; then pages arrive. By precopy: ``load`` for each section, ``loaded``. By postcopy: ``listen``,
    then, while pages arrive, ``load`` for each section and ``loaded``; after the last page ``end``. The caller of
    :meth:`Incoming.receive` decides whether it is to run, and calls ``cont``.
    """

    @property
    def configuration(self) -> Configuration:
        """Name of the machine; raises ValueError before there is one."""
        ...

    @property
    def ram(self) -> RamSet:
        """The same for life; blocks are added, never taken away."""
        ...

    @property
    def running(self) -> bool: ...

    @property
    def runnable(self) -> bool:
        """Whether it can run here at all."""
        ...

    @property
    def came_as(self) -> RunState:
        """Of a machine that arrived: its run state at its source before it was stopped to be sent; ``running``, or the
        state that it has here too."""
        ...

    def report(self) -> dict[str, Any]:
        """Its state, for tests: numbers and names, of JSON's types only. Never waits."""
        ...

    async def verify(self) -> dict[str, Any]:
        """Check every page of the machine, which is stopped and complete: ``pages``, how many are ``bad``, and the
        ``first-bad``. Raises MigrationRefused where nothing is known about its pages."""
        ...

    # --- leaving

    @property
    def ram_section(self) -> int:
        """The number of RAM's section in the stream: one that no device section has."""
        ...

    def blocked(self) -> Sequence[str]:
        """Why it cannot migrate now, one sentence each (a back-end that cannot log its writes)."""
        ...

    async def stop(self) -> None:
        """Nothing writes its memory any more when this returns. Nothing happens if it is stopped."""
        ...

    async def cont(self, runs: Callable[[], None] = nobody) -> None:
        """Run. Raises MigrationRefused if it cannot run here (it is held).

        ``runs`` is called once its vCPUs run, before its back-ends have started, which may take longer; if it raises
        behind that, the machine stands again.

        It allocates nothing that may be short, such as threads, descriptors or maps: they were allocated before the
        machine first ran, or by :meth:`loaded`, and are kept over a :meth:`stop`.
        """
        ...

    def state_size(self) -> int:
        """Bytes that the sections of ``save`` take in the stream, at most. Asked while it runs; never waits."""
        ...

    @property
    def early(self) -> Sequence[DeviceSection]:
        """Device sections that are sent before the pages: a destination needs them to accept the pages."""
        ...

    async def save(self) -> tuple[Sequence[DeviceSection], bytes]:
        """The other device sections of the stopped machine, in order, and the JSON that describes all (b"": none)."""
        ...

    def first(self) -> Sequence[tuple[RamBlock, int]]:
        """Bytes of the stopped machine that its state's load and its vCPUs touch first, each by its block and the
        offset there: in a postcopy their pages are sent before all others."""
        ...

    async def start_tracking(self) -> None:
        """From now on ``sync_dirty`` finds each write to its memory. Everything that ``sync_dirty`` and
        ``stop_tracking`` need is allocated here. If it raises, it has undone itself."""
        ...

    async def sync_dirty(self) -> int:
        """Set the DIRTY bits of pages written since the last call; how many host pages became dirty."""
        ...

    async def stop_tracking(self) -> None: ...

    # --- arriving

    def postcopy_refusal(self) -> str | None:
        """Why it cannot arrive by postcopy, one sentence that names the back-end; None: it can."""
        ...

    def accept(self, configuration: Configuration) -> None:
        """Check the machine that arrives. Raises StreamError, one sentence, if it is not this one."""
        ...

    async def advise(self, service: FaultService) -> None:
        """POSTCOPY_ADVISE: get the userfaultfd of each back-end, and allocate everything else that postcopy needs.

        Raises PostcopyRefused naming the back-end, Shortage.
        """
        ...

    def accept_blocks(self, listed: RamBlocks, *, postcopy: bool) -> None:
        """Make or check the blocks; from here on they are in ``ram``. ``postcopy``: the source has sent page sizes.

        Raises StreamError, one sentence, for blocks that do not match or cannot be created.
        """
        ...

    async def listen(self) -> None:
        """POSTCOPY_LISTEN: memory may be missing pages from now on; tell the back-ends."""
        ...

    async def load(self, section: DeviceSection) -> None:
        """Load one device section; a section may arrive twice. May wait for a page, on a thread of its own, unless it
        is ``early``, from before the pages. Raises StreamError."""
        ...

    async def loaded(self, description: bytes) -> None:
        """All sections have arrived: allocate everything that running needs. Raises StreamError if a section is
        missing or a resource is unavailable: the machine has not run here.

        ``description``: the JSON about the sections, b"" in postcopy.
        """
        ...

    async def end(self) -> None:
        """POSTCOPY_END: every page has arrived; tell the back-ends. One that is gone is only logged."""
        ...
