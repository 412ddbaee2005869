"""From a batch's requests to slices, in one call for the usual case of one peer, one route and one lane.

These kernels are short and hold the GIL: no thread changes tables, routes or a lane's queue meanwhile. `repeat` takes
it for each submission, and lets go of it while it waits.
"""

from __future__ import annotations

from mooncake_hpc.native.atomics import get, get_byte, load, now, pause, put, put_byte, release_gil, store, take_gil
from mooncake_hpc.native.compile import brief, kernel
from mooncake_hpc.native.ranges import covered, room, wraps
from mooncake_hpc.transports.progress_kernels import drive
from mooncake_hpc.transports.queue_kernels import (
    CANCEL,
    DONE_AT,
    ERROR,
    ERROR_REQUEST,
    EVENT,
    HEAD,
    HIDDEN,
    LENGTH,
    LOCAL,
    META,
    OTHERS,
    PENDING,
    QUEUED,
    REMAINING,
    REMOTE,
    REQUESTS,
    ROOM,
    ROUTE_BORDERS,
    ROUTE_FENCE,
    ROUTE_LANE,
    ROUTE_LIMIT,
    ROUTE_TABLES,
    ROUTE_TAIL,
    SLICE,
    SLICES,
    STARTED,
    STATUS,
    WAITERS,
    WORD,
    WRITING,
    enqueue,
    note_time,
)

BAD_OPCODE, BAD_LENGTH, LOCAL_UNREGISTERED, REMOTE_UNREGISTERED, NO_ROOM = 1, 2, 3, 4, 5
REASONS = 8

# --- words of an engine's block
LOCAL_TABLES = 0  # readable, writable
SEGMENTS, SEGMENT_COUNT = 16, 24  # address of an array: by target id the block of the first route, or 0
ENGINE_WORDS = 8

TARGET_BITS = 20
REFUSED = -1  # in a batch's QUEUED word: `submit` took nothing
LEAVE = 1_000  # ns for the leader of a lane to take an entry out of the queue once its batch is done


@brief
def reset(batch, count):
    """Make a used batch block new."""
    for word in (REMAINING, WORD, ERROR, ERROR_REQUEST, CANCEL, WAITERS, OTHERS):
        store(batch + word, 0)
    put(batch + EVENT, -1)
    status = get(batch + STATUS)
    for index in range((count + 7) >> 3):
        put(status + 8 * index, 0)


@brief
def cut(batch, count, target, local, route, slices, most):
    """Write the slices of those of the batch's `count` requests that go to segment `target`; their number.

    `local` is the address of a pair of tables, readable and writable, `route` that of a route block. A slice crosses
    no border of a remote buffer and is at most the route's limit and tail. There is room for `most` at `slices`.
    Below 0: -(request * REASONS + reason).
    """
    made = fence_at = others = 0
    requests, status, pending = get(batch + REQUESTS), get(batch + STATUS), get(batch + PENDING)
    limit, fence_byte, tail = get(route + ROUTE_LIMIT), get(route + ROUTE_FENCE), get(route + ROUTE_TAIL)
    borders = get(route + ROUTE_BORDERS)
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
        if length > 0 and wraps(theirs, length):
            return -(index * REASONS + REMOTE_UNREGISTERED)
        allowed = get(route + ROUTE_TABLES + 8 * opcode)
        pieces = 0
        while length > 0:
            size = min(room(allowed, theirs), length)
            if size <= 0:
                return -(index * REASONS + REMOTE_UNREGISTERED)
            if borders != 0:
                size = min(room(get(borders + 8 * (1 - opcode)), ours), size)
                if size <= 0:
                    return -(index * REASONS + LOCAL_UNREGISTERED)
            if size - limit > tail:
                size = limit
            if made >= most - 1:
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
            note_time(batch, index)
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


