"""Rails of the RDMA lane: the words that describe them, and the slices that go over them.

A *rail* is a path from a device of ours to one of the peer's: a completion queue and some queue pairs. Slices complete
in any order, so an entry of the lane's queue counts its completed ones and leaves the queue when it is at the head and
all are done.
"""

from __future__ import annotations

from mooncake_hpc.native.atomics import compare_exchange, fetch_add, get, load, put, store
from mooncake_hpc.native.compile import kernel
from mooncake_hpc.transports.queue_kernels import (
    BYTES,
    CANCEL,
    CANCELLED,
    DEPTH,
    ENTRY,
    ENTRY_BATCH,
    ENTRY_COUNT,
    ENTRY_DONE,
    ENTRY_SLICES,
    HEAD,
    LENGTH,
    LOCAL,
    META,
    PENDING,
    REMAINING,
    REMOTE,
    RING,
    SLICE,
    TAIL,
    WANTED,
    finish_slice,
    ring_thread,
)
from mooncake_hpc.transports.rdma.verbs_kernels import FLUSHED
from mooncake_hpc.transports.recut_kernels import size_of

# --- words of the lane block
RAILS, RAIL_COUNT = 128, 136  # address of the rails' addresses; how many
SEND_SEQ, SEND_SLICE = 144, 152  # the next slice of the queue to post
LOCAL_KEYS, REMOTE_KEYS = 160, 168  # addresses of pairs of keyed tables, readable and writable
RETRY, RETRY_MASK, RETRY_HEAD, RETRY_TAIL = 176, 184, 192, 200  # ring of (slice, entry number) to post again
FAILURES = 208  # so many errors of its own fail a slice
TURN = 216  # counts the leader's turns: in a new one no older tables are looked at
EPOLL, EVENTS = 240, 248  # epoll of the completion channels and the doorbell; room for MAX_EVENTS events
COMPLETIONS = 256  # room for POLLED struct ibv_wc
WINDOW = 264  # bytes under way a rail where there are several
SLEEPS = 272  # how often a leader slept
BAD_WR, SCRATCH = 280, 288
PEEKED = 296  # entry number of the slice that `peek` found, below 0: of the retry ring
FULL_SEQ = 304  # TAIL when `post` looked last
STALE = 312  # 1: a key of the peer's was refused; nothing is posted before Python has read its descriptor again

# --- rail block
RAIL_STATE = 0
RAIL_CQ, RAIL_POLL, RAIL_NOTIFY = 8, 16, 24  # ibv_cq, addresses of functions
RAIL_QPS, RAIL_QP_COUNT, RAIL_NEXT_QP = 32, 40, 48  # address of the queue pairs' blocks
RAIL_BYTES, RAIL_OUT = 56, 64  # bytes and work requests under way
RAIL_CAUSE, RAIL_VENDOR = 72, 80  # the first error: status of a completion, or -errno of post or poll
LOCAL_KEY, REMOTE_KEY = 88, 96  # where its device's key lies in a row of the tables
LOCAL_BIT, REMOTE_BIT = 104, 112  # its devices' bits in the row's first word: they are near to the memory
RAIL_FLUSHING = 120  # 1: Python has moved the queue pairs to ERR
RAIL_DELIVERED = 128  # bytes completed
RAIL_WORDS = 24
ABSENT, LIVE, BAD, DEAD = 0, 1, 2, 3

# --- block of a queue pair
QP, QP_POST = 0, 8  # ibv_qp, address of a function
QP_POSTED, QP_RETIRED, QP_DEPTH = 16, 24, 32  # counts since the start; size of the ring, a power of 2
QP_WRS, QP_SLOTS = 40, 48  # the ring's struct ibv_send_wr; for each (slice, entry number)
QP_CUT = 56  # 1: the device took part of a chain; the last that counts as posted is the one that it refused
QP_WORDS = 8

CHAIN, CHAIN_BYTES = 16, 256 << 10  # work requests, bytes of one post
TURN_BYTES = 1 << 20  # posted between two looks at completions and the clock, as soft-RoCE moves it in the call
POLLED = 32  # completions of one poll
MAX_EVENTS = 16
OVER = 8  # flag of a slice: it is completed
COUNTER = 48  # bit of a slice's META where its errors are counted
META_MASK = (1 << COUNTER) - 1
NAP = 50_000_000  # ns: no sleep is longer without a look at the clock


@kernel
def entry_of(lane, seq):
    """The address of entry `seq`."""
    return get(lane + RING) + ENTRY * (seq & (get(lane + DEPTH) - 1))


@kernel
def finish(lane, seq, piece, code):
    """Complete a slice of entry `seq`."""
    entry = entry_of(lane, seq)
    meta = get(piece + META)
    put(piece + META, meta | OVER)
    if code == 0:
        put(lane + BYTES, get(lane + BYTES) + get(piece + LENGTH))
    batch = get(entry + ENTRY_BATCH)
    put(entry + ENTRY_DONE, get(entry + ENTRY_DONE) + 1)
    finish_slice(batch, meta & META_MASK, code)


