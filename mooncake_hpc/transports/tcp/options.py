"""Options of a data connection, the same on both sides."""

from __future__ import annotations

import contextlib
import socket

# Within a host nothing is far away, so that a long queue between the two sides gains nothing: it only leaves the
# processor's cache before the receiver has read it, and keeps one side idle at the start and end of each batch. The
# kernel grows it to tcp_wmem's 4 MiB. 256 to 512 KiB are 1.5 times as fast over loopback, 1 MiB no faster than 4.
# It takes no more than net.core.wmem_max, and counts double, for its own headers (socket(7)).
LOCAL_SEND_BUFFER = 384 << 10  # bytes


def set_options(connection: socket.socket) -> None:
    """Non-blocking, without Nagle's delay, with a short queue where both ends are of one address. Raises OSError."""
    connection.setblocking(False)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    with contextlib.suppress(OSError):  # over already, as its first reader will find
        if connection.getsockname()[0] == connection.getpeername()[0]:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, LOCAL_SEND_BUFFER)
