"""Worker processes that prepare buffers in parallel. `python -m mooncake_hpc.workers` is one of them."""

from mooncake_hpc.workers.pool import Job, WorkerPool

__all__ = ["Job", "WorkerPool"]
