"""Moves one request's blocks of a KV cache: mpirun -n 2 python examples/kv_cache.py

Rank 0 has computed them (prefill), rank 1 goes on with them (decode). A block lies in every layer, a stride apart,
and both sides have put the request's blocks where there was room. All of it is one batch: gather and scatter.
"""

import socket

import numpy as np
from mpi4py import MPI

import mooncake_hpc as mh

LAYERS, BLOCKS = 16, 64
BLOCK = np.dtype((np.float16, (2, 16, 8, 64)))  # keys and values of 16 tokens, 8 heads of 64
THEIRS, OURS = np.array([3, 41, 7, 60, 22]), np.array([11, 12, 50, 0, 63])  # the request's blocks, in its order

world = MPI.COMM_WORLD
etcd = mh.EmbeddedEtcd() if world.rank == 0 else None
server = world.bcast(etcd and etcd.endpoint)

with mh.TransferEngine(f"{socket.gethostname()}:{12345 + world.rank}", server) as engine:
    cache = engine.allocate(LAYERS * BLOCKS * BLOCK.itemsize).view(np.float16).reshape(LAYERS, BLOCKS, *BLOCK.shape)
    if world.rank == 0:
        cache[:, THEIRS] = np.arange(LAYERS * len(THEIRS)).reshape(LAYERS, -1, 1, 1, 1, 1)
    prefill, _ = world.allgather(engine.name)

    if world.rank == 1:
        segment = engine.open_segment(prefill)
        layers = np.arange(LAYERS)[:, None] * cache.strides[0]
        requests = np.zeros((LAYERS, len(OURS)), mh.REQUEST)
        requests["opcode"], requests["target_id"], requests["length"] = mh.READ, segment.id, BLOCK.itemsize
        requests["remote_addr"] = segment.buffers[0].address + layers + THEIRS * cache.strides[1]
        requests["local_addr"] = cache.ctypes.data + layers + OURS * cache.strides[1]
        engine.submit(requests.ravel()).wait(timeout=30)
        correct = bool((cache[:, OURS] == np.arange(requests.size).reshape(LAYERS, -1, 1, 1, 1, 1)).all())
        print(f"{requests.size} blocks of {BLOCK.itemsize} bytes over {segment.transport}: {correct = }")
    world.Barrier()  # rank 0 serves until then
world.Barrier()  # and its etcd until all have withdrawn
if etcd:
    etcd.close()
