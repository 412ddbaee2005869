"""A shard that comes slowly is fetched a second time, beside its place: two sources may not write to one memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mooncake_hpc.p2p.fetcher import Job
from mooncake_hpc.p2p.layout import Bytes, Memory

if TYPE_CHECKING:
    from mooncake_hpc.engine.engine import TransferEngine

LARGEST_RACE = 16 << 20  # bytes of a shard that is fetched a second time


class Scratch:
    """Memory for one such shard, allocated when it is first needed, until `close`."""

    def __init__(self, engine: TransferEngine, shard_size: int) -> None:
        self._engine, self._size = engine, min(LARGEST_RACE, shard_size)
        self._memory: Bytes | None = None

    def take(self, begin: int, end: int) -> Memory | None:
        """Where bytes `begin` to `end` of the object go; None: they are too many."""
        if end - begin > self._size:
            return None
        if self._memory is None:
            self._memory = self._engine.allocate(self._size, remote_accessible=False)
        return Memory([self._memory[: end - begin]], begin)

    def close(self) -> None:
        if self._memory is not None:
            self._engine.unregister(self._memory)


def put_in_place(job: Job, memory: Memory) -> None:
    """Copy the shard from beside its place to it, cut as the object's buffers are."""
    (whole,) = job.target.views(job.begin, job.end)
    views = memory.views(job.begin, job.end)
    pieces = np.split(whole, np.cumsum([view.nbytes for view in views])[:-1])
    for ours, theirs in zip(views, pieces, strict=True):
        ours[:] = theirs
