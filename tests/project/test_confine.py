"""Mounts of a test's own child are seen by nobody else, also where / is no mount point."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# In a mount namespace of the script's own, with a mount that is shared with a child's: what the child mounts below it
# would come back. A plain chroot: into a folder that is no mount point.
SCRIPT = """
import os, sys
from tests.kit.confine import LIBC, private_mounts

MS_SHARED = 1 << 20
top, plain = sys.argv[1], sys.argv[2] == "plain"
jail = top + "/jail"
private_mounts()
assert LIBC.mount(b"none", os.fsencode(top), b"tmpfs", 0, None) == 0
assert LIBC.mount(b"none", os.fsencode(top), None, MS_SHARED, None) == 0
os.makedirs(jail + "/proc")
os.makedirs(jail + "/here")
assert LIBC.mount(b"none", os.fsencode(jail) + b"/proc", b"proc", 0, None) == 0
mounts = open("/proc/self/mountinfo").read()
if (child := os.fork()) == 0:
    try:
        if plain:
            os.chroot(jail)
        os.chdir("/here" if plain else jail + "/here")
        from tests.kit import confine
        confine._private.clear()
        private_mounts()
        place = os.getcwd()
        assert place == ("/here" if plain else jail + "/here"), place
        assert LIBC.mount(b"none", os.fsencode(place), b"tmpfs", 0, None) == 0
        assert place in open("/proc/self/mountinfo").read()
    except BaseException as e:
        print(repr(e), flush=True)
        os._exit(1)
    os._exit(0)
_, status = os.waitpid(child, 0)
assert status == 0
assert open("/proc/self/mountinfo").read() == mounts
"""


@pytest.fixture(autouse=True)
def as_root() -> None:
    if os.geteuid() != 0:
        pytest.fail("needs root") if os.environ.get("CI") else pytest.skip("needs root: it mounts")


@pytest.mark.parametrize("where", ["plain", "root"])
def test_private_mounts(where: str, tmp_path: Path) -> None:
    """``plain``: in a plain chroot."""
    command = [sys.executable, "-c", SCRIPT, str(tmp_path), where]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
