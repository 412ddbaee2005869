"""Compile every kernel that a job uses and keep it, once on each node, before its ranks start.

Without this all ranks of a node would compile the same kernels at the same time on their first transfer.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import time
from collections.abc import Iterator

import numpy as np

from mooncake_hpc.core.errors import LockHeld
from mooncake_hpc.core.filelock import FileLock
from mooncake_hpc.core.memory import data_address
from mooncake_hpc.engine.engine import TransferEngine
from mooncake_hpc.native import cache_files as files
from mooncake_hpc.native import xxh3
from mooncake_hpc.native.cache_folder import kernel_folder
from mooncake_hpc.workers.pool import WorkerPool

log = logging.getLogger(__name__)

SIZE = 64 << 10  # bytes moved by each transport: the kernels do not care
TIMEOUT = 60.0  # seconds for each transfer
LOCK_TIMEOUT_S = 300.0


def warm() -> float:
    """Use what a job uses, on memory of this process; the seconds it took: about 30 with an empty cache, else 1.

    Others that warm the same cache wait for the first one. Raises what the engine raises.
    """
    begin = time.monotonic()
    folder = kernel_folder()
    with _one_at_a_time(folder):
        files.remove_unfinished(folder)
        for protocol in ("tcp", "shm"):
            transfer(protocol)
        if importlib.util.find_spec("pyverbs") is not None:
            _compile_rdma()
        _prepare()
    return time.monotonic() - begin


@contextlib.contextmanager
def _one_at_a_time(folder: str) -> Iterator[None]:
    """Wait for others that warm the same folder, but not for ever: the lock only saves work that is done twice."""
    with contextlib.ExitStack() as held:
        if folder:
            try:
                held.enter_context(FileLock(os.path.join(folder, "warm.lock"), timeout_s=LOCK_TIMEOUT_S))
            except (LockHeld, OSError) as error:  # OSError: a full disk, or a folder that cannot be written
                log.info("kernels are compiled without a lock: %s", error)
        yield


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
    from mooncake_hpc.native.compile import compile_ahead
    from mooncake_hpc.transports.rdma import poll_kernels as rdma

    compile_ahead(*rdma.KERNELS)


def _prepare() -> None:
    array = np.zeros(SIZE, np.uint8)
    with WorkerPool(1) as pool:
        for job in (pool.touch(array), pool.checksum(array), pool.fill(array, 1), pool.verify(array, 1)):
            job.wait(TIMEOUT)
    xxh3.copy_and_digest([[(data_address(array), data_address(array), SIZE)]])
