"""The rules of docs/architecture.md that can be read off the sources: imports and pointers."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kit.c_calls import NATIVE, c_files

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "vhostpc"

# A package imports only what stands after it.
ORDER = [
    *(
        "cli",
        "proxy",
        "qmp",
        "endpoint",
        "guest",
        "frontend",
        "migration",
        "backend",
        "virtio",
        "pages",
        "ufd",
        "memory",
    ),
    "_native",
]
# ... and these not even so.
FORBIDDEN = {("frontend", "backend"), ("frontend", "migration"), ("migration", "backend")}
# For all to import; they import nothing of ours but this.
FREE = {
    "errors": set[str](),
    "logs": set(),
    "own_sockets": set(),
    "units": set(),
    "enums": set(),
    "lazy": set(),
    "dialect": set(),
    "wire": {"errors", "dialect", "units", "enums", "lazy"},
    "transport": {"errors", "own_sockets", "wire"},
    "listener": {"errors", "logs"},
}
# The packages that may see the native module.
# (migration/ends.py and qmp/editing.py need a thread only.)
NATIVE_USERS = (
    *("guest/vcpu.py", "memory/", "pages/", "ufd/", "virtio/", "_native/", "frontend/driver.py"),
    *("migration/ends.py", "qmp/editing.py"),
)


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def imports(path: Path) -> Iterator[str]:
    """Full names that a file imports, wherever the import stands (TYPE_CHECKING blocks count too)."""
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = path.relative_to(ROOT).with_suffix("").parts
                package = ".".join(parts[: len(parts) - node.level])
                base = f"{package}.{base}" if base else package
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def includes(path: Path) -> list[str]:
    """Our headers that a file of C includes, as it names them: from the native half's folder on."""
    return re.findall(r'^#include "([^"]+)"', path.read_text(), re.MULTILINE)


def room(name: str) -> str | None:
    """The room of one of our modules, None for others and for the package itself."""
    parts = name.split(".")
    if parts[0] != "vhostpc" or len(parts) < 2:
        return None
    return parts[1] if (PACKAGE / parts[1]).is_dir() or (PACKAGE / f"{parts[1]}.py").exists() else None


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down_only(path: Path) -> None:
    here = path.relative_to(PACKAGE)
    own = here.parts[0].removesuffix(".py")
    if own in ("__init__", "__main__"):
        return
    for name in imports(path):
        theirs = room(name)
        if theirs is None or theirs == own:
            continue
        if own in FREE:
            assert theirs in FREE[own], f"{here} imports {name}: {own} is for all, so it imports none of ours"
        elif theirs not in FREE:
            assert own in ORDER, f"{here}: {own} has no place in the order of layers"
            assert theirs in ORDER, f"{here} imports {name}, which has no place in the order of layers"
            assert ORDER.index(theirs) > ORDER.index(own), f"{here} imports {name}, which stands above it"
            assert (own, theirs) not in FORBIDDEN, f"{here} imports {name}: {own} must not know {theirs}"
        if theirs == "_native":
            assert str(here).startswith(NATIVE_USERS), f"{here} imports {name}: only {NATIVE_USERS} may"


@pytest.mark.parametrize("path", c_files(), ids=lambda p: p.name)
def test_includes_go_down_only(path: Path) -> None:
    """A folder of C belongs to the package of its name, and uses what that may use; what is in none is for all."""
    own = path.relative_to(NATIVE).parts[0]
    for name in includes(path):
        assert (NATIVE / name).is_file(), f"{path.name} includes {name}"
        theirs = Path(name).parts[0]
        if theirs in ORDER and theirs != own:
            assert own in ORDER, f"{path.name} includes {name}: it is for all, so it needs none of theirs"
            assert ORDER.index(theirs) > ORDER.index(
                own
            ), f"{path.name} includes {name}, which stands above it"
            assert (
                own,
                theirs,
            ) not in FORBIDDEN, f"{path.name} includes {name}: {own} must not know {theirs}"


@pytest.mark.parametrize(
    "path", sorted((PACKAGE / "wire").rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE))
)
def test_codecs_do_no_io(path: Path) -> None:
    found = {name.split(".")[0] for name in imports(path)}
    assert not found & {"trio", "socket", "asyncio", "threading", "select", "cffi"}


def loaded_by(statement: str) -> set[str]:
    code = f"import sys, json; {statement}; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    names = json.loads(done.stdout)
    return set(names)


def test_the_library_does_not_load_the_command_line() -> None:
    for module in ("vhostpc", "vhostpc.ufd", "vhostpc.backend", "vhostpc.frontend"):
        loaded = loaded_by(f"from {module} import *")
        heavy = {name.split(".")[0] for name in loaded} & {"click", "rich", "pytest", "asyncio"}
        assert not heavy, f"{module} loads {heavy}"


def test_a_front_end_loads_no_postcopy() -> None:
    """A test of somebody's back-end that connects and asks for features starts soon."""
    loaded = loaded_by("from vhostpc.frontend import connect")
    assert "vhostpc.transport" in loaded
    assert not {
        name for name in loaded if name.startswith(("vhostpc.ufd", "vhostpc._native", "vhostpc.memory"))
    }


