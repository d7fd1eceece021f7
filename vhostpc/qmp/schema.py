"""Types of commands' arguments and results: checked as QEMU does, described as in ``query-qmp-schema``.

Source: QEMU, docs/devel/qapi-code-gen (introspection); sentences as recorded from 7.2 and 10.0.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from vhostpc.wire.qmp import QmpError


def _wrong(path: str, expected: str) -> QmpError:
    return QmpError(f"Invalid parameter type for '{path or 'null'}', expected: {expected}")


@dataclass(frozen=True)
class Builtin:
    """A type of JSON. ``name`` and ``json``: its names in introspection; ``expected``: in error messages."""

    name: str
    json: str
    expected: str
    types: tuple[type, ...]

    def check(self, value: Any, path: str) -> Any:
        if not isinstance(value, self.types) or (isinstance(value, bool) and bool not in self.types):
            raise _wrong(path, self.expected)
        return value


STR = Builtin("str", "string", "string", (str,))
BOOL = Builtin("bool", "boolean", "boolean", (bool,))
NULL = Builtin("null", "null", "null", (type(None),))
ANY = Builtin("any", "value", "value", (object,))
NUMBER = Builtin("number", "number", "number", (int, float))


@dataclass(frozen=True)
class Int:
    """An integer of ``bits``; introspection knows only ``int``."""

    bits: int = 64
    signed: bool = True
    name = "int"
    json = "int"

    def check(self, value: Any, path: str) -> int:
        whole = isinstance(value, int) and not isinstance(value, bool)
        if self.signed:
            if not whole or not -(1 << 63) <= value < 1 << 63:
                raise _wrong(path, "integer")
            return int(value)
        if not whole:
            raise QmpError(f"Parameter '{path}' expects uint64")
        number = int(value) & (1 << 64) - 1  # a negative one counts from the end, as with QEMU
        if number >> self.bits:
            raise QmpError(f"Parameter '{path}' expects uint{self.bits}_t")
        return number


@dataclass(frozen=True)
class Enum:
    """Values; ``features`` of some of them."""

    values: tuple[str, ...]
    features: tuple[tuple[str, str], ...] = ()

    def check(self, value: Any, path: str) -> str:
        if not isinstance(value, str):
            raise _wrong(path, "string")
        if value not in self.values:
            name = path.rpartition(".")[2]
            name = "null" if name.endswith("]") else name
            raise QmpError(f"Parameter '{name}' does not accept value '{value}'")
        return value


@dataclass(frozen=True)
class Array:
    of: Type

    def check(self, value: Any, path: str) -> list[Any]:
        if not isinstance(value, list):
            raise _wrong(path, "array")
        return [self.of.check(item, f"{path}[{at}]") for at, item in enumerate(value)]


@dataclass(frozen=True)
class StrOrNull:
    """A string, or null for none."""

    def check(self, value: Any, path: str) -> str:
        if value is None:
            return ""
        if not isinstance(value, str):
            raise _wrong(path, "StrOrNull")
        return value


@dataclass(frozen=True)
class Member:
    name: str
    type: Type
    optional: bool = False
    features: tuple[str, ...] = ()


@dataclass(frozen=True)
class Struct:
    """An object; with a ``tag``, that member's value chooses further members from ``variants``."""

    members: tuple[Member, ...] = ()
    tag: str = ""
    variants: tuple[tuple[str, Struct], ...] = ()

    def check(self, value: Any, path: str = "") -> dict[str, Any]:
        if not isinstance(value, dict):
            raise _wrong(path, "object")
        prefix = f"{path}." if path else ""
        found: dict[str, Any] = {}
        used = self.collect(value, prefix, found)
        for name in value:
            if name not in used:
                raise QmpError(f"Parameter '{prefix}{name}' is unexpected")
        return found

    def collect(self, value: dict[str, Any], prefix: str, found: dict[str, Any]) -> set[str]:
        """Check members and put them into ``found``; returns the names that were known."""
        used = set()
        for member in self.members:
            used.add(member.name)
            if member.name in value:
                found[member.name] = member.type.check(value[member.name], prefix + member.name)
            elif not member.optional:
                raise QmpError(f"Parameter '{prefix}{member.name}' is missing")
        if self.tag:
            used |= dict(self.variants)[found[self.tag]].collect(value, prefix, found)
        return used


Type = Builtin | Int | Enum | Array | StrOrNull | Struct

NOTHING = Struct()


class Introspection:
    """``query-qmp-schema``: commands, events and every type they lead to, under short names."""

    def __init__(self) -> None:
        self.entries: list[dict[str, Any]] = []
        self._names: dict[Type, str] = {}

    def command(self, name: str, arguments: Struct, result: Type, **more: Any) -> None:
        entry = {"name": name, "ret-type": self.type(result), "meta-type": "command", **more}
        self.entries.append({**entry, "arg-type": self.type(arguments)})

    def event(self, name: str, data: Struct) -> None:
        self.entries.append({"name": name, "meta-type": "event", "arg-type": self.type(data)})

    def type(self, kind: Type) -> str:
        """The name of a type, which is described when it is first named."""
        if isinstance(kind, Builtin | Int):
            return self._describe(kind, kind.name, {"meta-type": "builtin", "json-type": kind.json})
        if kind in self._names:
            return self._names[kind]
        if isinstance(kind, Array):
            of = self.type(kind.of)
            return self._describe(kind, f"[{of}]", {"meta-type": "array", "element-type": of})
        name = str(len(self._names))
        self._names[kind] = name
        if isinstance(kind, Enum):
            told: dict[str, Any] = {
                "meta-type": "enum",
                "members": [self._value(value, kind) for value in kind.values],
                "values": list(kind.values),
            }
        elif isinstance(kind, StrOrNull):
            members = [{"type": self.type(STR)}, {"type": self.type(NULL)}]
            told = {"meta-type": "alternate", "members": members}
        else:
            told = {"meta-type": "object", "members": [self._member(m) for m in kind.members]}
            if kind.tag:
                told["tag"] = kind.tag
                told["variants"] = [{"case": case, "type": self.type(of)} for case, of in kind.variants]
        self.entries.append({"name": name, **told})
        return name

    def _describe(self, kind: Type, name: str, told: dict[str, Any]) -> str:
        if not any(entry["name"] == name for entry in self.entries):
            self.entries.append({"name": name, **told})
        self._names[kind] = name
        return name

    def _member(self, member: Member) -> dict[str, Any]:
        told: dict[str, Any] = {"name": member.name, "type": self.type(member.type)}
        if member.optional:
            told["default"] = None
        if member.features:
            told["features"] = list(member.features)
        return told

    @staticmethod
    def _value(value: str, kind: Enum) -> dict[str, Any]:
        features = [feature for name, feature in kind.features if name == value]
        return {"name": value, "features": features} if features else {"name": value}


def optional(names: Iterable[str], kind: Type) -> tuple[Member, ...]:
    return tuple(Member(name, kind, True) for name in names)
