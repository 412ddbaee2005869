"""The target's side of the TCP data protocol: one call serves one connection until it ends.

Received bytes go to a staging buffer, where headers are parsed and small WRITE bodies are copied out; the rest of a
large body is received straight into its destination, together with what follows it. Replies are gathered and sent
before the server would wait, or before a WRITE follows unsent READ replies (their bytes must be those of before).

While a connection refers to registered memory its BUSY word holds the version of the tables it uses; whoever takes
memory out of the tables waits until no connection is busy with an older version.
"""

from __future__ import annotations

from mooncake_hpc.native import spin
from mooncake_hpc.native.atomics import (
    copy,
    errno,
    fence,
    fetch_add,
    get,
    get_byte,
    load,
    now,
    pause,
    poll,
    put,
    recvmsg,
    sendmsg,
    store,
)
from mooncake_hpc.native.compile import kernel
from mooncake_hpc.native.ranges import room
from mooncake_hpc.native.sockets import (
    DONTWAIT,
    EAGAIN,
    EINTR,
    LIST,
    NAP,
    NOSIGNAL,
    POLLIN,
    POLLOUT,
    advance,
)
from mooncake_hpc.transports.tcp.pipeline_kernels import VERSION_2 as FRAMING_2

# --- words of a thread's block
FD = 0  # of the connection being served, -1: none
STOP = 8  # set by others: end the connection at the next look
BUSY = 16  # version of the tables in use; 0: refers to no registered memory
SERIAL = 24  # connections so far: tells the present one from others
GUARD = 32  # 1 while somebody closes or stops the connection
# of a connection, 0 at its beginning
STAGE_AT, STAGE_END = 40, 48  # staging buffer, parsed and received up to
REPLY_COUNT, REPLY_READS = 56, 64  # entries of REPLIES, whether READ payloads are among them
BODY_AT, BODY_LEFT, BODY_ACK = 72, 80, 88  # destination of the WRITE being received; 1: acknowledge it, 2: do not
LARGE = 96  # 1: the last body was large; receive the next header alone
CONNECTION = 104  # id that the client gave this connection; 0: none yet
ASKED = 112  # 1: a request has come over it
BEGAN = 120  # when, ns
# of the thread
EXPORTS = 128  # address of the exports block
LISTENER = 136
STAGE, REPLIES = 144, 152  # staging buffer, struct iovec array
PATIENCE = 160  # ns without progress in the middle of a request or reply after which the client counts as dead
SEND_BUFFER = 168  # bytes (int32), where both ends are of one host
GOOD, REFUSAL = 176, 184  # status words
BYTES_IN, BYTES_OUT = 192, 200  # of all its connections
MESSAGE = 208  # struct msghdr, 7 words
PAIR = 264  # two struct iovecs
SPIN = 296  # a spinner (`native.spin`), 3 words
PEER, OURS = 320, 352  # struct sockaddr_in6
ADDRESS_SIZE = 384  # socklen_t
ERROR = 392  # errno of accept
COUNTED = 400  # 1: the thread is among ACCEPTING
BLOCK_WORDS = 51

# --- words of the exports block, one an engine
EXPORT_VERSION, EXPORT_TABLES = 0, 8  # EXPORT_TABLES: tables readable, writable (as for `cut`)
SPINNING, SPINNING_LIMIT = 24, 32
ACCEPTING = 40  # threads that wait for a connection
CLOSING = 48  # 1: no more connections are wanted
GUARDED = 56  # 1: clients prove first that they know our secret
EXPORT_WORDS = 8

STAGE_BYTES = 256 << 10
LARGE_BODY = 16 << 10
LULL = 128  # pauses between two looks for the rest of a large body: a look takes the lock that its bytes need too

ENDED, HELLO, REFUSED, FAILED, STALLED, STOPPED = 0, 1, 2, 3, 4, 5  # what `serve_connection` returns


@kernel
def _enter(block):
    """Take the current tables."""
    exports = get(block + EXPORTS)
    version = load(exports + EXPORT_VERSION)
    while True:
        store(block + BUSY, version)
        fence()
        again = load(exports + EXPORT_VERSION)
        if again == version:
            return
        version = again


@kernel
def _reply(block, address, length):
    entry = get(block + REPLIES) + 16 * get(block + REPLY_COUNT)
    put(entry, address)
    put(entry + 8, length)
    put(block + REPLY_COUNT, get(block + REPLY_COUNT) + 1)


@kernel
def _flush(block):
    """Send all replies: 0, FAILED, STALLED or STOPPED."""
    vector, at, end = get(block + REPLIES), 0, get(block + REPLY_COUNT)
    message = block + MESSAGE
    since = 0
    while at < end:
        put(message + 16, vector + 16 * at)
        put(message + 24, end - at)
        sent = sendmsg(get(block + FD), message, DONTWAIT | NOSIGNAL)
        if sent > 0:
            at = advance(vector, at, end, sent)
            since = 0
            continue
        code = errno()
        if code not in (EAGAIN, EINTR):
            return FAILED
        time = now()
        since = time if since == 0 else since
        if time - since > get(block + PATIENCE):
            return STALLED
        if load(block + STOP) != 0:
            return STOPPED
        poll(get(block + FD), POLLOUT, -1, NAP)
    put(block + REPLY_COUNT, 0)
    put(block + REPLY_READS, 0)
    return 0


