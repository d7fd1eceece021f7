"""Build source archive and wheel, and look whether all that belongs in them is there.

Without network: the build tools are those of the environment that runs this.
"""

from __future__ import annotations

import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def tracked() -> list[str]:
    """Files below ``vhostpc/`` that a user of the package needs, as git knows them."""
    listed = subprocess.run(
        ["git", "ls-files", "vhostpc"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    return [
        name for name in listed.splitlines() if name.endswith((".py", ".pyi", ".c", ".h", ".typed", ".json"))
    ]


def build(kind: str, into: Path) -> Path:
    """Run one hook of the build backend in a child, so that its chatter can be kept back."""
    code = f"import setuptools.build_meta as b, sys; print(b.build_{kind}(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", code, str(into)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"building the {kind} failed:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    return into / done.stdout.strip().splitlines()[-1]


def main() -> None:
    wanted = tracked()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with tarfile.open(build("sdist", folder)) as archive:
            source = {member.split("/", 1)[1] for member in archive.getnames() if "/" in member}
        wheel_path = build("wheel", folder)
        with zipfile.ZipFile(wheel_path) as archive:
            wheel = set(archive.namelist())
    problems = [f"source archive lacks {file}" for file in wanted if file not in source]
    # The typed stub is for the checker and goes along; headers and C files go along for debuggers.
    problems += [f"wheel lacks {file}" for file in wanted if file not in wheel]
    if not any(file.startswith("vhostpc/_native/_vpc") and file.endswith(".so") for file in wheel):
        problems.append("wheel lacks the compiled module")
    if "-abi3-linux" not in wheel_path.name:
        problems.append(f"wheel is not for the stable ABI: {wheel_path.name}")
    extra = [file for file in wheel if not file.startswith(("vhostpc/", "vhostpc-"))]
    problems += [f"wheel holds {file}, which does not belong in it" for file in extra]
    if problems:
        sys.exit("\n".join(problems))
    print(f"package: {wheel_path.name} and its source archive hold all {len(wanted)} files")


if __name__ == "__main__":
    main()
