"""The other programs that the QEMU tests need: three QEMU versions, a guest kernel, busybox for the guest.

``python -m tests.qemu.peers`` fetches what is missing; run again, it does nothing.  An installed QEMU is
used when it has the wanted version and is never replaced: other versions are unpacked into a cache folder
(``.cache/peers`` at the top of the checkout, or ``$VHOSTPC_CACHE``).  apt does the downloads, with its
state under the cache folder and the mirror that ``/etc/apt`` names for Debian 12, so nothing is installed,
nothing of the machine's package state changes, and no privilege is needed.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
APT = Path("/etc/apt")
VERSIONS = ("7.2", "10.0")
"""With which everything is tested."""
NEWEST = "11.1"
"""With which some is, to see what changes; it needs a newer C library than Debian 12 has."""
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")

# Which suite has which version.
SUITES = {"7.2": "bookworm", "10.0": "bookworm-backports"}


class PeerMissing(Exception):
    """A peer is not there; the message says what to run."""


@dataclass(frozen=True)
class Qemu:
    """One QEMU: how to start it.

    ``argv`` is the program with the ``-L`` options it needs, ``env`` what to add to the environment.
    """

    version: str
    argv: tuple[str, ...]
    env: dict[str, str] = field(default_factory=dict)

    @property
    def major(self) -> int:
        return int(self.version.split(".", maxsplit=1)[0])


@dataclass(frozen=True)
class Kernel:
    """A guest kernel: its image, its module folder, its release string."""

    image: Path
    modules: Path
    release: str


def cache_dir() -> Path:
    """The cache folder, created if need be."""
    path = Path(os.environ.get("VHOSTPC_CACHE") or REPO / ".cache" / "peers")
    path.mkdir(parents=True, exist_ok=True)
    return path


def _version(argv: tuple[str, ...], env: dict[str, str]) -> str | None:
    try:
        out = subprocess.run(
            [*argv, "--version"], env={**os.environ, **env}, capture_output=True, text=True, check=False
        ).stdout
    except OSError:
        return None
    found = re.search(r"version (\d+\.\d+)\.", out)
    return found.group(1) if found else None


def _unpacked_qemu(root: Path, version: str) -> Qemu:
    # Libraries that are not installed were unpacked beside QEMU; some live in subfolders.
    lib_dirs = sorted(
        {str(p.parent) for p in root.glob("usr/lib/**/*.so*")} | {f"{root}/lib/x86_64-linux-gnu"}
    )
    # QEMU's own plug-ins are no libraries for others (the folder itself has QEMU's name, too).
    lib_dirs = [d for d in lib_dirs if "/qemu" not in d.removeprefix(str(root))]
    share = root / "usr/share"
    argv = (str(root / "usr/bin/qemu-system-x86_64"), "-L", str(share / "qemu"), "-L", str(share / "seabios"))
    return Qemu(version, argv, {"LD_LIBRARY_PATH": ":".join(lib_dirs)})


def qemu(version: str) -> Qemu:
    """The QEMU of that version; raises PeerMissing."""
    if version == NEWEST:
        return newest_qemu()
    installed = ("/usr/bin/qemu-system-x86_64",)
    if _version(installed, {}) == version:
        return Qemu(version, installed)
    root = cache_dir() / f"qemu-{version}"
    if (root / ".complete").exists():
        found = _unpacked_qemu(root, version)
        if _version(found.argv, found.env) == version:
            return found
    raise PeerMissing(f"QEMU {version} is not here: run python -m tests.qemu.peers")


def newest_qemu() -> Qemu:
    """The newest QEMU, run by the C library that came with it; raises PeerMissing."""
    root = cache_dir() / f"qemu-{NEWEST}"
    if (root / ".complete").exists():
        usr = root / "usr"
        own = usr / "lib/x86_64-linux-gnu"
        found = _unpacked_qemu(root, NEWEST)
        argv = (
            str(usr / "lib64/ld-linux-x86-64.so.2"),
            *("--library-path", f"{own}:{found.env['LD_LIBRARY_PATH']}"),
            *("--argv0", "qemu-system-x86_64"),
            *found.argv,
        )
        # Its children run with this machine's library.
        made = Qemu(NEWEST, argv, {"QEMU_MODULE_DIR": str(own / "qemu")})
        if _version(made.argv, made.env) == NEWEST:
            return made
    raise PeerMissing(f"QEMU {NEWEST} is not here: run python -m tests.qemu.peers")


def kernel() -> Kernel:
    """Debian 12's cloud kernel; raises PeerMissing."""
    root = cache_dir() / "kernel"
    if (root / ".complete").exists():
        for image in sorted((root / "boot").glob("vmlinuz-*")):
            release = image.name.removeprefix("vmlinuz-")
            return Kernel(image, root / "lib/modules" / release, release)
    raise PeerMissing("the guest kernel is not here: run python -m tests.qemu.peers")


