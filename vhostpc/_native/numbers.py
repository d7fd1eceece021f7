"""Structs that C fills, as values of Python."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeVar

T = TypeVar("T")


def numbers_of(cls: type[T], *raw: Any, **others: Any) -> T:
    """A ``cls``, dataclass or NamedTuple, of C structs: each field is the member of its name.

    ``others``: fields whose value is no plain number of a struct. Raises TypeError for a field that is nowhere.
    """
    return cls(**dict(_members(cls, raw, others)), **others)


def _members(cls: Any, structs: tuple[Any, ...], others: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for name in cls.__match_args__:
        for raw in structs:
            if name not in others and hasattr(raw, name):
                yield name, getattr(raw, name)
                break
