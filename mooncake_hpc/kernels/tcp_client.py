"""The initiator's side of the TCP data protocol, pipelined: headers, bodies and replies of whole batches in few calls.

Wire format (the original's): a request is a 24-byte header {u64 size, u64 address, u8 opcode, 7 bytes padding},
then for a WRITE the body. A reply is, in version 2, a status word and then for a READ the payload; version 1 has no
status, so its WRITEs count as done only when a later READ on the same connection has been answered. Requests of one
connection are served in order.

Positions: what has been completed (HEAD, DONE_SLICES), what the receive list describes (BUILT_*), what the send list
describes (SEND_*); completed <= built <= sent. After a lost connection the lane goes on from the first of these.
"""

from __future__ import annotations

from mooncake_hpc.kernels import spin
from mooncake_hpc.kernels.lane import (
    AGAIN,
    ASLEEP,
    BROKEN,
    CANCEL,
    CANCELLED,
    CAUSE,
    DEPTH,
    DONE_SLICES,
    DOORBELL,
    DOWN,
    EMPTY,
    ENTRY,
    ENTRY_BATCH,
    ENTRY_COUNT,
    ENTRY_SLICES,
    FINISHED,
    HEAD,
    HIDDEN,
    LENGTH,
    LOCAL,
    MALFORMED,
    META,
    OWNER,
    PATIENCE,
    PROGRESS,
    REJECTED,
    REMOTE,
    RING,
    SKIPPED,
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
    finish_head,
    follow,
    hand_over,
    head_entry,
    neglected,
    rest,
    ring_thread,
)
from mooncake_hpc.kernels.native import (
    compare_exchange,
    errno,
    fence,
    get,
    kernel,
    load,
    now,
    pause,
    poll,
    put,
    read,
    recvmsg,
    sendmsg,
    store,
)

# --- words of the lane block
FD = 128
VERSION = 136  # framing: 1 or 2
SEND_SEQ, SEND_SLICE = 144, 152
BUILT_SEQ, BUILT_SLICE = 160, 168
SEND_LIST, SEND_AT, SEND_END = 176, 184, 192  # struct iovec array, next entry, end
RECEIVE_LIST, RECEIVE_AT, RECEIVE_END = 200, 208, 216
HEADERS, STATUSES = 224, 232  # addresses of WINDOW headers and WINDOW status words
WINDOW_DONE = 240  # slices completed of those that the receive list describes
RECEIVED = 248  # bytes received beyond the completed slices
SEND_MESSAGE, RECEIVE_MESSAGE = 256, 312  # struct msghdr
CONNECTION = 368  # our id of the connection, 56 bits, sent in the header's padding
SCRATCH = 376

WINDOW = 512  # slices that one list describes
LIST = 1024  # struct iovecs in a list: Linux takes no more a call (UIO_MAXIOV)
LIST_BYTES = 8 << 20  # describing more at a time than a socket buffer holds wins nothing

OK = 0x4D43545600000000  # status word: magic "MCTV" << 32 | code
VERSION_2 = 0x80  # bit of the opcode

EOF = -100  # CAUSE: the peer closed the connection
DONTWAIT, NOSIGNAL = 0x40, 0x4000
EAGAIN, EINTR = 11, 4
POLLIN, POLLOUT = 1, 4
NAP = 50_000_000  # ns: no sleep is longer without a look at the clock


@kernel
def reset(lane):
    """Start on a fresh connection at the first slice that is not completed."""
    put(lane + SEND_SEQ, get(lane + HEAD))
    put(lane + SEND_SLICE, get(lane + DONE_SLICES))
    put(lane + BUILT_SEQ, get(lane + HEAD))
    put(lane + BUILT_SLICE, get(lane + DONE_SLICES))
    for word in (SEND_AT, SEND_END, RECEIVE_AT, RECEIVE_END, WINDOW_DONE, RECEIVED):
        put(lane + word, 0)
    put(lane + PROGRESS, now())


