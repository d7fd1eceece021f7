"""The single checks of ``vhostpc doctor``. None of them changes anything."""

from __future__ import annotations

import os
import platform
import re
import resource
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from vhostpc.backend.tap import may_open_any_tap
from vhostpc.cli.common import MORE_DESCRIPTORS, few_descriptors
from vhostpc.errors import VhostpcError
from vhostpc.pages.dirty import DirtyWay, probe_dirty
from vhostpc.ufd import MINIMUM_KERNEL, POSTCOPY_FEATURES, Features, Probe, Way, names, probe
from vhostpc.ufd.probe import explain
from vhostpc.units import TARGET_PAGE

QEMU_WAIT_SECONDS = 20


class Level(Enum):
    """The severity of a finding."""

    OK = "ok"
    NOTE = "note"
    """Something to know; nothing is broken."""
    WARN = "warn"
    """Some of our functions, or a peer, will not work."""
    FAIL = "fail"
    """Postcopy cannot work."""


@dataclass(frozen=True)
class Check:
    """One finding: its subject, its severity, its text, the remedy, and the facts for programs."""

    name: str
    level: Level
    text: str
    mend: str = ""
    facts: dict[str, Any] = field(default_factory=dict)


def check_kernel(found: Probe) -> Check:
    needed = ".".join(map(str, MINIMUM_KERNEL))
    facts = {"release": found.kernel, "minimum": needed, "machine": platform.machine()}
    if found.kernel_ok:
        return Check("kernel", Level.OK, f"Linux {found.kernel} (at least {needed} needed)", facts=facts)
    return Check(
        "kernel", Level.FAIL, f"Linux {found.kernel} is too old", f"use Linux {needed} or later", facts
    )


def check_userfaultfd(found: Probe) -> Check:
    facts = {
        "ways": {w.way.name.lower(): {"works": w.works, "reason": w.reason} for w in found.ways},
        "best": found.best.name.lower() if found.best is not None else None,
        "features": names(found.features),
        "ioctls": names(found.ioctls),
    }
    if found.problem:
        reason, _, mend = found.problem.partition("; to fix it, ")
        return Check("userfaultfd", Level.FAIL, reason, mend, facts)
    words = {
        Way.DEVICE: "opens through /dev/userfaultfd",
        Way.SYSCALL: "opens through the system call",
        Way.USER_MODE_ONLY: "opens in user-mode-only form, which is enough for vhostpc",
    }
    assert found.best is not None
    text = words[found.best]
    # Peers may need more: QEMU and other back-ends want the full form.
    if found.best is Way.USER_MODE_ONLY:
        refused = {w.way: w.errno for w in found.ways if not w.works}
        mend = explain(refused).rpartition("to fix it, ")[2]
        return Check("userfaultfd", Level.NOTE, text, f"QEMU itself needs the full form: {mend}", facts)
    return Check("userfaultfd", Level.OK, text, facts=facts)


def check_features(found: Probe) -> Check | None:
    if found.best is None:
        return None
    needed = ", ".join(names(POSTCOPY_FEATURES))
    more = Features(int(found.features) & ~int(POSTCOPY_FEATURES))
    if int(POSTCOPY_FEATURES) & ~int(found.features):
        missing = names(Features(int(POSTCOPY_FEATURES) & ~int(found.features)))
        return Check("features", Level.FAIL, f"missing: {', '.join(missing)}", "use a newer kernel")
    return Check("features", Level.OK, f"{needed}, and {len(names(more))} more")


def check_dirty_tracking(found: Probe) -> Check | None:
    """Whether the memory that our own machines write can migrate."""
    if found.best is None:
        return None
    problems = probe_dirty()
    facts = {"ways": {way.value: {"works": not p, "reason": p} for way, p in problems.items()}}
    works = [way for way, problem in problems.items() if not problem]
    if not works:
        reason = problems[DirtyWay.WP_SYNC]
        mend = "only for endpoints with machines of their own: use Linux 5.19 or later"
        return Check("dirty tracking", Level.WARN, reason, mend, facts)
    if works[0] is DirtyWay.WP_ASYNC:
        return Check("dirty tracking", Level.OK, "by wp-async: no writer waits", facts=facts)
    text = (
        f"by wp-sync: each first write to a page waits until it is recorded ({problems[DirtyWay.WP_ASYNC]})"
    )
    return Check("dirty tracking", Level.NOTE, text, "use Linux 6.7 or later for wp-async", facts)


