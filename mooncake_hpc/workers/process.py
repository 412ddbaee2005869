"""Start, feed and end one worker process.

Not multiprocessing: its spawn imports the caller's main module once more, which needs a `__main__` guard, and whose
`from mpi4py import MPI` would make the worker join MPI as the caller's rank; its fork copies threads' locks.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
import weakref
from collections.abc import Mapping

from mooncake_hpc.core.errors import WorkerError
from mooncake_hpc.core.memory import MemoryFile
from mooncake_hpc.core.process import own
from mooncake_hpc.workers import channel

LAUNCHERS = ("PMI_", "PMIX_", "OMPI_", "PRTE_", "HYDRA_", "MPI_", "MPICH_")  # what they tell a rank
ONE_THREAD = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")  # numpy would start a pool


def worker_environment(env: Mapping[str, str], path: list[str]) -> dict[str, str]:
    """`env` without what makes a process join MPI, with the module search path `path`."""
    clean = {name: value for name, value in env.items() if not name.startswith(LAUNCHERS)}
    clean["PYTHONPATH"] = os.pathsep.join(entry or os.getcwd() for entry in path)
    return clean | dict.fromkeys(ONE_THREAD, "1")


class WorkerProcess:
    """Worker number `owner` of the ring in `control`. Raises WorkerError when it cannot be started."""

    def __init__(self, owner: int, control: MemoryFile) -> None:
        self.owner = owner
        self._attached: set[int] = set()
        self._end, theirs = map(own, channel.pair())
        fds = (control.fd, theirs.fileno())
        command = [sys.executable, "-P", "-m", "mooncake_hpc.workers", owner, *fds, os.getpid()]
        try:
            # a process group of its own: Ctrl-C in the terminal is for the parent
            self._process = subprocess.Popen(
                [str(word) for word in command],
                env=worker_environment(os.environ, sys.path),
                stdin=subprocess.DEVNULL,
                pass_fds=fds,
                process_group=0,
            )
        except OSError as error:
            self._end.close()
            raise WorkerError(f"cannot start worker {owner} as {command[0]}: {error}") from error
        finally:
            theirs.close()

    @property
    def pid(self) -> int:
        return self._process.pid

    def exit_status(self) -> int | None:
        """None while it runs; else its exit code, or minus the signal that killed it."""
        return self._process.poll()

    def attach(self, file: MemoryFile) -> bool:
        """Have the worker map `file` until it is closed; False when too many messages are unread."""
        if file.serial in self._attached:
            return True
        message = channel.Message(channel.ATTACH, file.serial, file.address, file.fd)
        try:
            channel.send(self._end, message)
        except BlockingIOError:
            return False
        except OSError:
            return True  # it is dead: its successor is told again
        self._attached.add(file.serial)
        forget = weakref.WeakMethod(self._forget)  # a file must not keep the workers of a dropped pool
        file.at_close(lambda serial: (method := forget()) and method(serial))
        return True

    def _forget(self, serial: int) -> None:
        """Have the worker unmap a file that was closed, within its idle time."""
        if serial in self._attached:
            self._attached.discard(serial)
            try:
                channel.send(self._end, channel.Message(channel.FORGET, serial))
            except BlockingIOError:
                self._process.kill()  # it does not read: only its end gives the memory back
            except OSError:
                pass

    def stop(self) -> None:
        """Ask the worker to end; it does when it is next idle or has finished a piece."""
        with contextlib.suppress(OSError):
            channel.send(self._end, channel.Message(channel.STOP))

    def end(self, deadline: float) -> None:
        """Wait until `deadline` (time.monotonic) for the worker that was stopped, then kill it."""
        try:
            self._process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._end.close()