@kernel
def retire_entries(lane):
    """Entries leave the queue from its head when all their slices are completed."""
    head, tail = get(lane + HEAD), load(lane + TAIL)
    while head != tail and get(entry_of(lane, head) + ENTRY_DONE) == get(entry_of(lane, head) + ENTRY_COUNT):
        head += 1
    if head != get(lane + HEAD):
        store(lane + HEAD, head)


@kernel
def again(lane, seq, piece):
    """Have a slice posted once more, before those that were not yet."""
    tail = get(lane + RETRY_TAIL)
    slot = get(lane + RETRY) + 16 * (tail & get(lane + RETRY_MASK))
    put(slot, piece)
    put(slot + 8, seq)
    put(lane + RETRY_TAIL, tail + 1)


@kernel
def count_splits(lane, tables):
    """How many more slices those to post again make, cut where buffers of `tables` end; 0 if the ring has no room."""
    ring, mask, head, tail = get(lane + RETRY), get(lane + RETRY_MASK), get(lane + RETRY_HEAD), get(lane + RETRY_TAIL)
    more = 0
    for at in range(head, tail):
        piece = get(ring + 16 * (at & mask))
        remote, left = get(piece + REMOTE), get(piece + LENGTH)
        while left > 0:
            size = size_of(tables, get(piece + META), remote, left)
            remote, left = remote + size, left - size
            more += 1 if left > 0 else 0
    return more if tail - head + more <= mask + 1 else 0


@kernel
def split(lane, tables, slices):
    """Cut the slices to post again; their further pieces lie in `slices`, beyond their entries' own.

    So that an entry ends with the last of them, it counts as many as not completed.
    """
    ring, mask = get(lane + RETRY), get(lane + RETRY_MASK)
    for at in range(get(lane + RETRY_HEAD), get(lane + RETRY_TAIL)):
        piece, seq = get(ring + 16 * (at & mask)), get(ring + 16 * (at & mask) + 8)
        entry, meta = entry_of(lane, seq), get(piece + META)
        batch = get(entry + ENTRY_BATCH)
        ours, remote, left = get(piece + LOCAL), get(piece + REMOTE), get(piece + LENGTH)
        size = size_of(tables, meta, remote, left)
        put(piece + LENGTH, size)
        while left > size:
            ours, remote, left = ours + size, remote + size, left - size
            size = size_of(tables, meta, remote, left)
            put(slices + LOCAL, ours)
            put(slices + REMOTE, remote)
            put(slices + LENGTH, size)
            put(slices + META, meta)
            put(entry + ENTRY_DONE, get(entry + ENTRY_DONE) - 1)
            fetch_add(batch + REMAINING, 1)
            fetch_add(get(batch + PENDING) + 8 * ((meta & META_MASK) >> 8), 1)
            again(lane, seq, slices)
            slices += SLICE


@kernel
def peek(lane):
    """The next slice to post, or 0; those of cancelled batches are completed on the way."""
    while get(lane + RETRY_HEAD) != get(lane + RETRY_TAIL):
        slot = get(lane + RETRY) + 16 * (get(lane + RETRY_HEAD) & get(lane + RETRY_MASK))
        piece, seq = get(slot), get(slot + 8)
        if load(get(entry_of(lane, seq) + ENTRY_BATCH) + CANCEL) == 0:
            put(lane + PEEKED, -1 - seq)
            return piece
        put(lane + RETRY_HEAD, get(lane + RETRY_HEAD) + 1)
        finish(lane, seq, piece, CANCELLED)
    while get(lane + SEND_SEQ) != load(lane + TAIL):
        seq = get(lane + SEND_SEQ)
        entry = entry_of(lane, seq)
        piece = get(entry + ENTRY_SLICES) + SLICE * get(lane + SEND_SLICE)
        put(lane + PEEKED, seq)
        if load(get(entry + ENTRY_BATCH) + CANCEL) == 0:
            return piece
        take(lane)
        finish(lane, seq, piece, CANCELLED)
    return 0


@kernel
def take(lane):
    """Go on behind the slice that `peek` found; its entry number."""
    seq = get(lane + PEEKED)
    if seq < 0:
        put(lane + RETRY_HEAD, get(lane + RETRY_HEAD) + 1)
        return -1 - seq
    at = get(lane + SEND_SLICE) + 1
    if at == get(entry_of(lane, seq) + ENTRY_COUNT):
        put(lane + SEND_SEQ, seq + 1)
        at = 0
    put(lane + SEND_SLICE, at)
    return seq


@kernel
def spoil(lane, rail, cause, vendor):
    """Nothing is posted to this rail any more; Python is to move its queue pairs to ERR."""
    if compare_exchange(rail + RAIL_STATE, LIVE, BAD) == LIVE or get(rail + RAIL_CAUSE) == FLUSHED:
        put(rail + RAIL_CAUSE, cause)
        put(rail + RAIL_VENDOR, vendor)
    store(lane + WANTED, 1)
    ring_thread(lane)
