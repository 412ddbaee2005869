"""The RDMA lane: posts slices to the queue pairs of several rails and polls their completion queues.

A *rail* is a path from a device of ours to one of the peer's: a completion queue and some queue pairs. All rails of a
lane are driven by the lane's leader, so a slice goes to whichever rail is nearest to its memory and has the fewest
bytes under way: rails share a request in proportion to what they deliver. Each queue pair has a ring of work requests
that was built once and is re-armed; they are posted in chains, of which the last is signalled: a completion retires
all before it on its queue pair (RC queue pairs complete in order). Slices complete in any order, so an entry counts
its completed ones and leaves the queue when it is at the head and all are done.

A completion with an error makes its rail BAD: nothing more is posted there, Python moves its queue pairs to ERR, and
what was under way comes back as flushed and goes to another rail. When all of it has been seen the rail is DEAD.
"""

from __future__ import annotations

from mooncake_hpc.kernels import spin
from mooncake_hpc.kernels.lane import (
    AGAIN,
    ASLEEP,
    BROKEN,
    BYTES,
    CANCEL,
    CANCELLED,
    CAUSE,
    DEPTH,
    DOORBELL,
    DOWN,
    EMPTY,
    ENTRY,
    ENTRY_BATCH,
    ENTRY_COUNT,
    ENTRY_DONE,
    ENTRY_SLICES,
    FINISHED,
    HEAD,
    LENGTH,
    LOCAL,
    LOST,
    META,
    OWNER,
    PATIENCE,
    PROGRESS,
    REJECTED,
    REMOTE,
    RING,
    SLICE,
    SPIN,
    STATE,
    TAIL,
    TIMED_OUT,
    UP,
    URGENT,
    WORD,
    WRITING,
    await_batch,
    finish_slice,
    follow,
    hand_over,
    neglected,
    rest,
    ring_thread,
)
from mooncake_hpc.kernels.native import (
    compare_exchange,
    epoll_wait,
    fence,
    get,
    kernel,
    load,
    now,
    pause,
    put,
    read,
    store,
)
from mooncake_hpc.kernels.ranges import row
from mooncake_hpc.kernels.verbs import (
    FLUSHED,
    LOCAL_PROTECTION,
    RDMA_READ,
    RDMA_WRITE,
    REMOTE_ACCESS,
    SGE_ADDRESS,
    SGE_LENGTH_KEY,
    SIGNALED,
    SUCCESS,
    WC,
    WC_ID,
    WC_STATUS,
    WC_VENDOR,
    WR,
    WR_COUNT_OPCODE,
    WR_FLAGS,
    WR_ID,
    WR_KEY,
    WR_NEXT,
    WR_REMOTE,
    WR_SGES,
    call2,
    call3,
)

# --- words of the lane block
RAILS, RAIL_COUNT = 128, 136  # address of the rails' addresses; how many
SEND_SEQ, SEND_SLICE = 144, 152  # the next slice of the queue to post
LOCAL_KEYS, REMOTE_KEYS = 160, 168  # addresses of pairs of keyed tables, readable and writable
RETRY, RETRY_MASK, RETRY_HEAD, RETRY_TAIL = 176, 184, 192, 200  # ring of (slice, entry number) to post again
FAILURES = 208  # so many errors of its own fail a slice
TURN = 216  # counts the leader's turns: in a new one no older tables are looked at
WANTED = 224  # 1: Python is to look after the rails
YIELD = 232  # 1: the leader is to leave, Python wants the lane
EPOLL, EVENTS = 240, 248  # epoll of the completion channels and the doorbell; room for MAX_EVENTS events
COMPLETIONS = 256  # room for POLLED struct ibv_wc
WINDOW = 264  # bytes under way a rail where there are several
SLEEPS = 272  # how often a leader slept
BAD_WR, SCRATCH = 280, 288
PEEKED = 296  # entry number of the slice that `_peek` found, below 0: of the retry ring
FULL_SEQ = 304  # TAIL when `_post` looked last
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
QP_WORDS = 8

CHAIN, CHAIN_BYTES = 16, 256 << 10  # work requests, bytes of one post
POLLED = 32  # completions of one poll
MAX_EVENTS = 16
OVER = 8  # flag of a slice: it is completed
COUNTER = 48  # bit of a slice's META where its errors are counted
META_MASK = (1 << COUNTER) - 1
NAP = 50_000_000  # ns: no sleep is longer without a look at the clock


