"""What pyproject.toml cannot say: the compiled module, what stays out of a wheel, and what compiling needs."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).resolve().parent
COMPILING = {"bdist_wheel", "editable_wheel", "build", "build_ext", "develop", "install"}
# What is included, and the Debian package that has it.
HEADERS = {
    "Python.h": "the headers of this Python (Debian: apt-get install python3-dev)",
    "pthread.h": "the C library's headers (Debian: apt-get install libc6-dev)",
    "linux/userfaultfd.h": "the headers of Linux 5.11 or later (Debian: apt-get install linux-libc-dev)",
}


def refuse(what: str) -> None:
    """End with one sentence in place of what a compiler says of it."""
    sys.exit(f"vhostpc cannot be compiled here: {what}")


def need_compiler() -> None:
    """Look for what compiling needs before anything is built."""
    if not sys.platform.startswith("linux"):
        refuse("it needs Linux, for userfaultfd")
    compiler = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")
    if shutil.which(compiler[0]) is None:
        refuse(
            f"there is no C compiler {compiler[0]} (Debian: apt-get install gcc libc6-dev; CC= names another one)"
        )
    folders = [f"-I{sysconfig.get_path(name)}" for name in ("include", "platinclude")]
    for header, what in HEADERS.items():
        look = subprocess.run(
            [*compiler, *folders, "-E", "-x", "c", "-"],
            input=f"#include <{header}>\n",
            capture_output=True,
            text=True,
            check=False,
        )
        if look.returncode:
            refuse(f"<{header}> is missing, which is in {what}")


def readme() -> str:
    """README.md for a page of an index, where a link to a file of the repository leads nowhere: its text only."""
    text = (HERE / "README.md").read_text(encoding="utf-8")
    return re.sub(r"\[([^\]]+)\]\((?![a-z]+:)[^)]*\)", r"\1", text)


class WithoutBuilders(build_py):
    """A wheel has the compiled module, and not what it was made by."""

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        """See setuptools."""
        found: list[tuple[str, str, str]] = super().find_package_modules(package, package_dir)
        return [module for module in found if module[:2] != ("vhostpc._native", "build")]


if COMPILING & set(sys.argv):
    need_compiler()

setup(
    cffi_modules=["vhostpc/_native/build.py:ffibuilder"],
    cmdclass={"build_py": WithoutBuilders},
    long_description=readme(),
    long_description_content_type="text/markdown",
    # The module keeps to the stable ABI, so one wheel serves every Python from 3.11 on.
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