def busybox() -> Path:
    """A static busybox; raises PeerMissing."""
    for path in (Path("/bin/busybox"), cache_dir() / "busybox/bin/busybox"):
        if path.exists() and b"/ld-linux" not in path.read_bytes()[:4096]:  # no interpreter: static
            return path
    raise PeerMissing("busybox is not here: run python -m tests.qemu.peers")


# Fetching


@dataclass(frozen=True)
class _Source:
    uri: str
    suite: str
    components: str
    signed_by: str

    def line(self) -> str:
        option = f"[signed-by={self.signed_by}] " if self.signed_by else ""
        return f"deb {option}{self.uri} {self.suite} {self.components}"


def _parse_list(text: str) -> Iterator[_Source]:
    for line in text.splitlines():
        found = re.match(r"deb\s+(?:\[([^]]*)\]\s+)?(\S+)\s+(\S+)\s+(.+?)\s*(?:#.*)?$", line.strip())
        if found:
            options, uri, suite, components = found.groups()
            signed = re.search(r"signed-by=(\S+)", options or "")
            yield _Source(uri, suite, components, signed.group(1) if signed else "")


def _parse_deb822(text: str) -> Iterator[_Source]:
    for stanza in re.split(r"\n\s*\n", text):
        fields: dict[str, str] = {}
        for line in stanza.splitlines():
            if not line.startswith(("#", " ", "\t")) and ":" in line:
                key, value = line.split(":", 1)
                fields[key.strip().lower()] = value.strip()
        if "deb" not in fields.get("types", "").split() or fields.get("enabled", "yes").lower() == "no":
            continue
        signed_by = fields.get("signed-by", "")
        for uri in fields.get("uris", "").split():
            for suite in fields.get("suites", "").split():
                yield _Source(uri, suite, fields.get("components", "main"), signed_by)


def _sources() -> list[_Source]:
    """Debian 12's suites as /etc/apt configures them, and backports from the same mirror."""
    found: list[_Source] = []
    for path in [APT / "sources.list", *sorted((APT / "sources.list.d").glob("*"))]:
        with contextlib.suppress(OSError):
            text = path.read_text()
            found += _parse_deb822(text) if path.suffix == ".sources" else _parse_list(text)
    kept = [s for s in found if re.fullmatch(r"bookworm(-updates|-security|-backports)?", s.suite)]
    main = next((s for s in kept if s.suite == "bookworm"), None)
    if main is None:
        raise PeerMissing(
            "no source for Debian 12 (bookworm) in /etc/apt: the QEMU tests fetch their peers from it"
        )
    if not any(s.suite == "bookworm-backports" for s in kept):
        kept.append(_Source(main.uri, "bookworm-backports", "main", main.signed_by))
    return kept


def _run(argv: list[str], **kwargs: object) -> str:
    done = subprocess.run(argv, capture_output=True, text=True, check=False, **kwargs)  # type: ignore[call-overload]
    if done.returncode:
        raise PeerMissing(f"{' '.join(argv)} failed ({done.returncode}):\n{done.stdout}{done.stderr}")
    return str(done.stdout)


