"""A user's own device that is wrong: the sentence names its file and line, and blames nobody else."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FINE = """\
from vhostpc.backend import Device


class Mine(Device):
    device_id = 4

    def __init__(self):
        {body}

    async def handle_queue(self, queue):
        pass
"""


def call(
    target: str | Path, folder: Path, *more: str, through: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str]:
    command = [*through, sys.executable, "-m", "vhostpc", "backend", f"{target}:Mine", *more]
    return subprocess.run(
        [*command, "--socket-path", str(folder / "s")],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize(
    ("source", "line", "words"),
    [
        ("x = 1\nclass Mine(:\n    pass\n", 2, "SyntaxError: invalid syntax"),
        ("class Mine:\n    x = 1\n   y = 2\n", 3, "IndentationError: unindent does not match"),
        ("import os\n\nimport absent_module\n", 3, "ModuleNotFoundError: No module named 'absent_module'"),
        ("from os import absent_name\n", 1, "ImportError: cannot import name 'absent_name'"),
        ("def f():\n    raise ValueError('no luck')\n\nf()\n", 2, "ValueError: no luck"),
        ("import json\n\njson.loads('{')\n", 3, "JSONDecodeError: Expecting property name"),
        ("import sys\nsys.exit('bye')\n", 2, "SystemExit: bye"),
        ("open('/absent/file')\n", 1, "/absent/file: No such file or directory"),
        (FINE.format(body="raise KeyError('colour')"), 8, "KeyError: 'colour'"),
        (FINE.format(body="self.features = 1 / 0"), 8, "ZeroDivisionError: division by zero"),
        (FINE.format(body="open('/absent/file')"), 8, "/absent/file: No such file or directory"),
    ],
)
@pytest.mark.parametrize("way", ["file", "module"])
def test_what_its_code_raises(source: str, line: int, words: str, way: str, tmp_path: Path) -> None:
    path = tmp_path / "mine_here.py"
    path.write_text(source)
    done = call(path if way == "file" else "mine_here", tmp_path)
    assert done.returncode == 1, done.stderr
    (told,) = done.stderr.splitlines()
    assert told.startswith(f"vhostpc: {path}, line {line}: ")
    assert words in told
    assert "internal" not in told
    assert "Traceback" in call(path, tmp_path, "--debug").stderr


def test_a_mistake_in_a_module_that_it_imports(tmp_path: Path) -> None:
    (tmp_path / "mine_here.py").write_text("import helper_of_mine\n")
    (tmp_path / "helper_of_mine.py").write_text("\n\nx = y\n")
    done = call("mine_here.py", tmp_path)
    assert (
        done.stderr == f"vhostpc: {tmp_path}/helper_of_mine.py, line 3: NameError: name 'y' is not defined\n"
    )


def test_a_source_that_has_no_lines(tmp_path: Path) -> None:
    (tmp_path / "mine_here.py").write_bytes(b"x = 1\n\0\n")
    done = call("mine_here.py", tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("vhostpc: ")
    assert "mine_here.py" in done.stderr
    assert done.stderr.endswith("null bytes\n")


def test_a_file_that_cannot_be_had(tmp_path: Path) -> None:
    (tmp_path / "folder.py").mkdir()
    (tmp_path / "text.txt").write_text("")
    for target, words in {
        "absent.py": "absent.py: No such file or directory",
        "folder.py": "folder.py: Is a directory",
        "./text.txt": "./text.txt is neither a module's name nor a FILE.py",
        ".relative": ".relative is neither a module's name nor a FILE.py",
    }.items():
        done = call(target, tmp_path)
        assert done.returncode == 2, target
        assert done.stderr.splitlines()[-1] == f"Error: Invalid value for MODULE:CLASS: {words}"


def test_a_file_that_may_not_be_read(tmp_path: Path) -> None:
    path = tmp_path / "secret.py"
    path.write_text("")
    path.chmod(0)
    # Root may read all files, so that right is taken.
    rights = ("setpriv", "--bounding-set", "-dac_override,-dac_read_search") if os.geteuid() == 0 else ()
    done = call(path, tmp_path, through=rights)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith(f"{path}: Permission denied")
