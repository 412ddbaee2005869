"""The lane's loop alone: one queue pair, thousands of requests a batch, no bench around it.

`rdma_lane.py OPERATION BYTES SECONDS DEPTH` runs two processes on rxe0, with DEPTH work requests under way, and prints
a line of JSON. With a DEPTH of 1 the time of a request is that from its post to its completion.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence

import numpy as np

from mooncake_hpc import READ, REQUEST, WRITE, TransferEngine
from mooncake_hpc.core.settings import RdmaSettings, Settings
from mooncake_hpc.testing.peer import PeerProcess

MOST = 1 << 14  # requests a batch
FOOTPRINT = 64 << 20  # bytes of memory that a batch covers at most
ROUNDS = 8  # a batch is so many times its depth at least, as nothing is under way between two
DEVICE = "rxe0"


def measure(opcode: int, size: int, seconds: float, depth: int) -> dict[str, float]:
    count = max(ROUNDS * depth, min(MOST, FOOTPRINT // size))
    span = min(FOOTPRINT, count * size)
    largest = max(size, 1 << 16)  # no request is cut
    rdma = RdmaSettings(queue_pairs=1, max_wr=depth, slice_size=largest, gid_index=1)
    env = {**os.environ, "MC_TE_FILTERS": DEVICE, "MC_NUM_QP_PER_EP": "1", "MC_GID_INDEX": "1"}
    with (
        PeerProcess("P2PHANDSHAKE", "rdma", env=env) as peer,
        TransferEngine(
            "lane:1", "P2PHANDSHAKE", protocol="rdma", bind_address="127.0.0.1", device_name=DEVICE,
            settings=Settings(rdma=rdma),
        ) as engine,
    ):  # fmt: skip
        local, remote = engine.allocate(span), peer.call("allocate", span, 1)
        local[:] = 1
        segment = engine.open_segment(peer.name)
        offsets = size * (np.arange(count) % (span // size))
        requests = np.zeros(count, REQUEST)
        requests["opcode"], requests["target_id"], requests["length"] = opcode, segment.id, size
        requests["local_addr"], requests["remote_addr"] = local.ctypes.data + offsets, remote + offsets
        engine.submit(requests[:depth]).wait(60)
        done, began, cpu = 0, time.perf_counter(), time.process_time()
        while (elapsed := time.perf_counter() - began) < seconds:
            engine.submit(requests).wait(120)
            done += count
        cpu = time.process_time() - cpu
    return {
        "requests_per_second": done / elapsed,
        "bytes_per_second": done * size / elapsed,
        "cpu_seconds_per_gb": cpu / (done * size / 1e9),
    }


def main(arguments: Sequence[str]) -> int:
    operation, size, seconds, depth = arguments
    print(json.dumps(measure({"read": READ, "write": WRITE}[operation], int(size), float(seconds), int(depth))))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
