"""Numbers with names: their name is printed, in messages and in the log; their number is sent.

``str`` of a plain ``IntEnum`` or ``IntFlag`` is its number.
"""

from __future__ import annotations

from enum import IntEnum, IntFlag


class WordEnum(IntEnum):
    """A number of ours; its text is a word: ``user-mode-only``."""

    def __str__(self) -> str:
        return self.name.lower().replace("_", "-")


class SpecEnum(IntEnum):
    """A number from a specification; its text is its name there: ``SET_MEM_TABLE``."""

    def __str__(self) -> str:
        return self.name


class NamedFlag(IntFlag):
    """Bits; their text is their names: ``MQ|RARP``, and ``0`` for none."""

    def __str__(self) -> str:
        return "|".join(names(self)) or "0"


def names(bits: IntFlag) -> list[str]:
    """The names of the set bits in order of value; ``bit N`` for one that has no name here."""
    found = []
    value = int(bits)
    for shift in range(value.bit_length()):
        if value >> shift & 1:
            found.append(type(bits)(1 << shift).name or f"bit {shift}")
    return found
