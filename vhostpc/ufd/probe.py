"""The uses of userfaultfd that this system allows this process, and the remedy if they are not enough."""

from __future__ import annotations

import errno
import os
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from vhostpc._native import ffi, lib
from vhostpc.ufd.flags import Features, Ioctls, Way, names

MINIMUM_KERNEL = (5, 11)
"""Linux 5.11 brought UFFD_USER_MODE_ONLY, so that no privilege is needed."""

POSTCOPY_FEATURES = Features.MISSING_SHMEM | Features.MISSING_HUGETLBFS
"""The features that postcopy of a virtual machine's shared memory needs (Linux 4.11)."""


SHORT = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN})
"""Errors that say nothing about the kernel or our privileges: a temporary shortage."""


def kernel_version(release: str | None = None) -> tuple[int, int]:
    """Major and minor of the running kernel, or of ``release`` (as ``uname -r`` prints it)."""
    found = re.match(r"(\d+)\.(\d+)", release if release is not None else platform.release())
    return (int(found[1]), int(found[2])) if found else (0, 0)


def seccomp_filtered() -> bool:
    """Whether a seccomp filter is in force on this process."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return False
    found = re.search(r"^Seccomp:\s*(\d+)", status, re.MULTILINE)
    return bool(found) and found[1] == "2" if found else False


def explain_way(way: Way, err: int) -> str:
    """Why one way did not open, in half a sentence."""
    word = errno.errorcode.get(err, str(err))
    absent = "the system call does not exist (kernel without CONFIG_USERFAULTFD, or a seccomp filter)"
    if way is Way.DEVICE:
        reasons = {
            errno.ENOENT: "/dev/userfaultfd does not exist (Linux 6.1 has it; it must be passed into containers)",
            errno.EACCES: "/dev/userfaultfd may not be opened by this user",
            errno.EPERM: "/dev/userfaultfd is denied (device cgroup or security module)",
        }
    elif way is Way.SYSCALL:
        reasons = {
            errno.EPERM: "the system call needs CAP_SYS_PTRACE or vm.unprivileged_userfaultfd=1",
            errno.ENOSYS: absent,
        }
        if seccomp_filtered():
            reasons[errno.EPERM] += ", or a seccomp filter denies it"
    else:
        reasons = {
            errno.EPERM: "even the user-mode-only call is denied (a seccomp filter or security module)",
            errno.EINVAL: "the kernel does not know user-mode-only (Linux 5.11 has it)",
            errno.ENOSYS: absent,
        }
    return f"{reasons.get(err, os.strerror(err))} [{word}]"


def explain(failures: Mapping[Way, int]) -> str:
    """One sentence for people: userfaultfd cannot be opened, why, and what to change."""
    if kernel_version() < MINIMUM_KERNEL:
        needed = ".".join(map(str, MINIMUM_KERNEL))
        return f"userfaultfd needs Linux {needed} or later, this is {platform.release()}"
    why = "; ".join(explain_way(way, err) for way, err in failures.items())
    mend = []
    if Way.DEVICE in failures:
        mend.append("give this process read and write access to /dev/userfaultfd")
    unprivileged = failures.get(Way.USER_MODE_ONLY)
    if unprivileged in (errno.EPERM, errno.ENOSYS):
        mend.append("allow the system call userfaultfd in the seccomp profile")
    elif failures.get(Way.SYSCALL) == errno.EPERM:
        mend.append("set sysctl vm.unprivileged_userfaultfd=1")
        mend.append("grant CAP_SYS_PTRACE")
    if unprivileged is None and Way.USER_MODE_ONLY not in failures:
        mend.append("allow the user-mode-only way, which needs no privilege")
    text = f"userfaultfd cannot be opened: {why}"
    return f"{text}; to fix it, {' or '.join(mend)}" if mend else text


@dataclass(frozen=True, slots=True)
class WayResult:
    """The result of one way of opening: ``errno`` 0 when it works, otherwise the number and ``reason``."""

    way: Way
    errno: int
    reason: str

    @property
    def works(self) -> bool:
        return self.errno == 0


@dataclass(frozen=True, slots=True)
class Probe:
    """The result of :func:`probe`."""

    kernel: str
    kernel_ok: bool
    ways: tuple[WayResult, ...]
    features: Features
    """Every feature the kernel knows; empty when no way works."""
    ioctls: Ioctls
    problem: str
    """Empty when postcopy of shared memory can work, otherwise one sentence: why not and what to change."""

    @property
    def best(self) -> Way | None:
        """The way that :meth:`vhostpc.ufd.Userfaultfd.open` uses, None when none works."""
        return next((w.way for w in self.ways if w.works), None)

    @property
    def ok(self) -> bool:
        return not self.problem


def probe() -> Probe:
    """Try each way once, with the handshake, and close again. Does not raise; touches no memory."""
    results = []
    offered, ioctls = ffi.new("uint64_t[1]"), ffi.new("uint64_t[1]")
    for way in Way:
        fd = lib.vpc_uffd_open(way)
        err = -fd if fd < 0 else 0
        if fd >= 0:
            err = -lib.vpc_uffd_api(fd, 0, offered, ioctls)
            os.close(fd)
        results.append(WayResult(way, err, explain_way(way, err) if err else ""))
    features = Features(offered[0])
    kernel_ok = kernel_version() >= MINIMUM_KERNEL
    problem = ""
    if not kernel_ok or not any(r.works for r in results):
        problem = explain({r.way: r.errno for r in results})
    elif features & POSTCOPY_FEATURES != POSTCOPY_FEATURES:
        missing = ", ".join(names(Features(int(POSTCOPY_FEATURES) & ~int(features))))
        problem = f"this kernel's userfaultfd does not serve shared memory: {missing} is missing"
    return Probe(platform.release(), kernel_ok, tuple(results), features, Ioctls(ioctls[0]), problem)
