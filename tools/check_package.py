"""Build the source archive, and a wheel from it, and look whether each holds what it should and nothing else.

Both are made of a copy of the checkout, so that nothing of an earlier build gets in. Without network: the build tools
are those of the environment that runs this.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
#: Below ``vhostpc/``: only needed to build.
BUILDERS = re.compile(r"vhostpc/_native/(build\.py|.*\.[ch])")
#: Made with a source archive.
MADE = re.compile(r"PKG-INFO|setup\.cfg|vhostpc\.egg-info/.*")
NOT_IN_ARCHIVE = {".gitignore"}
TAG = "cp311-abi3-linux_"


def project_files() -> list[str]:
    """The files of the checkout, as git knows them; new ones too. Of an unpacked source archive, all that it holds."""
    if not (ROOT / ".git").exists():
        listed = (ROOT / "vhostpc.egg-info" / "SOURCES.txt").read_text()
        return [name for name in listed.splitlines() if not MADE.fullmatch(name)]
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [name for name in listed.splitlines() if (ROOT / name).is_file()]


def copy_to(folder: Path, files: Iterable[str]) -> Path:
    """The checkout without anything that was built in it."""
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name)
    return folder


def build(kind: str, source: Path, into: Path) -> Path:
    """Run one hook of the build backend in a child, so that its chatter can be kept back."""
    code = f"import setuptools.build_meta as b, sys; print(b.build_{kind}(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", code, str(into)], cwd=source, capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"building the {kind} failed:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    return into / done.stdout.strip().splitlines()[-1]


def unpack(archive_path: Path, into: Path) -> Path:
    """The one folder that a source archive holds, unpacked."""
    with tarfile.open(archive_path) as archive:
        archive.extractall(into, filter="data")
    (folder,) = into.iterdir()
    return folder


def archive_problems(files: set[str], held: set[str]) -> list[str]:
    """What is wrong with a source archive that holds ``held``."""
    wanted = files - NOT_IN_ARCHIVE
    problems = [f"source archive lacks {name}" for name in sorted(wanted - held)]
    others = sorted(name for name in held - wanted if not MADE.fullmatch(name))
    return problems + [f"source archive holds {name}, which is not of the project" for name in others]


def wheel_problems(files: set[str], wheel: Path) -> list[str]:
    """What is wrong with a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
        (info,) = {name.split("/")[0] for name in held if ".dist-info/" in name}
        tags = re.findall(r"^Tag: (.*)$", archive.read(f"{info}/WHEEL").decode(), re.MULTILINE)
        metadata = archive.read(f"{info}/METADATA").decode()
    wanted = {name for name in files if name.startswith("vhostpc/") and not BUILDERS.fullmatch(name)}
    problems = [f"wheel lacks {name}" for name in sorted(wanted - held)]
    compiled = {name for name in held if re.fullmatch(r"vhostpc/_native/_vpc\.abi3\.so", name)}
    if not compiled:
        problems.append("wheel lacks the compiled module")
    others = sorted(name for name in held - wanted - compiled if not name.startswith(f"{info}/"))
    problems += [f"wheel holds {name}, which does not belong in it" for name in others]
    if not tags or not all(tag.startswith(TAG) for tag in tags) or TAG not in wheel.name:
        problems.append(f"wheel is not for the stable ABI of 3.11: {wheel.name}, tags {tags}")
    dead = re.findall(r"\]\((?![a-z]+:)[^)]*\)", metadata)
    problems += [f"the description on an index has a link that leads nowhere: {link}" for link in dead]
    if "## Two commands" not in metadata:
        problems.append("the description lacks README.md")
    return problems


def main() -> None:
    files = project_files()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        archive = build("sdist", copy_to(folder / "copy", files), folder)
        (folder / "unpacked").mkdir()
        source = unpack(archive, folder / "unpacked")
        held = {str(path.relative_to(source)) for path in source.rglob("*") if path.is_file()}
        problems = archive_problems(set(files), held)
        wheel = build("wheel", source, folder)
        problems += wheel_problems(set(files), wheel)
    if problems:
        sys.exit("\n".join(problems))
    print(f"package: {wheel.name} and its source archive hold what they should")


if __name__ == "__main__":
    main()
