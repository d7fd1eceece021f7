"""A tmpfs of few pages, for memory that runs short; it can grow. Needs root.

``python -m tests.kit.small_tmpfs FD PAGES LENGTH`` is its other half: mounts are made in a process of their own, whose
mounts nobody else sees.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from tests.kit.confine import LIBC, die_with_parent, private_mounts

MS_REMOUNT = 32


class SmallTmpfs:
    """``fd``: a file of holes there."""

    def __init__(self, control: socket.socket, fd: int) -> None:
        self.fd = fd
        self._control = control

    def resize(self, pages: int) -> None:
        """So many pages of 4096 bytes from now on."""
        self._control.send(b"%d" % pages)
        assert self._control.recv(16) == b"done"


@contextmanager
def small_tmpfs(pages: int, length: int) -> Iterator[SmallTmpfs]:
    """A file of ``length`` bytes on a tmpfs that holds ``pages`` pages of 4096 bytes."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    command = [sys.executable, "-m", "tests.kit.small_tmpfs", str(theirs.fileno()), str(pages), str(length)]
    with ours, subprocess.Popen(command, pass_fds=[theirs.fileno()]) as child:
        theirs.close()
        _, fds, _, _ = socket.recv_fds(ours, 16, 1)
        assert fds, "no tmpfs could be mounted"
        try:
            yield SmallTmpfs(ours, fds[0])
        finally:
            os.close(fds[0])
            ours.close()
            child.wait()


def _mount(path: str, pages: int, flags: int) -> None:
    size = b"size=%d" % (pages * 4096)
    if LIBC.mount(b"none", os.fsencode(path), b"tmpfs", flags, size):
        raise SystemExit("a tmpfs cannot be mounted")


def main(number: int, pages: int, length: int) -> None:
    die_with_parent()
    private_mounts()
    with socket.socket(fileno=number) as control, tempfile.TemporaryDirectory() as folder:
        _mount(folder, pages, 0)
        fd = os.open(f"{folder}/ram", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
        os.ftruncate(fd, length)
        socket.send_fds(control, [b"here"], [fd])
        while command := control.recv(16):
            _mount(folder, int(command), MS_REMOUNT)
            control.send(b"done")
        LIBC.umount2(os.fsencode(folder), 2)  # MNT_DETACH: the file may still be open elsewhere


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
