"""The RDMA lane: posts slices to the queue pairs of several rails and polls their completion queues.

All rails of a lane are driven by the lane's leader, so a slice goes to whichever rail is nearest to its memory and has
the fewest bytes under way: rails share a request in proportion to what they deliver. A completion retires all before it
on its queue pair (RC queue pairs complete in order).

A completion with an error makes its rail BAD: nothing more is posted there, Python moves its queue pairs to ERR, and
what was under way comes back as flushed and goes to another rail. When all of it has been seen the rail is DEAD.
"""

from __future__ import annotations

from mooncake_hpc.native import spin
from mooncake_hpc.native.atomics import epoll_wait, fence, get, load, now, pause, put, read, store
from mooncake_hpc.native.compile import Entry, kernel
from mooncake_hpc.transports.queue_kernels import (
    AGAIN,
    ASLEEP,
    BROKEN,
    CANCELLED,
    CAUSE,
    DOORBELL,
    EMPTY,
    ENTRY_COUNT,
    ENTRY_SLICES,
    FINISHED,
    HEAD,
    LENGTH,
    LOST,
    META,
    PATIENCE,
    PROGRESS,
    REJECTED,
    SLICE,
    SPIN,
    TAIL,
    TIMED_OUT,
    WANTED,
    YIELD,
    is_cancelled,
    outcome,
    ring_thread,
    take_out,
)
from mooncake_hpc.transports.rdma.post_kernels import post, post_ends
from mooncake_hpc.transports.rdma.rail_kernels import (
    BAD,
    COMPLETIONS,
    COUNTER,
    DEAD,
    EPOLL,
    EVENTS,
    FAILURES,
    FULL_SEQ,
    LIVE,
    MAX_EVENTS,
    NAP,
    OVER,
    POLLED,
    QP_DEPTH,
    QP_POSTED,
    QP_RETIRED,
    QP_SLOTS,
    RAIL_BYTES,
    RAIL_COUNT,
    RAIL_CQ,
    RAIL_DELIVERED,
    RAIL_FLUSHING,
    RAIL_NOTIFY,
    RAIL_OUT,
    RAIL_POLL,
    RAIL_QP_COUNT,
    RAIL_QPS,
    RAIL_STATE,
    RAILS,
    RETRY,
    RETRY_HEAD,
    RETRY_MASK,
    RETRY_TAIL,
    SCRATCH,
    SEND_SEQ,
    SEND_SLICE,
    SLEEPS,
    STALE,
    TURN,
    again,
    count_splits,
    entry_of,
    finish,
    peek,
    retire_entries,
    split,
    spoil,
)
from mooncake_hpc.transports.rdma.verbs_kernels import (
    FLUSHED,
    LOCAL_PROTECTION,
    REMOTE_ACCESS,
    SUCCESS,
    WC,
    WC_ID,
    WC_STATUS,
    WC_VENDOR,
    call2,
    call3,
)
from mooncake_hpc.transports.recut_kernels import count_pieces, cut_anew


@kernel
def _retire(lane, rail, qp, upto):
    """Complete all slices before position `upto` of a queue pair as transferred."""
    slots, mask = get(qp + QP_SLOTS), get(qp + QP_DEPTH) - 1
    first = get(qp + QP_RETIRED)
    total = 0
    for position in range(first, upto):
        slot = slots + 16 * (position & mask)
        piece = get(slot)
        total += get(piece + LENGTH)
        finish(lane, get(slot + 8), piece, 0)
    put(qp + QP_RETIRED, upto)
    put(rail + RAIL_OUT, get(rail + RAIL_OUT) - (upto - first))
    put(rail + RAIL_BYTES, get(rail + RAIL_BYTES) - total)
    put(rail + RAIL_DELIVERED, get(rail + RAIL_DELIVERED) + total)


