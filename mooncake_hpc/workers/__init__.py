"""Worker processes that prepare buffers in parallel: `pool.WorkerPool`. `python -m mooncake_hpc.workers` is one."""
