"""The userfaultfd tests once more, on the oldest kernel we promise: Debian 12's 6.1, in an emulated guest.

The guest gets this interpreter, its site-packages, the package and the tests in an initrd, runs pytest and
says its exit code over the serial line.
"""

from __future__ import annotations

import os
import re
import site
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest

import vhostpc
from tests.qemu import guest, peers
from tests.qemu.proc import child

pytestmark = pytest.mark.qemu

REPO = peers.REPO
LEFT_OUT = re.compile(
    r"^(pip|mypy|mypyc|ruff|setuptools|pkg_resources|trio_typing|.*-stubs|.*__mypyc.*|.*\.dist-info/RECORD|"
    r"test|idlelib|tkinter|turtledemo|ensurepip|lib2to3|config-.*|site-packages|dist-packages)$"
)
# The tests that place pages at several rates run here at one: an emulated processor takes its time.
CHOICE = "not [0] and not [20971520]"
RUN = """\
cd {repo}
mkdir -p /root /etc /run /tmp /var/tmp /dev/shm /scratch
chmod 1777 /tmp
mount -t tmpfs tmp /scratch
mount -t tmpfs shm /dev/shm
echo 'root:x:0:0::/root:/bin/sh' >/etc/passwd
export HOME=/root TMPDIR=/scratch PYTHONPATH={repo}:{packages} PYTHONDONTWRITEBYTECODE=1
{python} -m pytest -p no:cacheprovider -p no:hypothesispytest --assert=plain -v --color=no \
    -o faulthandler_timeout=120 -k "{choice}" {tests}
echo "pytest ended with $?"
"""


def tree(root: Path) -> Iterator[Path]:
    """Files below a folder, without what the guest has no use for."""
    for folder, folders, names in os.walk(root):
        folders[:] = [f for f in folders if not LEFT_OUT.match(f)]
        yield from (Path(folder, n) for n in names if not LEFT_OUT.match(n))


def libraries(binaries: list[Path]) -> set[Path]:
    """The shared libraries that these need, by the loader's own account."""
    out = subprocess.run(["ldd", *map(str, binaries)], capture_output=True, text=True, check=False).stdout
    return {Path(p) for p in re.findall(r"(?:=> |^\s+)(/\S+) \(0x", out, re.MULTILINE)}


def python_files() -> set[Path]:
    """This interpreter: its program, standard library, packages, and the libraries of all of them."""
    program = Path(sys.executable).resolve()
    files = {program} | set(tree(Path(sysconfig.get_path("stdlib"))))
    for packages in site.getsitepackages():
        files |= set(tree(Path(packages)))
    files |= {p for p in tree(Path(vhostpc.__file__).parent) if p.suffix in (".py", ".so", ".h", ".pyc")}
    files |= set((REPO / "tests").rglob("*.py")) | {REPO / "pyproject.toml"}
    binaries = [p for p in files if p == program or ".so" in p.suffixes]
    return files | libraries(binaries)


def python_initrd(kernel: peers.Kernel, tests: list[str]) -> bytes:
    files = guest.base_files(kernel, ())
    for path in python_files():
        if path.is_file():
            stat = path.stat()
            # The time stays, or the interpreter would compile everything anew.
            files[str(path)[1:]] = guest.Entry(
                0o100000 | stat.st_mode & 0o777, path.read_bytes(), int(stat.st_mtime)
            )
    run = RUN.format(
        repo=REPO,
        packages=":".join(site.getsitepackages()),
        python=Path(sys.executable).resolve(),
        tests=" ".join(tests),
        choice=CHOICE,
    )
    files["run.sh"] = guest.Entry(0o100755, run.encode())
    return guest.archive(files)


async def test_ufd_on_linux_6_1(tmp_path: Path) -> None:
    kernel = peers.kernel()
    assert kernel.release.startswith("6.1."), kernel.release
    me = Path(__file__).name
    tests = [
        f"tests/ufd/{p.name}" for p in sorted((REPO / "tests" / "ufd").glob("test_ufd_*.py")) if p.name != me
    ]
    initrd = tmp_path / "initrd"
    initrd.write_bytes(python_initrd(kernel, tests))
    # Huge pages are set aside at boot, for the tests that place one.
    append = "console=ttyS0 quiet panic=-1 hugepages=16 vm.run=/run.sh"
    argv = [*peers.qemu("10.0").argv, "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]
    argv += ["-accel", "tcg", "-cpu", "max", "-smp", "2", "-m", "1536M", "-serial", "stdio"]
    argv += ["-kernel", str(kernel.image), "-initrd", str(initrd), "-append", append]
    async with child("guest", argv, env=peers.qemu("10.0").env) as process:
        try:
            ended = await process.out.find(r"pytest ended with (\d+)", limit=540)
        except AssertionError:
            # Which test it was stands far above what a stack's last lines tell.
            raise AssertionError("\n".join(process.out.lines)) from None
        summary = [line for line in process.out.lines if re.search(r"\d+ passed", line)]
        assert ended.group(1) == "0", "\n".join(process.out.lines)
        # A run that skipped what it was for would prove nothing.
        assert summary, process.out.tail()
        assert "SKIPPED" not in "\n".join(process.out.lines), process.out.tail(60)
