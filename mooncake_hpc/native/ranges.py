"""Address ranges as tables for kernels: what may be touched, of our memory and of a peer's.

Addresses are unsigned 64 bits, whoever named them: a peer, a caller, a file. Each question that a kernel has about an
address is asked here.

A table of n ranges is 1 + 2n words: n, the first addresses in ascending order, and for each the highest last address
of all ranges that begin no later. Last addresses are inclusive, so that a range may end with the address space.
Whatever overlaps, a range that begins at or before an address and goes on furthest is found by one binary search: if a
request is inside any single range, it is inside that one.

A table may carry a row of int64 for each range (`keyed`), which `row` finds.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from mooncake_hpc.native.atomics import below, get
from mooncake_hpc.native.compile import kernel

SPACE = 1 << 64  # addresses
LONGEST = (1 << 63) - 1  # bytes of a range or request, so that sizes are positive as int64
Words = npt.NDArray[np.int64]


def table(ranges: Iterable[tuple[int, int]]) -> Words:
    """The table of (start, end) pairs, end exclusive; empty ones are left out.

    Raises ValueError for what is no range of addresses, or longer than LONGEST.
    """
    pairs = sorted((start, end) for start, end in ranges if start != end)
    for start, end in pairs:
        if not (0 <= start < end <= SPACE and end - start <= LONGEST):
            raise ValueError(f"{start:#x} to {end:#x} is no range of addresses of 64 bits")
    starts = np.array([start for start, _ in pairs], np.uint64)
    lasts = np.maximum.accumulate(np.array([end - 1 for _, end in pairs], np.uint64))
    return np.concatenate([np.array([len(pairs)], np.uint64), starts, lasts]).view(np.int64)


def keyed(ranges: Iterable[tuple[int, int, Sequence[int]]]) -> Words:
    """The table of (start, end, row): behind it come the rows' byte offsets in it, then the rows. As `table`."""
    entries = sorted((start, end, tuple(row)) for start, end, row in ranges if start != end)
    plain = table((start, end) for start, end, _ in entries)
    width = len(entries[0][2]) if entries else 0
    best, offsets = 0, []
    for number, (_, end, _) in enumerate(entries):
        best = number if end > entries[best][1] else best
        offsets.append(8 * (len(plain) + len(entries) + width * best))
    rows = [value for _, _, row in entries for value in row]
    return np.concatenate([plain, np.array(offsets, np.int64), np.array(rows, np.int64)])


@kernel
def _find(ranges, address):
    """How many ranges begin at or before `address`; 0 too where none of them goes on to it."""
    count = get(ranges)
    low, high = 0, count
    while low < high:
        middle = (low + high) >> 1
        if below(address, get(ranges + 8 + 8 * middle)):
            high = middle
        else:
            low = middle + 1
    if low != 0 and below(get(ranges + 8 * (count + low)), address):
        return 0
    return low


@kernel
def row(ranges, address):
    """The address of the row of the range that `room` finds in a keyed table, or 0."""
    count, found = get(ranges), _find(ranges, address)
    return ranges + get(ranges + 8 * (2 * count + found)) if found != 0 else 0


@kernel
def room(ranges, address):
    """Bytes from `address` to the furthest end of a range of the table at `ranges` that holds it; 0 where none does."""
    found = _find(ranges, address)
    return get(ranges + 8 * (get(ranges) + found)) - address + 1 if found != 0 else 0


@kernel
def wraps(address, length):
    """Whether `length` bytes, more than 0, from `address` on go beyond the end of the address space."""
    return below(address + length - 1, address)


@kernel
def covered(ranges, address, length):
    """Whether ranges of the table, one after the other, hold `length` bytes, more than 0, from `address` on."""
    if wraps(address, length):
        return False
    while length > 0:
        size = room(ranges, address)
        if size <= 0:
            return False
        address, length = address + size, length - size
    return True
