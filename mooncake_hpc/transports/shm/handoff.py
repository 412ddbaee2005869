"""How memory files pass between processes of a host: JSON frames and descriptors over a Unix socket.

The socket's name is abstract and random: it needs no folder and leaves nothing behind. Who reaches it is in the
same network namespace; its user is checked by SO_PEERCRED.
"""

from __future__ import annotations

import array
import json
import os
import socket
import struct
from typing import Any

LENGTH = struct.Struct("<I")
MAX_FRAME = 64 << 20
TIMEOUT = 20.0  # seconds for one exchange: a peer that compiles its kernels on a loaded machine takes several


def peer_is_ours(connection: socket.socket) -> bool:
    """Whether the process at the other end has our user id, or is root."""
    _, uid, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return uid in (0, os.geteuid())


def send(connection: socket.socket, value: Any, fds: list[int]) -> None:
    """Send a JSON value, then each descriptor with one byte. Raises OSError."""
    data = json.dumps(value).encode()
    connection.sendall(LENGTH.pack(len(data)) + data)
    for fd in fds:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))]
        connection.sendmsg([b"\0"], rights)


def receive(connection: socket.socket) -> Any:
    """The next JSON value, None at the end. Raises OSError, ValueError."""
    head = _exactly(connection, LENGTH.size)
    if head is None:
        return None
    (size,) = LENGTH.unpack(head)
    if size > MAX_FRAME:
        raise ValueError(f"a frame of {size} bytes")
    data = _exactly(connection, size)
    return None if data is None else json.loads(data)


def receive_fd(connection: socket.socket) -> int:
    """The next descriptor; the caller's to close. Raises OSError."""
    size = array.array("i").itemsize
    data, rights, _, _ = connection.recvmsg(1, socket.CMSG_LEN(size), socket.MSG_CMSG_CLOEXEC)
    for level, kind, payload in rights:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS) and len(payload) >= size:
            return array.array("i", payload[:size])[0]
    raise ConnectionResetError("the peer closed the connection" if not data else "no descriptor came")


def _exactly(connection: socket.socket, count: int) -> bytes | None:
    parts = bytearray()
    while len(parts) < count:
        part = connection.recv(count - len(parts))
        if not part:
            return None
        parts += part
    return bytes(parts)
