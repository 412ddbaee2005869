"""Where the bytes of an object are: in our memory, and at a holder."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]


class Layout:
    """Buffers, (address, bytes) each, that follow one another from byte `origin` of the object on."""

    def __init__(self, buffers: Sequence[tuple[int, int]], origin: int = 0) -> None:
        self.begin, at = origin, origin
        self._ends: list[int] = []  # of the buffers that are not empty, in the object
        self._addresses: list[int] = []  # that the object's byte 0 would have in the same buffer
        for address, nbytes in buffers:
            if nbytes:
                self._addresses.append(address - at)
                self._ends.append(at + nbytes)
            at += nbytes
        self.end = at

    def extents(self, begin: int, end: int) -> list[tuple[int, int]]:
        """(address, bytes) of the object's bytes from `begin` to `end`, in order."""
        found = []
        index = bisect_right(self._ends, begin)
        while begin < end:
            stop = min(end, self._ends[index])
            found.append((self._addresses[index] + begin, stop - begin))
            begin, index = stop, index + 1
        return found


class Memory(Layout):
    """Our own buffers: one-dimensional arrays of bytes."""

    def __init__(self, arrays: Sequence[Bytes], origin: int = 0) -> None:
        super().__init__([(int(array.ctypes.data), array.nbytes) for array in arrays], origin)
        self._arrays = [array for array in arrays if array.nbytes]

    def views(self, begin: int, end: int) -> list[Bytes]:
        """The object's bytes from `begin` to `end`, in order."""
        found = []
        index = bisect_right(self._ends, begin)
        while begin < end:
            array, last = self._arrays[index], self._ends[index]
            stop = min(end, last)
            first = last - array.nbytes
            found.append(array[begin - first : stop - first])
            begin, index = stop, index + 1
        return found


def pair(local: Layout, remote: Layout, begin: int, end: int) -> list[tuple[int, int, int]]:
    """(local address, remote address, bytes) that together are the object's bytes from `begin` to `end`."""
    pairs = []
    ours, theirs = local.extents(begin, end)[::-1], remote.extents(begin, end)[::-1]
    while ours:
        (a, n), (b, m) = ours.pop(), theirs.pop()
        length = min(n, m)
        pairs.append((a, b, length))
        if n > length:
            ours.append((a + length, n - length))
        if m > length:
            theirs.append((b + length, m - length))
    return pairs
