"""The queue of a lane and the state of a batch: what every transport's kernels share.

A *lane* carries slices in order. Its queue holds *entries* (one a batch and lane), not slices, so the number of
requests in flight has no limit of its own. Who moves their bytes is in `transports.progress_kernels`.

All state is int64 words in blocks owned by Python; a constant below is a word's byte offset in its block.
"""

from __future__ import annotations

from mooncake_hpc.native.atomics import (
    compare_exchange,
    fence,
    fetch_add,
    futex_wait,
    futex_wake,
    get,
    get_byte,
    load,
    now,
    pause,
    put,
    put_byte,
    store,
    write,
)
from mooncake_hpc.native.compile import brief, kernel

# --- lane block
OWNER = 0  # 1 while a thread moves this lane's bytes
HEAD = 8  # entries completed since the start
TAIL = 16  # entries queued since the start
RING = 24  # address of the entries
DEPTH = 32  # entries in the ring, a power of 2
STATE = 40  # UP, DOWN or CLOSED
DOORBELL = 48  # eventfd that ends the leader's sleep
ASLEEP = 56  # 1 while the leader sleeps
BELL_WORD = 64  # futex word of the lane's thread; changes to end its sleep
RESTING = 72  # 1 while the lane's thread sleeps until rung
CAUSE = 80  # why the lane went down: an errno or one of the codes below
BYTES = 88  # payload bytes completed
LOOK = 96  # nanoseconds that the lane's thread slept last between two looks
PATIENCE = 104  # nanoseconds without any progress after which the connection counts as dead
PROGRESS = 112  # time of the last progress
DONE_SLICES = 120  # completed slices of the head entry
SPIN = 472  # the leader's spinner (`native.spin`), 3 words
URGENT = 496  # 1: somebody waits who cannot lead (an event loop, or a batch of several lanes)
LANE_ONE = 504  # holds 1, written to eventfds
LEAD = 512  # address of the transport's `lead`, as a C function: how `leader.drive` moves bytes
YIELD = 520  # 1: the leader is to leave, Python wants the lane
WANTED = 528  # 1: Python is to look after the connection
PLACEHOLDER = 536  # address of a cancelled batch of one slice, followed by that: what stands for an entry taken out
LANE_WORDS = 72  # the words from 128 to 471 belong to the transport

DOWN, UP, CLOSED = 0, 1, 2

# --- entry: 4 words
ENTRY, ENTRY_SLICES, ENTRY_COUNT, ENTRY_BATCH = 32, 0, 8, 16
ENTRY_DONE = 24  # completed slices, for a transport that completes them in any order

# --- slice: 4 words
SLICE, LOCAL, REMOTE, LENGTH, META = 32, 0, 8, 16, 24  # META: request index << 8 | flags
WRITING, SKIPPED, HIDDEN = 1, 2, 4  # flags: opcode; never sent; a fence of the lane's own, no request's slice
RETRIED = 16  # flag: the peer has refused it once

# --- batch block
REMAINING = 0  # slices not yet completed
WORD = 8  # futex word: odd when the batch is done
ERROR = 16  # code of the first failure
ERROR_REQUEST = 24  # its request
EVENT = 32  # eventfd to write when done, or -1
CANCEL = 40  # 1: slices not yet sent are skipped
WAITERS = 48
STATUS = 56  # address of an int8 a request: 0 waiting, 1 done, a failure code below 0
PENDING = 64  # address of an int64 a request: its slices not yet completed
BATCH_ONE = 72  # holds 1, written to eventfds
OTHERS = 80  # requests that `cut` left out since they go to another segment
REQUESTS = 88  # address of the request records
SLICES, ROOM = 96, 104  # address of the slices, and how many there is room for
DONE_AT = 112  # address of an int64 a request, to be given the time when it is done; or 0
QUEUED = 120  # of `slicer.repeat`: what is in a lane's queue
STARTED = 128  # of `slicer.repeat`: when that was submitted
GOAL = 136  # address of the status of a request that somebody waits for, or 0
BATCH_WORDS = 18

# --- the placeholder's block: a batch block, its only status, slice count and slice
PLACEHOLDER_STATUS = 8 * BATCH_WORDS
PLACEHOLDER_PENDING = PLACEHOLDER_STATUS + 8
PLACEHOLDER_SLICE = PLACEHOLDER_PENDING + 8
PLACEHOLDER_WORDS = PLACEHOLDER_SLICE // 8 + SLICE // 8
ENDLESS = 1 << 62  # slices of a placeholder: it is never done, and wakes nobody

