"""How memory files pass between processes of a host: JSON frames and descriptors over a Unix socket.

The socket's name is abstract and random: it needs no folder and leaves nothing behind. Who reaches it is in the
same network namespace; its user is checked by SO_PEERCRED. With a secret (`mooncake_hpc.authentication`) the first
frames are `{"hello": nonce}`, `{"challenge": …}` and `{"proof": …}` in hexadecimal digits; `{"refused": …}` ends a
connection.
"""

from __future__ import annotations

import array
import json
import os
import socket
import struct
from typing import Any

from mooncake_hpc.authentication import Authentication, Expected, Purpose, Reason, refusal

HELLO_BYTES = 1 << 10  # longest frame of a client that has proved nothing yet
LENGTH = struct.Struct("<I")
WHERE = "its shared-memory socket"  # for messages
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


def receive(connection: socket.socket, limit: int = MAX_FRAME) -> Any:
    """The next JSON value, None at the end. Raises OSError, ValueError."""
    head = _exactly(connection, LENGTH.size)
    if head is None:
        return None
    (size,) = LENGTH.unpack(head)
    if size > limit:
        raise ValueError(f"a frame of {size} bytes")
    data = _exactly(connection, size)
    return None if data is None else json.loads(data)


def prove(connection: socket.socket, expected: Expected) -> None:
    """As the client: have the server prove who it is, and prove ourselves, where that is required.

    Raises AuthenticationError, and as `receive`.
    """
    if not expected.authentication.required:
        return
    exchange = expected.open(Purpose.SHM, WHERE)
    try:
        send(connection, {"hello": exchange.nonce.hex()}, [])
        reply = receive(connection, HELLO_BYTES)
    except ConnectionError:
        reply = None
    if not isinstance(reply, dict) or not isinstance(challenge := reply.get("challenge"), str):
        raise refusal(exchange.peer, Reason.NO_SECRET_THERE)
    send(connection, {"proof": exchange.prove(bytes.fromhex(challenge)).hex()}, [])


def check_admitted(reply: Any, expected: Expected) -> None:
    """Raise AuthenticationError where the server's reply to our first request is a refusal."""
    if isinstance(reply, dict) and "refused" in reply:
        reason = Reason.SECRETS_DIFFER if expected.authentication.required else Reason.NO_SECRET_HERE
        raise refusal(expected.at(WHERE), reason)


def admit(connection: socket.socket, authentication: Authentication) -> bool:
    """As the server: whether the client has proved that it knows our secret. Raises as `receive`."""
    hello = receive(connection, HELLO_BYTES)
    try:
        exchange = authentication.answer(Purpose.SHM, bytes.fromhex(hello["hello"]))
        send(connection, {"challenge": exchange.challenge.hex()}, [])
        if exchange.admits(bytes.fromhex(receive(connection, HELLO_BYTES)["proof"])):
            return True
    except (ValueError, KeyError, TypeError):  # no such fields
        pass
    refuse(connection)
    return False


def refuse(connection: socket.socket) -> None:
    """Tell a client that nothing is handed out to it. Raises OSError."""
    send(connection, {"refused": "authentication"}, [])


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
