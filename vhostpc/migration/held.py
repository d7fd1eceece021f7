"""A machine that came from elsewhere and does not run here: kept as it came, to be looked at and sent on."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import TracebackType

from vhostpc.memory.ramblock import TARGET_PAGE, RamSet
from vhostpc.wire.elements import BlockInfo, Configuration, DeviceSection


@dataclass
class HeldMachine:
    """RAM blocks in memfds, device sections as bytes, in the order in which they came."""

    configuration: Configuration
    ram: RamSet
    devices: list[DeviceSection] = field(default_factory=list)
    description: bytes = b""
    """JSON about the device sections; a machine that came by postcopy has none."""

    def device(self, idstr: str, instance: int = 0) -> DeviceSection:
        """Raises KeyError."""
        for section in self.devices:
            if (section.idstr, section.instance) == (idstr, instance):
                return section
        raise KeyError(f"{idstr} {instance}")

    def close(self) -> None:
        """Let go of its memory. Nobody may be using it."""
        self.ram.close()

    def __enter__(self) -> HeldMachine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def page_size_of(block: BlockInfo) -> int:
    """Bytes of a host page at the source: it says them only where they are not a target page."""
    return block.page_size or TARGET_PAGE
