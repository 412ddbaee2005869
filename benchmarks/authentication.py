"""What authentication costs: `authentication.py [SECONDS]`, in turn with and without a secret, and a line of JSON each.

Connecting is a READ of 1 byte over tcp, the connection made anew each time; steady are reads of 4 KiB one at a time,
and of 1 MiB × 8. Both processes are on this host. `control_us` is a Probe.
"""

from __future__ import annotations

import json
import os
import secrets
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from mooncake_hpc import READ, REQUEST, TransferEngine
from mooncake_hpc.core.settings import Settings
from mooncake_hpc.testing.peer import PeerProcess

ROUNDS = 5
ARENA = 8 << 20


class Side:
    """An engine and a node, with a secret or without."""

    def __init__(self, stack: ExitStack, secret_file: str) -> None:
        self.secret = bool(secret_file)
        env = {**os.environ, "MOONCAKE_HPC_SECRET_FILE": secret_file}
        self.peer = stack.enter_context(PeerProcess("P2PHANDSHAKE", "tcp", env=env))
        known = Settings(secret_file=secret_file)
        self.engine = stack.enter_context(
            TransferEngine("ours:1", "P2PHANDSHAKE", protocol="tcp", bind_address="127.0.0.1", settings=known)
        )
        self.local = self.engine.allocate(ARENA)
        self.remote = int(self.peer.call("allocate", ARENA))
        self.segment = self.engine.open_segment(self.peer.name)

    def requests(self, length: int, count: int) -> np.ndarray:
        here = int(self.local.ctypes.data)
        parts = range(0, length * count, length)
        return np.array([(READ, self.segment.id, here + at, self.remote + at, length) for at in parts], REQUEST)

    def connect(self) -> float:
        """Seconds of a READ that has to connect first."""
        (route,) = self.segment.routes
        for lane in route.lanes:
            lane.interrupt()
        began = time.perf_counter()
        self.engine.transfer(self.requests(1, 1), 10)
        return time.perf_counter() - began

    def probe(self) -> float:
        began = time.perf_counter()
        self.engine.probe(self.peer.name)
        return time.perf_counter() - began

    def rate(self, length: int, count: int, seconds: float) -> float:
        """Bytes a second."""
        requests, done, began = self.requests(length, count), 0, time.perf_counter()
        while (elapsed := time.perf_counter() - began) < seconds:
            self.engine.transfer(requests, 10)
            done += 1
        return done * length * count / elapsed

    def sample(self, seconds: float) -> dict[str, float]:
        def often(measure: Callable[[], float]) -> float:
            end = time.perf_counter() + seconds
            values = [measure()]
            while time.perf_counter() < end:
                values.append(measure())
            return 1e6 * statistics.median(values)

        return {
            "connect_us": often(self.connect),
            "control_us": often(self.probe),
            "read_4k_us": 4096e6 / self.rate(4096, 1, seconds),
            "read_1m_gb_per_s": self.rate(1 << 20, 8, seconds) / 1e9,
        }


def main(arguments: Sequence[str]) -> int:
    seconds = float(arguments[0]) if arguments else 1.0
    with ExitStack() as stack:
        file = Path(stack.enter_context(tempfile.TemporaryDirectory()), "secret")
        file.touch(0o600)
        file.write_text(secrets.token_hex(32))
        sides = [Side(stack, ""), Side(stack, str(file))]
        rounds = [[side.sample(seconds) for side in sides] for _ in range(ROUNDS)]
    for index, side in enumerate(sides):
        medians = {name: statistics.median(samples[index][name] for samples in rounds) for name in rounds[0][index]}
        print(json.dumps({"secret": side.secret, **{name: round(value, 2) for name, value in medians.items()}}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
