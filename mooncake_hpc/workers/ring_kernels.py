"""A ring of jobs in shared memory: one process posts, it and its workers claim pieces, run and finish them.

    control   BELL, HEAD, TAIL                      BELL counts posts; jobs TAIL to HEAD - 1 may have work left
    slot      KIND … B                              job number `n` lies in slot n % JOBS
              one state a piece, one result a piece

A piece's state is `number << 16`, plus 0 while nobody has it, its owner while it runs, FINISHED at the end. It is
claimed by compare-and-exchange on that word. So a claim of a job that has left its slot fails, and the pieces that
a killed process held are found by its owner number and put back (`release`): no moment of dying loses one.

Who finds nothing to do reads BELL, looks again, spins briefly and sleeps in futex(2) on the value that it read.
Addresses in a job are the poster's; `table` holds what to add to them for each file in this process.
"""

from __future__ import annotations

import numpy as np

from mooncake_hpc.native import atomics as native
from mooncake_hpc.native import prepare
from mooncake_hpc.native.compile import kernel

JOBS, PIECES = 64, 64
BELL, HEAD, TAIL = 0, 64, 128  # byte offsets, a cache line each: BELL is what workers look at
SLOTS = 192
KIND, TOTAL, STEP, COUNT, FILE_A, A, FILE_B, B, P, Q, RUNG = range(0, 88, 8)  # byte offsets in a slot
STATES = 128
RESULTS = STATES + 8 * PIECES
SLOT_BYTES = RESULTS + 8 * PIECES
CONTROL_BYTES = SLOTS + JOBS * SLOT_BYTES

FINISHED, OWNER_MASK = 0xFFFF, 0xFFFF
POSTER = 0xFFFE  # the owner number of the posting process; workers have smaller ones, from 1
ANY_FILE = -1
MISSING = np.iinfo(np.int64).min
NOTHING, OUT_OF_TIME, FILE_MISSING = 0, 1, 2

FILL, VERIFY, CHECKSUM, GATHER, SCATTER, TOUCH, POISON = range(1, 8)
HERE = np.array([[ANY_FILE, 0]], np.int64)  # the table of the process whose addresses the jobs hold
WAKE_ALL = 0x7FFFFFFF


@kernel
def slot(control, number):
    """Address of the slot of job `number`."""
    return control + SLOTS + number % JOBS * SLOT_BYTES


@kernel
def ring_bell(word):
    """Change `word` and wake all who sleep on it."""
    native.fetch_add(word, 1)
    native.futex_wake(word, WAKE_ALL)


@kernel
def delta(table, file):
    """What to add to the poster's addresses in `file`, or MISSING."""
    for i in range(table.shape[0]):
        if table[i, 0] == file or table[i, 0] == ANY_FILE:
            return table[i, 1]
    return MISSING


@kernel
def run_piece(job, piece, table):
    """Do one piece and return its result, or MISSING when this process has not mapped a file that it needs."""
    kind, step = native.get(job + KIND), native.get(job + STEP)
    start = piece * step
    n = min(step, native.get(job + TOTAL) - start)
    p, q = native.get(job + P), native.get(job + Q)
    shift_a, shift_b = delta(table, native.get(job + FILE_A)), delta(table, native.get(job + FILE_B))
    if shift_a == MISSING or shift_b == MISSING:
        return MISSING
    a, b = native.get(job + A) + shift_a, native.get(job + B) + shift_b
    result = np.int64(0)
    if kind == FILL:
        prepare.fill_range(a + start, n, np.uint64(p), q + start)
    elif kind == VERIFY:
        result = np.int64(prepare.verify_range(a + start, n, np.uint64(p), q + start))
    elif kind == CHECKSUM:
        result = np.int64(prepare.checksum_range(a + start, n, start))
    elif kind == GATHER:
        prepare.strided_copy(a + start * q, q, b + start * p, p, p, n)
    elif kind == SCATTER:
        prepare.strided_copy(a + start * p, p, b + start * q, q, p, n)
    elif kind == TOUCH:
        prepare.touch_range(a + start, n, p)
    elif kind == POISON:
        prepare.poison_range(a + start, n, p)
    return result


