"""Peers of the tests that come as Debian packages and are no QEMU: User-Mode Linux, libblkio, DPDK, UEFI firmware.

``python -m tests.peers.packages`` fetches what is missing, as ``tests.qemu.peers`` does and into the same cache folder.
libblkio is Debian 13's: it needs no newer C library than Debian 12 has, so it is used as it is.
Of DPDK's 280 packages those are fetched that its testpmd is linked with, and the drivers that the tests use.
"""

from __future__ import annotations

import fcntl
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from tests.qemu.peers import Kernel, PeerMissing, _Apt, _Source, _sources, _unpack, cache_dir

RUN = "run python -m tests.peers.packages"


def user_mode_linux() -> Kernel:
    """Debian 12's; its image is a program. Raises PeerMissing."""
    root = cache_dir() / "uml"
    if (root / ".complete").exists():
        for modules in sorted((root / "usr/lib/uml/modules").glob("*")):
            return Kernel(root / "usr/bin/linux.uml", modules, modules.name)
    raise PeerMissing(f"User-Mode Linux is not here: {RUN}")


def libblkio() -> Path:
    """The shared library; raises PeerMissing."""
    root = cache_dir() / "libblkio"
    if (root / ".complete").exists():
        for path in root.glob("usr/lib/*/libblkio.so.1"):
            return path
    raise PeerMissing(f"libblkio is not here: {RUN}")


@dataclass(frozen=True)
class Dpdk:
    """DPDK's testpmd: the program, DPDK's own arguments that it needs, what to add to the environment, its version."""

    program: str
    version: str
    eal: tuple[str, ...] = ()
    env: dict[str, str] = field(default_factory=dict)


TESTPMD = "dpdk-testpmd"
DRIVERS = ("librte-mempool-ring23", "librte-net-virtio23", "librte-net-vhost23")
"""Debian 12's, which testpmd loads when it runs."""


def dpdk() -> Dpdk:
    """The installed one, or that in the cache folder. Raises PeerMissing."""
    if installed := shutil.which(TESTPMD):
        query = ["dpkg-query", "-W", "-f", "${Version}", "dpdk-dev"]
        version = subprocess.run(query, capture_output=True, text=True, check=False).stdout
        return Dpdk(installed, version.strip() or "?")
    root = cache_dir() / "dpdk"
    if (root / ".complete").exists():
        libraries = sorted({str(path.parent) for path in root.glob("**/*.so*")})
        drivers = [next(root.glob(f"usr/lib/**/pmds-*/{_library(name)}")) for name in DRIVERS]
        return Dpdk(
            str(root / "usr/bin" / TESTPMD),
            (root / "version").read_text() if (root / "version").exists() else "?",
            tuple(word for path in drivers for word in ("-d", str(path))),
            {"LD_LIBRARY_PATH": ":".join(libraries)},
        )
    raise PeerMissing(f"DPDK is not here: {RUN}")


def _library(package: str) -> str:
    """``librte-net-virtio23``: ``librte_net_virtio.so.23``."""
    name, number = re.fullmatch(r"(.+?)-?([0-9]+)", package).groups()  # type: ignore[union-attr]
    return f"{name.replace('-', '_')}.so.{number}"


def _package(name: str, number: str) -> str:
    """Of the library ``librte_NAME.so.NUMBER``, as Debian calls it."""
    name = f"librte-{name.replace('_', '-')}"
    return f"{name}-{number}" if name[-1].isdigit() else f"{name}{number}"


def firmware() -> tuple[Path, Path]:
    """UEFI firmware: its code and its variables, the installed one or that in the cache folder. Raises PeerMissing."""
    for root in (Path("/"), cache_dir() / "ovmf"):
        code, variables = (root / f"usr/share/OVMF/OVMF_{name}_4M.fd" for name in ("CODE", "VARS"))
        if code.exists() and variables.exists():
            return code, variables
    raise PeerMissing(f"the UEFI firmware is not here: {RUN}")


def _fetch_dpdk(cache: Path) -> None:
    """Raises PeerMissing."""
    apt = _Apt(cache / "apt")
    (deb,) = apt.download("dpdk-dev")
    # apt empties both folders.
    kept = Path(shutil.copy(deb, cache / "dpdk-dev.deb"))
    try:
        fresh = cache / "dpdk-dev"
        _unpack([kept], fresh)
        linked = re.findall(rb"librte_([a-z0-9_]+)\.so\.([0-9]+)", (fresh / "usr/bin" / TESTPMD).read_bytes())
        shutil.rmtree(fresh)
        names = {_package(name.decode(), number.decode()) for name, number in linked}
        debs = apt.archives(*sorted(names | set(DRIVERS)))
        _unpack([kept, *debs], cache / "dpdk")
        version = subprocess.run(
            ["dpkg-deb", "-f", str(kept), "Version"], capture_output=True, text=True, check=True
        ).stdout
        (cache / "dpdk/version").write_text(version.strip())
    finally:
        kept.unlink()


class _AptOfTrixie(_Apt):
    """Debian 13's packages, from the mirror that has Debian 12's; nothing counts as installed."""

    def sources(self) -> list[_Source]:
        main = next(s for s in _sources() if s.suite == "bookworm")
        return [_Source(main.uri, "trixie", "main", main.signed_by)]

    def status(self) -> Path:
        path = self.root / "status"
        path.touch()
        return path


def fetch() -> None:
    """Fetch what is missing; safe to run twice, also at the same time."""
    cache = cache_dir()
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            user_mode_linux()
        except PeerMissing:
            _unpack(_Apt(cache / "apt").download("user-mode-linux"), cache / "uml")
        try:
            libblkio()
        except PeerMissing:
            _unpack(_AptOfTrixie(cache / "apt-trixie").download("libblkio1"), cache / "libblkio")
        try:
            dpdk()
        except PeerMissing:
            _fetch_dpdk(cache)
        try:
            firmware()
        except PeerMissing:
            _unpack(_Apt(cache / "apt").download("ovmf"), cache / "ovmf")


def main() -> int:
    try:
        fetch()
        print(f"User-Mode Linux {user_mode_linux().release}: {user_mode_linux().image}")
        print(f"libblkio: {libblkio()}")
        print(f"DPDK {dpdk().version}: {dpdk().program}")
        print(f"UEFI firmware: {firmware()[0]}")
    except PeerMissing as exc:
        print(exc, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
