"""The program that stands between an embedded etcd and its starter, so that neither outlives the other.

    python -I -S _supervisor.py STARTER_PID TEMP_FOLDER ETCD [ETCD_ARGUMENT ...]

Runs etcd in a private folder under TEMP_FOLDER until etcd ends, until standard input closes or the starter is
gone, whichever comes first (the kernel closes the pipe of a starter that was killed), or until SIGTERM. Then
it stops etcd, prints the tail of etcd's log on standard output and removes the folder. Standard library only:
it is started without site-packages, in a few milliseconds.

A supervisor that was killed by SIGKILL leaves its folder. `sweep`, which each supervisor calls, and the starter when
its own has ended, removes such folders: those with a mark file of this user and this boot that no process locks.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import select
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from types import FrameType

PR_SET_PDEATHSIG = 1  # prctl(2)
TICK = 0.2  # seconds between two looks at etcd and the starter
STOP_TIMEOUT = 3.0  # seconds that etcd has to end after SIGTERM; it takes about 0.01
REMOVALS = 10  # attempts to remove a folder
LOG_TAIL = 2000  # bytes; fits a pipe that nobody reads
LOG_NAME = "etcd.log"
PREFIX, MARK = "mooncake-etcd-", "owner"  # of folders; the file in one that its supervisor locks


def _die_with_parent() -> None:
    """Between fork and exec of etcd: should this supervisor be killed, etcd goes with it."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _stop(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def _wait(etcd: subprocess.Popen[bytes], starter: int) -> None:
    """Return once etcd has ended, or the starter has let go."""
    while etcd.poll() is None and os.getppid() == starter:
        readable, _, _ = select.select([0], [], [], TICK)
        if readable and not os.read(0, 4096):
            return


def _end(etcd: subprocess.Popen[bytes]) -> None:
    etcd.terminate()
    try:
        etcd.wait(STOP_TIMEOUT)
    except subprocess.TimeoutExpired:
        etcd.kill()
        etcd.wait()


def _print_tail(path: str) -> None:
    with open(path, "rb") as log:
        log.seek(max(0, os.path.getsize(path) - LOG_TAIL))
        tail = log.read()
    with contextlib.suppress(OSError):  # the starter may be gone
        os.write(1, tail)


def _mark(folder: str) -> None:
    """Lock the folder's mark file for as long as this process lives. Where files cannot be locked there is none."""
    fd = os.open(os.path.join(folder, MARK), os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with contextlib.suppress(OSError):
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.write(fd, _boot())  # last: a mark without it counts as none


def _boot() -> bytes:
    """Tells this boot of this machine from others, whose locks are not seen here on a shared file system."""
    with open("/proc/sys/kernel/random/boot_id", "rb") as file:
        return file.read()


def _abandoned(folder: str) -> bool:
    """Whether it is a folder of a supervisor of this user on this machine that has been killed."""
    status = os.lstat(folder)
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o077:
        return False
    fd = os.open(os.path.join(folder, MARK), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode) or os.read(fd, 100) != _boot():
            return False
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    finally:
        os.close(fd)


def _remove(folder: str) -> None:
    for _ in range(REMOVALS):
        shutil.rmtree(folder, ignore_errors=True)
        if not os.path.lexists(folder):
            return
        time.sleep(TICK / 10)  # an etcd that is being killed may have made another file


def sweep(temp_folder: str) -> None:
    """Remove the folders of supervisors that were killed. Never raises."""
    with contextlib.suppress(OSError), os.scandir(temp_folder) as entries:
        for path in [entry.path for entry in entries if entry.name.startswith(PREFIX)]:
            with contextlib.suppress(OSError):  # no mark, or it is locked, or another process sweeps as well
                if _abandoned(path):
                    _remove(path)


def main(starter: int, temp_folder: str, command: list[str]) -> int:
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _stop)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the starter's: it still has keys to withdraw
    folder = tempfile.mkdtemp(prefix=PREFIX, dir=temp_folder)
    try:
        _mark(folder)
        os.chdir(folder)  # etcd's peer socket has a relative path: a socket's path is 107 bytes at most
        with open(LOG_NAME, "wb") as log:
            etcd = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, preexec_fn=_die_with_parent
            )
        try:
            sweep(temp_folder)
            _wait(etcd, starter)
        finally:
            for number in (signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN)
            _end(etcd)
            _print_tail(LOG_NAME)
        return etcd.returncode or 0
    finally:
        os.chdir("/")
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2], sys.argv[3:]))
