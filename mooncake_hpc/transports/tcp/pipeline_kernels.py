"""The initiator's side of the TCP data protocol, pipelined: headers, bodies and replies of whole batches in few calls.

Wire format (the original's): a request is a 24-byte header {u64 size, u64 address, u8 opcode, 7 bytes padding},
then for a WRITE the body. A reply is, in version 2, a status word and then for a READ the payload; version 1 has no
status, so its WRITEs count as done only when a later READ on the same connection has been answered. Requests of one
connection are served in order.

Positions: what has been completed (HEAD, DONE_SLICES), what the receive list describes (BUILT_*), what the send list
describes (SEND_*); completed <= built <= sent. After a lost connection the lane goes on from the first of these.
"""

from __future__ import annotations

from mooncake_hpc.native.atomics import get, load, now, put
from mooncake_hpc.native.compile import kernel
from mooncake_hpc.native.sockets import LIST, append
from mooncake_hpc.transports.queue_kernels import (
    CANCEL,
    CANCELLED,
    DEPTH,
    DONE_SLICES,
    ENTRY,
    ENTRY_BATCH,
    ENTRY_COUNT,
    ENTRY_SLICES,
    HEAD,
    HIDDEN,
    LENGTH,
    LOCAL,
    MALFORMED,
    META,
    PROGRESS,
    REJECTED,
    REMOTE,
    RING,
    SKIPPED,
    SLICE,
    STATE,
    STRANGER,
    TAIL,
    UP,
    WRITING,
    drop_placeholders,
    finish_head,
    head_entry,
    is_cancelled,
    take_out,
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
LIST_BYTES = 8 << 20  # describing more at a time than a socket buffer holds wins nothing

OK = 0x4D43545600000000  # status word: magic "MCTV" << 32 | code
UNPROVED = 2  # code: the client has to prove first that it knows the server's secret
VERSION_2 = 0x80  # bit of the opcode

EOF = -100  # CAUSE: the peer closed the connection


@kernel
def _entry(lane, seq):
    return get(lane + RING) + ENTRY * (seq & (get(lane + DEPTH) - 1))


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
def _frame_bytes(lane, seq, at):
    """What the send list holds of this slice: its header, and the body of a WRITE."""
    piece = get(_entry(lane, seq) + ENTRY_SLICES) + SLICE * at
    meta = get(piece + META)
    if meta & SKIPPED:
        return 0
    return 24 + get(piece + LENGTH) if meta & WRITING else 24


@kernel
def retract(lane):
    """Once the connection is dead: those slices count as not sent of which the socket took no byte."""
    unsent = 0
    for index in range(get(lane + SEND_AT), get(lane + SEND_END)):
        unsent += get(get(lane + SEND_LIST) + 16 * index + 8)
    seq, at = get(lane + SEND_SEQ), get(lane + SEND_SLICE)
    while unsent > 0:
        before, last = (seq, at - 1) if at > 0 else (seq - 1, get(_entry(lane, seq - 1) + ENTRY_COUNT) - 1)
        unsent -= _frame_bytes(lane, before, last)
        if unsent >= 0:
            seq, at = before, last
    put(lane + SEND_SEQ, seq)
    put(lane + SEND_SLICE, at)
    put(lane + SEND_AT, get(lane + SEND_END))


@kernel
def _is_free(lane, seq):
    """Whether nothing of entry `seq` can be under way: not sent, or READs of a connection that is dead."""
    last, at = get(lane + SEND_SEQ), get(lane + SEND_SLICE)
    if seq > last or (seq == last and at == 0):
        return True
    if load(lane + STATE) == UP:
        return False
    entry = _entry(lane, seq)
    first = get(lane + DONE_SLICES) if seq == get(lane + HEAD) else 0
    for index in range(first, at if seq == last else get(entry + ENTRY_COUNT)):
        meta = get(get(entry + ENTRY_SLICES) + SLICE * index + META)
        if meta & WRITING and meta & SKIPPED == 0:
            return False
    return True


@kernel
def drop_cancelled(lane):
    """Complete the cancelled batches of which nothing is under way (the lane's owner only)."""
    for seq in range(get(lane + HEAD), load(lane + TAIL)):
        if is_cancelled(lane, _entry(lane, seq)) and _is_free(lane, seq):
            take_out(lane, seq)
    if load(lane + STATE) != UP:
        drop_placeholders(lane)


@kernel
def writes_in_flight(lane):
    """Whether a WRITE has been given to the socket, wholly or partly, and not completed."""
    seq, at = get(lane + HEAD), get(lane + DONE_SLICES)
    while seq < get(lane + SEND_SEQ) or (seq == get(lane + SEND_SEQ) and at < get(lane + SEND_SLICE)):
        entry = _entry(lane, seq)
        meta = get(get(entry + ENTRY_SLICES) + SLICE * at + META)
        if meta & WRITING and meta & SKIPPED == 0:
            return True
        at += 1
        if at == get(entry + ENTRY_COUNT):
            seq, at = seq + 1, 0
    return False


@kernel
def describe_send(lane):
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
            count = append(vector, count, header, 24)
            if meta & WRITING:
                count = append(vector, count, get(piece + LOCAL), length)
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
def describe_receive(lane):
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
                count = append(vector, count, statuses + 8 * slots, 8)
            if meta & WRITING == 0:
                count = append(vector, count, get(piece + LOCAL), get(piece + LENGTH))
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
        if status == OK | UNPROVED:
            return STRANGER
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
def settle(lane):
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


KERNELS = reset, retract, drop_cancelled, writes_in_flight  # what Python calls
