"""What the engine itself costs an RDMA operation: everything from submit() to the end of wait(), without a device.

The lane's rail has functions that do nothing for `post_send` and `poll_cq`: a post is taken at once, a poll says that
all of it has completed. So this measures requests, slicing, queueing, work requests, completions and Python's part, on
any machine: `python benchmarks/verbs_noop.py [--batch 128] [--size 64] [--rounds 40]`, one line of JSON at the end.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence

import numpy as np

from mooncake_hpc import REQUEST, WRITE, TransferEngine
from mooncake_hpc.testing import noop

BATCHES = 500  # a round


def measure(batch: int, size: int, rounds: int) -> list[tuple[float, float]]:
    """Nanoseconds an operation, (of time, of this thread's processor time) a round."""
    store = "memory://verbs-noop"
    with (
        noop.installed(),
        TransferEngine("there:1", store, protocol="rdma", bind_address="127.0.0.1") as there,
        TransferEngine("here:1", store, protocol="rdma", bind_address="127.0.0.1") as here,
    ):
        theirs, ours = there.allocate(batch * size), here.allocate(batch * size)
        segment = here.open_segment(there.name)
        requests = np.zeros(batch, REQUEST)
        requests["opcode"], requests["target_id"], requests["length"] = WRITE, segment.id, size
        requests["local_addr"] = ours.ctypes.data + size * np.arange(batch)
        requests["remote_addr"] = theirs.ctypes.data + size * np.arange(batch)
        figures = []
        for _ in range(rounds + 1):
            begin, busy = time.perf_counter_ns(), time.thread_time_ns()
            for _ in range(BATCHES):
                here.submit(requests).wait(10)
            spent = time.perf_counter_ns() - begin, time.thread_time_ns() - busy
            figures.append((spent[0] / (BATCHES * batch), spent[1] / (BATCHES * batch)))
        moved = sum(here.lane_bytes().values())
        if moved != (rounds + 1) * BATCHES * batch * size:
            raise SystemExit(f"only {moved} bytes were counted")
        return figures[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=40)
    options = parser.parse_args()
    elapsed, busy = zip(*measure(options.batch, options.size, options.rounds), strict=True)
    result = {
        "batch": options.batch,
        "bytes": options.size,
        "ns_per_operation": summary(elapsed),
        "processor_ns_per_operation": summary(busy),
    }
    print(json.dumps(result))


def summary(figures: Sequence[float]) -> dict[str, float]:
    named = {"least": min(figures), "median": statistics.median(figures), "most": max(figures)}
    return {name: round(value, 1) for name, value in named.items()}


if __name__ == "__main__":
    main()
