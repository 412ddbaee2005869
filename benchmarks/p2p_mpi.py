"""What MPI does with the same object over the same links: MPI_Bcast, and a pipelined chain. Run under mpirun.

Prints one line of JSON on rank 0: seconds of the slowest rank, a list by case.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import numpy as np
from mpi4py import MPI

PIECE = 256 << 10  # bytes a message of the chain


def broadcast(world: MPI.Comm, buffer: np.ndarray) -> None:
    world.Bcast(buffer, root=0)


def chain(world: MPI.Comm, buffer: np.ndarray) -> None:
    """Rank r receives from r - 1 and sends on to r + 1, a piece behind."""
    rank, last = world.rank, world.size - 1
    pieces = [buffer[at : at + PIECE] for at in range(0, len(buffer), PIECE)]
    coming = [world.Irecv(piece, rank - 1, number) for number, piece in enumerate(pieces)] if rank else []
    going = []
    for number, piece in enumerate(pieces):
        if rank:
            coming[number].Wait()
        if rank < last:
            going.append(world.Isend(piece, rank + 1, number))
    MPI.Request.Waitall(going)


def measure(world: MPI.Comm, buffer: np.ndarray, content: np.ndarray, work: Callable[..., None]) -> float:
    """Seconds of the slowest rank from the barrier on. AssertionError for a wrong byte."""
    buffer[:] = content if world.rank == 0 else 0
    world.Barrier()
    begin = time.monotonic()
    work(world, buffer)
    seconds = time.monotonic() - begin
    assert np.array_equal(buffer, content), f"rank {world.rank} has wrong bytes"
    slowest: float = world.allreduce(seconds, MPI.MAX)
    return slowest


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", type=int, required=True)
    size = parser.parse_args().size
    world = MPI.COMM_WORLD
    content = np.random.default_rng(1).integers(0, 256, size, np.uint8)
    buffer = np.empty(size, np.uint8)
    warm = buffer[: 1 << 20]
    measure(world, warm, content[: 1 << 20], chain)  # connections
    measure(world, warm, content[: 1 << 20], broadcast)
    told = {
        "broadcast": measure(world, buffer, content, broadcast),
        "chain": measure(world, buffer, content, chain),
        "library": MPI.Get_library_version().splitlines()[0].strip(" \0"),
    }
    if world.rank == 0:
        print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main()