class _Apt:
    """apt with its own sources, lists and archives; the installed packages are only read."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for part in ("state/lists/partial", "cache/archives/partial"):
            (root / part).mkdir(parents=True, exist_ok=True)
        sources = root / "sources.list"
        sources.write_text("".join(s.line() + "\n" for s in self.sources()))
        self.options = [
            f"-oDir::Etc::sourcelist={sources}",
            "-oDir::Etc::sourceparts=-",
            "-oDir::Etc::preferencesparts=-",
            f"-oDir::State={root / 'state'}",
            f"-oDir::State::status={self.status()}",
            f"-oDir::Cache={root / 'cache'}",
            "-oAPT::Sandbox::User=root",
            "-oAcquire::Languages=none",
            "-oAcquire::Retries=3",
            "-oDebug::NoLocking=1",
        ]
        self.updated = False

    def sources(self) -> list[_Source]:
        return _sources()

    def status(self) -> Path:
        """The list of what is installed."""
        return Path("/var/lib/dpkg/status")

    def get(self, *args: str, cwd: Path | None = None) -> str:
        if not self.updated:
            _run(["apt-get", *self.options, "-q", "update"])
            self.updated = True
        return _run(["apt-get", *self.options, "-qy", *args], cwd=cwd)

    def archives(self, *args: str) -> list[Path]:
        """Download what installing ``args`` would need, and give the .deb files."""
        folder = self.root / "cache/archives"
        for old in folder.glob("*.deb"):
            old.unlink()
        self.get(
            "install",
            "--download-only",
            "--no-install-recommends",
            "--allow-downgrades",
            "--reinstall",
            *args,
        )
        return sorted(folder.glob("*.deb"))

    def download(self, name: str) -> list[Path]:
        """One package's .deb, without what it depends on."""
        folder = self.root / "single"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        self.get("download", name, cwd=folder)
        return list(folder.glob("*.deb"))

    def kernel_package(self) -> str:
        self.get("check")
        out = _run(["apt-cache", *self.options, "depends", "linux-image-cloud-amd64"])
        found = re.search(r"Depends: (linux-image-\S+)", out)
        if not found:
            raise PeerMissing(f"linux-image-cloud-amd64 names no kernel:\n{out}")
        return found.group(1)


class _AptOfNewest(_Apt):
    """Debian 13's packages for the newest QEMU, from the same mirror; nothing counts as installed, so that all that it
    needs comes with it."""

    def sources(self) -> list[_Source]:
        main = next(s for s in _sources() if s.suite == "bookworm")
        return [_Source(main.uri, suite, "main", main.signed_by) for suite in ("trixie", "trixie-backports")]

    def status(self) -> Path:
        path = self.root / "status"
        path.touch()
        return path


def _unpack(debs: list[Path], target: Path) -> None:
    fresh = target.with_name(target.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    shutil.rmtree(target, ignore_errors=True)
    fresh.mkdir(parents=True)
    for deb in debs:
        _run(["dpkg", "-x", str(deb), str(fresh)])
    (fresh / ".complete").touch()
    fresh.rename(target)


def _fetch_newest(cache: Path) -> None:
    """Raises PeerMissing."""
    names = ("libc6", "qemu-system-x86", "qemu-system-common", "qemu-system-data", "seabios")
    apt = _AptOfNewest(cache / f"apt-{NEWEST}")
    _unpack(apt.archives("-t", "trixie-backports", *names), cache / f"qemu-{NEWEST}")


def fetch(say: bool = False) -> None:
    """Fetch every peer that is missing; safe to run twice, also at the same time."""

    def tell(text: str) -> None:
        if say:
            print(text, flush=True)

    cache = cache_dir()
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        apt: _Apt | None = None
        for version in VERSIONS:
            try:
                tell(f"QEMU {version}: {qemu(version).argv[0]}")
            except PeerMissing:
                apt = apt or _Apt(cache / "apt")
                suite = SUITES[version]
                tell(f"QEMU {version}: fetching from {suite}")
                names = ("qemu-system-x86", "qemu-system-common", "qemu-system-data", "seabios")
                debs = apt.archives("-t", suite, *names)
                _unpack(debs, cache / f"qemu-{version}")
                tell(f"QEMU {version}: {qemu(version).argv[0]}")
        try:
            newest_qemu()
        except PeerMissing:
            tell(f"QEMU {NEWEST}: fetching from trixie-backports")
            _fetch_newest(cache)
        tell(f"QEMU {NEWEST}: {newest_qemu().argv[0]}")
        try:
            kernel()
        except PeerMissing:
            apt = apt or _Apt(cache / "apt")
            _unpack(apt.download(apt.kernel_package()), cache / "kernel")
        tell(f"guest kernel {kernel().release}")
        try:
            busybox()
        except PeerMissing:
            apt = apt or _Apt(cache / "apt")
            _unpack(apt.download("busybox-static"), cache / "busybox")
        tell(f"guest programs: {busybox()}")


def main() -> int:
    try:
        fetch(say=True)
    except PeerMissing as exc:
        print(exc, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
