"""One userfaultfd: open, register ranges, place pages, wake waiters, read events.

Sources: userfaultfd(2), ioctl_userfaultfd(2). Nothing here touches guest memory, so nothing here waits
for a page. Addresses are plain integers of the process that created the ufd.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import select
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from vhostpc._native import ffi, lib
from vhostpc.errors import UfdError
from vhostpc.ufd.flags import Features, Ioctls, RegisterMode, Way, names
from vhostpc.ufd.probe import MINIMUM_KERNEL, SHORT, explain, kernel_version
from vhostpc.ufd.ufd_events import Event, decode
from vhostpc.units import in_units

DONTWAKE = 1
NOTHING = Features(0)
MAX_EVENTS = 64

_REASONS = {
    ("register", errno.EBUSY): "another userfaultfd watches part of the range",
    ("register", errno.EINVAL): "the range must be mapped, in whole pages, of memory that the mode supports",
    ("register", errno.EPERM): "the mapping is of a file without write permission",
    ("copy", errno.EEXIST): "a page is there already; it was left unchanged",
    ("copy", errno.ENOENT): "the range is not registered with this userfaultfd, or no longer mapped",
    ("copy", errno.ESRCH): "the process that opened this userfaultfd is gone",
    ("copy", errno.EAGAIN): "the memory layout is changing: read the events, then try again",
    ("copy", errno.EINVAL): "address and length must be whole pages of the mapping",
    ("copy", errno.ENOSPC): "no page is left in the file system",
    ("zeropage", errno.EINVAL): "address and length must be whole pages, and hugetlbfs has no zero page",
    ("wake", errno.EINVAL): "address and length must be whole pages",
    ("events", errno.EINVAL): "the handshake was not completed",
}


def _failure(what: str, err: int, where: str = "") -> UfdError:
    family = "copy" if what == "zeropage" and (what, err) not in _REASONS else what
    reason = _REASONS.get((family, err), os.strerror(err))
    return UfdError(f"userfaultfd {what}{where}: {reason} [{errno.errorcode.get(err, err)}]", err)


def _range(start: int, length: int) -> str:
    return f" of {in_units(length)} at {start:#x}"


def is_userfaultfd(fd: int) -> bool:
    """Whether ``fd`` is a userfaultfd: a peer can pass any descriptor."""
    try:
        return os.readlink(f"/proc/self/fd/{fd}") == "anon_inode:[userfaultfd]"
    except OSError:
        return False


class Userfaultfd:
    """An open userfaultfd. Make one with :meth:`open`, or with :meth:`from_fd` from one that a peer sent.

    It is close-on-exec and non-blocking, and closes itself as a context manager. All methods may be called
    from the trio thread: none waits for a page. To wait for events:
    ``await trio.lowlevel.wait_readable(ufd)``, then :meth:`events`.

    A waiter that is released by :meth:`unregister`, or because the last copy of the ufd was closed, finds
    zeros, and its touch creates that zero page in a shared file for everybody.
    """

    def __init__(
        self, fd: int, *, features: Features, offered: Features, ioctls: Ioctls, way: Way | None
    ) -> None:
        self._fd = fd
        self.features = features
        """Features that are enabled."""
        self.offered = offered
        """Every feature the kernel knows. Those that only announce an ability, such as MISSING_SHMEM,
        work without being requested."""
        self.ioctls = ioctls
        """The ioctls of the ufd as a whole; :meth:`register` returns those of a range."""
        self.way = way
        """How it was opened; None for one that a peer opened."""

    @classmethod
    def open(
        cls,
        *,
        ways: Sequence[Way] = tuple(Way),
        features: Features = NOTHING,
        optional: Features = NOTHING,
    ) -> Userfaultfd:
        """Open by the first of ``ways`` that works and complete the handshake.

        ``features`` must be granted; of ``optional``, those that the kernel knows are enabled.

        Raises :class:`~vhostpc.errors.UfdError` whose text says what to change: no way works, the kernel is
        older than the minimum, or a needed feature is missing.
        """
        if kernel_version() < MINIMUM_KERNEL:
            raise UfdError(explain({}), errno.ENOSYS)
        failures: dict[Way, int] = {}
        for way in ways:
            fd = lib.vpc_uffd_open(way)
            if -fd in SHORT:
                raise _failure("open", -fd)
            if fd < 0:
                failures[way] = -fd
                continue
            os.close(fd)
            return cls._negotiate(way, features, optional)
        raise UfdError(explain(failures), next(reversed(failures.values()), errno.EINVAL))

    @classmethod
    def _negotiate(cls, way: Way, features: Features, optional: Features) -> Userfaultfd:
        # A ufd has one handshake, which fails if it requests an unknown bit. So a first ufd requests nothing,
        # and learns the features.
        _, offered, ioctls = cls._handshake(way, Features(0), keep=False)
        if missing := int(features) & ~int(offered):
            text = ", ".join(names(Features(missing)))
            raise UfdError(f"this kernel's userfaultfd does not know {text}", errno.EINVAL)
        granted = features | optional & offered
        fd, _, _ = cls._handshake(way, granted, keep=True)
        return cls(fd, features=granted, offered=offered, ioctls=ioctls, way=way)

    @staticmethod
    def _handshake(way: Way, features: Features, *, keep: bool) -> tuple[int, Features, Ioctls]:
        fd = lib.vpc_uffd_open(way)
        if -fd in SHORT:
            raise _failure("open", -fd)
        if fd < 0:
            raise UfdError(explain({way: -fd}), -fd)
        offered, ioctls = ffi.new("uint64_t[1]"), ffi.new("uint64_t[1]")
        rc = lib.vpc_uffd_api(fd, features, offered, ioctls)
        if rc < 0 or not keep:
            os.close(fd)
        if rc == -errno.EPERM and Features.EVENT_FORK in features:
            raise UfdError("userfaultfd EVENT_FORK needs CAP_SYS_PTRACE", errno.EPERM)
        if rc < 0:
            raise _failure("handshake", -rc)
        return fd, Features(offered[0]), Ioctls(ioctls[0])

    @classmethod
    def from_fd(cls, fd: int) -> Userfaultfd:
        """Take over ``fd``, a ufd that another process opened and completed the handshake on.

        Makes it non-blocking: poll(2) reports an error on a blocking ufd, because a fault can be resolved
        between poll and read. Raises :class:`UfdError` (and leaves ``fd`` open) when ``fd`` is not a
        userfaultfd or has no handshake yet.
        """
        if not is_userfaultfd(fd):
            raise UfdError(f"descriptor {fd} is not a userfaultfd", errno.EINVAL)
        os.set_blocking(fd, False)
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        if any(ready & select.POLLERR for _, ready in poll.poll(0)):
            raise UfdError("the handshake of this userfaultfd was not completed", errno.EINVAL)
        # "API:\taa:features in force:ioctls of the kernel", fs/userfaultfd.c; above all features stand
        # the kernel's own marks.
        found = re.search(r"^API:\s*[0-9a-f]+:([0-9a-f]+):", _fdinfo(fd), re.MULTILINE)
        features = Features(int(found[1], 16) if found else 0) & Features(sum(Features))
        return cls(fd, features=features, offered=features, ioctls=Ioctls(0), way=None)

    @property
    def user_mode_only(self) -> bool:
        """Whether faults that the kernel takes for the process (read(2) into the range, say) fail with
        EFAULT instead of waiting. False for one that a peer opened: it cannot be seen."""
        return self.way is Way.USER_MODE_ONLY

    @property
    def closed(self) -> bool:
        return self._fd < 0

    def fileno(self) -> int:
        """The descriptor; :class:`UfdError` after :meth:`close` or :meth:`detach`."""
        if self._fd < 0:
            raise UfdError("this userfaultfd is closed", errno.EBADF)
        return self._fd

    def dup(self) -> int:
        """A copy of the descriptor, close-on-exec, owned by the caller; registrations live until the last
        copy is closed."""
        return fcntl.fcntl(self.fileno(), fcntl.F_DUPFD_CLOEXEC, 0)

    def detach(self) -> int:
        """Release the descriptor: the caller owns it, this object counts as closed."""
        fd, self._fd = self.fileno(), -1
        return fd

    def close(self) -> None:
        """Close. With the last copy gone, all ranges are unregistered and waiters go on and read zeros."""
        if self._fd >= 0:
            os.close(self.detach())

    def __enter__(self) -> Userfaultfd:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"fd {self._fd}"
        return f"<Userfaultfd {state}, {self.way.name if self.way is not None else 'from a peer'}>"

    def register(self, start: int, length: int, mode: RegisterMode = RegisterMode.MISSING) -> Ioctls:
        """Report faults of the range from now on; returns the ioctls that it supports.

        Both numbers are multiples of the mapping's page size (hugetlbfs: of the huge page).
        """
        ioctls = ffi.new("uint64_t[1]")
        rc = lib.vpc_uffd_register(self.fileno(), start, length, mode, ioctls)
        if rc < 0:
            raise _failure("register", -rc, _range(start, length))
        return Ioctls(ioctls[0])

    def unregister(self, start: int, length: int) -> None:
        """Stop reporting faults of the range; its waiters go on and read zeros (see the class)."""
        rc = lib.vpc_uffd_unregister(self.fileno(), start, length)
        if rc < 0:
            raise _failure("unregister", -rc, _range(start, length))

    def wake(self, start: int, length: int) -> None:
        """Let every thread that waits in the range retry. It is not an error if there is none."""
        rc = lib.vpc_uffd_wake(self.fileno(), start, length)
        if rc < 0:
            raise _failure("wake", -rc, _range(start, length))

    def copy(self, address: int, data: Any, *, wake: bool = True) -> int:
        """Place ``data`` (bytes-like, whole pages, private memory) at ``address`` and return the bytes.

        Each page appears whole or not at all. A count smaller than ``len(data)`` means that the page there
        could not be placed: another call, from that page on, reports the reason. Raises :class:`UfdError` when not
        even the first page was placed: errno EEXIST (a page is there, it was left alone), EAGAIN (try
        again), ENOENT (not registered), ESRCH (process gone), ENOSPC or ENOMEM. Never pass guest memory as
        ``data``: that would be touched here.
        """
        with memoryview(data) as view:
            source = ffi.from_buffer(view)
            at = int(ffi.cast("uintptr_t", source))
            done = ffi.new("int64_t[1]")
            mode = 0 if wake else DONTWAKE
            rc = lib.vpc_uffd_copy(self.fileno(), address, at, len(source), mode, done)
            placed, length = int(done[0]), len(source)
            ffi.release(source)
        if rc < 0 and placed == 0:
            raise _failure("copy", -rc, _range(address, length))
        return placed

    def zeropage(self, start: int, length: int, *, wake: bool = True) -> int:
        """Place zero pages and return the bytes placed; counts and errors as :meth:`copy`.

        hugetlbfs cannot do it (EINVAL): copy zeros there.
        """
        done = ffi.new("int64_t[1]")
        rc = lib.vpc_uffd_zero(self.fileno(), start, length, 0 if wake else DONTWAKE, done)
        if rc < 0 and done[0] == 0:
            raise _failure("zeropage", -rc, _range(start, length))
        return int(done[0])

    def events(self, limit: int = MAX_EVENTS) -> list[Event]:
        """Up to ``limit`` (at most 64) waiting events, an empty list when there is none.

        A fault is reported once; its thread waits until the page exists and the range is woken.
        """
        raw = ffi.new("struct vpc_uffd_event[]", min(limit, MAX_EVENTS))
        count = lib.vpc_uffd_read(self.fileno(), raw, len(raw))
        if count == -errno.EAGAIN:
            return []
        if count < 0:
            raise _failure("events", -count)
        return [decode(raw[i]) for i in range(count)]

    def waiting(self) -> tuple[int, int]:
        """The number of waiting faults: (not reported yet, all), from ``/proc/self/fdinfo``."""
        text = _fdinfo(self.fileno())
        pending = re.search(r"^pending:\s*(\d+)", text, re.MULTILINE)
        total = re.search(r"^total:\s*(\d+)", text, re.MULTILINE)
        return (int(pending[1]) if pending else 0, int(total[1]) if total else 0)


def _fdinfo(fd: int) -> str:
    return Path(f"/proc/self/fdinfo/{fd}").read_text()