@kernel
def _take_body(block):
    """Move staged bytes of the current WRITE to their destination; acknowledge it when whole."""
    left = get(block + BODY_LEFT)
    at = get(block + STAGE_AT)
    size = min(left, get(block + STAGE_END) - at)
    if size > 0:
        copy(get(block + BODY_AT), get(block + STAGE) + at, size)
        put(block + BODY_AT, get(block + BODY_AT) + size)
        put(block + STAGE_AT, at + size)
        put(block + BODY_LEFT, left - size)
    if left == size:
        if get(block + BODY_ACK) == 1:
            _reply(block, block + GOOD, 8)
        put(block + BODY_ACK, 0)


@kernel
def _begin(block, header):
    """Start the request at `header`: queue a READ's reply, or set up a WRITE's body; REFUSED if not allowed."""
    size, address, opcode = get(header), get(header + 8), get_byte(header + 16)
    tables = get(block + EXPORTS) + EXPORT_TABLES
    writing = 1 if opcode & 127 == 1 else 0
    put(block + ASKED, 1)
    if size <= 0 or size > room(get(tables + 8 * writing), address):
        if opcode & FRAMING_2:
            _reply(block, block + REFUSAL, 8)
        return REFUSED
    if writing:
        put(block + BODY_AT, address)
        put(block + BODY_LEFT, size)
        put(block + BODY_ACK, 1 if opcode & FRAMING_2 else 2)
        put(block + LARGE, 1 if size >= LARGE_BODY else 0)
        put(block + BYTES_IN, get(block + BYTES_IN) + size)
        return 0
    if opcode & FRAMING_2:
        _reply(block, block + GOOD, 8)
    _reply(block, address, size)
    put(block + REPLY_READS, 1)
    put(block + LARGE, 0)
    put(block + BYTES_OUT, get(block + BYTES_OUT) + size)
    return 0


@kernel
def _parse(block):
    """Carry out everything staged: 0 when more bytes are needed, else what `serve` returns."""
    stage = get(block + STAGE)
    while True:
        if get(block + BODY_ACK) != 0:
            _take_body(block)
            if get(block + BODY_ACK) != 0:
                return 0
        at, end = get(block + STAGE_AT), get(block + STAGE_END)
        if end - at < 24:
            if at > 0:
                copy(stage, stage + at, end - at)
                put(block + STAGE_AT, 0)
                put(block + STAGE_END, end - at)
            return 0
        header = stage + at
        identity = get(header + 16) >> 8
        if get(block + CONNECTION) == 0 and identity != 0:
            put(block + CONNECTION, identity)
            return HELLO
        if get(block + BUSY) == 0:
            _enter(block)
        writing = get_byte(header + 16) & 127 == 1
        if get(block + REPLY_COUNT) > LIST - 4 or (writing and get(block + REPLY_READS) != 0):
            code = _flush(block)
            if code != 0:
                return code
        put(block + STAGE_AT, at + 24)
        code = _begin(block, header)
        if code != 0:
            return code


@kernel
def _receive(block):
    """One receive without waiting: into the current body and then the staging buffer. Bytes, 0 (end) or -1."""
    left, end = get(block + BODY_LEFT), get(block + STAGE_END)
    if left > 0:
        end = 0
        put(block + STAGE_AT, 0)
        put(block + STAGE_END, 0)
    put(block + PAIR, get(block + BODY_AT))
    put(block + PAIR + 8, left)
    put(block + PAIR + 16, get(block + STAGE) + end)
    put(block + PAIR + 24, 24 - end if get(block + LARGE) != 0 and end < 24 else STAGE_BYTES - end)
    message = block + MESSAGE
    put(message + 16, block + PAIR + (0 if left > 0 else 16))
    put(message + 24, 2 if left > 0 else 1)
    got = recvmsg(get(block + FD), message, DONTWAIT)
    if got > 0:
        direct = min(got, left)
        put(block + BODY_AT, get(block + BODY_AT) + direct)
        put(block + BODY_LEFT, left - direct)
        put(block + STAGE_END, end + got - direct)
    return got


@kernel
def _await_bytes(block):
    """Receive, spinning briefly and then sleeping. 0: something came; else what `serve` returns."""
    partial = get(block + BODY_ACK) != 0 or get(block + STAGE_END) > get(block + STAGE_AT)
    began = now()
    exports = get(block + EXPORTS)
    budget = spin.budget(block + SPIN)
    spinning = budget > 0 and fetch_add(exports + SPINNING, 1) < get(exports + SPINNING_LIMIT)
    if budget > 0 and not spinning:
        fetch_add(exports + SPINNING, -1)
    code = -1
    while code < 0:
        got = _receive(block)
        if got > 0:
            code = 0
        elif got == 0:
            code = ENDED + 100
        elif errno() not in (EAGAIN, EINTR):
            code = FAILED
        elif load(block + STOP) != 0:
            code = STOPPED
        else:
            quiet = now() - began
            if spinning and quiet < budget:
                for _ in range(LULL if get(block + BODY_LEFT) >= LARGE_BODY else 1):
                    pause()
            else:
                if spinning:
                    spin.failed(block + SPIN)
                    fetch_add(exports + SPINNING, -1)
                    spinning = False
                if partial and quiet > get(block + PATIENCE):
                    code = STALLED
                else:
                    poll(get(block + FD), POLLIN, -1, NAP * 20 if partial else -1)
    if spinning:
        spin.paid(block + SPIN)
        fetch_add(exports + SPINNING, -1)
    return code


@kernel
def serve_connection(block):
    """Serve until the connection ends (ENDED, FAILED, STALLED, REFUSED, STOPPED) or the client says its id (HELLO)."""
    while True:
        code = _parse(block)
        flushed = _flush(block)
        if code != 0:
            return code
        if flushed != 0:
            return flushed
        if get(block + BODY_ACK) == 0:
            store(block + BUSY, 0)
        code = _await_bytes(block)
        if code != 0:
            return code % 100
