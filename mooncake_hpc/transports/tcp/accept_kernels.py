"""Threads of a data port: one call accepts connections and serves them, one after the other.

The original opens a connection a request where it pools none. So threads wait in accept(), each gets the next one, and
Python hears of a connection only where its client says an id (ours do), and where it is refused or fails. A thread of
Python's own sees to it that there are enough: it sleeps until nobody waits in accept() any more.
"""

from __future__ import annotations

from mooncake_hpc.native import spin
from mooncake_hpc.native.atomics import (
    accept4,
    close,
    compare_exchange,
    errno,
    fence,
    fetch_add,
    futex_wait,
    futex_wake,
    get,
    getsockname,
    load,
    now,
    pause,
    put,
    setsockopt,
    shutdown,
    store,
)
from mooncake_hpc.native.compile import kernel
from mooncake_hpc.native.sockets import (
    CLOEXEC,
    ECONNABORTED,
    EINTR,
    NONBLOCK,
    SHUT_RD,
    SO_SNDBUF,
    SOL_SOCKET,
    same_host,
)
from mooncake_hpc.transports.tcp.server_kernels import (
    ACCEPTING,
    ADDRESS_SIZE,
    BEGAN,
    BUSY,
    CLOSING,
    CONNECTION,
    COUNTED,
    ENDED,
    ERROR,
    EXPORTS,
    FD,
    GUARD,
    GUARDED,
    LISTENER,
    OURS,
    PEER,
    SEND_BUFFER,
    SERIAL,
    SPIN,
    STAGE_AT,
    STOP,
    serve_connection,
)

SPARE = 16  # threads that wait for a connection at most: Linux sets a descriptor aside for each
LOOK = 60_000_000_000  # ns between two looks at what somebody would have told

UNNEEDED, UNACCEPTED, CLOSED = 6, 7, 8  # what `serve` returns where there is no connection
ACCEPTED = 9  # what it returns once with a new one, where clients have to prove something


@kernel
def _lock(block):
    while compare_exchange(block + GUARD, 0, 1) != 0:
        pause()


@kernel
def _unlock(block):
    store(block + GUARD, 0)


@kernel
def hang_up(block):
    """Close the connection, if there is one."""
    _lock(block)
    if get(block + FD) >= 0:
        close(get(block + FD))
    put(block + FD, -1)
    store(block + BUSY, 0)
    _unlock(block)


@kernel
def stop(block, serial):
    """Have the thread end this connection at its next look, if it has not. Never a FIN before the last WRITE has
    landed: the thread closes."""
    _lock(block)
    if get(block + FD) >= 0 and get(block + SERIAL) == serial:
        store(block + STOP, 1)
        shutdown(get(block + FD), SHUT_RD)
    _unlock(block)


@kernel
def wait_no_more(block):
    """The thread is none of those that wait for a connection, if it was."""
    if get(block + COUNTED) != 0:
        put(block + COUNTED, 0)
        accepting = get(block + EXPORTS) + ACCEPTING
        if fetch_add(accepting, -1) == 1:
            futex_wake(accepting, 1)


@kernel
def _accept(block):
    """Wait for a connection and make it the block's: 0, or what `serve` returns. After UNACCEPTED the thread counts as
    waiting still: where descriptors have run out, another one would fare no better."""
    exports = get(block + EXPORTS)
    if get(block + COUNTED) == 0:
        put(block + COUNTED, 1)
        if fetch_add(exports + ACCEPTING, 1) >= SPARE:
            wait_no_more(block)
            return UNNEEDED
    fd, code = -1, EINTR
    while fd < 0 and code in (EINTR, ECONNABORTED) and load(exports + CLOSING) == 0:
        put(block + ADDRESS_SIZE, 32)
        fd = accept4(get(block + LISTENER), block + PEER, block + ADDRESS_SIZE, NONBLOCK | CLOEXEC)
        code = errno()
    if fd < 0 and load(exports + CLOSING) == 0:
        put(block + ERROR, code)
        return UNACCEPTED
    wait_no_more(block)
    if fd < 0:
        return CLOSED
    _begin_connection(block, fd)
    return 0


@kernel
def _begin_connection(block, fd):
    put(block + ADDRESS_SIZE, 32)
    if getsockname(fd, block + OURS, block + ADDRESS_SIZE) == 0 and same_host(block + PEER, block + OURS):
        setsockopt(fd, SOL_SOCKET, SO_SNDBUF, block + SEND_BUFFER, 4)
    for word in range(STAGE_AT, BEGAN, 8):
        put(block + word, 0)
    put(block + BEGAN, now())
    spin.forget(block + SPIN)
    _lock(block)
    put(block + SERIAL, get(block + SERIAL) + 1)
    store(block + STOP, 0)
    store(block + FD, fd)
    _unlock(block)
    fence()
    if load(get(block + EXPORTS) + CLOSING) != 0:  # whoever stops all may have looked before
        store(block + STOP, 1)


@kernel
def await_shortage(exports):
    """Sleep until no thread waits for a connection; whether connections are still wanted. The thread that is to be
    started then counts as waiting already."""
    while load(exports + CLOSING) == 0:
        waiting = load(exports + ACCEPTING)
        if waiting == 0:
            fetch_add(exports + ACCEPTING, 1)
            return True
        futex_wait(exports + ACCEPTING, waiting, LOOK)
    return False


@kernel
def take_back(exports):
    """No thread could be started after `await_shortage`."""
    fetch_add(exports + ACCEPTING, -1)


@kernel
def end(exports):
    """No more connections are wanted."""
    store(exports + CLOSING, 1)
    futex_wake(exports + ACCEPTING, 1)


@kernel
def serve(block):
    """Serve the block's connection, or the next ones, until Python has to know of it."""
    while True:
        if get(block + FD) < 0:
            code = _accept(block)
            if code != 0:
                return code
            if get(get(block + EXPORTS) + GUARDED) != 0:
                return ACCEPTED
        code = serve_connection(block)
        if code != ENDED or get(block + CONNECTION) != 0:
            return code
        hang_up(block)


KERNELS = serve, await_shortage, take_back, wait_no_more, end, stop, hang_up
