"""Structs that C fills, as values of Python."""

from __future__ import annotations

from typing import Any, TypeVar

T = TypeVar("T")


def numbers_of(cls: type[T], *structs: Any, **others: Any) -> T:
    """A ``cls``, a dataclass, of C structs: each field is the member of its name.

    ``others``: fields whose value is no plain number of a struct. Raises TypeError for a field that is nowhere.
    """
    fields: tuple[str, ...] = cls.__match_args__  # type: ignore[attr-defined]
    for name in fields:
        if name in others:
            continue
        for raw in structs:
            number = getattr(raw, name, None)
            if number is not None:
                others[name] = number
                break
    return cls(**others)
