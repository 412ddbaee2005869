"""A folder whose files we open one by one, never through a link, and a few at a time.

Paths are tuples of names below the folder. Every name on the way is opened by itself (openat(2), O_NOFOLLOW), so that a
link which somebody puts there meanwhile leads nowhere.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections import OrderedDict
from collections.abc import Collection, Iterator
from pathlib import Path

from mooncake_hpc.core.errors import P2PError

Names = tuple[str, ...]

OPEN_FILES = 16  # at a time: the soft limit of descriptors may be low, and the engine needs some
FOLDER_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW
FILE_FLAGS = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK  # a FIFO is opened without waiting, and refused


class Folder:
    """`fd` is the folder's descriptor, which this object owns; `path` is for error texts."""

    def __init__(self, fd: int, path: Path) -> None:
        self.fd, self.path = fd, path
        self._files: OrderedDict[Names, int] = OrderedDict()
        self._known: dict[Names, tuple[int, int]] = {}  # device and inode of what was opened
        self._inodes: dict[tuple[int, int], Names] = {}

    def close(self) -> None:
        """Close all descriptors. Idempotent."""
        while self._files:
            os.close(self._files.popitem()[1])
        if self.fd >= 0:
            os.close(self.fd)
        self.fd = -1

    def file(self, names: Names) -> int:
        """A descriptor of the file, made where it is missing. It is valid until OPEN_FILES others were asked for.

        Raises P2PError when a file that was opened before has been replaced, or two names are one file; OSError.
        """
        if (fd := self._files.get(names)) is not None:
            self._files.move_to_end(names)
            return fd
        while len(self._files) >= OPEN_FILES:
            os.close(self._files.popitem(last=False)[1])
        with self._opened(names[:-1]) as folder:
            fd = self._open_file(names, folder)
        try:
            self._check(names, os.fstat(fd))
        except BaseException:
            os.close(fd)
            raise
        self._files[names] = fd
        return fd

    def _open_file(self, names: Names, folder: int) -> int:
        if names in self._known:
            return os.open(names[-1], FILE_FLAGS, dir_fd=folder)
        with contextlib.suppress(FileNotFoundError):
            status = os.stat(names[-1], dir_fd=folder, follow_symlinks=False)
            readonly = stat.S_ISREG(status.st_mode) and not status.st_mode & 0o200
            if readonly or status.st_nlink > 1:  # a name of ours; what other names mean stays
                os.unlink(names[-1], dir_fd=folder)
        return os.open(names[-1], FILE_FLAGS | os.O_CREAT, 0o666, dir_fd=folder)

    def _check(self, names: Names, status: os.stat_result) -> None:
        inode = status.st_dev, status.st_ino
        if not stat.S_ISREG(status.st_mode) or self._known.setdefault(names, inode) != inode:
            raise P2PError(f"{self.show(names)} is not the file that was made there: somebody has replaced it")
        if self._inodes.setdefault(inode, names) != names:
            raise P2PError(f"{self.show(names)} and {self.show(self._inodes[inode])} are one file on this file system")

    def make_folders(self, names: Names) -> None:
        """Make the folder, and those that it lies in, where they are missing. Raises OSError."""
        with self._opened(names, make=True):
            pass

    def sync_folder(self, names: Names) -> None:
        """Flush a folder's entries to disk."""
        with self._opened(names) as fd:
            os.fsync(fd)

    def remove(self, names: Names, folder: bool) -> None:
        with self._opened(names[:-1]) as fd:
            (os.rmdir if folder else os.unlink)(names[-1], dir_fd=fd)

    def survey(self, top: str) -> list[tuple[Names, bool]]:
        """What lies under the name `top`, itself included, a folder before what is in it; with whether it is a folder.

        Raises P2PError for what is neither a plain file nor a folder.
        """
        found: list[tuple[Names, bool]] = []
        left: list[Names] = [(top,)]
        while left:
            names = left.pop()
            with self._opened(names[:-1]) as fd:
                try:
                    mode = os.stat(names[-1], dir_fd=fd, follow_symlinks=False).st_mode
                except FileNotFoundError:
                    continue
            if not stat.S_ISDIR(mode) and not stat.S_ISREG(mode):
                raise P2PError(f"{self.show(names)} is {kind(mode)}, not of this program: move it away")
            found.append((names, stat.S_ISDIR(mode)))
            if stat.S_ISDIR(mode):
                with self._opened(names) as fd:
                    left.extend((*names, name) for name in os.listdir(fd))
        return found

    def show(self, names: Names) -> str:
        return str(self.path.joinpath(*names))

    @contextlib.contextmanager
    def _opened(self, names: Names, make: bool = False) -> Iterator[int]:
        """A descriptor of a folder below this one."""
        fd = os.dup(self.fd)
        try:
            for name in names:
                if make:
                    with contextlib.suppress(FileExistsError):
                        os.mkdir(name, dir_fd=fd)
                before, fd = fd, os.open(name, FOLDER_FLAGS, dir_fd=fd)
                os.close(before)
            yield fd
        finally:
            os.close(fd)


def kind(mode: int) -> str:
    """What a file of this mode is, for error texts."""
    for test, text in (
        (stat.S_ISLNK, "a link"),
        (stat.S_ISDIR, "a folder"),
        (stat.S_ISREG, "a file"),
        (stat.S_ISFIFO, "a FIFO"),
        (stat.S_ISSOCK, "a socket"),
        (stat.S_ISCHR, "a device"),
        (stat.S_ISBLK, "a device"),
    ):
        if test(mode):
            return text
    return "no plain file"


def ancestors(all_names: Collection[Names]) -> set[Names]:
    """The folders in which these names lie."""
    return {names[:length] for names in all_names for length in range(1, len(names))}
