"""Whatever of ours has a name prints it, not a number."""

from __future__ import annotations

import enum
import importlib
import pkgutil

import pytest

import vhostpc
from vhostpc.enums import NamedFlag


def all_enums() -> list[type[enum.Enum]]:
    """Every enumeration that a module of the package defines."""
    found: dict[str, type[enum.Enum]] = {}
    for module in pkgutil.walk_packages(vhostpc.__path__, "vhostpc."):
        if module.name.endswith("__main__") or module.name == "vhostpc._native.build":
            continue
        for value in vars(importlib.import_module(module.name)).values():
            if (
                isinstance(value, type)
                and issubclass(value, enum.Enum)
                and value.__module__.startswith("vhostpc")
            ):
                found[f"{value.__module__}.{value.__qualname__}"] = value
    return [found[name] for name in sorted(found)]


ENUMS = [kind for kind in all_enums() if len(kind)]


def test_they_are_found() -> None:
    names = {f"{kind.__module__}.{kind.__qualname__}" for kind in ENUMS}
    assert {"vhostpc.ufd.flags.Way", "vhostpc.ufd.trace.Way", "vhostpc.wire.vhost_user.Request"} <= names
    assert len(names) > 25


@pytest.mark.parametrize("kind", ENUMS, ids=lambda k: f"{k.__module__}.{k.__qualname__}")
def test_its_members_print_their_names(kind: type[enum.Enum]) -> None:
    for member in kind:
        for text in (str(member), f"{member}", repr(member), "%s" % member):  # noqa: UP031: as a log line has it
            if not (isinstance(member, str) and text == member.value):
                assert member.name.lower() in text.lower().replace("-", "_"), text


def test_sets_of_bits_print_the_names_of_all() -> None:
    class Some(NamedFlag, boundary=enum.KEEP):
        A = 1
        B = 4

    assert [str(Some(n)) for n in (0, 1, 5, 8, 12)] == ["0", "A", "A|B", "bit 3", "B|bit 3"]
    assert f"{Some(5):#x}" == "0x5"
    assert Some(5) == 5
