"""RAM blocks in files of folders: memory that outlives its process."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import quote

from vhostpc.errors import GuestMemoryError, naming

LOCK = ".lock"
ORDINARY, HUGE = "tmpfs", "hugetlbfs"


class RamFiles:
    """Folders on tmpfs or hugetlbfs, for one process at a time; the blocks' files are named after them.

    A block lies in the folder whose file system has pages of its size. One of them is on tmpfs: :attr:`folder`, which
    has room for a note. The files stay when the process is killed; :meth:`remove` is for its end. Nobody else may
    write or shrink them: they cannot be sealed as a memfd can. Raises GuestMemoryError, one sentence, for a folder
    that cannot be used.
    """

    def __init__(self, *folders: Path) -> None:
        self._by_page: dict[int, Path] = {}
        self._locks: list[int] = []
        try:
            kinds = {folder: self._take(folder) for folder in folders}
            ordinary = [folder for folder, kind in kinds.items() if kind == ORDINARY]
            if not ordinary:
                raise GuestMemoryError(f"{folders[0]} is on {HUGE}: one folder on tmpfs is needed, too")
        except BaseException:
            self.close()
            raise
        self.folder = ordinary[0]

    def _take(self, folder: Path) -> str:
        """Lock it; its kind."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            kind = filesystem_of(folder)
            if kind not in (ORDINARY, HUGE):
                raise GuestMemoryError(
                    f"{folder} is on {kind or 'an unknown file system'}: guest memory needs tmpfs or hugetlbfs"
                )
            self._locks.append(os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        except OSError as e:
            raise GuestMemoryError(f"{folder} cannot hold guest memory: {e.strerror}") from None
        try:
            fcntl.flock(self._locks[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise GuestMemoryError(f"{folder} holds the memory of another process that runs") from None
        page = os.statvfs(folder).f_bsize
        if page in self._by_page:
            raise GuestMemoryError(f"{folder} has pages of the same size as {self._by_page[page]}")
        self._by_page[page] = folder
        return kind

    def path_of(self, name: str, page_size: int) -> Path:
        """The file of the block of that name. Raises OSError, EINVAL: there is no folder for pages of this size."""
        if page_size not in self._by_page:
            raise OSError(errno.EINVAL, f"no folder was given whose pages have {page_size >> 10} KiB")
        return self._by_page[page_size] / ("ram-" + quote(name, safe="", errors="surrogateescape"))

    def paths(self) -> list[Path]:
        """The files that hold blocks."""
        return sorted(path for folder in self._by_page.values() for path in folder.glob("ram-*"))

    def create(self, name: str, length: int, page_size: int) -> int:
        """A descriptor of a new file of ``length`` bytes, all holes. Raises OSError: EEXIST, and as :meth:`path_of`."""
        path = self.path_of(name, page_size)
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

    def open(self, name: str, length: int, page_size: int) -> int:
        """A descriptor of the block's file. Raises GuestMemoryError: there is none, or it has another length."""
        path: Path | None = None
        try:
            path = self.path_of(name, page_size)
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError as e:
            raise GuestMemoryError(f"{path or name}: {e.strerror}") from None
        found = os.fstat(fd).st_size
        if found != length:
            os.close(fd)
            raise GuestMemoryError(f"{path} has {found} bytes, not the {length} of RAM block {name!r}")
        return fd

    def remove(self) -> None:
        """Remove the blocks' files."""
        for path in self.paths():
            path.unlink(missing_ok=True)

    def close(self) -> None:
        """Let another process have the folders. The files stay."""
        while self._locks:
            os.close(self._locks.pop())

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