@kernel
def _entry(lane, seq):
    return get(lane + RING) + ENTRY * (seq & (get(lane + DEPTH) - 1))


@kernel
def _finish(lane, seq, piece, code):
    """Complete a slice of entry `seq`."""
    entry = _entry(lane, seq)
    meta = get(piece + META)
    put(piece + META, meta | OVER)
    if code == 0:
        put(lane + BYTES, get(lane + BYTES) + get(piece + LENGTH))
    batch = get(entry + ENTRY_BATCH)
    put(entry + ENTRY_DONE, get(entry + ENTRY_DONE) + 1)
    finish_slice(batch, meta & META_MASK, code)


@kernel
def _retire_entries(lane):
    """Entries leave the queue from its head when all their slices are completed."""
    head, tail = get(lane + HEAD), load(lane + TAIL)
    while head != tail and get(_entry(lane, head) + ENTRY_DONE) == get(_entry(lane, head) + ENTRY_COUNT):
        head += 1
    if head != get(lane + HEAD):
        store(lane + HEAD, head)


@kernel
def _again(lane, seq, piece):
    """Have a slice posted once more, before those that were not yet."""
    tail = get(lane + RETRY_TAIL)
    slot = get(lane + RETRY) + 16 * (tail & get(lane + RETRY_MASK))
    put(slot, piece)
    put(slot + 8, seq)
    put(lane + RETRY_TAIL, tail + 1)


@kernel
def _peek(lane):
    """The next slice to post, or 0; those of cancelled batches are completed on the way."""
    while get(lane + RETRY_HEAD) != get(lane + RETRY_TAIL):
        slot = get(lane + RETRY) + 16 * (get(lane + RETRY_HEAD) & get(lane + RETRY_MASK))
        piece, seq = get(slot), get(slot + 8)
        if load(get(_entry(lane, seq) + ENTRY_BATCH) + CANCEL) == 0:
            put(lane + PEEKED, -1 - seq)
            return piece
        put(lane + RETRY_HEAD, get(lane + RETRY_HEAD) + 1)
        _finish(lane, seq, piece, CANCELLED)
    while get(lane + SEND_SEQ) != load(lane + TAIL):
        seq = get(lane + SEND_SEQ)
        entry = _entry(lane, seq)
        piece = get(entry + ENTRY_SLICES) + SLICE * get(lane + SEND_SLICE)
        put(lane + PEEKED, seq)
        if load(get(entry + ENTRY_BATCH) + CANCEL) == 0:
            return piece
        _take(lane)
        _finish(lane, seq, piece, CANCELLED)
    return 0


@kernel
def _take(lane):
    """Go on behind the slice that `_peek` found; its entry number."""
    seq = get(lane + PEEKED)
    if seq < 0:
        put(lane + RETRY_HEAD, get(lane + RETRY_HEAD) + 1)
        return -1 - seq
    at = get(lane + SEND_SLICE) + 1
    if at == get(_entry(lane, seq) + ENTRY_COUNT):
        put(lane + SEND_SEQ, seq + 1)
        at = 0
    put(lane + SEND_SLICE, at)
    return seq


@kernel
def _local_row(lane, piece):
    writing = get(piece + META) & WRITING
    return row(get(get(lane + LOCAL_KEYS) + 8 * (1 - writing)), get(piece + LOCAL))


@kernel
def _remote_row(lane, piece):
    writing = get(piece + META) & WRITING
    return row(get(get(lane + REMOTE_KEYS) + 8 * writing), get(piece + REMOTE))


@kernel
def _room(rail):
    """The next queue pair of the rail that takes a work request, or 0; the ring goes on behind it."""
    count, first = get(rail + RAIL_QP_COUNT), get(rail + RAIL_NEXT_QP)
    for step in range(count):
        number = (first + step) % count
        qp = get(get(rail + RAIL_QPS) + 8 * number)
        if get(qp + QP_POSTED) - get(qp + QP_RETIRED) < get(qp + QP_DEPTH):
            put(rail + RAIL_NEXT_QP, (number + 1) % count)
            return number
    return -1


@kernel
def _fitness(rail, local, remote):
    """Of a rail for memory with these rows: 3 near to both sides' memory, 2 to ours, 1 to the peer's, 0 to none."""
    near = 2 if get(local) & get(rail + LOCAL_BIT) else 0
    return near + (1 if get(remote) & get(rail + REMOTE_BIT) else 0)


