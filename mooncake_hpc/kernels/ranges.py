"""Registered address ranges as tables for kernels.

A table of n ranges is 1 + 2n int64: n, the starts in ascending order, and for each the largest end of all ranges
that start no later. Whatever overlaps, a range that starts at or before an address and reaches furthest is found by
one binary search: if a request is inside any single range, it is inside that one.

A table may carry a row of int64 for each range (`keyed`), which `row` finds.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from mooncake_hpc.kernels.compiled import kernel
from mooncake_hpc.kernels.native import get


def table(ranges: Iterable[tuple[int, int]]) -> np.ndarray:
    """The table (int64) of (start, end) pairs, end exclusive."""
    pairs = np.array(sorted(ranges), np.int64).reshape(-1, 2)
    ends = np.maximum.accumulate(pairs[:, 1])
    return np.concatenate([np.array([len(pairs)], np.int64), pairs[:, 0], ends])


def keyed(ranges: Iterable[tuple[int, int, Sequence[int]]]) -> np.ndarray:
    """The table of (start, end, row): behind starts and ends come the rows' byte offsets in it, then the rows."""
    entries = sorted((start, end, tuple(row)) for start, end, row in ranges)
    plain = table((start, end) for start, end, _ in entries)
    width = len(entries[0][2]) if entries else 0
    best, offsets = 0, []
    for number, (_, end, _) in enumerate(entries):
        best = number if end > entries[best][1] else best
        offsets.append(8 * (len(plain) + len(entries) + width * best))
    rows = [value for _, _, row in entries for value in row]
    return np.concatenate([plain, np.array(offsets, np.int64), np.array(rows, np.int64)])


@kernel
def row(ranges, address):
    """The address of the row of the range that `reach` finds in a keyed table, or 0."""
    count = get(ranges)
    low, high = 0, count
    while low < high:
        middle = (low + high) >> 1
        if get(ranges + 8 + 8 * middle) <= address:
            low = middle + 1
        else:
            high = middle
    if low == 0 or get(ranges + 8 * (count + low)) <= address:
        return 0
    return ranges + get(ranges + 8 * (2 * count + low))


@kernel
def reach(ranges, address):
    """The furthest end of a range of the table at `ranges` that holds `address`, or 0."""
    count = get(ranges)
    low, high = 0, count
    while low < high:
        middle = (low + high) >> 1
        if get(ranges + 8 + 8 * middle) <= address:
            low = middle + 1
        else:
            high = middle
    if low == 0:
        return 0
    end = get(ranges + 8 * (count + low))
    return end if end > address else 0


@kernel
def covered(ranges, address, length):
    """Whether ranges of the table, one after the other, hold [address, address + length)."""
    end = address + length
    while address < end:
        furthest = reach(ranges, address)
        if furthest == 0:
            return False
        address = furthest
    return True
