"""Take rights away from a process, as a container or an ordinary user's login would.

``python -m tests.kit.confine PROFILE COMMAND...`` runs a command with fewer rights; needs root. Profiles:
``nobody``: an ordinary user. ``denied``: userfaultfd denied by a seccomp filter, no device node.
``denied-nosys``: the same with ENOSYS. ``denied-nobody``: both. Works on x86-64 and arm64. Nothing gives
the rights back.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
import sys
import tempfile
from pathlib import Path

LIBC = ctypes.CDLL(None, use_errno=True)

PR_SET_PDEATHSIG = 1
PR_SET_SECCOMP = 22
PR_SET_NO_NEW_PRIVS = 38
SECCOMP_MODE_FILTER = 2
SECCOMP_RET_ALLOW = 0x7FFF0000
SECCOMP_RET_ERRNO = 0x00050000
BPF_LD_W_ABS, BPF_JEQ_K, BPF_RET_K, BPF_AND_K = 0x20, 0x15, 0x06, 0x54
CLONE_NEWNS = 0x00020000
MS_BIND, MS_MOVE, MS_REC, MS_PRIVATE = 0x1000, 0x2000, 0x4000, 0x40000
NUMBERS = {
    "userfaultfd": {"x86_64": 323, "aarch64": 282},
    "io_setup": {"x86_64": 206, "aarch64": 0},
    "mmap": {"x86_64": 9, "aarch64": 222},
    "fallocate": {"x86_64": 285, "aarch64": 47},
    "preadv2": {"x86_64": 327, "aarch64": 286},
}
MMAP_FLAGS = 16 + 8 * 3  # of struct seccomp_data: the low half of the fourth argument
MAP_PRIVATE, MAP_FIXED = 0x02, 0x10
NOBODY = 65534

#: Not empty once this process has a mount namespace of its own.
_private: list[int] = []


def _check(rc: int, what: str) -> None:
    if rc != 0:
        err = ctypes.get_errno()
        raise OSError(err, f"{what}: {os.strerror(err)}")


def die_with_parent() -> None:
    """SIGKILL for us when the thread that started us ends (prctl(2))."""
    _check(LIBC.prctl(PR_SET_PDEATHSIG, 9, 0, 0, 0), "PR_SET_PDEATHSIG")


def deny(call: str, err: int = errno.EPERM) -> None:
    """A seccomp filter: this system call gives ``err``, everything else works (seccomp(2)). With 0 it does nothing, and
    succeeds."""
    _filter(
        (BPF_LD_W_ABS, 0, 0, 0),
        (BPF_JEQ_K, 0, 1, NUMBERS[call][platform.machine()]),
        (BPF_RET_K, 0, 0, SECCOMP_RET_ERRNO | err),
        (BPF_RET_K, 0, 0, SECCOMP_RET_ALLOW),
    )


def deny_mapping_over(err: int, *, private_only: bool = False) -> None:
    """From now on ``mmap`` with MAP_FIXED gives ``err`` to this thread and those it starts, else works.

    ``private_only``: that of private memory only.
    """
    flags = MAP_FIXED | MAP_PRIVATE if private_only else MAP_FIXED
    _filter(
        (BPF_LD_W_ABS, 0, 0, 0),
        (BPF_JEQ_K, 0, 4, NUMBERS["mmap"][platform.machine()]),
        (BPF_LD_W_ABS, 0, 0, MMAP_FLAGS),
        (BPF_AND_K, 0, 0, flags),
        (BPF_JEQ_K, 0, 1, flags),
        (BPF_RET_K, 0, 0, SECCOMP_RET_ERRNO | err),
        (BPF_RET_K, 0, 0, SECCOMP_RET_ALLOW),
    )


def _filter(*lines: tuple[int, int, int, int]) -> None:
    program = b"".join(struct.pack("=HBBI", *line) for line in lines)
    text = ctypes.create_string_buffer(program)
    header = ctypes.create_string_buffer(struct.pack("@HxxxxxxP", len(lines), ctypes.addressof(text)))
    _check(LIBC.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "PR_SET_NO_NEW_PRIVS")
    rc = LIBC.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.c_void_p(ctypes.addressof(header)), 0, 0)
    _check(rc, "PR_SET_SECCOMP")


def private_mounts() -> None:
    """Mounts made from here on are seen by us and our children only (mount_namespaces(7)).

    Whatever mounts in this file calls it first, so that nothing can ever be mounted over the machine's own
    folders. Once is enough.
    """
    if _private:
        return
    before = os.readlink("/proc/self/ns/mnt")
    _check(LIBC.unshare(CLONE_NEWNS), "unshare")
    # Only a mount point can be made private, and / is none in a plain chroot. So from the root of our namespace, to
    # which setns(2) brings a process that enters one, and back.
    root, here = (os.open(path, os.O_PATH | os.O_DIRECTORY) for path in ("/", "."))
    space = os.open("/proc/self/ns/mnt", os.O_RDONLY)
    try:
        _check(LIBC.setns(space, CLONE_NEWNS), "the root of the mount namespace")
        _check(LIBC.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None), "private mounts")
        os.fchdir(root)
        os.chroot(".")
        os.fchdir(here)
    finally:
        for fd in (root, here, space):
            os.close(fd)
    if os.readlink("/proc/self/ns/mnt") == before:
        raise RuntimeError("this is still the machine's own mount namespace")
    _private.append(os.getpid())


def hide_devices(keep: tuple[str, ...] = ("null", "zero", "urandom", "random", "tty")) -> None:
    """An almost empty /dev, for us and our children: no /dev/userfaultfd. Needs root."""
    private_mounts()
    nodes = {name: os.stat(f"/dev/{name}") for name in keep if os.path.exists(f"/dev/{name}")}
    _check(LIBC.mount(b"none", b"/dev", b"tmpfs", 0, b"mode=0755"), "tmpfs on /dev")
    for name, stat in nodes.items():
        os.mknod(f"/dev/{name}", stat.st_mode, stat.st_rdev)
        os.chmod(f"/dev/{name}", 0o666)
    os.mkdir("/dev/shm")
    _check(LIBC.mount(b"none", b"/dev/shm", b"tmpfs", 0, b"mode=1777"), "tmpfs on /dev/shm")


def expose(*wanted: Path) -> None:
    """Let everybody reach ``wanted``, also where a folder above is closed to others, such as /root.

    The closed folder is covered, for us and our children, by an empty one that holds just these. Needs root.
    """
    private_mounts()
    found = dict.fromkeys(path.resolve() for path in wanted)
    closed: dict[Path, list[Path]] = {}
    for path in found:
        for above in reversed(path.parents):
            if not above.stat().st_mode & 0o001:
                closed.setdefault(above, []).append(path)
                break
    for above, paths in closed.items():
        outer = [p for p in paths if not any(q in p.parents for q in paths)]
        holders = [tempfile.mkdtemp(prefix="confine-") for _ in outer]
        for path, holder in zip(outer, holders, strict=True):
            _check(LIBC.mount(os.fsencode(path), os.fsencode(holder), None, MS_BIND, None), f"bind {path}")
        _check(LIBC.mount(b"none", os.fsencode(above), b"tmpfs", 0, b"mode=0755"), f"cover {above}")
        for path, holder in zip(outer, holders, strict=True):
            path.mkdir(parents=True)
            _check(LIBC.mount(os.fsencode(holder), os.fsencode(path), None, MS_MOVE, None), f"move {path}")
            os.rmdir(holder)


def become_nobody() -> None:
    """Give up root for good: no groups, no capabilities."""
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)


def main(profile: str, command: list[str]) -> None:
    if profile not in ("nobody", "denied", "denied-nosys", "denied-nobody"):
        raise SystemExit(f"no such profile: {profile}")
    if profile.startswith("denied"):
        hide_devices()
    if profile.endswith("nobody"):
        expose(Path(sys.base_prefix), Path(sys.prefix), Path(__file__).resolve().parents[2])
        become_nobody()
    if profile.startswith("denied"):
        deny("userfaultfd", errno.ENOSYS if profile == "denied-nosys" else errno.EPERM)
    # Last, because the kernel forgets it when the user changes.
    die_with_parent()
    os.execvp(command[0], command)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
