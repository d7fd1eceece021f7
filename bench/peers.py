"""Builds QEMU's vhost-user-bridge from Debian's source package, twice: as it is and without its dump.

Its library, libvhost-user, is kept too: the bench's own device in C is linked with it.

No binary package has that program. Nothing outside ``.cache/bench`` is written: apt runs with its own
state folder whose only sources are the machine's own, asked for as ``deb-src``. Needed on the machine:
dpkg-dev, libglib2.0-dev, ninja-build, pkg-config, gcc (``make bench`` installs them).
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

from tests.peers.packages import dpdk
from tests.qemu.peers import PeerMissing

from . import CACHE

STOCK = CACHE / "vhost-user-bridge"
QUIET = CACHE / "vhost-user-bridge-nodump"
LIBRARY = CACHE / "libvhost-user"
NEEDED = ["dpkg-dev", "libglib2.0-dev", "ninja-build", "pkg-config", "gcc"]
SERIES = "7.2"
# The smallest configuration that still has the target: no system emulator, no user emulator, no
# optional library; "tools" and "vhost-user" are what tests/meson.build asks for.
CONFIGURE = [
    "--without-default-features",
    "--without-default-devices",
    "--disable-system",
    "--disable-user",
    "--enable-tools",
    "--enable-vhost-user",
    "--disable-docs",
    "--disable-werror",
]
DUMP = re.compile(r"^#define VHOST_USER_BRIDGE_DEBUG 1$", re.M)


class PeerError(Exception):
    """A peer cannot be built; the text says what is missing."""


def run(argv: list[str], cwd: Path, **env: str) -> str:
    """Run a build step and return its output; its last lines are in the error when it fails."""
    done = subprocess.run(
        argv,
        cwd=cwd,
        env={**os.environ, "LC_ALL": "C", **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        tail = "\n".join(done.stdout.splitlines()[-25:])
        raise PeerError(f"{' '.join(argv[:4])} ... gave {done.returncode}:\n{tail}")
    return done.stdout


def missing_packages() -> list[str]:
    """The packages of ``NEEDED`` that are not installed."""
    return [
        name
        for name in NEEDED
        if "ok installed"
        not in subprocess.run(
            ["dpkg-query", "-W", "-f", "${Status}", name], capture_output=True, text=True, check=False
        ).stdout
    ]


def source_entries(folder: Path) -> None:
    """Write into ``folder`` the machine's Debian sources, asked for as source packages."""
    found = 0
    for path in sorted(Path("/etc/apt/sources.list.d").glob("*.sources")):
        text = path.read_text()
        if "debian" in text:
            (folder / path.name).write_text(re.sub(r"^Types:.*$", "Types: deb-src", text, flags=re.M))
            found += 1
    for path in [Path("/etc/apt/sources.list"), *sorted(Path("/etc/apt/sources.list.d").glob("*.list"))]:
        lines = path.read_text().splitlines() if path.exists() else []
        wanted = [re.sub(r"^deb\s", "deb-src ", x) for x in lines if re.match(r"^deb\s.*debian", x)]
        if wanted:
            (folder / f"{path.stem}.list").write_text("\n".join(wanted) + "\n")
            found += 1
    if not found:
        raise PeerError("no Debian mirror is configured in /etc/apt, so QEMU's source cannot be fetched")


