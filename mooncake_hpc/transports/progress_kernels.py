"""Who moves a lane's bytes: a thread that waits for some of them, else the lane's own.

There is no thread that has to be woken for a batch. Whoever waits becomes the *leader*: it takes the lane's OWNER word
and moves everybody's bytes, by the transport's `lead`, until its own batch is done; the others sleep on their batches,
and one of them leads next. The lane's own thread is a backstop for queues that nobody waits on.
"""

from __future__ import annotations

from mooncake_hpc.native.atomics import (
    call_entry,
    compare_exchange,
    fence,
    fetch_add,
    futex_wait,
    futex_wake,
    get,
    get_byte,
    load,
    now,
    put,
    store,
)
from mooncake_hpc.native.compile import kernel
from mooncake_hpc.transports.queue_kernels import (
    AGAIN,
    BELL_WORD,
    BROKEN,
    DEPTH,
    DOWN,
    EMPTY,
    ENTRY,
    ENTRY_BATCH,
    FINISHED,
    GOAL,
    HEAD,
    LEAD,
    LOOK,
    OWNER,
    PROGRESS,
    REACHED,
    RESTING,
    RING,
    STATE,
    STATUS,
    TAIL,
    UP,
    URGENT,
    WAITERS,
    WANTED,
    WORD,
    YIELD,
    outcome,
    ring_thread,
)

GRACE = 1_000_000  # ns: the lane's thread leaves a queue to its waiters this long
LONGEST = 8_000_000  # ns: and looks at it this seldom where it was never needed
LINGER = 100_000_000  # ns: until this long after the last traffic
LOOKS = 2_000_000  # ns between two looks at a request that another thread moves
NAP = 50_000_000  # ns that the lane's thread leads at a time


@kernel
def hand_over(lane):
    """Release the lane; when entries are left, wake one that waits for its batch to lead instead."""
    chosen = 0
    seq = get(lane + HEAD)
    tail = load(lane + TAIL)
    while seq != tail and chosen == 0:
        entry = get(lane + RING) + ENTRY * (seq & (get(lane + DEPTH) - 1))
        batch = get(entry + ENTRY_BATCH)
        if load(batch + WAITERS) != 0:
            chosen = batch
            fetch_add(batch + WORD, 2)  # still held: the entry has not left the queue
        seq += 1
    store(lane + OWNER, 0)
    if chosen != 0:
        futex_wake(chosen + WORD, 1)  # at worst a word that nobody sleeps on


@kernel
def follow(lane, batch, until):
    """Sleep until the batch is done, the lane has no leader, it is time to look at a request, or `until`."""
    fetch_add(batch + WAITERS, 1)
    word = load(batch + WORD)
    left = until - now()
    if word & 1 == 0 and load(lane + OWNER) != 0 and left > 0:
        futex_wait(batch + WORD, word, left if get(batch + GOAL) == 0 else min(left, LOOKS))
    fetch_add(batch + WAITERS, -1)


@kernel
def await_batch(batch, until):
    """Sleep until the batch is done or `until`; whether it is done."""
    fetch_add(batch + WAITERS, 1)
    word = load(batch + WORD)
    while word & 1 == 0:
        left = until - now()
        if left <= 0:
            break
        futex_wait(batch + WORD, word, left)
        word = load(batch + WORD)
    fetch_add(batch + WAITERS, -1)
    return word & 1


@kernel
def drive(lane, batch, until):
    """Wait for `batch` (0: everything) until `until`: move the lane's bytes, or sleep while another thread does.

    EMPTY: this lane holds nothing more of the batch, which another lane still carries. REACHED: as `lane.outcome`.
    """
    while True:
        if batch != 0:
            code = outcome(batch)
            if code != AGAIN:
                return code
        if load(lane + STATE) != UP:
            if batch == 0:
                return BROKEN
            return FINISHED if await_batch(batch, until) else AGAIN
        if load(lane + YIELD) == 0 and compare_exchange(lane + OWNER, 0, 1) == 0:
            code = AGAIN
            if load(lane + STATE) == UP:  # else it broke, or is being repaired, since the look above
                code = call_entry(get(lane + LEAD), lane, batch, until)
            if code == BROKEN:
                compare_exchange(lane + STATE, UP, DOWN)  # not when it was closed meanwhile
                ring_thread(lane)
            hand_over(lane)
            if code in (FINISHED, EMPTY, REACHED):
                return code
        elif batch == 0:
            return AGAIN
        else:
            follow(lane, batch, until)
        if now() >= until:
            return AGAIN


@kernel
def await_request(lane, batch, request, until):
    """Drive the lane until this one of the batch's requests is done, or `until`."""
    status = get(batch + STATUS) + request
    while get_byte(status) == 0 and now() < until:
        put(batch + GOAL, status)
        drive(lane, batch, until)
    put(batch + GOAL, 0)


@kernel
def rest(lane):
    """The lane thread's sleep between two looks at the queue: GRACE to LONGEST in traffic, else until rung."""
    word = load(lane + BELL_WORD)
    if load(lane + STATE) == UP and now() - get(lane + PROGRESS) > LINGER:
        store(lane + RESTING, 1)
        fence()
        if load(lane + HEAD) == load(lane + TAIL):
            futex_wait(lane + BELL_WORD, word, 10_000_000_000)
            store(lane + RESTING, 0)
            return
        store(lane + RESTING, 0)  # what is queued does not move, or its leader is in a long call
    unattended = load(lane + HEAD) != load(lane + TAIL) and load(lane + OWNER) == 0
    put(lane + LOOK, GRACE if unattended else min(LONGEST, max(GRACE, 2 * get(lane + LOOK))))
    futex_wait(lane + BELL_WORD, word, get(lane + LOOK))


@kernel
def neglected(lane, head_before):
    """Whether something is queued that nobody moves: same head as before, no leader."""
    head = load(lane + HEAD)
    return head == head_before and head != load(lane + TAIL) and load(lane + OWNER) == 0


@kernel
def attend(lane):
    """The lane thread's loop: move what nobody waits on; returns when Python is needed: not UP, or WANTED."""
    head = -1
    while load(lane + STATE) == UP and load(lane + WANTED) == 0:
        rest(lane)
        if neglected(lane, head) or load(lane + URGENT) != 0:
            store(lane + URGENT, 0)
            drive(lane, 0, now() + NAP)
        head = load(lane + HEAD)


@kernel
def await_work(lane):
    """The lane thread's sleep while the lane is DOWN: until something is queued or it is rung."""
    word = load(lane + BELL_WORD)
    store(lane + RESTING, 1)
    fence()
    if load(lane + STATE) == DOWN and load(lane + HEAD) == load(lane + TAIL):
        futex_wait(lane + BELL_WORD, word, 10_000_000_000)
    store(lane + RESTING, 0)