def test_the_command_line_loads_its_parts_when_asked() -> None:
    """So that ``--help`` and a wrong option answer at once."""
    loaded = loaded_by("import vhostpc.cli.main")
    assert not loaded & {"trio", "rich", "vhostpc._native", "vhostpc.backend", "vhostpc.frontend"}


# The headers.

HANDLE = re.compile(r"(const )?struct vpc_\w+ \*{1,2}$")
OUT = {"uint64_t *", "int64_t *", "uint32_t *", "int32_t *", "uint16_t *", "int *", "size_t *"}
TEXT = {"const char *"}
# Private memory of the caller or of a handle, each looked at by hand: never an address in guest memory.
PRIVATE = {
    "vpc_ring.h": {"const unsigned char * data", "unsigned char * data"},
    # A copy out of and into RAM blocks; offsets in one.
    "vpc_ram.h": {"void * to", "const void * from", "const uint64_t * ranges"},
    # A return-path message; numbers of threads.
    "vpc_fault.h": {"const void * message", "const uint32_t * threads"},
    # Bytes of the stream that were read before it, and by it too far.
    "vpc_load.h": {"const void * from", "void * to"},
    # What follows the pages in a stream.
    "vpc_save.h": {"const void * from"},
    "vpc_driver.h": {"const unsigned char * data", "unsigned char * data"},
}


def declarations(header: Path) -> str:
    text = header.read_text().split("/* cdef begin */", 1)[1].split("/* cdef end */", 1)[0]
    text = re.sub(r"/\*.*?\*/", " ", text, flags=re.DOTALL)
    return re.sub(r"^#.*$", "", text, flags=re.MULTILINE)


def pointers(header: Path) -> Iterator[tuple[str, str]]:
    """(type, name) of every pointer in the declarations: parameters, results and fields."""
    for piece in re.split(r"[;,(){}]", declarations(header)):
        text = " ".join(piece.split())
        if "*" in text:
            found = re.fullmatch(r"(.*?) ?(\*+) ?(\w*)", text)
            assert found, f"{header.name}: a pointer that this test cannot read: {text}"
            yield f"{found[1]} {found[2]}", found[3]


@pytest.mark.parametrize("header", c_files("vpc_*.h"), ids=lambda p: p.name)
def test_no_function_takes_or_returns_a_pointer_to_guest_bytes(header: Path) -> None:
    for kind, name in pointers(header):
        allowed = kind in OUT or kind in TEXT or HANDLE.fullmatch(kind) is not None
        allowed = allowed or f"{kind} {name}" in PRIVATE.get(header.name, set())
        assert (
            allowed
        ), f"{header.name}: {kind}{name}: guest memory is named by integers; if this is private, list it"


def test_one_way_to_make_an_object() -> None:
    """``vpc_x_new`` gives 0 or -errno, and its object through the last argument; no function returns a handle."""
    made, freed = set(), set()
    for header in c_files("vpc_*.h"):
        for declaration in declarations(header).split(";"):
            text = " ".join(declaration.split())
            assert not re.match(r"(const )?struct \w+ \*", text), text
            freed |= set(re.findall(r"^void vpc_(\w+)_(?:free|unref)\(", text))
            if found := re.match(r"(.*) vpc_(\w+)_new\((.*)\)$", text):
                kind = found[2]
                assert found[1] == "int", text
                assert found[3].split(", ")[-1] == f"struct vpc_{kind} **out", text
                made.add(kind)
    assert made == freed - {"chain"}, "a chain is made by popping it"


@pytest.mark.parametrize("header", c_files("vpc_*.h"), ids=lambda p: p.name)
def test_no_callbacks(header: Path) -> None:
    assert not re.search(r"\(\s*\*", declarations(header)), "C calls no Python"


@pytest.mark.parametrize("path", c_files("*.c"), ids=lambda p: p.name)
def test_native_code_knows_no_interpreter(path: Path) -> None:
    text = path.read_text()
    assert "Python.h" not in text
    assert not re.search(r"\b(printf|fprintf|puts|exit)\s*\(", text), "the core neither prints nor exits"


def test_every_native_name_has_a_type() -> None:
    """What a header declares stands in its Protocol class, and nothing else does."""
    for header in c_files("vpc_*.h"):
        declared = set(re.findall(r"\b(vpc_\w+)\(", declarations(header)))
        api = header.parent / f"api_{header.stem.removeprefix('vpc_')}.py"
        typed = {
            node.name
            for node in ast.walk(ast.parse(api.read_text()))
            if isinstance(node, ast.FunctionDef) and node.name.startswith("vpc_")
        }
        assert declared == typed, header.name


@pytest.mark.parametrize("name", ["options", "phase", "status", "runstate", "uri"])
def test_tables_of_a_migration_do_no_io(name: str) -> None:
    found = {part.split(".")[0] for part in imports(PACKAGE / "migration" / f"{name}.py")}
    assert not found & {"trio", "socket", "os", "threading"}