def check_memfd() -> Check:
    try:
        fd = os.memfd_create("vhostpc-doctor", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    except OSError as e:
        mend = "allow memfd_create in the seccomp profile, or use files on /dev/shm for guest memory"
        return Check("memfd", Level.WARN, f"memfd_create: {e.strerror}", mend)
    try:
        os.ftruncate(fd, TARGET_PAGE)
    finally:
        os.close(fd)
    return Check("memfd", Level.OK, "shared memory can be created and sealed")


def check_shm() -> Check:
    try:
        stat = os.statvfs("/dev/shm")
    except OSError as e:
        return Check(
            "/dev/shm", Level.NOTE, f"{e.strerror}", "mount a tmpfs there, or use memfd for guest memory"
        )
    free = stat.f_bavail * stat.f_frsize >> 20
    return Check("/dev/shm", Level.OK, f"{free} MiB free", facts={"free_mib": free})


def check_huge_pages() -> Check:
    pools: dict[str, dict[str, int]] = {}
    for folder in sorted(Path("/sys/kernel/mm/hugepages").glob("hugepages-*kB")):
        size = folder.name.removeprefix("hugepages-")
        pools[size] = {n: int((folder / f"{n}_hugepages").read_text()) for n in ("nr", "free")}
    if not pools:
        return Check("huge pages", Level.NOTE, "this kernel does not support them (hugetlbfs)")
    text = ", ".join(f"{size}: {p['free']} of {p['nr']} free" for size, p in pools.items())
    used = any(p["nr"] for p in pools.values())
    mend = "" if used else "only for guests on huge pages: write their number to /proc/sys/vm/nr_hugepages"
    return Check("huge pages", Level.OK if used else Level.NOTE, text, mend, {"pools": pools})


def check_shmem_thp() -> Check:
    knob = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
    try:
        found = re.search(r"\[(\w+)\]", knob.read_text())
    except OSError:
        found = None
    value = found[1] if found else "absent"
    facts = {"shmem_enabled": value}
    if value in ("always", "force"):
        text = f"shmem_enabled is {value}: vhostpc switches it off for the memory it watches"
        mend = f"other back-ends may not: echo never > {knob}"
        return Check("transparent huge pages", Level.NOTE, text, mend, facts)
    return Check("transparent huge pages", Level.OK, f"shmem_enabled is {value}", facts=facts)


def check_locked_memory() -> Check:
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    limit = "unlimited" if soft == resource.RLIM_INFINITY else f"{soft >> 10} KiB"
    text = f"limit on locked memory: {limit}; mlockall(MCL_FUTURE) in a device's process rules out postcopy"
    return Check("mlockall", Level.OK, text, facts={"rlimit_memlock": soft})


def check_descriptors() -> Check:
    """Whether our programs can start."""
    if problem := few_descriptors():
        return Check("open files", Level.FAIL, f"no program will start: {problem}", MORE_DESCRIPTORS)
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = "unlimited" if soft == resource.RLIM_INFINITY else str(soft)
    return Check("open files", Level.OK, f"limit: {limit}", facts={"rlimit_nofile": soft})


def check_tap() -> Check:
    """The privilege that ``vhostpc bridge --tap`` needs; nothing else needs it."""
    try:
        any_tap = may_open_any_tap()
    except VhostpcError as e:
        reason, _, mend = str(e).partition("; ")
        return Check("tap devices", Level.NOTE, reason, f"only for --tap: {mend}")
    if any_tap:
        return Check("tap devices", Level.OK, "can be opened")
    mend = "only for --tap: as root, ip tuntap add NAME mode tap user USER; or run with CAP_NET_ADMIN"
    return Check("tap devices", Level.NOTE, "only those that belong to this user can be opened", mend)


# From docs/compatibility.md: (concerns this version, what happens, what to do).
QEMU_BUGS: tuple[tuple[Callable[[tuple[int, int]], bool], str, str], ...] = (
    (
        lambda v: (7, 0) <= v < (8, 0),
        "crashes when a vhost-user device starts under TCG with MSI-X",
        "add vectors=0 to the device, or use KVM",
    ),
    (
        lambda v: v >= (10, 0),
        "postcopy with two or more queue pairs of vhost-user-net never ends",
        "start the back-end with --answer-each-pair, or use one queue pair",
    ),
    (
        lambda v: v >= (10, 0),
        "postcopy-preempt never ends once a vhost-user back-end has faulted",
        "leave postcopy-preempt off, or start the back-end with --no-fault",
    ),
)


def qemu_programs() -> list[Path]:
    """The system emulators in PATH."""
    name = {"x86_64": "x86_64", "aarch64": "aarch64"}.get(platform.machine(), platform.machine())
    wanted = [f"qemu-system-{name}", "qemu-kvm", "kvm"]
    found = [Path(p) for p in map(shutil.which, wanted) if p]
    return list({p.resolve(): p for p in reversed(found)}.values())


def check_qemu(program: Path) -> Check:
    try:
        out = subprocess.run(
            [program, "--version"], capture_output=True, text=True, timeout=QEMU_WAIT_SECONDS, check=False
        ).stdout
    except (OSError, subprocess.TimeoutExpired) as e:
        return Check("QEMU", Level.NOTE, f"{program} does not report its version: {e}")
    match = re.search(r"version (\d+)\.(\d+)(?:\.(\d+))?", out)
    if not match:
        return Check("QEMU", Level.NOTE, f"{program} does not report its version")
    version = (int(match[1]), int(match[2]))
    bugs = [(what, mend) for concerns, what, mend in QEMU_BUGS if concerns(version)]
    facts = {
        "program": str(program),
        "version": match[0].removeprefix("version "),
        "bugs": [b[0] for b in bugs],
    }
    text = f"{program} is {facts['version']}"
    if not bugs:
        return Check("QEMU", Level.OK, text, facts=facts)
    text += "; known: " + "; ".join(what for what, _ in bugs)
    return Check("QEMU", Level.NOTE, text, "; ".join(mend for _, mend in bugs), facts)


def run_checks() -> list[Check]:
    """All checks, most important first."""
    found = probe()
    checks: list[Check | None] = [
        check_kernel(found),
        check_userfaultfd(found),
        check_features(found),
        check_dirty_tracking(found),
        check_memfd(),
        check_shm(),
        check_huge_pages(),
        check_shmem_thp(),
        check_locked_memory(),
        check_descriptors(),
        check_tap(),
    ]
    programs = qemu_programs()
    checks += [check_qemu(p) for p in programs]
    if not programs:
        checks.append(
            Check("QEMU", Level.NOTE, "not found in PATH", "only to migrate real guests: install QEMU")
        )
    return [c for c in checks if c is not None]
