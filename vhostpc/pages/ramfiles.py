"""RAM blocks in the files of a folder: memory that outlives its process."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import quote

from vhostpc.errors import GuestMemoryError, naming

LOCK = ".lock"
IN_MEMORY = ("tmpfs", "hugetlbfs")


class RamFiles:
    """A folder on tmpfs or hugetlbfs, for one process at a time; the blocks' files are named after them.

    The files stay when the process is killed; :meth:`remove` is for its end. Nobody else may write or shrink them:
    they cannot be sealed as a memfd can. Raises GuestMemoryError, one sentence, for a folder that cannot be used.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            kind = filesystem_of(folder)
            if kind not in IN_MEMORY:
                raise GuestMemoryError(
                    f"{folder} is on {kind or 'an unknown file system'}: guest memory needs tmpfs or hugetlbfs"
                )
            self._lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as e:
            raise GuestMemoryError(f"{folder} cannot hold guest memory: {e.strerror}") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            raise GuestMemoryError(f"{folder} holds the memory of another process that runs") from None

    def path_of(self, name: str) -> Path:
        """The file of the block of that name."""
        return self.folder / ("ram-" + quote(name, safe="", errors="surrogateescape"))

    def names(self) -> list[str]:
        """Names of the files that hold blocks."""
        return sorted(path.name for path in self.folder.glob("ram-*"))

    def create(self, name: str, length: int, page_size: int) -> int:
        """A descriptor of a new file of ``length`` bytes, all holes. Raises OSError: EEXIST, or EINVAL for a page size
        that the file system does not have."""
        if os.statvfs(self.folder).f_bsize != page_size:
            raise OSError(22, f"the pages of {self.folder} have another size")
        path = self.path_of(name)
        with naming(str(path)):
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            with naming(str(path)):
                os.ftruncate(fd, length)
        except BaseException:
            os.close(fd)
            path.unlink()
            raise
        return fd

    def open(self, name: str, length: int) -> int:
        """A descriptor of the block's file. Raises GuestMemoryError: there is none, or it has another length."""
        path = self.path_of(name)
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError as e:
            raise GuestMemoryError(f"{path}: {e.strerror}") from None
        found = os.fstat(fd).st_size
        if found != length:
            os.close(fd)
            raise GuestMemoryError(f"{path} has {found} bytes, not the {length} of RAM block {name!r}")
        return fd

    def remove(self) -> None:
        """Remove the blocks' files."""
        for path in self.folder.glob("ram-*"):
            path.unlink(missing_ok=True)

    def close(self) -> None:
        """Let another process have the folder. The files stay."""
        os.close(self._lock)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def filesystem_of(folder: Path) -> str | None:
    """The type of its file system, by proc_pid_mountinfo(5); None: it is not listed."""
    device = os.stat(folder).st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        if before.split()[2] == wanted:
            return after.split()[0]
    return None