@kernel
def _return(lane, rail, qp, status):
    """Take back the next slice of a queue pair, which failed: it is posted again, or fails for good."""
    position = get(qp + QP_RETIRED)
    slot = get(qp + QP_SLOTS) + 16 * (position & (get(qp + QP_DEPTH) - 1))
    piece, seq = get(slot), get(slot + 8)
    put(qp + QP_RETIRED, position + 1)
    put(rail + RAIL_OUT, get(rail + RAIL_OUT) - 1)
    put(rail + RAIL_BYTES, get(rail + RAIL_BYTES) - get(piece + LENGTH))
    if status != FLUSHED:
        put(piece + META, get(piece + META) + (1 << COUNTER))
    failures = get(piece + META) >> COUNTER
    if status == REMOTE_ACCESS and failures == 1:  # the key may be that of an earlier registration
        store(lane + STALE, 1)
        again(lane, seq, piece)
    elif status == REMOTE_ACCESS:
        finish(lane, seq, piece, REJECTED)
    elif failures > get(lane + FAILURES):
        finish(lane, seq, piece, REJECTED if status == LOCAL_PROTECTION else LOST)
    else:
        again(lane, seq, piece)


@kernel
def _poll_rail(lane, rail):
    """Take what has completed on a rail: how many completions."""
    wcs = get(lane + COMPLETIONS)
    count = call3(get(rail + RAIL_POLL), get(rail + RAIL_CQ), POLLED, wcs)
    if count < 0:
        spoil(lane, rail, count, 0)
        return 0
    for index in range(count):
        wc = wcs + WC * index
        position, number = get(wc + WC_ID) >> 8, get(wc + WC_ID) & 255
        status = get(wc + WC_STATUS) & 0xFFFFFFFF
        qp = get(get(rail + RAIL_QPS) + 8 * number)
        if position < get(qp + QP_RETIRED):
            continue
        if status == SUCCESS:
            _retire(lane, rail, qp, position + 1)
        else:
            _retire(lane, rail, qp, position)
            _return(lane, rail, qp, status)
            spoil(lane, rail, status, get(wc + WC_VENDOR) & 0xFFFFFFFF)
    return count


@kernel
def _poll(lane):
    """Take what has completed; how many completions."""
    rails, total = get(lane + RAILS), 0
    for number in range(get(lane + RAIL_COUNT)):
        rail = get(rails + 8 * number)
        state = load(rail + RAIL_STATE)
        if state in (LIVE, BAD):
            if get(rail + RAIL_OUT) > 0:
                total += _poll_rail(lane, rail)
            if state == BAD and load(rail + RAIL_FLUSHING) != 0 and get(rail + RAIL_OUT) == 0:
                store(rail + RAIL_STATE, DEAD)
    if total > 0:
        retire_entries(lane)
    return total


@kernel
def settle(lane):
    """Take what has completed (the lane's owner only)."""
    _poll(lane)
    retire_entries(lane)


@kernel
def usable(lane):
    """How many rails can carry something, or still may complete something."""
    rails, count = get(lane + RAILS), 0
    for number in range(get(lane + RAIL_COUNT)):
        state = load(get(rails + 8 * number) + RAIL_STATE)
        if state in (LIVE, BAD):
            count += 1
    return count


@kernel
def take_back(lane, rail):
    """Whatever was under way on a rail whose queue pairs are destroyed is posted again (the lane's owner only)."""
    for number in range(get(rail + RAIL_QP_COUNT)):
        qp = get(get(rail + RAIL_QPS) + 8 * number)
        while get(qp + QP_RETIRED) != get(qp + QP_POSTED):
            _return(lane, rail, qp, FLUSHED)
    store(rail + RAIL_STATE, DEAD)


@kernel
def fail_queue(lane, code):
    """Fail all that is queued (the lane's owner only, with nothing under way)."""
    ring, mask = get(lane + RETRY), get(lane + RETRY_MASK)
    for at in range(get(lane + RETRY_HEAD), get(lane + RETRY_TAIL)):
        finish(lane, get(ring + 16 * (at & mask) + 8), get(ring + 16 * (at & mask)), code)
    put(lane + RETRY_HEAD, get(lane + RETRY_TAIL))
    tail = load(lane + TAIL)
    for seq in range(get(lane + HEAD), tail):
        entry = entry_of(lane, seq)
        for index in range(get(entry + ENTRY_COUNT)):
            piece = get(entry + ENTRY_SLICES) + SLICE * index
            if get(piece + META) & OVER == 0:
                finish(lane, seq, piece, code)
    put(lane + SEND_SEQ, tail)
    put(lane + SEND_SLICE, 0)
    store(lane + HEAD, tail)


