"""The memory of a batch: its block, requests, statuses and slices. Used again, since making it costs microseconds."""

from __future__ import annotations

from collections import deque

import numpy as np
import numpy.typing as npt

from mooncake_hpc.core.errors import ConfigError
from mooncake_hpc.core.request import REQUEST, Requests
from mooncake_hpc.transports import queue_kernels as layout

SMALLEST = 16  # requests
SPARE = 16  # slices beyond one a request, for requests that cross a border
KEPT = 64  # unused arenas of a size that are kept
RANKS = 15  # sizes of which arenas are kept: up to 2**14 requests
DONE_AT = layout.DONE_AT // 8


class Arena:
    """Room for 2**`rank` requests, `count` of them in use. `words` are those of the batch block in `queue_kernels`."""

    __slots__ = ("_array", "address", "bytes", "count", "rank", "requests", "status", "words")

    def __init__(self, rank: int) -> None:
        self.rank, self.count = rank, 0
        capacity = max(SMALLEST, 1 << rank)
        sizes = layout.BATCH_WORDS, 4 * capacity, capacity, capacity // 8, 4 * (capacity + SPARE)
        starts = [0, *np.cumsum(sizes).tolist()]
        self._array = np.zeros(starts[-1], np.int64)
        self.address = int(self._array.ctypes.data)
        self.words = self._array.data  # its items are Python ints, and quick to read
        self.requests: Requests = self._array[starts[1] : starts[2]].view(REQUEST)
        self.bytes = self.requests.view(np.uint8).data
        self.status: npt.NDArray[np.int8] = self._array[starts[3] : starts[4]].view(np.int8)
        for word, part in ((layout.REQUESTS, 1), (layout.PENDING, 2), (layout.STATUS, 3), (layout.SLICES, 4)):
            self.words[word // 8] = self.address + 8 * starts[part]
        self.words[layout.ROOM // 8] = capacity + SPARE
        self.words[layout.BATCH_ONE // 8] = 1


def _address(done_at: npt.NDArray[np.int64], count: int) -> int:
    if done_at.dtype != np.int64 or done_at.shape != (count,) or not done_at.flags.carray:
        raise ConfigError(f"done_at must be a contiguous, writable array of {count} int64")
    return int(done_at.ctypes.data)


class ArenaPool:
    """Unused arenas by rank. Thread-safe: each step is one call of a deque."""

    def __init__(self) -> None:
        self._unused: list[deque[Arena]] = [deque(maxlen=KEPT) for _ in range(RANKS)]

    def take(self, requests: Requests, done_at: npt.NDArray[np.int64] | None) -> Arena:
        """An arena that holds a copy of these requests, and where to write when each is done.

        Raises ConfigError where `done_at` has no room for that.
        """
        count = requests.size
        rank = (count - 1).bit_length()
        try:
            arena = self._unused[rank].pop()
        except IndexError:  # none is left, or none of this rank are kept
            arena = Arena(rank)
        arena.count = count
        data = requests.tobytes()  # numpy's own assignment of records goes field by field, which costs ten times
        arena.bytes[: len(data)] = data
        arena.words[DONE_AT] = 0 if done_at is None else _address(done_at, count)
        return arena

    def give(self, arena: Arena) -> None:
        """Take back an arena that nothing refers to."""
        if arena.rank < RANKS:
            self._unused[arena.rank].append(arena)