# --- route block: how slices for one way to a peer are cut
ROUTE_TABLES = 0  # readable, writable
ROUTE_LIMIT = 16  # largest slice
ROUTE_FENCE = 24  # address of a byte for version 1's fences: a READ that follows the last WRITE; 0: none needed
ROUTE_LANE = 32  # the lane, where there is one alone, else 0
ROUTE_TAIL = 40  # a rest of at most this many bytes is taken into the slice before it
ROUTE_BORDERS = 48  # address of tables of ours, readable and writable, whose borders no slice crosses; 0: none
ROUTE_WORDS = 8

# --- failure codes of a slice, negative as bytes
REJECTED, LOST, TIMED_OUT, CANCELLED, MALFORMED = -1, -2, -3, -4, -5
SILENT = -7  # the peer does not answer; nobody knows that it is dead
STRANGER = -6  # the peer and we do not prove to each other that we know a common secret

# --- what `drive` returns
FINISHED, AGAIN, BROKEN, EMPTY, REACHED = 0, 1, 2, 3, 4


@kernel
def note_time(batch, request):
    """Tell whoever asked for it that the request is done now."""
    times = get(batch + DONE_AT)
    if times != 0:
        put(times + 8 * request, now())


@kernel
def finish_slice(batch, meta, code):
    """Count a slice of `batch` as completed with `code` (0: fine); the last one wakes whoever waits."""
    request = meta >> 8
    if code != 0:
        put_byte(get(batch + STATUS) + request, code)
        if compare_exchange(batch + ERROR, 0, code) == 0:
            put(batch + ERROR_REQUEST, request)
    if meta & HIDDEN == 0 and fetch_add(get(batch + PENDING) + 8 * request, -1) == 1 and code == 0:
        note_time(batch, request)
        put_byte(get(batch + STATUS) + request, 1)
    if fetch_add(batch + REMAINING, -1) == 1:
        event = get(batch + EVENT)
        fetch_add(batch + WORD, 1)
        if load(batch + WAITERS) != 0:
            futex_wake(batch + WORD, 1 << 30)
        if event >= 0:
            write(event, batch + BATCH_ONE, 8)


@kernel
def outcome(batch):
    """FINISHED: the batch is done; REACHED: the request that somebody waits for; else AGAIN."""
    if load(batch + WORD) & 1:
        return FINISHED
    goal = get(batch + GOAL)
    if goal != 0 and get_byte(goal) != 0:
        put(batch + GOAL, 0)
        return REACHED
    return AGAIN


@kernel
def abandon(slices, count, batch, code):
    """Fail slices that could not be queued."""
    for index in range(count):
        finish_slice(batch, get(slices + SLICE * index + META), code)


@kernel
def head_entry(lane):
    """Address of the entry being completed."""
    return get(lane + RING) + ENTRY * (get(lane + HEAD) & (get(lane + DEPTH) - 1))


@kernel
def finish_head(lane, code):
    """Complete the next slice of the head entry; the entry leaves the queue with its last slice."""
    entry = head_entry(lane)
    batch = get(entry + ENTRY_BATCH)
    done = get(lane + DONE_SLICES)
    piece = get(entry + ENTRY_SLICES) + SLICE * done
    meta = get(piece + META)
    if code == 0 and meta & HIDDEN == 0:
        put(lane + BYTES, get(lane + BYTES) + get(piece + LENGTH))
    last = done + 1 == get(entry + ENTRY_COUNT)
    put(lane + DONE_SLICES, 0 if last else done + 1)
    finish_slice(batch, meta, code)
    if last:
        store(lane + HEAD, get(lane + HEAD) + 1)


@kernel
def fail_head_entry(lane, code):
    """Fail what is left of the head entry (the owner of the lane only, with its connection dead)."""
    head = get(lane + HEAD)
    while get(lane + HEAD) == head:
        finish_head(lane, code)


@kernel
def fail_all(lane, code):
    """Fail everything queued now: whoever has heard of it may already submit again."""
    tail = load(lane + TAIL)
    while get(lane + HEAD) != tail:
        fail_head_entry(lane, code)


@kernel
def is_cancelled(lane, entry):
    """Whether the entry's batch is cancelled and still in the queue."""
    batch = get(entry + ENTRY_BATCH)
    return batch != get(lane + PLACEHOLDER) and load(batch + CANCEL) != 0


