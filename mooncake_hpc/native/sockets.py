"""Linux constants of sockets, and arrays of struct iovec {address, length}, which scatter and gather calls take."""

from __future__ import annotations

from mooncake_hpc.native.atomics import get, put
from mooncake_hpc.native.compile import kernel

DONTWAIT, NOSIGNAL = 0x40, 0x4000  # flags of sendmsg and recvmsg
EAGAIN, EINTR, ECONNABORTED = 11, 4, 103
NONBLOCK, CLOEXEC = 0o4000, 0o2000000  # flags of accept4
SHUT_RD = 0
SOL_SOCKET, SO_SNDBUF = 1, 7
AF_INET = 2
POLLIN, POLLOUT = 1, 4
LIST = 1024  # struct iovecs in a list: Linux takes no more a call (UIO_MAXIOV)
NAP = 50_000_000  # ns: no sleep is longer without a look at the clock


@kernel
def same_host(one, other):
    """Whether two struct sockaddr_in or sockaddr_in6 have the same address."""
    if get(one) & 0xFFFF == AF_INET:
        return get(one) >> 32 == get(other) >> 32
    return get(one + 8) == get(other + 8) and get(one + 16) == get(other + 16)


@kernel
def append(vector, count, address, length):
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
def shorten(vector, at, end, nbytes):
    """Cut an iovec array to its first `nbytes`: the new end, and the bytes taken from the entry before it."""
    while at < end:
        entry = vector + 16 * at
        length = get(entry + 8)
        at += 1
        if length >= nbytes:
            put(entry + 8, nbytes)
            return at, length - nbytes
        nbytes -= length
    return end, 0