@kernel
def writes_in_flight(lane):
    """Whether a WRITE has been given to the socket, wholly or partly, and not completed."""
    seq, at = get(lane + HEAD), get(lane + DONE_SLICES)
    while seq < get(lane + SEND_SEQ) or (seq == get(lane + SEND_SEQ) and at < get(lane + SEND_SLICE)):
        entry = _entry(lane, seq)
        if get(get(entry + ENTRY_SLICES) + SLICE * at + META) & WRITING:
            return True
        at += 1
        if at == get(entry + ENTRY_COUNT):
            seq, at = seq + 1, 0
    return False


@kernel
def _entry(lane, seq):
    return get(lane + RING) + ENTRY * (seq & (get(lane + DEPTH) - 1))


@kernel
def _append(vector, count, address, length):
    """Add a range to an iovec array, joined with the one before where they touch; the new count."""
    if count > 0:
        last = vector + 16 * (count - 1)
        if get(last) + get(last + 8) == address:
            put(last + 8, get(last + 8) + length)
            return count
    put(vector + 16 * count, address)
    put(vector + 16 * count + 8, length)
    return count + 1


@kernel
def advance(vector, at, end, moved):
    """Drop `moved` bytes from the front of an iovec array; the new front."""
    while moved > 0 and at < end:
        entry = vector + 16 * at
        length = get(entry + 8)
        if moved < length:
            put(entry, get(entry) + moved)
            put(entry + 8, length - moved)
            return at
        moved -= length
        at += 1
    return at


@kernel
def _describe_send(lane):
    """Fill the send list with the next slices. Slices of a cancelled batch are marked and left out."""
    vector, headers = get(lane + SEND_LIST), get(lane + HEADERS)
    identity = get(lane + CONNECTION) << 8 | (VERSION_2 if get(lane + VERSION) == 2 else 0)
    seq, at, tail = get(lane + SEND_SEQ), get(lane + SEND_SLICE), load(lane + TAIL)
    count = slots = total = 0
    while seq != tail and slots < WINDOW and count < LIST - 2 and total < LIST_BYTES:
        entry = _entry(lane, seq)
        piece = get(entry + ENTRY_SLICES) + SLICE * at
        meta = get(piece + META)
        if load(get(entry + ENTRY_BATCH) + CANCEL) != 0 and meta & HIDDEN == 0:
            put(piece + META, meta | SKIPPED)
        else:
            header, length = headers + 24 * slots, get(piece + LENGTH)
            put(header, length)
            put(header + 8, get(piece + REMOTE))
            put(header + 16, identity | meta & WRITING)
            count = _append(vector, count, header, 24)
            if meta & WRITING:
                count = _append(vector, count, get(piece + LOCAL), length)
                total += length
            slots += 1
        at += 1
        if at == get(entry + ENTRY_COUNT):
            seq += 1
            at = 0
    put(lane + SEND_SEQ, seq)
    put(lane + SEND_SLICE, at)
    put(lane + SEND_AT, 0)
    put(lane + SEND_END, count)


@kernel
def _describe_receive(lane):
    """Fill the receive list with the replies to what has been described for sending."""
    vector, statuses, version = get(lane + RECEIVE_LIST), get(lane + STATUSES), get(lane + VERSION)
    seq, at = get(lane + BUILT_SEQ), get(lane + BUILT_SLICE)
    stop_seq, stop_at = get(lane + SEND_SEQ), get(lane + SEND_SLICE)
    count = slots = total = 0
    while (seq != stop_seq or at != stop_at) and slots < WINDOW and count < LIST - 2 and total < LIST_BYTES:
        entry = _entry(lane, seq)
        piece = get(entry + ENTRY_SLICES) + SLICE * at
        meta = get(piece + META)
        if meta & SKIPPED == 0:
            if version == 2:
                count = _append(vector, count, statuses + 8 * slots, 8)
            if meta & WRITING == 0:
                count = _append(vector, count, get(piece + LOCAL), get(piece + LENGTH))
                total += get(piece + LENGTH)
        slots += 1
        at += 1
        if at == get(entry + ENTRY_COUNT):
            seq += 1
            at = 0
    put(lane + BUILT_SEQ, seq)
    put(lane + BUILT_SLICE, at)
    put(lane + RECEIVE_AT, 0)
    put(lane + RECEIVE_END, count)
    put(lane + WINDOW_DONE, 0)


