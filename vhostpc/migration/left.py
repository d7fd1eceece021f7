"""What a killed source has left: its memory in files, and a note of what a recovery needs besides.

The destination's bitmaps say what is missing, so that is little: names, lengths and page sizes of the blocks, the
number of RAM's section in the stream, and whether requested pages have a connection of their own (postcopy-preempt),
because the destination waits for that one in every recovery. Device state is not needed: it has gone with the package,
or nothing was lost.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vhostpc.errors import GuestMemoryError
from vhostpc.migration.held import HeldMachine
from vhostpc.migration.machine import Machine
from vhostpc.pages.ramfiles import RamFiles
from vhostpc.wire.migration.elements import Configuration

VERSION = 1
NAME = "migration.json"


@dataclass(frozen=True)
class LeftBlock:
    name: str
    length: int
    page_size: int


@dataclass(frozen=True)
class Note:
    """Written when the machine has stopped for a postcopy, removed when it is all over."""

    machine: str
    section: int
    blocks: tuple[LeftBlock, ...]
    preempt: bool = False
    """The capability postcopy-preempt was on."""

    @classmethod
    def of(cls, machine: Machine, *, preempt: bool = False) -> Note:
        blocks = tuple(LeftBlock(b.name, b.length, b.page_size) for b in machine.ram.blocks)
        return cls(machine.configuration.machine, machine.ram_section, blocks, preempt)

    @classmethod
    def parse(cls, text: str) -> Note:
        """Raises ValueError for a text that is no note of this version."""
        found: Any = json.loads(text)
        if not isinstance(found, dict) or found.get("version") != VERSION:
            raise ValueError("it is not of this version")
        try:
            blocks = tuple(
                LeftBlock(str(b["name"]), int(b["length"]), int(b["page_size"])) for b in found["blocks"]
            )
            return cls(str(found["machine"]), int(found["section"]), blocks, found.get("preempt") is True)
        except (KeyError, TypeError) as e:
            raise ValueError(f"{e} is missing or wrong") from None

    def encode(self) -> str:
        return json.dumps({"version": VERSION, **asdict(self)}, indent=1)


class Notes:
    """The note's place, beside the blocks' files."""

    def __init__(self, files: RamFiles) -> None:
        self._files = files
        self._path = files.folder / NAME

    def write(self, machine: Machine, *, preempt: bool = False) -> None:
        """All of it or nothing. Raises OSError."""
        fresh = Path(f"{self._path}.new")
        fresh.write_text(Note.of(machine, preempt=preempt).encode())
        os.replace(fresh, self._path)

    def remove(self) -> None:
        self._path.unlink(missing_ok=True)

    def read(self) -> Note | None:
        """None: no postcopy was under way. Raises GuestMemoryError for what is no note, or files without one."""
        try:
            return Note.parse(self._path.read_text())
        except FileNotFoundError:
            pass
        except (OSError, ValueError) as e:
            raise GuestMemoryError(f"{self._path}: {e}") from None
        if paths := self._files.paths():
            raise GuestMemoryError(
                "this is the memory of a machine that was not moving when its process ended: "
                f"remove {', '.join(map(str, paths))}"
            )
        return None


class LeftMachine(HeldMachine):
    """The memory of a machine whose process was killed while its postcopy went on. It serves the rest, no more."""

    def __init__(self, note: Note, files: RamFiles) -> None:
        """Raises GuestMemoryError: the files are not those of the note."""
        super().__init__(Configuration(note.machine))
        self._section = note.section
        try:
            for block in note.blocks:
                fd = files.open(block.name, block.length, block.page_size)
                try:
                    self.ram.add(block.name, fd, block.length, block.page_size)
                finally:
                    os.close(fd)
        except OSError as e:
            self.close()
            raise GuestMemoryError(f"memory in {files.folder}: {e.strerror}") from None
        except BaseException:
            self.close()
            raise

    @property
    def ram_section(self) -> int:
        return self._section

    def blocked(self) -> Sequence[str]:
        return (
            "Only the memory of this machine is left: it can be recovered by its destination, and not sent anew",
        )
