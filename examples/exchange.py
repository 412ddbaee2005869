"""Ranks exchange numpy arrays through the engine: mpirun -n 4 python examples/exchange.py [etcd's host:port]

Each publishes an array and reads its right neighbour's. MPI is the program's own; the engine knows nothing of it.
"""

import contextlib
import socket
import sys

import numpy as np
from mpi4py import MPI

import mooncake_hpc as mh

world = MPI.COMM_WORLD
rank, size = world.rank, world.size

with contextlib.ExitStack() as stack:
    etcd = sys.argv[1] if len(sys.argv) > 1 else None
    if rank == 0 and etcd is None:  # serves ranks on this host; for several, name one that all of them reach
        etcd = stack.enter_context(mh.EmbeddedEtcd()).endpoint
    etcd = world.bcast(etcd)

    with mh.TransferEngine(f"{socket.gethostname()}:{12345 + rank}", etcd) as engine:
        mine = np.full(1 << 20, rank, np.float32)
        engine.register(mine)
        names = world.allgather(engine.name)  # everybody has published

        right = (rank + 1) % size
        theirs = np.empty_like(mine)
        engine.register(theirs, remote_accessible=False)
        segment = engine.open_segment(names[right])
        engine.read(theirs, segment, segment.buffers[0].address)

        # afterwards nobody reads from us any more; allreduce() would hold the GIL while it waits, when first called
        correct = all(world.allgather(bool((theirs == right).all())))
        if rank == 0:
            print(f"{size} ranks read {theirs.nbytes} bytes each over {segment.transport}: {correct = }")
    world.Barrier()  # before rank 0 ends etcd
