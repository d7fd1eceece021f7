"""Names of userfaultfd's bits. Bits that a newer kernel adds are kept unchanged.

Sources: ioctl_userfaultfd(2), ``include/uapi/linux/userfaultfd.h``.
"""

from __future__ import annotations

from enum import KEEP

from vhostpc.enums import NamedFlag, WordEnum, names

__all__ = ["FaultFlags", "Features", "Ioctls", "RegisterMode", "Way", "names"]


class Features(NamedFlag, boundary=KEEP):
    """``UFFD_FEATURE_*``: what UFFDIO_API offers and enables."""

    PAGEFAULT_FLAG_WP = 1 << 0
    EVENT_FORK = 1 << 1
    EVENT_REMAP = 1 << 2
    EVENT_REMOVE = 1 << 3
    MISSING_HUGETLBFS = 1 << 4
    MISSING_SHMEM = 1 << 5
    EVENT_UNMAP = 1 << 6
    SIGBUS = 1 << 7
    THREAD_ID = 1 << 8
    MINOR_HUGETLBFS = 1 << 9
    MINOR_SHMEM = 1 << 10
    EXACT_ADDRESS = 1 << 11
    WP_HUGETLBFS_SHMEM = 1 << 12
    WP_UNPOPULATED = 1 << 13
    POISON = 1 << 14
    WP_ASYNC = 1 << 15
    MOVE = 1 << 16


class Ioctls(NamedFlag, boundary=KEEP):
    """``_UFFDIO_*`` as a set of bits: what a ufd, or a registered range, can do."""

    REGISTER = 1 << 0x00
    UNREGISTER = 1 << 0x01
    WAKE = 1 << 0x02
    COPY = 1 << 0x03
    ZEROPAGE = 1 << 0x04
    MOVE = 1 << 0x05
    WRITEPROTECT = 1 << 0x06
    CONTINUE = 1 << 0x07
    POISON = 1 << 0x08
    API = 1 << 0x3F


class RegisterMode(NamedFlag):
    """``UFFDIO_REGISTER_MODE_*``: which faults of a range are reported."""

    MISSING = 1 << 0
    WP = 1 << 1
    MINOR = 1 << 2


class FaultFlags(NamedFlag, boundary=KEEP):
    """``UFFD_PAGEFAULT_FLAG_*``; without any bit: a read of a missing page."""

    WRITE = 1 << 0
    WP = 1 << 1
    MINOR = 1 << 2


class Way(WordEnum):
    """The ways to open a ufd, in the order in which they are tried (values of ``vpc_uffd.h``)."""

    DEVICE = 0
    """``/dev/userfaultfd``: Linux 6.1; needs read and write access to the node, nothing else."""
    SYSCALL = 1
    """userfaultfd(2): needs CAP_SYS_PTRACE or ``vm.unprivileged_userfaultfd=1``."""
    USER_MODE_ONLY = 2
    """userfaultfd(2) with UFFD_USER_MODE_ONLY: Linux 5.11, no privilege; faults of the kernel itself fail."""
