"""Broadcasts a checkpoint from rank 0 to all others: mpirun -n 4 python examples/checkpoint.py

The others know a name, no addresses; they fetch shards from rank 0 and from one another, each one verified.
"""

import socket

import numpy as np
from mpi4py import MPI

import mooncake_hpc as mh

world = MPI.COMM_WORLD
etcd = mh.EmbeddedEtcd() if world.rank == 0 else None
server = world.bcast(etcd and etcd.endpoint)

with mh.P2PStore(f"{socket.gethostname()}:{12345 + world.rank}", server) as store:
    if world.rank == 0:
        random = np.random.default_rng(1)
        checkpoint = {f"layer.{i}": random.standard_normal((512, 512), np.float32) for i in range(16)}
        store.register("step-1000", checkpoint, shard_size=1 << 20)
        total = sum(float(tensor.sum()) for tensor in checkpoint.values())
    else:
        replica = store.get_replica("step-1000", wait=30, timeout=60)  # waits for it to be published
        total = sum(float(tensor.sum()) for tensor in replica.tensors().values())
        sources = ", ".join(f"{name} {nbytes >> 20} MiB" for name, nbytes in replica.progress.sources.items())
        print(f"rank {world.rank}: {replica.progress.throughput / 1e9:.2f} GB/s from {sources}", flush=True)
    totals = world.allgather(total)  # nobody leaves while others may still fetch from it
    if world.rank == 0:
        print("equal on all ranks:", len(set(totals)) == 1)
world.Barrier()  # etcd serves until all have withdrawn
if etcd:
    etcd.close()