@kernel
def finished(job, number):
    """Whether all pieces of job `number` are done."""
    done = number << 16 | FINISHED
    left = 0
    for piece in range(native.get(job + COUNT)):
        left += native.load(job + STATES + 8 * piece) != done
    return left == 0


@kernel
def work_on(job, number, owner, table, deadline):
    """Run pieces of job `number` until none is left to claim: NOTHING, OUT_OF_TIME or FILE_MISSING."""
    posted = number << 16
    for piece in range(native.get(job + COUNT)):
        state = job + STATES + 8 * piece
        if native.load(state) != posted or native.compare_exchange(state, posted, posted | owner) != posted:
            continue
        result = run_piece(job, piece, table)
        if result == MISSING:
            native.store(state, posted)
            return FILE_MISSING
        native.put(job + RESULTS + 8 * piece, result)
        native.store(state, posted | FINISHED)
        native.fence()  # of two who finish the last two pieces at once, one must see both
        if finished(job, number):
            ring_bell(job + RUNG)
        if native.now() > deadline:
            return OUT_OF_TIME
    return NOTHING


@kernel
def post(control, number, fields, pieces):
    """Put a job, whose words from KIND on are `fields`, into its free slot and wake the workers."""
    job = slot(control, number)
    for i in range(fields.size):
        native.put(job + KIND + 8 * i, fields[i])
    for piece in range(pieces):
        native.store(job + STATES + 8 * piece, number << 16)
    native.store(control + HEAD, number + 1)
    ring_bell(control + BELL)


@kernel
def set_tail(control, number):
    """Tell the workers that all jobs before `number` are done."""
    native.store(control + TAIL, number)


@kernel
def help_and_wait(control, number, nanoseconds):
    """Run pieces of our job `number`, then sleep until the rest is done: True, or False when time is up."""
    job, deadline = slot(control, number), native.now() + nanoseconds
    work_on(job, number, POSTER, HERE, deadline)
    while True:
        rung = native.load(job + RUNG)
        if finished(job, number):
            return True
        left = deadline - native.now()
        if left <= 0:
            return False
        native.futex_wait(job + RUNG, rung, left)


@kernel
def serve(control, owner, table, spins, idle, busy):
    """A worker's turn: run pieces for up to `busy` ns, or sleep up to `idle` ns for a job.

    NOTHING: no job came. OUT_OF_TIME: there may be more. FILE_MISSING: of the jobs that were left, one needs a file
    which `table` does not hold.
    """
    deadline = native.now() + busy
    missing = False
    bell = native.load(control + BELL)
    for number in range(native.load(control + TAIL), native.load(control + HEAD)):
        outcome = work_on(slot(control, number), number, owner, table, deadline)
        if outcome == OUT_OF_TIME:
            return OUT_OF_TIME
        missing |= outcome == FILE_MISSING
    if missing:
        return FILE_MISSING
    for _ in range(spins):
        if native.load(control + BELL) != bell:
            return OUT_OF_TIME
        native.pause()
    native.futex_wait(control + BELL, bell, idle)
    return NOTHING if native.load(control + BELL) == bell else OUT_OF_TIME


@kernel
def release(control, owner):
    """Put back the pieces that the dead process `owner` held; how many there were."""
    count = 0
    for number in range(native.load(control + TAIL), native.load(control + HEAD)):
        job = slot(control, number)
        for piece in range(native.get(job + COUNT)):
            state = job + STATES + 8 * piece
            if native.load(state) == (number << 16 | owner):
                native.store(state, number << 16)
                count += 1
    if count:
        ring_bell(control + BELL)
    return count
