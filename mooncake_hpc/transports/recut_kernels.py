"""Cuts slices anew that wait in a lane's queue: the peer has registered the memory that they are for as other buffers.

For the owner of a lane, and of what is not under way.
"""

from __future__ import annotations

from mooncake_hpc.native.atomics import fetch_add, get, put
from mooncake_hpc.native.compile import kernel
from mooncake_hpc.native.ranges import covered, room
from mooncake_hpc.transports.queue_kernels import (
    DEPTH,
    DONE_SLICES,
    ENTRY,
    ENTRY_BATCH,
    ENTRY_COUNT,
    ENTRY_SLICES,
    HEAD,
    HIDDEN,
    LENGTH,
    LOCAL,
    META,
    PENDING,
    PLACEHOLDER,
    REMAINING,
    REMOTE,
    RETRIED,
    RING,
    SLICE,
    WRITING,
    head_entry,
)


@kernel
def _entry(lane, seq):
    return get(lane + RING) + ENTRY * (seq & (get(lane + DEPTH) - 1))


@kernel
def size_of(tables, meta, remote, length):
    """How much of a slice lies in one buffer; all of it where buffers do not hold it, and the peer is to refuse it."""
    table = get(tables + 8 * (meta & WRITING))
    whole = meta & HIDDEN != 0 or not covered(table, remote, length)
    return length if whole else min(room(table, remote), length)


@kernel
def count_pieces(lane, seq, tables):
    """How many slices the rest of entry `seq` makes, cut where buffers of `tables` (readable, writable) end; 0: as many
    as it has."""
    entry = _entry(lane, seq)
    if get(entry + ENTRY_BATCH) == get(lane + PLACEHOLDER):
        return 0
    first, end = get(lane + DONE_SLICES) if seq == get(lane + HEAD) else 0, get(entry + ENTRY_COUNT)
    pieces = 0
    for index in range(first, end):
        piece = get(entry + ENTRY_SLICES) + SLICE * index
        remote, left = get(piece + REMOTE), get(piece + LENGTH)
        while left > 0:
            size = size_of(tables, get(piece + META), remote, left)
            remote, left = remote + size, left - size
            pieces += 1
    return pieces if pieces > end - first else 0


@kernel
def cut_anew(lane, seq, tables, slices, count):
    """Put the `count` slices of `count_pieces`, written to `slices`, in the place of those of entry `seq`."""
    entry = _entry(lane, seq)
    batch = get(entry + ENTRY_BATCH)
    first, end = get(lane + DONE_SLICES) if seq == get(lane + HEAD) else 0, get(entry + ENTRY_COUNT)
    fetch_add(batch + REMAINING, count - (end - first))
    made = slices
    for index in range(first, end):
        piece = get(entry + ENTRY_SLICES) + SLICE * index
        ours, remote, left, meta = get(piece + LOCAL), get(piece + REMOTE), get(piece + LENGTH), get(piece + META)
        pieces = 0
        while left > 0:
            size = size_of(tables, meta, remote, left)
            put(made + LOCAL, ours)
            put(made + REMOTE, remote)
            put(made + LENGTH, size)
            put(made + META, meta)
            ours, remote, left = ours + size, remote + size, left - size
            made, pieces = made + SLICE, pieces + 1
        if pieces > 1:
            fetch_add(get(batch + PENDING) + 8 * (meta >> 8), pieces - 1)
    if seq == get(lane + HEAD):
        put(lane + DONE_SLICES, 0)
    put(entry + ENTRY_SLICES, slices)
    put(entry + ENTRY_COUNT, count)


@kernel
def is_retried(lane):
    """Whether the peer has refused the head slice before."""
    entry = head_entry(lane)
    return get(get(entry + ENTRY_SLICES) + SLICE * get(lane + DONE_SLICES) + META) & RETRIED != 0


@kernel
def mark_retried(lane):
    """The peer has refused the head slice."""
    entry = head_entry(lane)
    piece = get(entry + ENTRY_SLICES) + SLICE * get(lane + DONE_SLICES)
    put(piece + META, get(piece + META) | RETRIED)


KERNELS = count_pieces, cut_anew, is_retried, mark_retried