@kernel
def _choose(lane, local, remote):
    """The live rail of the best fitness with the fewest bytes under way, or 0 while those are full."""
    rails, count = get(lane + RAILS), get(lane + RAIL_COUNT)
    best, chosen, fewest = -1, 0, get(lane + WINDOW)
    for number in range(count):
        rail = get(rails + 8 * number)
        if load(rail + RAIL_STATE) != LIVE:
            continue
        fitness = _fitness(rail, local, remote) if count > 1 else 0
        if fitness > best:
            best, chosen, fewest = fitness, 0, get(lane + WINDOW)
        if fitness == best and (count == 1 or get(rail + RAIL_BYTES) < fewest):
            chosen, fewest = rail, get(rail + RAIL_BYTES)
    return chosen


@kernel
def _arm(rail, qp, position, number, piece, local, remote):
    """Write the work request at `position` of the ring for a slice."""
    index = position & (get(qp + QP_DEPTH) - 1)
    wr = get(qp + QP_WRS) + WR * index
    opcode = RDMA_WRITE if get(piece + META) & WRITING else RDMA_READ
    put(wr + WR_ID, position << 8 | number)
    put(wr + WR_COUNT_OPCODE, 1 | opcode << 32)
    put(wr + WR_FLAGS, 0)
    put(wr + WR_REMOTE, get(piece + REMOTE))
    put(wr + WR_KEY, get(remote + get(rail + REMOTE_KEY)))
    sge = get(wr + WR_SGES)
    put(sge + SGE_ADDRESS, get(piece + LOCAL))
    put(sge + SGE_LENGTH_KEY, get(piece + LENGTH) | get(local + get(rail + LOCAL_KEY)) << 32)


@kernel
def _fill(lane, rail, qp, number, first_local, first_remote):
    """Arm a chain of work requests with slices of the same memory; their number."""
    posted, depth = get(qp + QP_POSTED), get(qp + QP_DEPTH)
    room = min(depth - (posted - get(qp + QP_RETIRED)), CHAIN)
    count = total = 0
    while count < room and total < CHAIN_BYTES:
        piece = _peek(lane)
        if piece == 0:
            break
        local, remote = _local_row(lane, piece), _remote_row(lane, piece)
        if local != first_local or remote != first_remote:
            break
        seq = _take(lane)
        position = posted + count
        _arm(rail, qp, position, number, piece, local, remote)
        slot = get(qp + QP_SLOTS) + 16 * (position & (depth - 1))
        put(slot, piece)
        put(slot + 8, seq)
        total += get(piece + LENGTH)
        count += 1
    put(rail + RAIL_BYTES, get(rail + RAIL_BYTES) + total)
    return count


