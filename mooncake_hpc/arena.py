"""The memory of a batch: its block, requests, statuses and slices. Used again, since making it costs microseconds."""

from __future__ import annotations

import threading
from collections import deque

import numpy as np
import numpy.typing as npt

from mooncake_hpc.kernels import lane as layout
from mooncake_hpc.request import REQUEST, Requests

SMALLEST = 16  # requests
SPARE = 16  # slices beyond one a request, for requests that cross a border
KEPT = 64  # unused arenas of a size that are kept
LARGEST_KEPT = 1 << 14  # requests


class Arena:
    """Room for `capacity` requests. `words` are those of `kernels.lane`'s batch block."""

    __slots__ = ("_array", "_bytes", "address", "capacity", "requests", "status", "words")

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        sizes = layout.BATCH_WORDS, 4 * capacity, capacity, capacity // 8, 4 * (capacity + SPARE)
        starts = [0, *np.cumsum(sizes).tolist()]
        self._array = np.zeros(starts[-1], np.int64)
        self.address = int(self._array.ctypes.data)
        self.words = self._array.data  # its items are Python ints, and quick to read
        self.requests: Requests = self._array[starts[1] : starts[2]].view(REQUEST)
        self._bytes = self.requests.view(np.uint8).data
        self.status: npt.NDArray[np.int8] = self._array[starts[3] : starts[4]].view(np.int8)
        for word, part in ((layout.REQUESTS, 1), (layout.PENDING, 2), (layout.STATUS, 3), (layout.SLICES, 4)):
            self.words[word // 8] = self.address + 8 * starts[part]
        self.words[layout.ROOM // 8] = capacity + SPARE
        self.words[layout.BATCH_ONE // 8] = 1

    def fill(self, requests: Requests) -> None:
        """Take over requests as bytes: numpy's own assignment of records goes field by field, which costs ten times."""
        data = requests.tobytes()
        self._bytes[: len(data)] = data


class ArenaPool:
    """Unused arenas by capacity. Thread-safe."""

    def __init__(self) -> None:
        self._unused: dict[int, deque[Arena]] = {}
        self._lock = threading.Lock()

    def take(self, count: int) -> Arena:
        """An arena for `count` requests."""
        capacity = max(SMALLEST, 1 << (count - 1).bit_length())
        try:
            return self._unused[capacity].pop()
        except (KeyError, IndexError):
            return Arena(capacity)

    def give(self, arena: Arena) -> None:
        """Take back an arena that nothing refers to."""
        if arena.capacity > LARGEST_KEPT:
            return
        unused = self._unused.get(arena.capacity)
        if unused is None:
            with self._lock:
                unused = self._unused.setdefault(arena.capacity, deque(maxlen=KEPT))
        unused.append(arena)