@kernel
def take_out(lane, seq):
    """Fail what is left of entry `seq` as cancelled, wherever it is in the queue (the lane's owner only).

    A placeholder stays, which passes through the queue as any cancelled batch does. So nothing else has to know of it.
    """
    entry = get(lane + RING) + ENTRY * (seq & (get(lane + DEPTH) - 1))
    slices, count, batch = get(entry + ENTRY_SLICES), get(entry + ENTRY_COUNT), get(entry + ENTRY_BATCH)
    first = 0
    if seq == get(lane + HEAD):
        first = get(lane + DONE_SLICES)
        put(lane + DONE_SLICES, 0)
    placeholder = get(lane + PLACEHOLDER)
    put(entry + ENTRY_SLICES, placeholder + PLACEHOLDER_SLICE)
    put(entry + ENTRY_COUNT, 1)
    put(entry + ENTRY_BATCH, placeholder)
    put(entry + ENTRY_DONE, 0)
    for index in range(first, count):
        finish_slice(batch, get(slices + SLICE * index + META), CANCELLED)


@kernel
def drop_placeholders(lane):
    """Take placeholders from the head of the queue (the owner of a lane without a connection only)."""
    while get(lane + HEAD) != load(lane + TAIL) and get(head_entry(lane) + ENTRY_BATCH) == get(lane + PLACEHOLDER):
        finish_head(lane, CANCELLED)


@kernel
def drop_cancelled(lane):
    """Complete all cancelled batches (the owner of a lane over which nothing is under way only)."""
    for seq in range(get(lane + HEAD), load(lane + TAIL)):
        if is_cancelled(lane, get(lane + RING) + ENTRY * (seq & (get(lane + DEPTH) - 1))):
            take_out(lane, seq)
    drop_placeholders(lane)


@kernel
def ring_thread(lane):
    """Wake the lane's own thread."""
    fetch_add(lane + BELL_WORD, 1)
    futex_wake(lane + BELL_WORD, 1)


@kernel
def ring_leader(lane):
    """End the leader's sleep, if it sleeps."""
    if load(lane + ASLEEP) != 0:
        store(lane + ASLEEP, 0)
        write(get(lane + DOORBELL), lane + LANE_ONE, 8)


@brief
def enqueue(lane, slices, count, batch):
    """Queue an entry (producers hold the GIL). Its number from 1 on; 0: the ring is full; -1: the lane is closed."""
    if load(lane + STATE) == CLOSED:
        return -1
    tail = get(lane + TAIL)
    depth = get(lane + DEPTH)
    if tail - load(lane + HEAD) >= depth:
        return 0
    entry = get(lane + RING) + ENTRY * (tail & (depth - 1))
    put(entry + ENTRY_SLICES, slices)
    put(entry + ENTRY_COUNT, count)
    put(entry + ENTRY_BATCH, batch)
    put(entry + ENTRY_DONE, 0)
    if tail == load(lane + HEAD):
        put(lane + PROGRESS, now())
    store(lane + TAIL, tail + 1)
    fence()
    ring_leader(lane)
    if load(lane + RESTING) != 0:
        ring_thread(lane)
    return tail + 1


@kernel
def await_room(lane, until):
    """Sleep until the ring has room, the lane is closed, or `until`."""
    while load(lane + TAIL) - load(lane + HEAD) >= get(lane + DEPTH) and load(lane + STATE) != CLOSED:
        left = until - now()
        if left <= 0:
            return
        futex_wait(lane + HEAD, load(lane + HEAD), min(left, 1_000_000))  # nobody wakes us: a poll a millisecond


@kernel
def hurry(lane):
    """Have the lane's own thread move the queue now."""
    store(lane + URGENT, 1)
    ring_thread(lane)


@kernel
def seize(lane, until):
    """Take the lane for repair; 0 if its leader has not left it by `until`."""
    while compare_exchange(lane + OWNER, 0, 1) != 0:
        if now() > until:
            return 0
        pause()
    return 1


@kernel
def go_up(lane):
    """DOWN to UP, unless the lane was closed meanwhile."""
    compare_exchange(lane + STATE, DOWN, UP)


@kernel
def go_down(lane, cause):
    """UP to DOWN, unless the lane was closed meanwhile (the lane's owner only)."""
    if compare_exchange(lane + STATE, UP, DOWN) == UP:
        put(lane + CAUSE, cause)
    ring_thread(lane)
