"""The shared-memory lane: whoever leads copies, straight between our memory and the peer's mapped files.

A page shared with the peer holds the version of its registrations and the version that we are busy under, as between
a TCP server and its connections: the peer changes the version and waits until nobody is busy with an older one.
"""

from __future__ import annotations

from mooncake_hpc.native.atomics import below, copy, errno, fence, get, load, now, put, recv, store
from mooncake_hpc.native.compile import Entry, kernel
from mooncake_hpc.native.ranges import covered
from mooncake_hpc.transports.queue_kernels import (
    AGAIN,
    BROKEN,
    CANCEL,
    CANCELLED,
    CAUSE,
    DONE_SLICES,
    EMPTY,
    ENTRY_BATCH,
    ENTRY_SLICES,
    FINISHED,
    HEAD,
    LENGTH,
    LOCAL,
    META,
    PROGRESS,
    REJECTED,
    REMOTE,
    SLICE,
    TAIL,
    WORD,
    WRITING,
    finish_head,
    head_entry,
    outcome,
)

# --- words of the lane block
FD = 128  # Unix socket to the peer; its end is the peer's end
PAGE = 136  # the page shared with the peer
VERSION = 144  # version of the peer's registrations that TABLES and FILES describe
TABLES = 152  # readable, writable
FILES = 160  # n, then n times {start at the peer, bytes, start here}
OFFSET = 168  # bytes of the head slice that have been copied
SCRATCH = 176

# --- words of the page
PAGE_VERSION, PAGE_BUSY, PAGE_BYTES = 0, 8, 4096

TURN = 4 << 20  # bytes to copy between two looks at the clock and the page
STALE, EOF = -101, -100  # CAUSE: the peer's registrations changed; the peer is gone
PEEK_DONTWAIT = 0x42
EAGAIN = 11
NAP = 50_000_000


@kernel
def _here(lane, address):
    """Where the peer's `address` is mapped in our process, and how far in one piece; (0, 0): nowhere."""
    files = get(lane + FILES)
    for index in range(get(files)):
        entry = files + 8 + 24 * index
        offset = address - get(entry)
        if below(offset, get(entry + 8)):
            return offset + get(entry + 16), get(entry + 8) - offset
    return 0, 0


@kernel
def _copy_some(lane, budget):
    """Copy at most `budget` bytes of the head slice, completing it when whole; the bytes.

    A slice may cross borders: the peer's buffers, as they were when it was cut, may be others now.
    """
    entry = head_entry(lane)
    piece = get(entry + ENTRY_SLICES) + SLICE * get(lane + DONE_SLICES)
    writing = get(piece + META) & WRITING
    length, remote, offset = get(piece + LENGTH), get(piece + REMOTE), get(lane + OFFSET)
    if load(get(entry + ENTRY_BATCH) + CANCEL) != 0:
        put(lane + OFFSET, 0)
        finish_head(lane, CANCELLED)
        return 0
    theirs, mapped = _here(lane, remote + offset)
    if theirs == 0 or not covered(get(get(lane + TABLES) + 8 * writing), remote, length):
        put(lane + OFFSET, 0)
        finish_head(lane, REJECTED)
        return 0
    size = min(length - offset, budget, mapped)
    ours = get(piece + LOCAL) + offset
    if writing:
        copy(theirs, ours, size)
    else:
        copy(ours, theirs, size)
    if offset + size == length:
        put(lane + OFFSET, 0)
        finish_head(lane, 0)
    else:
        put(lane + OFFSET, offset + size)
    return size


@kernel
def _peer_lives(lane):
    return recv(get(lane + FD), lane + SCRATCH, 1, PEEK_DONTWAIT) < 0 and errno() == EAGAIN


@kernel
def _turn(lane, batch):
    """Copy about TURN bytes as long as the batch (0: anything) is not done; BROKEN, or 0."""
    page, version = get(lane + PAGE), get(lane + VERSION)
    if not _peer_lives(lane):
        put(lane + CAUSE, EOF)
        return BROKEN
    store(page + PAGE_BUSY, version)
    fence()
    code = 0
    if load(page + PAGE_VERSION) != version:
        put(lane + CAUSE, STALE)
        code = BROKEN
    left = TURN
    while code == 0 and left > 0 and get(lane + HEAD) != load(lane + TAIL):
        left -= _copy_some(lane, left) + 256  # an empty slice costs something too
        if batch != 0 and load(batch + WORD) & 1:
            left = 0
    store(page + PAGE_BUSY, 0)
    return code


@Entry
def lead(lane, batch, until):
    """As `tcp_client.lead`."""
    while True:
        if _turn(lane, batch) == BROKEN:
            return BROKEN
        if batch != 0:
            code = outcome(batch)
            if code != AGAIN:
                return code
        if get(lane + HEAD) == load(lane + TAIL):
            return FINISHED if batch == 0 else EMPTY
        time = now()
        put(lane + PROGRESS, time)
        if time >= until:
            return AGAIN
