"""Peers without their start-up: a process that has loaded everything forks them, in milliseconds instead of seconds;
and other programs of ours.

`Nursery` is the test's side; `python -m mooncake_hpc.testing.fork_server FD PROTOCOL…` is the process, which ends with
its socket FD. It has moved bytes over the protocols once, so that all kernels are loaded, and has no thread when it
forks.
Where every start costs much, as in an emulated guest, a test session sets `peer.nursery` to one.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import BinaryIO, Self

START_TIMEOUT = 280.0  # seconds; emulated and with other work beside it, it takes half a minute
FORK_TIMEOUT = 30.0
LONGEST = 1 << 20  # bytes of a request
PROGRAM = "-c"


class Forked:
    """A process that the nursery forked, with as much of `subprocess.Popen` as peers need."""

    def __init__(self, pid: int, pidfd: int, stdin: BinaryIO, stdout: BinaryIO) -> None:
        self.pid, self.stdin, self.stdout = pid, stdin, stdout
        self._pidfd = pidfd

    def send_signal(self, number: int) -> None:
        """Raises ProcessLookupError when it has ended."""
        if self._pidfd < 0:
            raise ProcessLookupError(f"process {self.pid} has ended")
        signal.pidfd_send_signal(self._pidfd, number)

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.send_signal(signal.SIGKILL)

    def wait(self, timeout: float | None = None) -> None:
        """Until it has ended. Raises subprocess.TimeoutExpired."""
        if self._pidfd < 0:
            return
        if not select.select([self._pidfd], [], [], timeout)[0]:
            raise subprocess.TimeoutExpired(["peer"], timeout or 0.0)
        os.close(self._pidfd)
        self._pidfd = -1


class Nursery:
    """The process. A context manager; peers that it forked end with their input, as others do."""

    def __init__(self, *protocols: str) -> None:
        ours, theirs = socket.socketpair()
        command = [sys.executable, "-m", "mooncake_hpc.testing.fork_server", str(theirs.fileno()), *protocols]
        with theirs:
            self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
        self._socket, self._lock = ours, threading.Lock()
        self._ready = False

    def run(self, program: str, *arguments: str, env: Mapping[str, str] | None = None, timeout: float = 60.0) -> str:
        """What the program, a Python text, writes to its standard output and, by an exception, to standard error.

        Raises OSError when the nursery has ended, subprocess.TimeoutExpired.
        """
        child = self.start([PROGRAM, program, *arguments], env)
        child.stdin.close()
        with child.stdout, ThreadPoolExecutor(1) as reader:
            said = reader.submit(child.stdout.read)
            try:
                child.wait(timeout)
            except subprocess.TimeoutExpired:
                child.kill()
                raise
            return said.result().decode()

    def start(self, arguments: Sequence[str], env: Mapping[str, str] | None) -> Forked:
        """A new `mooncake_hpc.testing.peer` with these arguments, or with PROGRAM a Python text and its arguments.

        Raises OSError when the nursery has ended.
        """
        with self._lock:
            self._await_ready()
            commands, stdin = os.pipe()
            stdout, replies = os.pipe()
            try:
                request = json.dumps([list(arguments), dict(os.environ if env is None else env)]).encode() + b"\n"
                socket.send_fds(self._socket, [request], [commands, replies])
                self._socket.settimeout(FORK_TIMEOUT)
                said, fds, _, _ = socket.recv_fds(self._socket, 64, 1)
            except BaseException:
                os.close(stdin)
                os.close(stdout)
                raise
            finally:
                os.close(commands)
                os.close(replies)
        if not fds:
            raise OSError("the nursery of peers has ended")
        return Forked(int(said), fds[0], os.fdopen(stdin, "wb"), os.fdopen(stdout, "rb", 0))

    def close(self) -> None:
        """Idempotent."""
        self._socket.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _await_ready(self) -> None:
        if not self._ready:
            self._socket.settimeout(START_TIMEOUT)
            if self._socket.recv(1) != b"+":
                raise OSError("the nursery of peers did not start")
            self._ready = True


def _receive(connection: socket.socket) -> tuple[list[str], dict[str, str], list[int]]:
    """Arguments, environment and descriptors of the next peer. Raises EOFError."""
    text, fds, _, _ = socket.recv_fds(connection, LONGEST, 2)
    while not text.endswith(b"\n"):
        more = connection.recv(LONGEST)
        if not more:
            raise EOFError
        text += more
    arguments, env = json.loads(text)
    return arguments, env, fds


def _become(arguments: list[str], env: dict[str, str], fds: list[int]) -> None:
    """In the child: never returns."""
    from mooncake_hpc.testing import peer  # which imports this module

    for target, fd in enumerate(fds):
        os.dup2(fd, target)
        os.close(fd)
    gc.enable()
    sys.stdin = os.fdopen(0, closefd=False)
    os.environ.clear()
    os.environ.update(env)
    if arguments[0] == PROGRAM:
        _run_program(*arguments[1:])
    code = 1
    try:
        peer.run(arguments)
        code = 0
    finally:
        os._exit(code)


def _run_program(text: str, *arguments: str) -> None:
    """It ends as an interpreter does, deleting everything."""
    os.dup2(1, 2)
    sys.argv = [PROGRAM, *arguments]
    exec(compile(text, PROGRAM, "exec"), {"__name__": "__main__"})
    sys.exit()


def main() -> None:
    from mooncake_hpc.jobs import kernel_cache as warm
    from mooncake_hpc.testing import peer

    fd, *protocols = sys.argv[1:]
    connection = socket.socket(fileno=int(fd))
    for protocol in protocols:
        warm.transfer(protocol)
    peer.digest(peer.pattern(1, 4096))
    gc.disable()
    gc.freeze()  # or a child's first collection would write to, and so copy, every page of objects
    if threading.active_count() != 1:
        raise RuntimeError(f"threads are left: {threading.enumerate()}")
    connection.sendall(b"+")
    while True:
        try:
            arguments, env, fds = _receive(connection)
        except (EOFError, ConnectionError):
            return
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        pid = os.fork()
        if pid == 0:
            connection.close()
            _become(arguments, env, fds)
        pidfd = os.pidfd_open(pid)
        socket.send_fds(connection, [str(pid).encode()], [pidfd])
        for used in (*fds, pidfd):
            os.close(used)


if __name__ == "__main__":
    main()
