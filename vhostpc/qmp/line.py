"""A line of the text monitor, parsed as QEMU parses it: names, options, strings with their escapes.

A command declares its arguments by their types, in order: ``-d`` is an option of that letter, ``s`` a string, ``b`` one
of the words on and off, ``S`` the rest of the line, ``S?`` the same, even if it is empty.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

_SPACE = " \t\n\v\f\r"
_ESCAPES = {"n": "\n", "r": "\r", "\\": "\\", "'": "'", '"': '"'}


class BadLine(Exception):
    """Arguments that do not belong to the command; the text says why."""


@dataclass
class Arguments:
    """``options``: letters; ``values``: strings, and whether it was ``on``, in the order of their types."""

    options: str = ""
    values: list[str | bool] = field(default_factory=list)


class Line:
    """A line that is read from its beginning on."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0

    @property
    def read(self) -> str:
        """The line up to here."""
        return self.text[: self.at]

    @property
    def rest(self) -> str:
        self._skip()
        return self.text[self.at :]

    def _skip(self) -> None:
        while self._next() and self._next() in _SPACE:
            self.at += 1

    def _next(self) -> str:
        return self.text[self.at : self.at + 1]

    def name(self) -> str:
        """The name of a command, empty at the end. It ends where a format could follow, as in ``x/4``."""
        self._skip()
        begin = self.at
        while self._next() and self._next() not in _SPACE + "/":
            self.at += 1
        return self.text[begin : self.at]

    def string(self) -> str | None:
        """A word, or a quoted string. None if there is none, it does not end, or an escape is wrong."""
        self._skip()
        if self._next() != '"':
            return self._word() or None
        self.at += 1
        found = ""
        while (one := self._next()) and one != '"':
            self.at += 1
            if one == "\\":
                escape = self._next()
                if escape not in _ESCAPES or not escape:
                    return None
                one = _ESCAPES[escape]
                self.at += 1
            found += one
        if not one:
            return None
        self.at += 1
        return found

    def _word(self) -> str:
        begin = self.at
        while self._next() and self._next() not in _SPACE:
            self.at += 1
        return self.text[begin : self.at]

    def strings(self) -> list[str] | None:
        """The rest; None where a word is wrong."""
        found = []
        while self.rest:
            one = self.string()
            if one is None:
                return None
            found.append(one)
        return found

    def arguments(self, command: str, types: Sequence[str]) -> Arguments:
        """The rest, as the arguments of ``command``. Raises BadLine."""
        found = Arguments()
        for at, kind in enumerate(types):
            self._skip()
            if kind.startswith("-"):
                self._option(command, kind[1], types[at + 1 :], found)
            elif kind == "s":
                word = self.string()
                if word is None:
                    raise BadLine(f"{command}: string expected")
                found.values.append(word)
            elif kind == "b":
                word = self._word()
                if word not in ("on", "off"):
                    raise BadLine("Expected 'on' or 'off'")
                found.values.append(word == "on")
            else:
                if kind == "S" and not self.rest:
                    raise BadLine(f"{command}: string expected")
                found.values.append(self.rest)
                self.at = len(self.text)
        if self.rest:
            raise BadLine(f"{command}: extraneous characters at the end of line")
        return found

    def _option(self, command: str, letter: str, later: Sequence[str], found: Arguments) -> None:
        if self._next() != "-":
            return
        given = self.text[self.at + 1 : self.at + 2]
        if given == letter:
            self.at += 2
            found.options += letter
        elif f"-{given}" not in later:
            raise BadLine(f"{command}: unsupported option -{given}")