def fetch_source(work: Path) -> Path:
    """Download and unpack QEMU's source package below ``work``; return the source folder."""
    apt = work / "apt"
    for name in ("lists/partial", "archives/partial", "sources.d"):
        (apt / name).mkdir(parents=True)
    (apt / "empty").touch()
    source_entries(apt / "sources.d")
    config = apt / "apt.conf"
    config.write_text(
        f'Dir::Etc::sourcelist "{apt}/empty";\n'
        f'Dir::Etc::sourceparts "{apt}/sources.d";\n'
        f'Dir::State::lists "{apt}/lists";\n'
        f'Dir::Cache "{apt}";\n'
        f'Dir::Cache::archives "{apt}/archives";\n'
        'APT::Sandbox::User "root";\n'
    )
    run(["apt-get", "update"], work, APT_CONFIG=str(config))
    shown = run(["apt-cache", "showsrc", "qemu"], work, APT_CONFIG=str(config))
    versions = [
        v for v in re.findall(r"^Version: (\S+)$", shown, re.M) if v.split(":")[-1].startswith(SERIES)
    ]
    if not versions:
        raise PeerError(f"the configured mirror has no source package of QEMU {SERIES}")
    run(["apt-get", "source", "--download-only", f"qemu={versions[0]}"], work, APT_CONFIG=str(config))
    dsc = next(work.glob("qemu_*.dsc"))
    run(["dpkg-source", "--no-check", "-x", dsc.name, "src"], work)
    (CACHE / "vhost-user-bridge.version").write_text(versions[0] + "\n")
    return work / "src"


def build_bridges() -> tuple[Path, Path]:
    """Return the stock vhost-user-bridge and the one without its dump, building both if needed.

    Takes about a minute and 500 MB of disk while it runs, 6 MB afterwards. Raises PeerError.
    """
    if STOCK.exists() and QUIET.exists() and LIBRARY.exists():
        return STOCK, QUIET
    lacking = missing_packages()
    if lacking:
        raise PeerError(f"vhost-user-bridge needs: apt-get install -y {' '.join(lacking)}")
    CACHE.mkdir(parents=True, exist_ok=True)
    print("building vhost-user-bridge from Debian's QEMU source (once) ...", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(dir=CACHE, prefix="qemu-") as name:
        work = Path(name)
        source = fetch_source(work)
        # QEMU 7.2 needs a meson of its time; newer ones refuse some of its files.
        venv.create(work / "meson", with_pip=True)
        pip = work / "meson/bin/python"
        run([str(pip), "-m", "pip", "install", "-q", "meson>=0.61,<1.3"], work)
        build = work / "build"
        build.mkdir()
        run(["../src/configure", f"--meson={work}/meson/bin/meson", *CONFIGURE], build)
        ninja = ["nice", "ninja", "tests/vhost-user-bridge"]
        run(ninja, build)
        keep_binary(build / "tests/vhost-user-bridge", STOCK)
        code = source / "tests/vhost-user-bridge.c"
        quiet, count = DUMP.subn("#define VHOST_USER_BRIDGE_DEBUG 0", code.read_text())
        if count != 1:
            raise PeerError("vhost-user-bridge.c has no dump switch where it used to be")
        code.write_text(quiet)
        run(ninja, build)
        keep_binary(build / "tests/vhost-user-bridge", QUIET)
        keep_library(source, build)
    return STOCK, QUIET


def keep_binary(built: Path, kept: Path) -> None:
    """Put a program in its place, also while the old one runs."""
    fresh = kept.with_suffix(".new")
    shutil.copy2(built, fresh)
    fresh.replace(kept)


def keep_library(source: Path, build: Path) -> None:
    """Keep libvhost-user's object file and the headers that its own header includes."""
    shutil.rmtree(LIBRARY, ignore_errors=True)
    shutil.copytree(source / "include/standard-headers", LIBRARY / "standard-headers")
    shutil.copy2(source / "subprojects/libvhost-user/libvhost-user.h", LIBRARY)
    # Meson's archives are thin: they only name the object.
    shutil.copy2(next(build.glob("**/libvhost-user.a.p/libvhost-user.c.o")), LIBRARY / "libvhost-user.o")


def bridge_version() -> str:
    """The version of the source package that the bridges were built from."""
    path = CACHE / "vhost-user-bridge.version"
    return path.read_text().strip() if path.exists() else "unknown"


def dpdk_version() -> str:
    """The version of the DPDK that the tests use, too."""
    try:
        return dpdk().version
    except PeerMissing:
        return "unknown"


if __name__ == "__main__":
    try:
        for binary in build_bridges():
            print(binary)
    except PeerError as err:
        sys.exit(str(err))