@kernel
def _post_chain(lane, rail, qp, count):
    """Post the armed work requests; whether the device took them."""
    posted, mask, wrs = get(qp + QP_POSTED), get(qp + QP_DEPTH) - 1, get(qp + QP_WRS)
    last = wrs + WR * ((posted + count - 1) & mask)
    following = get(last + WR_NEXT)
    put(last + WR_NEXT, 0)
    put(last + WR_FLAGS, SIGNALED)
    put(lane + BAD_WR, 0)
    put(qp + QP_POSTED, posted + count)
    put(rail + RAIL_OUT, get(rail + RAIL_OUT) + count)
    code = call3(get(qp + QP_POST), get(qp + QP), wrs + WR * (posted & mask), lane + BAD_WR)
    put(last + WR_NEXT, following)
    if code == 0:
        return True
    bad = get(lane + BAD_WR)
    if bad != 0:  # this one and those behind it are not the device's
        kept = ((bad - wrs) // WR - posted) & mask
        for position in range(posted + kept, posted + count):
            slot = get(qp + QP_SLOTS) + 16 * (position & mask)
            _again(lane, get(slot + 8), get(slot))
            put(rail + RAIL_BYTES, get(rail + RAIL_BYTES) - get(get(slot) + LENGTH))
        put(qp + QP_POSTED, posted + kept)
        put(rail + RAIL_OUT, get(rail + RAIL_OUT) - (count - kept))
    spoil(lane, rail, -code, 0)
    return False


@kernel
def spoil(lane, rail, cause, vendor):
    """Nothing is posted to this rail any more; Python is to move its queue pairs to ERR."""
    if compare_exchange(rail + RAIL_STATE, LIVE, BAD) == LIVE or get(rail + RAIL_CAUSE) == FLUSHED:
        put(rail + RAIL_CAUSE, cause)
        put(rail + RAIL_VENDOR, vendor)
    store(lane + WANTED, 1)
    ring_thread(lane)


@kernel
def _post(lane):
    """Post slices while there are any and a rail takes them; how many."""
    total = 0
    put(lane + FULL_SEQ, load(lane + TAIL))
    while load(lane + STALE) == 0:
        piece = _peek(lane)
        if piece == 0:
            return total
        local, remote = _local_row(lane, piece), _remote_row(lane, piece)
        if local == 0 or remote == 0:  # unregistered meanwhile
            seq = _take(lane)
            _finish(lane, seq, piece, REJECTED)
            continue
        rail = _choose(lane, local, remote)
        if rail == 0:
            return total
        number = _room(rail)
        if number < 0:
            return total
        qp = get(get(rail + RAIL_QPS) + 8 * number)
        count = _fill(lane, rail, qp, number, local, remote)
        if _post_chain(lane, rail, qp, count):
            total += count
    return total


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
        _finish(lane, get(slot + 8), piece, 0)
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
        _again(lane, seq, piece)
    elif status == REMOTE_ACCESS:
        _finish(lane, seq, piece, REJECTED)
    elif failures > get(lane + FAILURES):
        _finish(lane, seq, piece, REJECTED if status == LOCAL_PROTECTION else LOST)
    else:
        _again(lane, seq, piece)


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
        _retire_entries(lane)
    return total


@kernel
def settle(lane):
    """Take what has completed (the lane's owner only)."""
    _poll(lane)
    _retire_entries(lane)


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
    put(lane + RETRY_HEAD, get(lane + RETRY_TAIL))
    tail = load(lane + TAIL)
    for seq in range(get(lane + HEAD), tail):
        entry = _entry(lane, seq)
        for index in range(get(entry + ENTRY_COUNT)):
            piece = get(entry + ENTRY_SLICES) + SLICE * index
            if get(piece + META) & OVER == 0:
                _finish(lane, seq, piece, code)
    put(lane + SEND_SEQ, tail)
    put(lane + SEND_SLICE, 0)
    store(lane + HEAD, tail)


@kernel
def drop_cancelled(lane):
    """Complete what is cancelled and not under way (the lane's owner only)."""
    _peek(lane)
    _retire_entries(lane)


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
        epoll_wait(get(lane + EPOLL), get(lane + EVENTS), MAX_EVENTS, milliseconds)
        read(get(lane + DOORBELL), lane + SCRATCH, 8)
    store(lane + ASLEEP, 0)


@kernel
def _lead(lane, batch, until):
    """Post and poll until `batch` (0: everything queued) is done, `until`, or no rail is left."""
    quiet = budget = 0
    while True:
        put(lane + TURN, get(lane + TURN) + 1)
        moved = _post(lane)
        moved += _poll(lane)
        if batch != 0 and load(batch + WORD) & 1:
            _retire_entries(lane)
            return FINISHED
        if moved == 0:
            _retire_entries(lane)  # of cancelled and refused slices
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


@kernel
def drive(lane, batch, until):
    """Wait for `batch` (0: everything) until `until`; as `tcp_client.drive`."""
    while True:
        if batch != 0 and load(batch + WORD) & 1:
            return FINISHED
        if load(lane + STATE) != UP:
            if batch == 0:
                return BROKEN
            return FINISHED if await_batch(batch, until) else AGAIN
        if load(lane + YIELD) == 0 and compare_exchange(lane + OWNER, 0, 1) == 0:
            code = AGAIN
            if load(lane + STATE) == UP:
                code = _lead(lane, batch, until)
            if code == BROKEN:
                compare_exchange(lane + STATE, UP, DOWN)
                ring_thread(lane)
            hand_over(lane)
            if code in (FINISHED, EMPTY):
                return code
        elif batch == 0:
            return AGAIN
        else:
            follow(lane, batch, until)
        if now() >= until:
            return AGAIN


@kernel
def attend(lane):
    """The lane thread's loop, as `tcp_client.attend`; returns also when the rails want Python."""
    head = -1
    while load(lane + STATE) == UP and load(lane + WANTED) == 0:
        rest(lane)
        if neglected(lane, head) or load(lane + URGENT) != 0:
            store(lane + URGENT, 0)
            drive(lane, 0, now() + NAP)
        head = load(lane + HEAD)


KERNELS = (drive, attend, spoil, settle, take_back, fail_queue, drop_cancelled)  # what Python calls