@kernel
def _settle_one(lane, piece, meta):
    """Version 2: complete the head slice if its reply is whole. 1: done; 0: not yet; below: a failure code."""
    received = get(lane + RECEIVED)
    if received < 8:
        return 0
    status = get(get(lane + STATUSES) + 8 * get(lane + WINDOW_DONE))
    if status != OK:
        return REJECTED if status >> 32 == OK >> 32 else MALFORMED
    need = 8 if meta & WRITING else 8 + get(piece + LENGTH)
    if received < need:
        return 0
    put(lane + RECEIVED, received - need)
    finish_head(lane, 0)
    return 1


@kernel
def _settle_run(lane, slices, done, end):
    """Version 1: complete all slices through the next answered READ; 1: done; 0: not yet."""
    upto, need = done, 0
    while upto < end and need == 0:
        piece = slices + SLICE * upto
        if get(piece + META) & (WRITING | SKIPPED) == 0:
            need = get(piece + LENGTH)
        upto += 1
    if need == 0 or get(lane + RECEIVED) < need:
        return 0
    put(lane + RECEIVED, get(lane + RECEIVED) - need)
    for index in range(done, upto):
        finish_head(lane, CANCELLED if get(slices + SLICE * index + META) & SKIPPED else 0)
    return 1


@kernel
def _settle(lane):
    """Complete every slice whose reply has been received whole; 0, or the failure code of the head slice."""
    while get(lane + HEAD) != get(lane + BUILT_SEQ) or get(lane + DONE_SLICES) != get(lane + BUILT_SLICE):
        entry, done = head_entry(lane), get(lane + DONE_SLICES)
        slices = get(entry + ENTRY_SLICES)
        piece = slices + SLICE * done
        meta = get(piece + META)
        if meta & SKIPPED:
            finish_head(lane, CANCELLED)
            result = 1
        elif get(lane + VERSION) == 2:
            result = _settle_one(lane, piece, meta)
        else:
            whole = get(lane + HEAD) != get(lane + BUILT_SEQ)
            end = get(entry + ENTRY_COUNT) if whole else get(lane + BUILT_SLICE)
            result = _settle_run(lane, slices, done, end)
        if result <= 0:
            return result
        put(lane + WINDOW_DONE, get(lane + WINDOW_DONE) + 1)
    return 0


@kernel
def _send(lane):
    """Send what the socket takes now: bytes, 0 or -1 (broken)."""
    if get(lane + SEND_AT) == get(lane + SEND_END):
        if get(lane + SEND_SEQ) == load(lane + TAIL):
            return 0
        _describe_send(lane)
        if get(lane + SEND_END) == 0:
            return 0
    vector, at, end = get(lane + SEND_LIST), get(lane + SEND_AT), get(lane + SEND_END)
    message = lane + SEND_MESSAGE
    put(message + 16, vector + 16 * at)
    put(message + 24, end - at)
    sent = sendmsg(get(lane + FD), message, DONTWAIT | NOSIGNAL)
    if sent < 0:
        code = errno()
        if code in (EAGAIN, EINTR):
            return 0
        put(lane + CAUSE, code)
        return -1
    put(lane + SEND_AT, advance(vector, at, end, sent))
    return sent