@kernel
def drop_cancelled(lane):
    """Complete what is cancelled and not under way, wherever it is in the queue (the lane's owner only)."""
    ring, mask, kept = get(lane + RETRY), get(lane + RETRY_MASK), get(lane + RETRY_HEAD)
    for at in range(kept, get(lane + RETRY_TAIL)):
        slot = ring + 16 * (at & mask)
        piece, seq = get(slot), get(slot + 8)
        if is_cancelled(lane, entry_of(lane, seq)):
            finish(lane, seq, piece, CANCELLED)
        else:
            put(ring + 16 * (kept & mask), piece)
            put(ring + 16 * (kept & mask) + 8, seq)
            kept += 1
    put(lane + RETRY_TAIL, kept)
    peek(lane)  # of an entry that was posted in part, the rest
    for seq in range(get(lane + SEND_SEQ), load(lane + TAIL)):
        started = seq == get(lane + SEND_SEQ) and get(lane + SEND_SLICE) > 0
        if is_cancelled(lane, entry_of(lane, seq)) and not started:
            take_out(lane, seq)
    peek(lane)  # past what was taken out
    retire_entries(lane)


UNDRAINED = 1024  # events left in the completion channels, at about 100 bytes in the kernel


@kernel
def _sleep(lane, left):
    """Sleep until something completes, the doorbell rings or `left` ns have passed (at most NAP)."""
    rails = get(lane + RAILS)
    for number in range(get(lane + RAIL_COUNT)):
        rail = get(rails + 8 * number)
        state = load(rail + RAIL_STATE)
        if state in (LIVE, BAD) and get(rail + RAIL_OUT) > 0:
            call2(get(rail + RAIL_NOTIFY), get(rail + RAIL_CQ), 0)
    store(lane + ASLEEP, 1)
    fence()
    if _poll(lane) == 0 and load(lane + TAIL) == get(lane + FULL_SEQ) and load(lane + YIELD) == 0:
        milliseconds = (min(left, NAP) + 999_999) // 1_000_000
        put(lane + SLEEPS, get(lane + SLEEPS) + 1)
        if get(lane + SLEEPS) % UNDRAINED == 0:  # Python takes them out
            store(lane + WANTED, 1)
            ring_thread(lane)
        epoll_wait(get(lane + EPOLL), get(lane + EVENTS), MAX_EVENTS, milliseconds)
        read(get(lane + DOORBELL), lane + SCRATCH, 8)
    store(lane + ASLEEP, 0)


@Entry
def lead(lane, batch, until):
    """Post and poll until `batch` (0: everything queued) is done, `until`, or no rail is left."""
    quiet = budget = 0
    while True:
        put(lane + TURN, get(lane + TURN) + 1)
        moved = post(lane)
        moved += _poll(lane)
        if batch != 0:
            code = outcome(batch)
            if code != AGAIN:
                retire_entries(lane)
                return code
        if moved == 0:
            retire_entries(lane)  # of cancelled and refused slices
        if get(lane + HEAD) == load(lane + TAIL):
            return FINISHED if batch == 0 else EMPTY
        if moved == 0 and usable(lane) == 0:
            return BROKEN
        if load(lane + YIELD) != 0:
            return AGAIN
        time = now()
        if moved > 0:
            if quiet != 0 and budget > 0:
                spin.paid(lane + SPIN)
            quiet = 0
            put(lane + PROGRESS, time)
        elif quiet == 0:
            quiet = time
            budget = spin.budget(lane + SPIN)
        elif time - get(lane + PROGRESS) > get(lane + PATIENCE):
            _give_up(lane)
            put(lane + PROGRESS, time)
        elif time - quiet > budget:
            if budget > 0:
                spin.failed(lane + SPIN)
                budget = 0
            _sleep(lane, max(0, until - time))
        else:
            pause()
        if time >= until:
            return AGAIN


@kernel
def _give_up(lane):
    """Nothing completes, nor fails: all rails count as broken."""
    put(lane + CAUSE, TIMED_OUT)
    for number in range(get(lane + RAIL_COUNT)):
        rail = get(get(lane + RAILS) + 8 * number)
        if load(rail + RAIL_STATE) == LIVE:
            spoil(lane, rail, TIMED_OUT, 0)


KERNELS = (
    lead,  # first: it is this transport's alone, and so tells whether all are compiled (`compile_ahead`)
    count_pieces,
    cut_anew,
    count_splits,
    split,
    spoil,
    settle,
    post_ends,
    take_back,
    fail_queue,
    drop_cancelled,
)  # what Python calls
