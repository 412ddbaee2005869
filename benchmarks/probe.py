"""A process that uses the library over tcp and tells what it costs; started by `resources.py`. Prints a JSON object."""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
from numba.core import event

from mooncake_hpc import READ, REQUEST, TransferEngine

BLOCK = 4096
SETTLED = 20_000  # batches after which memory is first looked at
WORK = 64 << 20  # bytes that the worker fills


def unshared(pid: int) -> int:
    """Resident bytes of a process without shared memory, which is what buffers are."""
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return sum(int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "RssFile"))


def cpu_ns(pid: int) -> int:
    """CPU time of a process's live threads so far, ns."""
    return sum(int(path.read_text().split()[0]) for path in Path(f"/proc/{pid}/task").glob("*/schedstat"))


def move(engine: TransferEngine, requests: Any, batches: int) -> None:
    for _ in range(batches):
        engine.submit(requests).wait(60)


def look(engine: TransferEngine, requests: Any, batches: int, idle: float, target: int) -> dict[str, float]:
    """What `batches` batches and then `idle` seconds of nothing cost this process and the target's."""
    both = {"initiator": os.getpid(), "target": target}
    move(engine, requests, min(SETTLED, batches))
    before = {name: unshared(pid) for name, pid in both.items()}
    begin = time.perf_counter()
    move(engine, requests, batches)
    told: dict[str, float] = {"batch_us": (time.perf_counter() - begin) / batches * 1e6}
    for name, pid in both.items():
        told[f"{name}_bytes"] = unshared(pid)
        told[f"{name}_growth_bytes"] = unshared(pid) - before[name]
    time.sleep(0.5)  # what follows traffic is no idleness
    used = {name: cpu_ns(pid) for name, pid in both.items()}
    time.sleep(idle)
    for name, pid in both.items():
        told[f"{name}_idle_cores"] = (cpu_ns(pid) - used[name]) / idle / 1e9
    return told


def worker_bytes(engine: TransferEngine) -> int:
    """Resident bytes of a worker process that has filled and verified a buffer, without the buffer."""
    from mooncake_hpc.workers.pool import WorkerPool

    buffer = engine.allocate(WORK, remote_accessible=False)
    mine = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children")
    with WorkerPool(1) as pool:
        for _ in range(20):  # until the worker has surely taken part
            pool.fill(buffer, 1, 0, 0).wait(60)
            pool.verify(buffer, 1, 0, 0).wait(60)
        return max(unshared(int(pid)) for pid in mine.read_text().split())


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("metadata", "name", "segment"):
        parser.add_argument(f"--{name}", required=True)
    for name in ("batches", "target"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--idle", type=float, default=5.0)
    options = parser.parse_args()
    with (
        event.install_recorder("numba:compile") as compiled,
        TransferEngine(options.name, options.metadata, protocol="tcp", bind_address="127.0.0.1") as engine,
    ):
        buffer = engine.allocate(BLOCK)
        segment = engine.open_segment(options.segment)
        place = int(buffer.ctypes.data)
        requests = np.array([(READ, segment.id, place, segment.buffers[0].address, BLOCK)], REQUEST)
        told = look(engine, requests, options.batches, options.idle, options.target)
        told["worker_bytes"] = worker_bytes(engine)
        told["compiled"] = len(compiled.buffer) / 2  # an event has a start and an end
        print(json.dumps(told))


if __name__ == "__main__":
    main()
