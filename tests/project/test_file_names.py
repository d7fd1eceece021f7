"""A file of the package has a name that no other has, so that the name alone tells which is meant."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import pytest

from tests.kit.c_calls import c_files
from tests.project.test_layers import ROOT, sources


@pytest.mark.parametrize("files", [sources(), c_files()], ids=["Python", "C"])
def test_no_two_files_of_one_name(files: list[Path]) -> None:
    named = defaultdict(list)
    for path in files:
        if path.name != "__init__.py":
            named[path.name].append(str(path.relative_to(ROOT)))
    assert len(named) > 50
    assert not {name: paths for name, paths in named.items() if len(paths) > 1}
