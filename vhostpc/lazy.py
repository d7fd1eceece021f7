"""Names of a package that are imported on first use: importing the package costs only the parts that are used."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any


def exports(package: str, modules: dict[str, str]) -> Callable[[str], Any]:
    """The ``__getattr__`` (PEP 562) of ``package``: for each module the names, in a string, that come from there; a
    module's own name is the module.

    For type checkers the package imports the same names under ``TYPE_CHECKING``, and hides this function from them,
    because with it they would accept any name. Raises AttributeError for any other name.
    """
    where = {name: module for module, names in modules.items() for name in names.split()}

    def look_up(name: str) -> Any:
        if name not in where:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module = importlib.import_module(where[name])
        found = module if where[name] == f"{package}.{name}" else getattr(module, name)
        setattr(sys.modules[package], name, found)  # looked up once
        return found

    return look_up