@brief
def assign(batch, count, target, blocks, routes):
    """Replace the target of each request to `target` by the number of the first route whose tables hold its range.

    `blocks` is the address of the addresses of `routes` route blocks. Numbers are -2 - route, so that they are no
    segment's; where no route holds it, the target stays. The number of those that no route holds.
    """
    missing = 0
    requests = get(batch + REQUESTS)
    for index in range(count):
        record = requests + 32 * index
        if get(record) >> 32 != target:
            continue
        opcode, theirs, length = get_byte(record), get(record + 16), get(record + 24)
        found = -1
        for route in range(routes):
            allowed = get(get(blocks + 8 * route) + ROUTE_TABLES + 8 * (opcode & 1))
            if found < 0 and (length <= 0 or covered(allowed, theirs, length)):
                found = route
        if found < 0:
            missing += 1
        else:
            put(record, (get(record) & 0xFFFFFFFF) | (-2 - found) << 32)
    return missing


@brief
def submit(batch, count, engine):
    """Cut and queue a batch of one target, one route and one lane: entry number << TARGET_BITS | target id.

    0: nothing has been queued; the batch is reset, and Python takes over, for the unusual and for errors.
    """
    reset(batch, count)
    target = get(get(batch + REQUESTS)) >> 32 if count > 0 else -1
    if target < 0 or target >= get(engine + SEGMENT_COUNT):
        return 0
    route = get(get(engine + SEGMENTS) + 8 * target)
    lane = get(route + ROUTE_LANE) if route != 0 else 0
    if lane == 0:
        return 0
    made = cut(batch, count, target, engine + LOCAL_TABLES, route, get(batch + SLICES), get(batch + ROOM))
    if made <= 0 or get(batch + OTHERS) != 0:
        return 0
    put(batch + REMAINING, made)
    number = enqueue(lane, get(batch + SLICES), made, batch)
    if number <= 0:
        put(batch + REMAINING, 0)
        return 0
    return number << TARGET_BITS | target


@kernel
def _carried_out(lane, batch, number, until):
    """Wait for entry `number` until `until`: whether its batch is done, all of it, and nobody looks at it any more."""
    drive(lane, batch, until)
    if load(batch + WORD) & 1 == 0 or load(batch + ERROR) != 0:
        return False
    end = 0
    while load(lane + HEAD) < number:  # another thread leads, and is about to
        pause()
        end = now() + LEAVE if end == 0 else end
        if now() > end:
            return False
    return True


@brief
def make_durations(times, count, begin):
    """Of the points in time after `begin`."""
    for index in range(count):
        put(times + 8 * index, get(times + 8 * index) - begin)


@brief
def repeat(batch, count, engine, done, limit, until, patience, latencies, rows, every):
    """Submit the batch and wait until it is done, as numbers `done` to `limit`, in turn; the first one not done.

    None but the first begins after `until`, and none is waited for longer than `patience` ns. `latencies` is the
    address of an int64 a number, in ns, or 0. Where `every` is not 0, one number in so many has its requests' own,
    from its submission on, written to a row of `rows`. The batch's QUEUED word tells how it ended:
    0: well; REFUSED: `submit` takes it not; else what that returned for one more, which is under way or has failed.
    """
    put(batch + QUEUED, 0)
    first = done
    while done < limit:
        begin = now()
        if begin >= until and done > first:
            return done
        row = 0
        if every != 0:  # not a call's first batch, if it can be another: its peer sleeps, as Python was busy before it
            row = rows + 8 * count * (done // every) if done % every == min(1, every - 1) else 0
            put(batch + DONE_AT, row)
        put(batch + STARTED, begin)
        queued = submit(batch, count, engine)
        put(batch + QUEUED, queued if queued > 0 else REFUSED)
        if queued <= 0:
            return done
        lane = get(get(get(engine + SEGMENTS) + 8 * (queued & ((1 << TARGET_BITS) - 1))) + ROUTE_LANE)
        thread = release_gil()
        fine = _carried_out(lane, batch, queued >> TARGET_BITS, begin + patience)
        take_gil(thread)
        if not fine:
            return done
        put(batch + QUEUED, 0)
        if latencies != 0:
            put(latencies + 8 * done, now() - begin)
        if row != 0:
            make_durations(row, count, begin)
        done += 1
    return done
