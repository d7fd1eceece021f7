"""Numbers and sizes as the text monitor reads them: like C's strtoull, and with QEMU's suffixes."""

from __future__ import annotations

import re

MOST = (1 << 64) - 1
MOST_DIGITS = 400
"""Most characters of a number that are examined."""

_SUFFIX = {"": 1, "b": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40, "p": 1 << 50, "e": 1 << 60}
_SIZE = re.compile(
    r"\s*\+?(?:0x([0-9a-f]+)|(?=\.?[0-9])([0-9]*)(?:\.([0-9]*))?([bkmgtpe]?))", re.IGNORECASE | re.ASCII
)
_NEGATIVE = re.compile(r"\s*-[0-9]+", re.ASCII)
_INTEGER = re.compile(r"\s*([+-]?)(?:0x([0-9a-f]+)|(0[0-7]*)|([1-9][0-9]*))", re.IGNORECASE | re.ASCII)


class TooLarge(ValueError):
    """It does not fit in 64 bits."""


def size(text: str, unit: str = "b") -> int:
    """Bytes; ``unit``: the suffix where there is none. Raises TooLarge, and ValueError for text that is not a size.

    A fraction is cut off at whole bytes, and not allowed where the unit is a byte. Hexadecimal numbers have no
    suffix.
    """
    found = _SIZE.fullmatch(text)
    if found is None or len(text) > MOST_DIGITS:
        if _NEGATIVE.match(text):
            raise TooLarge(text)
        raise ValueError(text)
    hexadecimal, whole, fraction, suffix = found.groups()
    if hexadecimal:
        return _fits(int(hexadecimal, 16) * _SUFFIX[unit], text)
    scale = _SUFFIX[(suffix or unit).lower()]
    part = int(float(f"0.{fraction or 0}") * scale)
    if scale == 1 and int(fraction or 0):
        raise ValueError(text)
    return _fits(int(whole or 0) * scale + part, text)


def unsigned(text: str) -> int:
    """A number of 64 bits, also octal and hexadecimal; a negative one counts from the end. Raises ValueError."""
    found = _INTEGER.fullmatch(text)
    if found is None or len(text) > MOST_DIGITS:
        raise ValueError(text)
    sign, hexadecimal, octal, decimal = found.groups()
    number = int(hexadecimal, 16) if hexadecimal else int(octal, 8) if octal else int(decimal)
    return _fits(number, text) if sign != "-" else -_fits(number, text) & MOST


def _fits(number: int, text: str) -> int:
    if number > MOST:
        raise TooLarge(text)
    return number
