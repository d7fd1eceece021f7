"""The elements around the RAM sections of a source: the head of the stream, the package, the end behind the pages."""

from __future__ import annotations

from collections.abc import Iterable

from vhostpc.errors import MigrationRefused
from vhostpc.migration.machine import Machine
from vhostpc.units import TARGET_PAGE
from vhostpc.wire.migration.elements import (
    LOADED,
    MAX_PACKAGE,
    MUST_HEAR,
    BlockInfo,
    DeviceSection,
    EndOfStream,
    Footer,
    Header,
    OpenReturnPath,
    Package,
    Ping,
    PostcopyAdvise,
    PostcopyListen,
    PostcopyRun,
    RamBlocks,
    SectionEnd,
    SectionStart,
)
from vhostpc.wire.migration.ramrec import RamFlag

_END_OF_PAGES = int(RamFlag.EOS).to_bytes(8, "big")


def head(machine: Machine, *, postcopy: bool, return_path: bool) -> bytes:
    """All that is ahead of the first page."""
    blocks = machine.ram.blocks
    parts = [Header().encode(), machine.configuration.encode()]
    if return_path:
        parts += [OpenReturnPath().encode(), Ping(1).encode()]
    if postcopy:
        sizes = 0
        for block in blocks:
            sizes |= block.page_size
        parts.append(PostcopyAdvise(sizes, TARGET_PAGE).encode())
    listed = RamBlocks(
        tuple(
            # The size of a page is said only where postcopy may follow and it is not that of a target page.
            BlockInfo(b.name, b.length, b.page_size if postcopy and b.page_size != TARGET_PAGE else None)
            for b in blocks
        )
    )
    section = machine.ram_section
    parts += [SectionStart(section).encode(), listed.encode(), Footer(section).encode()]
    return b"".join([*parts, *(early.encode() for early in machine.early)])


def packaged(devices: Iterable[DeviceSection], *, must_hear: bool) -> bytes:
    """The package. ``must_hear``: with the PING whose PONG says that it was loaded. Raises MigrationRefused."""
    blob = PostcopyListen().encode() + b"".join(section.encode() for section in devices)
    blob += Ping(LOADED).encode()
    if must_hear:
        blob += Ping(MUST_HEAR).encode()
    blob += PostcopyRun().encode()
    check_package(len(blob))
    return Package(blob).encode()


def check_package(size: int) -> None:
    """Raises MigrationRefused: the stream says the length of a package in 32 bits."""
    if size > MAX_PACKAGE:
        raise MigrationRefused(
            f"The machine's device state has {size} bytes: a package holds {MAX_PACKAGE} at most, "
            "so it can move by precopy only"
        )


def tail(section: int) -> bytes:
    """Behind the last page of a postcopy: the end of its RAM section, an empty END of RAM, the end of the stream."""
    footer = Footer(section).encode()
    return footer + SectionEnd(section).encode() + _END_OF_PAGES + footer + EndOfStream().encode()
