"""What the framework looks up on a device is documented, what is documented is there, and requests have handlers."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import vhostpc.backend.session  # noqa: F401 - brings all handlers
from tests.kit.pages import ROOT
from vhostpc.backend import Chain, Device, FrontEnd, Queue
from vhostpc.backend.answer import HANDLERS
from vhostpc.backend.state import SessionState
from vhostpc.wire.vhost_user import REQUESTS, Request

PUBLIC = sorted(name for name in vars(Device) if not name.startswith("_"))
# These speak to any device; others there to their own alone.
FRAMEWORK = [
    *(path for path in sorted((ROOT / "vhostpc/backend").glob("*.py")) if path.stem not in ("net", "disk")),
    *(ROOT / "vhostpc/cli" / name for name in ("backend.py", "own_device.py", "program.py")),
]


def looked_up(path: Path) -> Iterator[str]:
    """Attributes of ``device`` or ``kind`` (its class), as a variable or at the end of a chain of attributes."""
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Attribute):
            of, name = node.value, node.attr
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "getattr":
            of, name = node.args[0], str(ast.literal_eval(node.args[1])) if is_text(node.args[1]) else ""
        else:
            continue
        called = of.id if isinstance(of, ast.Name) else of.attr if isinstance(of, ast.Attribute) else ""
        if called in ("device", "kind") and not name.startswith("__"):
            yield name


def is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def test_all_that_is_looked_up_is_there() -> None:
    """The base class has it, with a default, and all that it has is used."""
    found = {name: path.name for path in FRAMEWORK for name in looked_up(path) if name}
    assert found.keys() - set(PUBLIC) == set()
    assert set(PUBLIC) - found.keys() == {"read_config"}  # by way of config_for


def test_all_that_is_there_is_documented() -> None:
    source = inspect.getsource(Device)
    page = (ROOT / "docs" / "back-end.md").read_text()
    for name in PUBLIC:
        member = vars(Device)[name]
        described = inspect.getdoc(member) if callable(member) else re.search(rf"#: .*\n    {name}: ", source)
        assert described, f"Device.{name} says nothing"
        assert f"`{name}`" in page, f"docs/back-end.md does not tell of {name}"
    # Its table has the attributes and their defaults.
    table = dict(re.findall(r"^\| `(\w+)` \|.*\| (\w+) \|$", page, re.MULTILINE))
    attributes = {name: vars(Device)[name] for name in PUBLIC if not callable(vars(Device)[name])}
    assert table == {name: str(value) if value != () else "none" for name, value in attributes.items()}


def test_all_that_it_names_is_there() -> None:
    """Of queues, chains and front-ends in the text of the classes."""
    named = {"queue": Queue, "chain": Chain, "front_end": SessionState}
    for text in (inspect.getsource(Device), inspect.getsource(FrontEnd)):
        for variable, name in re.findall(r"``(queue|chain|front_end)\.(\w+)", text):
            assert hasattr(named[variable], name), f"{variable}.{name}"


def test_a_session_has_all_that_a_device_may_know_of_it() -> None:
    made = set(SessionState.__init__.__code__.co_names) | vars(SessionState).keys()
    told = {name for name in vars(FrontEnd).keys() | FrontEnd.__annotations__.keys() if name[0] != "_"}
    assert told
    assert told <= made


def test_the_table_of_requests_and_the_handlers_are_the_same() -> None:
    assert {Request(number) for number in HANDLERS} == {spec.request for spec in REQUESTS.values()}
    assert all(number == spec.request for number, spec in REQUESTS.items())


def test_handlers_have_the_names_of_their_requests() -> None:
    assert {request: handler.__name__ for request, handler in HANDLERS.items()} == {
        request: Request(request).name.lower() for request in HANDLERS
    }