@kernel
def _receive(lane):
    """Receive what is there now: bytes, 0 or -1 (broken)."""
    if get(lane + RECEIVE_AT) == get(lane + RECEIVE_END):
        _describe_receive(lane)
        if get(lane + RECEIVE_END) == 0:
            return 0
    vector, at, end = get(lane + RECEIVE_LIST), get(lane + RECEIVE_AT), get(lane + RECEIVE_END)
    message = lane + RECEIVE_MESSAGE
    put(message + 16, vector + 16 * at)
    put(message + 24, end - at)
    got = recvmsg(get(lane + FD), message, DONTWAIT)
    if got > 0:
        put(lane + RECEIVE_AT, advance(vector, at, end, got))
        put(lane + RECEIVED, get(lane + RECEIVED) + got)
        return got
    if got == 0:
        put(lane + CAUSE, EOF)
        return -1
    code = errno()
    if code in (EAGAIN, EINTR):
        return 0
    put(lane + CAUSE, code)
    return -1


@kernel
def _sleep(lane, left):
    """Sleep until the socket is ready, the doorbell rings or `left` ns have passed (at most NAP)."""
    unsent = get(lane + SEND_AT) != get(lane + SEND_END)
    store(lane + ASLEEP, 1)
    fence()
    if unsent or get(lane + SEND_SEQ) == load(lane + TAIL):
        events = POLLIN | POLLOUT if unsent else POLLIN
        ready = poll(get(lane + FD), events, get(lane + DOORBELL), min(left, NAP))
        if ready >> 16:
            read(get(lane + DOORBELL), lane + SCRATCH, 8)
    store(lane + ASLEEP, 0)


@kernel
def _lead(lane, batch, until):
    """Move bytes until `batch` (0: everything queued) is done, `until`, or the connection breaks."""
    quiet = budget = 0
    while True:
        moved = _send(lane)
        got = _receive(lane) if moved >= 0 else -1
        code = _settle(lane)
        if code != 0:
            put(lane + CAUSE, code)
            return BROKEN
        if batch != 0 and load(batch + WORD) & 1:
            return FINISHED
        if get(lane + HEAD) == load(lane + TAIL):
            return FINISHED if batch == 0 else EMPTY
        if got < 0:
            return BROKEN
        time = now()
        if moved + got > 0:
            if quiet != 0 and budget > 0:
                spin.paid(lane + SPIN)
            quiet = 0
            put(lane + PROGRESS, time)
        elif quiet == 0:
            quiet = time
            budget = spin.budget(lane + SPIN)
        elif time - get(lane + PROGRESS) > get(lane + PATIENCE):
            put(lane + CAUSE, TIMED_OUT)
            return BROKEN
        elif time - quiet > budget:
            if budget > 0:
                spin.failed(lane + SPIN)
                budget = 0
            _sleep(lane, max(0, until - time))  # below 0 would be without end
        else:
            pause()
        if time >= until:
            return AGAIN


@kernel
def drive(lane, batch, until):
    """Wait for `batch` (0: everything) until `until`: move the lane's bytes, or sleep while another thread does.

    EMPTY: this lane holds nothing more of the batch, which another lane still carries.
    """
    while True:
        if batch != 0 and load(batch + WORD) & 1:
            return FINISHED
        if load(lane + STATE) != UP:
            if batch == 0:
                return BROKEN
            return FINISHED if await_batch(batch, until) else AGAIN
        if compare_exchange(lane + OWNER, 0, 1) == 0:
            if load(lane + STATE) != UP:  # broke, or is being repaired, since the look above
                store(lane + OWNER, 0)
                continue
            code = _lead(lane, batch, until)
            if code == BROKEN:
                compare_exchange(lane + STATE, UP, DOWN)  # not when it was closed meanwhile
                ring_thread(lane)
            hand_over(lane)
            if code != BROKEN:
                return code
        elif batch == 0:
            return AGAIN
        else:
            follow(lane, batch, until)
        if now() >= until:
            return AGAIN


@kernel
def attend(lane):
    """The lane thread's loop: move what nobody waits on; returns when the lane needs Python (not UP)."""
    head = -1
    while load(lane + STATE) == UP:
        rest(lane)
        if neglected(lane, head) or load(lane + URGENT) != 0:
            store(lane + URGENT, 0)
            drive(lane, 0, now() + NAP)
        head = load(lane + HEAD)
