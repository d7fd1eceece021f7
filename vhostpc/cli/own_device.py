"""A user's device class: found by name, and created. Errors in the user's code are reported with file and line."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from vhostpc.backend import Device
from vhostpc.backend.device import check_device
from vhostpc.cli.common import Failure
from vhostpc.errors import VhostpcError, sentence

HINT = "MODULE:CLASS"
PACKAGE = str(Path(__file__).resolve().parent.parent)


def find(target: str) -> Callable[..., Any]:
    """The object that ``MODULE:NAME`` or ``FILE.py:NAME`` names; the current folder is searched first."""
    module_name, colon, name = target.rpartition(":")
    if not colon or not module_name or not name:
        raise click.BadParameter(f"{target!r} is not MODULE:CLASS or FILE.py:CLASS", param_hint=HINT)
    sys.path.insert(0, os.getcwd())
    found: Any = load_file(Path(module_name)) if module_name.endswith(".py") else load_module(module_name)
    for part in name.split("."):
        found = getattr(found, part, None)
    if not callable(found):
        raise click.BadParameter(f"{module_name} has no class {name}", param_hint=HINT)
    return found  # type: ignore[no-any-return]


def load_module(name: str) -> Any:
    """Import a module by its name."""
    if "/" in name or name.startswith(".") or Path(name).is_file():
        raise click.BadParameter(f"{name} is neither a module's name nor a FILE.py", param_hint=HINT)
    with telling(name):
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as e:
            # The module itself, or a folder above it, is missing: that is the user's spelling. Another one that it
            # imports is a mistake in it.
            if e.name is not None and f"{name}.".startswith(f"{e.name}."):
                raise click.BadParameter(f"no module named {e.name!r}", param_hint=HINT) from None
            raise


def load_file(path: Path) -> Any:
    """Import a source file by its path; it may import modules beside it, as a program may."""
    try:
        with path.open("rb"):
            pass
    except OSError as e:
        raise click.BadParameter(f"{path}: {e.strerror}", param_hint=HINT) from None
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    sys.path.insert(0, str(path.resolve().parent))
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    with telling(str(path)):
        spec.loader.exec_module(module)
    return module


def make(factory: Callable[..., Any], arguments: dict[str, str]) -> Device:
    """The device: ``factory`` called with the ``-o`` options as keyword arguments."""
    name = getattr(factory, "__name__", repr(factory))
    try:
        inspect.signature(factory).bind(**arguments)
    except TypeError as e:
        given = ", ".join(arguments) or "none"
        raise click.UsageError(f"{name}: {e} (options given with -o: {given})") from None
    with telling(name):
        device = factory(**arguments)
    if not isinstance(device, Device):
        raise click.BadParameter(
            f"{name} returns a {type(device).__name__}, which is not a vhostpc.backend.Device",
            param_hint=HINT,
        )
    try:
        check_device(device)
    except VhostpcError as e:
        raise click.BadParameter(str(e), param_hint=HINT) from None
    return device


@contextmanager
def telling(what: str) -> Iterator[None]:
    """Turn an exception of the user's code in this block into one sentence: file, line and error.

    ``what``: named where no line is known. A VhostpcError is a sentence already.
    """
    try:
        yield
    except (VhostpcError, click.ClickException):
        raise
    except (Exception, SystemExit) as e:
        raise Failure(f"{place(e) or what}: {in_words(e)}") from e


def in_words(error: BaseException) -> str:
    """The error without its location."""
    if isinstance(error, SyntaxError):
        return f"{type(error).__name__}: {error.msg}"
    if isinstance(error, OSError | MemoryError):
        return sentence(error)
    return "".join(traceback.format_exception_only(error)).strip()


def place(error: BaseException) -> str | None:
    """File and line of the user's code that an error came from; None if it was not involved."""
    if isinstance(error, SyntaxError) and error.filename and Path(error.filename).is_file():
        return f"{error.filename}, line {error.lineno}" if error.lineno else error.filename
    # The innermost line that is neither Python's nor ours; one of an installed module only where there is no other.
    frames = [
        frame
        for frame in reversed(traceback.extract_tb(error.__traceback__))
        if not frame.filename.startswith(("<", PACKAGE + os.sep)) and not is_pythons(frame.filename)
    ]
    own = [frame for frame in frames if "site-packages" not in frame.filename] or frames
    return f"{own[0].filename}, line {own[0].lineno}" if own else None


def is_pythons(filename: str) -> bool:
    """Whether a file belongs to the standard library."""
    library = sysconfig.get_path("stdlib")
    return filename.startswith(library + os.sep) and "site-packages" not in filename
