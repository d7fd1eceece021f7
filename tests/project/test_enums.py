"""Whatever of ours has a name prints it, not a number."""

from __future__ import annotations

import enum
import importlib
import pkgutil

import pytest

import vhostpc
from vhostpc._native import lib
from vhostpc.enums import NamedFlag
from vhostpc.memory import strike
from vhostpc.memory.mapping import Backing
from vhostpc.pages import trace
from vhostpc.pages.pagesource import Ended
from vhostpc.pages.ramblock import Bits
from vhostpc.ufd import flags
from vhostpc.wire.migration.ramrec import BadRecord


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
    assert {"vhostpc.ufd.flags.Way", "vhostpc.pages.trace.Way", "vhostpc.wire.vhost_user.Request"} <= names
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


#: Enumerations whose numbers C has too: how they begin there, and names that differ.
OF_C: list[tuple[type[enum.IntEnum], str, dict[str, str]]] = [
    (Backing, "VPC_KIND_", {}),
    (Bits, "VPC_BITS_", {}),
    (BadRecord, "VPC_BAD_", {}),
    (Ended, "VPC_SAVE_", {}),
    (strike.Use, "VPC_USE_", {"DIRTY_LOG": "LOG", "INFLIGHT_REGION": "INFLIGHT"}),
    (trace.Way, "VPC_WAY_", {}),
    (flags.Way, "VPC_UFFD_", {"USER_MODE_ONLY": "USER_MODE"}),
]


@pytest.mark.parametrize(
    ("kind", "prefix", "renamed"), OF_C, ids=lambda value: value if isinstance(value, str) else ""
)
def test_a_number_of_c_is_the_same_in_python(
    kind: type[enum.IntEnum], prefix: str, renamed: dict[str, str]
) -> None:
    ours = {prefix + renamed.get(member.name, member.name): member.value for member in kind}
    theirs = {name: getattr(lib, name) for name in dir(lib) if name.startswith(prefix)}
    theirs.pop("VPC_SAVE_HEARD", None)  # is no end
    assert ours == theirs
