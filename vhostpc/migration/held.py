"""A machine that came from elsewhere and does not run here: kept unchanged, to be inspected and sent on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from vhostpc.errors import MigrationRefused, StreamError
from vhostpc.memory.available import available_memory
from vhostpc.migration.machine import nobody
from vhostpc.migration.runstate import RunState
from vhostpc.pages.ramblock import Bits, RamBlock, RamSet, refusal
from vhostpc.pages.ramfiles import RamFiles
from vhostpc.pages.service import FaultService
from vhostpc.units import TARGET_PAGE, in_units, sizes_differ
from vhostpc.wire.migration.elements import BlockInfo, Configuration, DeviceSection, RamBlocks

MOST_RAM = 1 << 42
"""Bytes of a block, at most: its bitmaps take a five-thousandth of that, whether any page has arrived or not."""


class HeldMachine:
    """RAM blocks in memfds, device sections as bytes, in the order in which they arrived.

    ``page_sizes``: bytes of a host page by name of a block. A source says them only where postcopy may follow, so
    a machine of huge pages that comes by precopy needs them said, or it is held in small ones. ``lengths``: bytes by
    name of a block; one that comes with another length, or not at all, is refused. ``files``: where its memory lies.
    """

    def __init__(
        self,
        configuration: Configuration | None = None,
        *,
        page_sizes: Mapping[str, int] | None = None,
        lengths: Mapping[str, int] | None = None,
        files: RamFiles | None = None,
    ) -> None:
        self._configuration = configuration
        self.page_sizes = dict(page_sizes or {})
        self.lengths = dict(lengths or {})
        self.ram = RamSet(files=files)
        self.early: list[DeviceSection] = []
        """Device sections that arrived before the pages, and are sent before them."""
        self.devices: list[DeviceSection] = []
        self.description = b""
        """JSON about the device sections; a machine that arrived by postcopy has none."""
        self.running = self.runnable = False
        self.came_as = RunState.PAUSED

    @property
    def configuration(self) -> Configuration:
        if self._configuration is None:
            raise ValueError("no machine is held")
        return self._configuration

    def device(self, idstr: str, instance: int = 0) -> DeviceSection:
        """The first section of that name and number: QEMU may send several. Raises KeyError."""
        for section in (*self.early, *self.devices):
            if (section.idstr, section.instance) == (idstr, instance):
                return section
        raise KeyError(f"{idstr} {instance}")

    def report(self) -> dict[str, Any]:
        return {
            "running": False,
            "problems": [],
            "blocks": [
                {
                    "name": block.name,
                    "length": block.length,
                    "page-size": block.page_size,
                    "received": block.count_bits(Bits.RECEIVED),
                }
                for block in self.ram.blocks
            ],
        }

    async def verify(self) -> dict[str, Any]:
        raise MigrationRefused("This machine is held: nobody here knows what its pages should be")

    # --- leaving: it does not run, so nothing in it changes

    @property
    def ram_section(self) -> int:
        return 1 + max((section.section_id for section in (*self.early, *self.devices)), default=0)

    def blocked(self) -> Sequence[str]:
        return ()

    async def stop(self) -> None:
        pass

    async def cont(self, runs: Callable[[], None] = nobody) -> None:
        raise MigrationRefused("This machine is held: it can be sent on, it does not run here")

    def state_size(self) -> int:
        return sum(len(section.encode()) for section in self.devices)

    async def save(self) -> tuple[Sequence[DeviceSection], bytes]:
        return self.devices, self.description

    def first(self) -> Sequence[tuple[RamBlock, int]]:
        return ()

    async def start_tracking(self) -> None:
        pass

    async def sync_dirty(self) -> int:
        return 0

    async def stop_tracking(self) -> None:
        pass

    # --- arriving

    def postcopy_refusal(self) -> str | None:
        return None

    def accept(self, configuration: Configuration) -> None:
        self._configuration = configuration

    async def advise(self, service: FaultService) -> None:
        pass

    def accept_blocks(self, listed: RamBlocks, *, postcopy: bool) -> None:
        came = {block.name: block.length for block in listed.blocks}
        for name, length in self.lengths.items():
            if name not in came:
                raise StreamError(f"RAM block {name!r} was expected, but the source has none of that name")
            if came[name] != length:
                raise StreamError(sizes_differ(name, came[name], length))
        self._must_fit(listed, postcopy)
        for block in listed.blocks:
            size = self._page_size(block, postcopy)
            try:
                self.ram.create(block.name, block.length, size)
            except OSError as e:
                raise StreamError(
                    f"RAM block {block.name!r}, {in_units(block.length)} in pages of {in_units(size)}, cannot be "
                    f"created: {refusal(e, block.length, size)}"
                ) from None

    def _must_fit(self, listed: RamBlocks, postcopy: bool) -> None:
        """Blocks that were not announced cost bitmaps and time for their length, whether any page arrives or not."""
        for block in listed.blocks:
            if block.length > MOST_RAM:
                raise StreamError(
                    f"RAM block {block.name!r} has {in_units(block.length)}, more than can be held"
                )
        small = [b for b in listed.blocks if self._page_size(b, postcopy) == TARGET_PAGE]
        total = sum(block.length for block in small if block.name not in self.lengths)
        if total > (free := available_memory()):
            raise StreamError(
                f"RAM blocks of {total >> 20} MiB, but this computer has only {free >> 20} MiB left: blocks that are"
                " hardly used can be held if --ram NAME=SIZE announces them"
            )

    def _page_size(self, block: BlockInfo, postcopy: bool) -> int:
        said = self.page_sizes.get(block.name, page_size_of(block))
        if postcopy and said != page_size_of(block):
            raise StreamError(
                f"RAM block {block.name!r} has pages of {in_units(page_size_of(block))} at the source, "
                f"not of {in_units(said)}"
            )
        return said

    async def listen(self) -> None:
        pass

    async def load(self, section: DeviceSection) -> None:
        (self.early if section.early else self.devices).append(section)

    async def loaded(self, description: bytes) -> None:
        self.description = description

    async def end(self) -> None:
        pass

    def close(self) -> None:
        """Release its memory. Nobody may be using it."""
        self.ram.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def page_size_of(block: BlockInfo) -> int:
    """Bytes of a host page at the source, which sends them only if they differ from a target page."""
    return block.page_size or TARGET_PAGE
