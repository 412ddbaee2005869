"""Registered address ranges as tables for kernels, and the slicer that cuts requests at their borders.

A table of n ranges is 1 + 2n int64: n, the starts in ascending order, and for each the largest end of all ranges
that start no later. Whatever overlaps, a range that starts at or before an address and reaches furthest is found by
one binary search: if a request is inside any single range, it is inside that one.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from mooncake_hpc.kernels.lane import HIDDEN, LENGTH, LOCAL, META, OTHERS, PENDING, REMOTE, SLICE, STATUS, WRITING
from mooncake_hpc.kernels.native import get, get_byte, kernel, put, put_byte

BAD_OPCODE, BAD_LENGTH, LOCAL_UNREGISTERED, REMOTE_UNREGISTERED, NO_ROOM = 1, 2, 3, 4, 5
REASONS = 8


def table(ranges: Iterable[tuple[int, int]]) -> np.ndarray:
    """The table (int64) of (start, end) pairs, end exclusive."""
    pairs = np.array(sorted(ranges), np.int64).reshape(-1, 2)
    ends = np.maximum.accumulate(pairs[:, 1])
    return np.concatenate([np.array([len(pairs)], np.int64), pairs[:, 0], ends])


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


@kernel
def cut(requests, count, target, local, remote, limit, slices, room, batch, fence_byte):
    """Write the slices of those of `count` requests that go to segment `target`; their number.

    `local` and `remote` are addresses of pairs of tables: readable, writable. A slice crosses no border of a remote
    buffer and is at most `limit` bytes. With `fence_byte` a READ of one byte to there follows the last WRITE
    (version 1 of the TCP protocol acknowledges no WRITE). Below 0: -(request * REASONS + reason).
    """
    made = fence_at = others = 0
    status, pending = get(batch + STATUS), get(batch + PENDING)
    for index in range(count):
        record = requests + 32 * index
        if get(record) >> 32 != target:
            others += 1
            continue
        opcode, ours, theirs, length = get_byte(record), get(record + 8), get(record + 16), get(record + 24)
        if opcode > 1:
            return -(index * REASONS + BAD_OPCODE)
        if length < 0:
            return -(index * REASONS + BAD_LENGTH)
        if length > 0 and not covered(get(local + 8 * (1 - opcode)), ours, length):
            return -(index * REASONS + LOCAL_UNREGISTERED)
        allowed = get(remote + 8 * opcode)
        pieces = 0
        while length > 0:
            size = min(reach(allowed, theirs) - theirs, min(length, limit))
            if size <= 0:
                return -(index * REASONS + REMOTE_UNREGISTERED)
            if made >= room - 1:
                return -(index * REASONS + NO_ROOM)
            piece = slices + SLICE * made
            put(piece + LOCAL, ours)
            put(piece + REMOTE, theirs)
            put(piece + LENGTH, size)
            put(piece + META, index << 8 | opcode)
            fence_at = theirs if opcode == WRITING else fence_at
            ours, theirs, length = ours + size, theirs + size, length - size
            made, pieces = made + 1, pieces + 1
        put(pending + 8 * index, pieces)
        if pieces == 0:
            put_byte(status + index, 1)
    if fence_byte != 0 and fence_at != 0:
        piece = slices + SLICE * made
        put(piece + LOCAL, fence_byte)
        put(piece + REMOTE, fence_at)
        put(piece + LENGTH, 1)
        put(piece + META, HIDDEN)
        made += 1
    put(batch + OTHERS, others)
    return made


@kernel
def assign(requests, count, target, remotes, routes):
    """Replace the target of each request to `target` by the number of the first route whose tables hold its range.

    `remotes` is the address of `routes` addresses of pairs of tables. Numbers are -2 - route, so that they are no
    segment's; where no route holds it, the target stays. The number of those that no route holds.
    """
    missing = 0
    for index in range(count):
        record = requests + 32 * index
        if get(record) >> 32 != target:
            continue
        opcode, theirs, length = get_byte(record), get(record + 16), get(record + 24)
        found = -1
        for route in range(routes):
            allowed = get(get(remotes + 8 * route) + 8 * (opcode & 1))
            if found < 0 and (length <= 0 or covered(allowed, theirs, length)):
                found = route
        if found < 0:
            missing += 1
        else:
            put(record, (get(record) & 0xFFFFFFFF) | (-2 - found) << 32)
    return missing
