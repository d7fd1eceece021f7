"""Structs that C fills, as values of Python."""

from __future__ import annotations

from typing import Any, TypeVar

T = TypeVar("T")


def _fields(cls: type) -> tuple[str, ...]:
    names: tuple[str, ...] = cls.__match_args__  # type: ignore[attr-defined]
    return names


def numbers_of(cls: type[T], *structs: Any, **others: Any) -> T:
    """A ``cls``, a dataclass, of C structs: each field is the member of its name.

    ``others``: fields whose value is no plain number of a struct. Raises TypeError for a field that is nowhere.
    """
    for name in _fields(cls):
        if name in others:
            continue
        for raw in structs:
            number = getattr(raw, name, None)
            if number is not None:
                others[name] = number
                break
    return cls(**others)


def summed(first: T, *others: T) -> T:
    """The sum of dataclasses of numbers, field by field; a flag is the last one's."""
    total = first
    for other in others:
        sums = {}
        for name in _fields(type(first)):
            mine, more = getattr(total, name), getattr(other, name)
            sums[name] = more if isinstance(more, bool) else mine + more
        total = type(first)(**sums)
    return total
