"""Options of a data connection, the same on both sides."""

from __future__ import annotations

import contextlib
import socket

# Within a host nothing is far away, so that a long queue between the two sides gains nothing: it only leaves the
# processor's cache before the receiver has read it, and keeps one side idle at the start and end of each batch. The
# kernel grows it to tcp_wmem's 4 MiB. 256 to 512 KiB are 1.5 times as fast over loopback, 1 MiB no faster than 4.
# It takes no more than net.core.wmem_max, and counts double, for its own headers (socket(7)).
LOCAL_SEND_BUFFER = 384 << 10  # bytes

# A peer whose host has lost its power, or its network, says nothing. The kernel asks an idle connection's other end
# whether it is there, and gives up bytes that nobody acknowledges. A process that is stopped still acknowledges.
IDLE_S, INTERVAL_S, PROBES = 10, 5, 4  # until the kernel asks for the first time, between two times, how often
VANISHED_S = 30.0  # after which a peer that acknowledges nothing counts as gone: IDLE_S + PROBES * INTERVAL_S


def find_vanished(connection: socket.socket, patience: float) -> None:
    """Have the connection, or all that a listener accepts, end when the other side is gone without a word.

    After VANISHED_S, or `patience` seconds where that is more: so long a peer that takes nothing is waited for. Raises
    OSError.
    """
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, IDLE_S)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, INTERVAL_S)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, PROBES)
    milliseconds = min(int(max(VANISHED_S, patience) * 1000), (1 << 31) - 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)


def set_options(connection: socket.socket) -> None:
    """Non-blocking, without Nagle's delay, with a short queue where both ends are of one address. Raises OSError."""
    connection.setblocking(False)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    with contextlib.suppress(OSError):  # over already, as its first reader will find
        if connection.getsockname()[0] == connection.getpeername()[0]:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, LOCAL_SEND_BUFFER)
