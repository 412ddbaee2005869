"""An exclusive lock between processes, named by a file: flock(2), or claim files where a file system has no flock.

Some parallel file systems refuse flock(2) (Lustre without `-o flock`: ENOSYS). There each contender makes an empty file
of its own, LOCK.<host>.<machine>.<pid>.<start>.<token>, and looks for those of others: of two contenders at least one
sees the other, and whoever sees a living one takes its own away again. A claim of this machine's whose process is gone
is removed. One of another machine cannot be judged from here: it counts as living, and the error names the file.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import random
import secrets
import socket
import stat
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from mooncake_hpc.core.errors import LockHeld

WITHOUT_FLOCK = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
POLL_S = (0.01, 0.25)  # between two tries: at first, and at most
CONTEST_S = 1.0  # several that claim at the same moment all withdraw: try again for so long before it counts as held


class FileLock:
    """The lock that the file `path` stands for, relative to the folder `dir_fd` if there is one. A context manager.

    The file is made where it is missing, and stays. A link in its place is not followed. Threads of one process exclude
    one another as processes do. A forked child does not hold what its parent holds.
    """

    def __init__(self, path: str | Path, *, dir_fd: int | None = None, timeout_s: float = 0.0) -> None:
        """`timeout_s` is how long `with` waits for the lock."""
        self._path, self._name = Path(path), os.path.basename(path)
        self._dir_fd, self._timeout_s = dir_fd, timeout_s
        self._fd, self._folder, self._claim, self._pid = -1, -1, "", 0
        self._flocked = False

    def acquire(self, timeout_s: float = 0.0) -> None:
        """Take the lock. Raises LockHeld when another one has it for `timeout_s` seconds, OSError for what is no place
        for a lock file."""
        self._pid, begin, pause_s = os.getpid(), time.monotonic(), POLL_S[0]
        self._fd = os.open(
            self._path,
            os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK,
            0o600,
            dir_fd=self._dir_fd,
        )
        try:
            if not stat.S_ISREG(os.fstat(self._fd).st_mode):
                raise OSError(errno.EINVAL, "it is no plain file", str(self._path))
            while (holder := self._try()) is not None:
                if time.monotonic() - begin >= max(timeout_s, CONTEST_S if self._folder >= 0 else 0.0):
                    raise LockHeld(f"{self._path} is locked by {holder}")
                time.sleep(pause_s * random.uniform(0.5, 1.0))
                pause_s = min(2 * pause_s, POLL_S[1])
        except BaseException:
            self.release()
            raise

    def _try(self) -> str | None:
        """Who has the lock; None: we have."""
        if self._folder < 0:
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self._flocked = True
                return None
            except BlockingIOError:
                return "another process"
            except OSError as error:
                if error.errno not in WITHOUT_FLOCK:
                    raise
            self._folder = os.open(self._path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self._dir_fd)
        return self._claim_it(self._folder)

    def _claim_it(self, folder: int) -> str | None:
        machine, pid = _machine(), os.getpid()
        host = socket.gethostname().replace(".", "-")[:64]
        self._claim = f"{self._name}.{host}.{machine}.{pid}.{_started(pid)}.{secrets.token_hex(4)}"
        os.close(os.open(self._claim, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=folder))
        for name in os.listdir(folder):
            if name == self._claim or (claim := _parse(name, self._name)) is None:
                continue
            host, of, owner, started = claim
            if of == machine and _started(owner) != started:
                _remove(name, folder)  # its process has ended
                continue
            self._withdraw()
            where = f"process {owner} of this machine" if of == machine else f"process {owner} of host {host}"
            return f"{where} (if it has ended, remove {self._path.with_name(name)})"
        return None

    def release(self) -> None:
        """Give the lock up. Idempotent. In a forked child, only lets go of what it has inherited."""
        if self._pid == os.getpid():
            self._withdraw()
            if self._flocked:  # a forked child may have the descriptor still
                fcntl.flock(self._fd, fcntl.LOCK_UN)
        for fd in (self._fd, self._folder):
            if fd >= 0:
                os.close(fd)
        self._fd, self._folder, self._flocked = -1, -1, False

    def _withdraw(self) -> None:
        if self._claim:
            _remove(self._claim, self._folder)
            self._claim = ""

    def __enter__(self) -> Self:
        self.acquire(self._timeout_s)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def _parse(name: str, lock: str) -> tuple[str, str, int, str] | None:
    """Host, machine, process and its start in the name of a claim on `lock`."""
    parts = name.removeprefix(f"{lock}.").split(".")
    if not name.startswith(f"{lock}.") or len(parts) != 5 or not parts[2].isdecimal():
        return None
    return parts[0], parts[1], int(parts[2]), parts[3]


def _machine() -> str:
    """What tells this machine, since its start, and this process's numbering of processes from others."""
    with open("/proc/sys/kernel/random/boot_id") as file:
        text = f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _started(pid: int) -> str:
    """When the process started, in clock ticks since the machine did (proc_pid_stat(5)); "" when there is none, or it
    is a zombie."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return ""
    return "" if fields[0] in "ZX" else fields[19]


def _remove(name: str, folder: int) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(name, dir_fd=folder)
