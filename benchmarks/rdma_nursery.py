"""Initiators of ours without their start-up, which takes ten seconds and more in an emulated guest.

`Nursery` starts this file as a process that loads everything, moves bytes over RDMA once and then forks for each
command that it is told: `bench` with its flags, `lane` and `registration` with those of rdma_lane.py and
rdma_registration.py.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Mapping, Sequence

from contenders import Failed, environment

START_TIMEOUT = 280.0  # seconds
PR_SET_PDEATHSIG = 1  # prctl(2)


class Nursery:
    """The process; a context manager that ends it."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__], env=environment(), text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self._reply(START_TIMEOUT)

    @property
    def pid(self) -> int:
        return self._process.pid

    def run(self, command: Sequence[str], variables: Mapping[str, str], timeout: float) -> tuple[str, float]:
        """Run to the end: its output and CPU seconds. Failed when it goes wrong."""
        assert self._process.stdin is not None
        with tempfile.NamedTemporaryFile("r") as output:
            order = {"command": list(command), "variables": dict(variables), "output": output.name}
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()
            code, cpu = self._reply(timeout)
            text = output.read()
        if code != 0:
            raise Failed(f"exit code {code} of {' '.join(command)}:\n{text[-2000:]}")
        return text, cpu

    def _reply(self, timeout: float) -> tuple[int, float]:
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], timeout)[0]:
            self.close()
            raise Failed(f"no end after {timeout:g} s")
        line = self._process.stdout.readline()
        if not line:
            raise Failed("the process that forks ours has ended")
        code, cpu = json.loads(line)
        return code, cpu

    def close(self) -> None:
        self._process.kill()
        self._process.wait()

    def __enter__(self) -> Nursery:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _child(order: dict[str, object]) -> int:
    """Carry out an order; the exit code."""
    import rdma_lane
    import rdma_registration

    from mooncake_hpc.__main__ import main

    os.environ.update(order["variables"])  # type: ignore[arg-type]
    output = os.open(str(order["output"]), os.O_WRONLY)
    for descriptor in (1, 2):
        os.dup2(output, descriptor)
    sys.stdout, sys.stderr = os.fdopen(1, "w", 1, closefd=False), os.fdopen(2, "w", 1, closefd=False)
    name, *arguments = list(order["command"])  # type: ignore[call-overload]
    try:
        ours = {"lane": rdma_lane.main, "registration": rdma_registration.main}
        return int(ours[name](arguments) if name in ours else main([name, *arguments]))
    except Exception:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()


def serve() -> None:
    """Answer each line of standard input with a line of [exit code, CPU seconds]."""
    import mooncake_hpc.cli.transfer_engine_bench  # noqa: F401 - loaded before it is forked
    from mooncake_hpc.jobs import kernel_cache as warm
    from mooncake_hpc.testing import peer
    from mooncake_hpc.testing.fork_server import Nursery as Peers

    with Peers("rdma") as peer.nursery:
        warm.transfer("rdma")
        peer.PeerProcess("P2PHANDSHAKE", "rdma").close()  # from now on there are peers at once
        if threading.active_count() != 1:
            raise RuntimeError(f"threads are left: {threading.enumerate()}")
        print("[0, 0]", flush=True)
        for line in sys.stdin:
            pid = os.fork()
            if pid == 0:
                code = 1
                try:
                    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
                    code = _child(json.loads(line))
                finally:
                    os._exit(code)
            _, status, used = os.wait4(pid, 0)
            print(json.dumps([os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime]), flush=True)


if __name__ == "__main__":
    serve()
