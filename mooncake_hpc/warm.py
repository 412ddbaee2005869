"""Compile every kernel that a job uses into numba's cache, once on each node, before its ranks start.

Without this all ranks of a node would compile the same kernels at the same time on their first transfer.
"""

from __future__ import annotations

import fcntl
import importlib.util
import os
import time
from pathlib import Path

import numpy as np

from mooncake_hpc.engine import TransferEngine
from mooncake_hpc.kernels import xxh3
from mooncake_hpc.memory import data_address
from mooncake_hpc.workers.pool import WorkerPool

SIZE = 64 << 10  # bytes moved by each transport: the kernels do not care
TIMEOUT = 60.0  # seconds for each transfer


def warm() -> float:
    """Use what a job uses, on memory of this process; the seconds it took: about 30 with an empty cache, else 1.

    Others that warm the same cache wait for the first one. Raises what the engine raises.
    """
    begin = time.monotonic()
    with open(_lock_file(), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for protocol in ("tcp", "shm"):
            transfer(protocol)
        if importlib.util.find_spec("pyverbs") is not None:
            _compile_rdma()
        _prepare()
    return time.monotonic() - begin


def _lock_file() -> Path:
    folder = Path(os.environ.get("NUMBA_CACHE_DIR") or f"/tmp/mooncake-hpc-{os.getuid()}")
    folder.mkdir(parents=True, exist_ok=True)
    return folder / "warm.lock"


def transfer(protocol: str) -> None:
    """Move a block there and back within this process. Raises what the engine raises."""
    store = f"memory://warm-{os.getpid()}"
    with (
        TransferEngine("127.0.0.1:1", store, protocol=protocol, bind_address="127.0.0.1") as target,
        TransferEngine("127.0.0.1:2", store, protocol=protocol, bind_address="127.0.0.1") as initiator,
    ):
        target.allocate(SIZE)
        ours = initiator.allocate(SIZE)
        segment = initiator.open_segment(target.name)
        initiator.write(ours, segment, segment.buffers[0].address, TIMEOUT)
        initiator.read(ours, segment, segment.buffers[0].address, TIMEOUT)


def _compile_rdma() -> None:
    """Without a device, which a machine that prepares others need not have."""
    from mooncake_hpc.kernels import rdma
    from mooncake_hpc.kernels.compiled import compile_ahead

    compile_ahead(*rdma.KERNELS)


def _prepare() -> None:
    array = np.zeros(SIZE, np.uint8)
    with WorkerPool(1) as pool:
        for job in (pool.touch(array), pool.checksum(array), pool.fill(array, 1), pool.verify(array, 1)):
            job.wait(TIMEOUT)
    xxh3.copy_and_digest([[(data_address(array), data_address(array), SIZE)]])
