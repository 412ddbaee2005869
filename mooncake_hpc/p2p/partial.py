"""The folder beside OUT in which an object grows until it is whole: OUT.partial, known by a mark of our own.

    OUT.partial/                    0700, ours
        .mooncake-hpc-partial       the mark: JSON, with the object, its version, and all names that we made
        .lock                       who is writing
        content                     the file, or the folder with the object's files

What has no such mark is somebody else's: it is neither written nor removed, and an error names it. The same holds for
what lies in `content` and is not in the mark. OUT itself is replaced only where it is a plain file that may be, or an
empty folder. Nothing here follows a link below OUT's folder.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import stat
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mooncake_hpc.core.errors import LockHeld, P2PError
from mooncake_hpc.core.filelock import FileLock
from mooncake_hpc.p2p.folder import FOLDER_FLAGS, Folder, Names, ancestors, kind

SUFFIX, MARK, LOCK, CONTENT = ".partial", ".mooncake-hpc-partial", ".lock", "content"
FORMAT = 1
LARGEST_MARK = 1 << 28  # bytes
TRIES = 50  # to make or enter the folder, while others finish theirs
PAUSE_S = 0.02  # between two of them
NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)  # file systems without hard links


class Partial:
    """OUT and its OUT.partial. `check`, then `enter`, `mark`, fill `folder`, `move` or leave it, `close`."""

    def __init__(self, out: str | Path) -> None:
        """Raises P2PError for what is no name of a file or folder."""
        self.out = Path(out)
        self.name = self.out.name
        if self.name in ("", "..") or "\0" in str(out):
            raise P2PError(f"{str(out)!r} is no place for an object: name a file or folder that is to be made")
        self.path = self.out.with_name(self.name + SUFFIX)
        self._parent = -1
        self._lock: FileLock | None = None
        self._made: list[Names] = []  # what the mark says
        self.folder = Folder(-1, self.path)

    # --- what is there ---------------------------------------------------------------------------------------

    def check(self, overwrite: bool, folder: bool | None = None) -> None:
        """Raise P2PError where something is in our place that is to stay. `folder` says what the object is, if that is
        known. Writes nothing."""
        try:
            parent = os.open(self.out.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            return
        try:
            self._check_out(parent, overwrite, folder)
            fd = self._open(parent)
            if fd is not None:
                os.close(fd)
        finally:
            os.close(parent)

    def _check_out(self, parent: int, overwrite: bool, folder: bool | None) -> None:
        try:
            mode = os.stat(self.name, dir_fd=parent, follow_symlinks=False).st_mode
        except FileNotFoundError:
            return
        if stat.S_ISREG(mode):
            if not overwrite:
                raise P2PError(f"{self.out} exists: choose another place, or replace it (overwrite=True, --overwrite)")
            if folder:
                raise P2PError(f"{self.out} is a file, the object a folder")
        elif stat.S_ISDIR(mode):
            if folder is False:
                raise P2PError(f"{self.out} is a folder, the object a file")
            fd = os.open(self.name, FOLDER_FLAGS, dir_fd=parent)
            try:
                if os.listdir(fd):
                    raise P2PError(f"{self.out} is a folder that is not empty")
            finally:
                os.close(fd)
        else:
            raise P2PError(f"{self.out} is {kind(mode)}: it is neither written to nor replaced, choose another place")

    def _open(self, parent: int) -> int | None:
        """A descriptor of OUT.partial; None where there is none. Raises P2PError when it is not ours."""
        try:
            status = os.stat(self.path.name, dir_fd=parent, follow_symlinks=False)
        except FileNotFoundError:
            return None
        if not stat.S_ISDIR(status.st_mode):
            raise self._alien(f"{kind(status.st_mode)} that this program has not made")
        fd = os.open(self.path.name, FOLDER_FLAGS, dir_fd=parent)
        try:
            status = os.fstat(fd)
            if status.st_uid != os.geteuid() or status.st_mode & 0o022:
                raise self._alien(f"a folder of user {status.st_uid} and mode {stat.S_IMODE(status.st_mode):o}")
            self._made = self._read_mark(fd)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def _alien(self, what: str) -> P2PError:
        return P2PError(
            f"{self.path}, where {self.out} is to grow, is {what}: it is left alone; move it away, or choose another "
            "place"
        )

    def _read_mark(self, folder: int) -> list[Names]:
        """The names that we made. Raises P2PError when there is no mark of ours."""
        try:
            with open(
                os.open(MARK, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder),
                encoding="utf-8",
            ) as file:
                status = os.fstat(file.fileno())
                if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
                    raise ValueError("it is no file of ours")
                return _made(json.loads(file.read(LARGEST_MARK)))
        except (OSError, ValueError, TypeError, KeyError, RecursionError):
            raise self._alien("a folder without this program's mark") from None

    # --- our turn --------------------------------------------------------------------------------------------

    def enter(self) -> None:
        """Make the folder, or open the one that an earlier call has left, and lock it. Raises P2PError, OSError."""
        os.makedirs(self.out.parent, exist_ok=True)
        self._parent = os.open(self.out.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        for _ in range(TRIES):
            fd = self._open(self._parent)
            if fd is None:
                self._make()
                continue
            self.folder = Folder(fd, self.path)
            self._lock = FileLock(LOCK, dir_fd=fd)
            try:
                self._lock.acquire()
            except LockHeld as error:
                raise P2PError(f"{self.path} is being written by another process ({error})") from error
            if self._in_place():
                return
            self._let_go()  # it was finished, and removed, this moment
            time.sleep(PAUSE_S)
        raise P2PError(f"{self.path} is made and removed by other processes all the time")

    def _make(self) -> None:
        """A new folder, which has its mark before it has its name."""
        name = f"{self.path.name}.{secrets.token_hex(4)}"
        os.mkdir(name, 0o700, dir_fd=self._parent)
        fd = os.open(name, FOLDER_FLAGS, dir_fd=self._parent)
        try:
            os.fchmod(fd, 0o700)
            self._write_mark(fd, "", "", [])
            os.rename(name, self.path.name, src_dir_fd=self._parent, dst_dir_fd=self._parent)
        except OSError as error:
            for entry in os.listdir(fd):
                os.unlink(entry, dir_fd=fd)
            os.rmdir(name, dir_fd=self._parent)
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):  # another process was faster
                raise
        finally:
            os.close(fd)

    def _in_place(self) -> bool:
        """Whether the folder that we have locked still is OUT.partial, with its mark."""
        try:
            there = os.stat(self.path.name, dir_fd=self._parent, follow_symlinks=False)
            os.stat(MARK, dir_fd=self.folder.fd, follow_symlinks=False)
        except FileNotFoundError:
            return False
        ours = os.fstat(self.folder.fd)
        if (there.st_dev, there.st_ino) != (ours.st_dev, ours.st_ino):
            return False
        self._made = self._read_mark(self.folder.fd)
        return True

    def mark(self, object_name: str, version: str, files: Sequence[Names], folders: Sequence[Names]) -> None:
        """Write down what we are about to make, and remove what earlier calls made and this one does not want.

        Raises P2PError for what lies there and is of neither, before anything is removed.
        """
        wanted_folders = {*folders, *ancestors(files), *ancestors(folders)}
        known = {*files, *self._made, *wanted_folders, *ancestors(self._made)}
        found = self.folder.survey(CONTENT)
        for names, _ in found:
            if names not in known:
                raise P2PError(f"{self.folder.show(names)} is not of this program: move it away")
        wanted = [*files, *folders]
        self._write_mark(self.folder.fd, object_name, version, [*{*self._made, *wanted}])
        for names, is_folder in reversed(found):
            if names not in (wanted_folders if is_folder else {*files}):
                self.folder.remove(names, is_folder)
        self._write_mark(self.folder.fd, object_name, version, wanted)

    def _write_mark(self, folder: int, object_name: str, version: str, made: Sequence[Names]) -> None:
        value = {"program": "mooncake-hpc", "format": FORMAT, "object": object_name, "version": version, "made": made}
        name = f"{MARK}.new"
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=folder)
        with open(
            os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=folder),
            "w",
            encoding="utf-8",
        ) as file:
            file.write(json.dumps(value))
            file.flush()
            os.fsync(file.fileno())
        os.rename(name, MARK, src_dir_fd=folder, dst_dir_fd=folder)
        self._made = [*made]

    # --- the end ---------------------------------------------------------------------------------------------

    def move(self, overwrite: bool, folder: bool) -> None:
        """Give the content its place, and remove the rest. Raises P2PError, OSError."""
        self._check_out(self._parent, overwrite, folder)
        source: dict[str, Any] = {"src_dir_fd": self.folder.fd, "dst_dir_fd": self._parent}
        if folder or overwrite:  # a folder replaces nothing but an empty one: rename(2)
            os.rename(CONTENT, self.name, **source)
        else:
            self._move_beside(source)
        os.fsync(self._parent)
        self._remove()

    def _move_beside(self, source: dict[str, Any]) -> None:
        """Give a file its place unless something is there now."""
        try:
            os.link(CONTENT, self.name, follow_symlinks=False, **source)
        except FileExistsError:
            self._check_out(self._parent, False, False)
            raise
        except OSError as error:
            if error.errno not in NO_LINKS:
                raise
            os.rename(CONTENT, self.name, **source)
        else:
            os.unlink(CONTENT, dir_fd=self.folder.fd)

    def _remove(self) -> None:
        """The mark first: who enters meanwhile sees that this folder's time is over."""
        for _ in range(TRIES):
            for name in sorted(os.listdir(self.folder.fd), key=lambda name: not name.startswith(MARK)):
                if name.startswith((MARK, LOCK)):
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(name, dir_fd=self.folder.fd)
            try:
                os.rmdir(self.path.name, dir_fd=self._parent)
                return
            except FileNotFoundError:
                return
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
            time.sleep(PAUSE_S)  # another one is trying the lock

    def close(self) -> None:
        """Let go of everything. Idempotent."""
        self._let_go()
        if self._parent >= 0:
            os.close(self._parent)
        self._parent = -1

    def _let_go(self) -> None:
        if self._lock is not None:
            self._lock.release()
        self._lock = None
        self.folder.close()


def _made(value: Any) -> list[Names]:
    """The names in a mark's JSON. Raises ValueError, TypeError, KeyError for what is none."""
    if value["program"] != "mooncake-hpc" or value["format"] != FORMAT:
        raise ValueError("another program's")
    made = [tuple(names) for names in value["made"]]
    if not all(names and all(isinstance(name, str) for name in names) for names in made):
        raise ValueError("names that are none")
    return made
