"""The initiator's side of the TCP data protocol: whoever waits moves the bytes that `tcp_lists` describes."""

from __future__ import annotations

from mooncake_hpc.native import spin
from mooncake_hpc.native.atomics import errno, fence, get, load, now, pause, poll, put, read, recvmsg, sendmsg, store
from mooncake_hpc.native.compile import Entry, kernel
from mooncake_hpc.native.sockets import DONTWAIT, EAGAIN, EINTR, NAP, NOSIGNAL, POLLIN, POLLOUT, advance, shorten
from mooncake_hpc.transports.queue_kernels import (
    AGAIN,
    ASLEEP,
    BROKEN,
    CAUSE,
    DOORBELL,
    EMPTY,
    FINISHED,
    GOAL,
    HEAD,
    PATIENCE,
    PROGRESS,
    SPIN,
    TAIL,
    TIMED_OUT,
    outcome,
)
from mooncake_hpc.transports.tcp.pipeline_kernels import (
    EOF,
    FD,
    RECEIVE_AT,
    RECEIVE_END,
    RECEIVE_LIST,
    RECEIVE_MESSAGE,
    RECEIVED,
    SCRATCH,
    SEND_AT,
    SEND_END,
    SEND_LIST,
    SEND_MESSAGE,
    SEND_SEQ,
    describe_receive,
    describe_send,
    settle,
)

SIP = 256 << 10  # bytes received at a time where one request is awaited: it is read next, from the nearest cache


@kernel
def _send(lane):
    """Send what the socket takes now: bytes, 0 or -1 (broken)."""
    if get(lane + SEND_AT) == get(lane + SEND_END):
        if get(lane + SEND_SEQ) == load(lane + TAIL):
            return 0
        describe_send(lane)
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
def _receive(lane, sip):
    """Receive what is there now (`sip`: SIP bytes of it at most): bytes, 0 or -1 (broken)."""
    if get(lane + RECEIVE_AT) == get(lane + RECEIVE_END):
        describe_receive(lane)
        if get(lane + RECEIVE_END) == 0:
            return 0
    vector, at, end = get(lane + RECEIVE_LIST), get(lane + RECEIVE_AT), get(lane + RECEIVE_END)
    cut = 0
    if sip:
        end, cut = shorten(vector, at, end, SIP)
    message = lane + RECEIVE_MESSAGE
    put(message + 16, vector + 16 * at)
    put(message + 24, end - at)
    got = recvmsg(get(lane + FD), message, DONTWAIT)
    last = vector + 16 * (end - 1)
    put(last + 8, get(last + 8) + cut)
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


@Entry
def lead(lane, batch, until):
    """Move bytes until `batch` (0: everything queued) is done, `until`, or the connection breaks."""
    quiet = budget = 0
    while True:
        moved = _send(lane)
        got = _receive(lane, batch != 0 and get(batch + GOAL) != 0) if moved >= 0 else -1
        code = settle(lane)
        if code != 0:
            put(lane + CAUSE, code)
            return BROKEN
        if batch != 0:
            code = outcome(batch)
            if code != AGAIN:
                return code
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
