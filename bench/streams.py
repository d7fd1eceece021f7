"""The stream that M1, M2 and M4 play: a stopped QEMU's own, with the pages of its memory taken out.

A QEMU 10.0 of :data:`RECORDED` MiB (``-M pc -S``, memory never touched) is migrated to a file once and read with the
package's own reader. What it says before its memory (header, machine, list of blocks, the small blocks' pages)
and behind it (devices, description) is kept as it came; ``native/stream_play.c`` sends a record for each page of the
memory in between. The length of the memory block in the list is that of the machine that is wanted.
"""

from __future__ import annotations

import struct
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

from vhostpc.wire.migration.elements import Footer, RamBlocks, SectionEnd, SectionPart, StreamEvent
from vhostpc.wire.migration.ramrec import EndOfSection, RamEncoder, RamPage
from vhostpc.wire.migration.stream import RamMode, StreamReader

from .ends import BLOCK, PEER, end, qemu_argv

RECORDED = 128  # MiB
PAGE = 4096
POOL = 256  # different pages of data, as in native/ram_stream.h
GOLDEN = 0x9E3779B97F4A7C15


def pool_page(number: int) -> bytes:
    """What ``stream_play`` sends as page ``number``."""
    first = number % POOL * (PAGE // 8)
    words = [(first + i + 1) * GOLDEN & 0xFFFFFFFFFFFFFFFF for i in range(PAGE // 8)]
    return struct.pack("=512Q", *words)


async def record(folder: Path) -> list[StreamEvent]:
    """The events of a stopped QEMU's stream."""
    monitor, file = folder / "recorded.qmp", folder / "recorded"
    argv = [*qemu_argv(RECORDED), "-S", "-qmp", f"unix:{monitor},server=on,wait=off"]
    async with end(PEER, argv, monitor) as source:
        await source.allow()
        await source.qmp.command("migrate", uri=f"file:{file}")
        await source.reaches("completed")
    reader = StreamReader(RamMode.PAGES)
    events = list(reader.feed(file.read_bytes()))
    file.unlink()
    if not reader.ended:
        raise RuntimeError("the recorded stream is not whole")
    return events


def write_stream(events: list[StreamEvent], mib: int, folder: Path) -> None:
    """``head`` and ``tail`` for a machine of that size, in ``folder``."""
    ram, head, tail = RamEncoder(), bytearray(), bytearray()
    section = next(e.section_id for e in events if isinstance(e, SectionPart | SectionEnd))
    small: dict[tuple[str, int], RamPage] = {}
    begun = False  # with RAM's pages; devices follow
    for event in events:
        if isinstance(event, RamPage):
            if event.block != BLOCK:
                small[event.block, event.offset] = event
        elif isinstance(event, RamBlocks):
            sizes = {BLOCK: mib << 20}
            blocks = tuple(replace(b, length=sizes.get(b.name, b.length)) for b in event.blocks)
            head += replace(event, blocks=blocks).encode()
        elif isinstance(event, SectionPart | SectionEnd | EndOfSection):
            begun = True  # one PART with all pages, one END with none
        elif not (begun and isinstance(event, Footer) and event.section_id == section):
            (tail if begun else head).extend(event.encode())  # type: ignore[union-attr]
    head += SectionPart(section).encode()
    for page in small.values():
        head += (
            ram.zero(page.block, page.offset, page.fill)
            if page.data is None
            else ram.page(page.block, page.offset, page.data)
        )
    footer = Footer(section).encode()
    (folder / "head").write_bytes(head)
    (folder / "tail").write_bytes(
        ram.end() + footer + SectionEnd(section).encode() + ram.end() + footer + tail
    )


@asynccontextmanager
async def streams(*sizes: int) -> AsyncIterator[dict[int, Path]]:
    """Folders with ``head`` and ``tail`` by size in MiB, for the length of a block."""
    with tempfile.TemporaryDirectory(prefix="vpc-bench-") as name:
        events = await record(Path(name))
        folders = {}
        for mib in sizes:
            folders[mib] = Path(name) / str(mib)
            folders[mib].mkdir()
            write_stream(events, mib, folders[mib])
        yield folders
