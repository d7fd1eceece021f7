"""Builds what a test guest boots: the static program of ``tests/guest`` and the initrd around it."""

from __future__ import annotations

import gzip
import hashlib
import os
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from tests.qemu.peers import REPO, Kernel, PeerMissing, busybox, cache_dir

SOURCES = REPO / "tests" / "guest"

# In the order in which they must be loaded; those that the kernel has built in are left out.
MODULES = (
    "virtio_ring",
    "virtio",
    "virtio_pci_modern_dev",
    "virtio_pci_legacy_dev",
    "virtio_pci",
    "failover",
    "net_failover",
    "virtio_net",
    "virtio_blk",
)


def program() -> Path:
    """The static program for the guest and the far end, built once per state of its sources."""
    sources = sorted(SOURCES.glob("*.[ch]"))
    digest = hashlib.sha256(b"".join(p.read_bytes() for p in sources)).hexdigest()[:16]
    target = cache_dir() / f"guest-{digest}"
    if not target.exists():
        fresh = target.with_suffix(f".{os.getpid()}")
        argv = ["gcc", "-static", "-O2", "-std=gnu11", "-Wall", "-Wextra", "-o", str(fresh)]
        argv += [str(p) for p in sources if p.suffix == ".c"]
        try:
            done = subprocess.run(argv, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            raise PeerMissing("gcc is not here: it builds the guest's program") from None
        if done.returncode:
            raise PeerMissing(f"the guest's program does not build:\n{done.stderr}")
        fresh.rename(target)
    return target


class Entry(NamedTuple):
    """A file of an initrd; a symlink has mode 0o120777 and its target as content."""

    mode: int
    content: bytes
    mtime: int = 0


def archive(files: Mapping[str, Entry]) -> bytes:
    """A cpio archive (newc, as the kernel's initramfs takes it); parent folders are added."""
    folders = {str(p) for name in files for p in Path(name).parents if str(p) != "."}
    entries = {name: Entry(0o040755, b"") for name in sorted(folders)} | dict(files)
    out = bytearray()

    def add(inode: int, name: str, mode: int, content: bytes, mtime: int = 0) -> None:
        path = name.encode() + b"\0"
        numbers = (inode, mode, 0, 0, 1, mtime, len(content), 0, 0, 0, 0, len(path), 0)
        out.extend(b"070701" + b"".join(b"%08X" % n for n in numbers) + path)
        out.extend(b"\0" * (-len(out) % 4))
        out.extend(content)
        out.extend(b"\0" * (-len(out) % 4))

    for inode, (name, entry) in enumerate(entries.items(), 1):
        add(inode, name, *entry)
    add(0, "TRAILER!!!", 0, b"")
    return bytes(out)


def base_files(kernel: Kernel, modules: Iterable[str] = MODULES) -> dict[str, Entry]:
    """Files of a guest without programs of its own: busybox, the init script, kernel modules."""
    files = {
        "init": Entry(0o100755, (SOURCES / "init.sh").read_bytes()),
        "bin/busybox": Entry(0o100755, busybox().read_bytes()),
    }
    built_in = (kernel.modules / "modules.builtin").read_text()
    order = []
    for name in modules:
        found = next(iter(kernel.modules.rglob(f"{name}.ko")), None)
        if found is not None:
            files[f"modules/{name}.ko"] = Entry(0o100644, found.read_bytes())
            order.append(f"{name}.ko\n")
        elif f"/{name}.ko" not in built_in:
            raise PeerMissing(f"the guest kernel has no module {name}")
    files["modules/order"] = Entry(0o100644, "".join(order).encode())
    return files


def initrd(kernel: Kernel) -> Path:
    """The initrd of the checking guest, built once per state of what it holds."""
    files = base_files(kernel)
    files["bin/guest"] = Entry(0o100755, program().read_bytes())
    digest = hashlib.sha256(repr(sorted(files.items())).encode()).hexdigest()[:16]
    target = cache_dir() / f"initrd-{digest}.gz"
    if not target.exists():
        fresh = target.with_suffix(f".{os.getpid()}")
        fresh.write_bytes(gzip.compress(archive(files), 1))
        fresh.rename(target)
    return target
