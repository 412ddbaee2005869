"""Posting of the RDMA lane: which rail takes the next slices, and work requests for them.

Each queue pair has a ring of work requests that was built once and is re-armed; they are posted in chains, of which
the last is signalled.
"""

from __future__ import annotations

from mooncake_hpc.native.atomics import get, load, put
from mooncake_hpc.native.compile import kernel
from mooncake_hpc.native.ranges import row
from mooncake_hpc.transports.queue_kernels import LENGTH, LOCAL, META, REJECTED, REMOTE, TAIL, WRITING
from mooncake_hpc.transports.rdma.rail_kernels import (
    BAD_WR,
    CHAIN,
    CHAIN_BYTES,
    FULL_SEQ,
    LIVE,
    LOCAL_BIT,
    LOCAL_KEY,
    LOCAL_KEYS,
    QP,
    QP_CUT,
    QP_DEPTH,
    QP_POST,
    QP_POSTED,
    QP_RETIRED,
    QP_SLOTS,
    QP_WRS,
    RAIL_BYTES,
    RAIL_COUNT,
    RAIL_NEXT_QP,
    RAIL_OUT,
    RAIL_QP_COUNT,
    RAIL_QPS,
    RAIL_STATE,
    RAILS,
    REMOTE_BIT,
    REMOTE_KEY,
    REMOTE_KEYS,
    STALE,
    TURN_BYTES,
    WINDOW,
    again,
    finish,
    peek,
    spoil,
    take,
)
from mooncake_hpc.transports.rdma.verbs_kernels import (
    RDMA_READ,
    RDMA_WRITE,
    SGE_ADDRESS,
    SGE_LENGTH_KEY,
    SIGNALED,
    WR,
    WR_COUNT_OPCODE,
    WR_FLAGS,
    WR_ID,
    WR_KEY,
    WR_NEXT,
    WR_REMOTE,
    WR_SGES,
    call3,
)


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
    """Arm a chain of work requests with slices of the same memory; their number, 0 when what `post` saw has meanwhile
    been cancelled."""
    posted, depth = get(qp + QP_POSTED), get(qp + QP_DEPTH)
    room = min(depth - (posted - get(qp + QP_RETIRED)), CHAIN)
    count = total = 0
    while count < room and total < CHAIN_BYTES:
        piece = peek(lane)
        if piece == 0:
            break
        local, remote = _local_row(lane, piece), _remote_row(lane, piece)
        if local != first_local or remote != first_remote:
            break
        seq = take(lane)
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
    """Post the armed work requests, one at least (of none the whole ring would go); whether the device took them."""
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
        if kept > 0:  # those before it are unsignalled: it stays as their end, see `post_ends`
            kept += 1
            put(qp + QP_CUT, 1)
        for position in range(posted + kept, posted + count):
            slot = get(qp + QP_SLOTS) + 16 * (position & mask)
            again(lane, get(slot + 8), get(slot))
            put(rail + RAIL_BYTES, get(rail + RAIL_BYTES) - get(get(slot) + LENGTH))
        put(qp + QP_POSTED, posted + kept)
        put(rail + RAIL_OUT, get(rail + RAIL_OUT) - (count - kept))
    spoil(lane, rail, -code, 0)
    return False


@kernel
def post_ends(lane, rail):
    """Post what ends a chain that was taken in part, to queue pairs in ERR (the lane's owner only): it comes back as
    flushed, and tells of the unsignalled ones before it, of which those that were carried out would say nothing."""
    for number in range(get(rail + RAIL_QP_COUNT)):
        qp = get(get(rail + RAIL_QPS) + 8 * number)
        if get(qp + QP_CUT) != 0:
            put(qp + QP_CUT, 0)
            end = get(qp + QP_WRS) + WR * ((get(qp + QP_POSTED) - 1) & (get(qp + QP_DEPTH) - 1))
            put(end + WR_NEXT, 0)  # the ring is not used again
            put(end + WR_FLAGS, SIGNALED)
            call3(get(qp + QP_POST), get(qp + QP), end, lane + BAD_WR)


@kernel
def post(lane):
    """Post slices while there are any and a rail takes them, TURN_BYTES about; how many."""
    total = size = 0
    put(lane + FULL_SEQ, load(lane + TAIL))
    while load(lane + STALE) == 0 and size < TURN_BYTES:
        piece = peek(lane)
        if piece == 0:
            return total
        local, remote = _local_row(lane, piece), _remote_row(lane, piece)
        if local == 0 or remote == 0:  # unregistered meanwhile
            seq = take(lane)
            finish(lane, seq, piece, REJECTED)
            continue
        rail = _choose(lane, local, remote)
        if rail == 0:
            return total
        number = _room(rail)
        if number < 0:
            return total
        qp = get(get(rail + RAIL_QPS) + 8 * number)
        size -= get(rail + RAIL_BYTES)
        count = _fill(lane, rail, qp, number, local, remote)
        size += get(rail + RAIL_BYTES)
        if count > 0 and _post_chain(lane, rail, qp, count):
            total += count
    return total
