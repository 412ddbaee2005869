"""The program that stands between an embedded etcd and its starter, so that neither outlives the other.

    python -I -S _supervisor.py STARTER_PID TEMP_FOLDER ETCD [ETCD_ARGUMENT ...]

Runs etcd in a private folder under TEMP_FOLDER until etcd ends, until standard input closes or the starter is
gone, whichever comes first (the kernel closes the pipe of a starter that was killed), or until SIGTERM. Then
it stops etcd, prints the tail of etcd's log on standard output and removes the folder. Standard library only:
it is started without site-packages, in a few milliseconds.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
from types import FrameType

PR_SET_PDEATHSIG = 1  # prctl(2)
TICK = 0.2  # seconds between two looks at etcd and the starter
STOP_TIMEOUT = 3.0  # seconds that etcd has to end after SIGTERM; it takes about 0.01
LOG_TAIL = 2000  # bytes; fits a pipe that nobody reads
LOG_NAME = "etcd.log"


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


def main(starter: int, temp_folder: str, command: list[str]) -> int:
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _stop)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the starter's: it still has keys to withdraw
    folder = tempfile.mkdtemp(prefix="mooncake-etcd-", dir=temp_folder)
    try:
        os.chdir(folder)  # etcd's peer socket has a relative path: a socket's path is 107 bytes at most
        with open(LOG_NAME, "wb") as log:
            etcd = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, preexec_fn=_die_with_parent
            )
        try:
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
