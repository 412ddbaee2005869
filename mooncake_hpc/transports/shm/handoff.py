"""How memory files pass between processes of a host: JSON frames and descriptors over a Unix socket.

The socket's name is abstract and random: it needs no folder and leaves nothing behind. Who reaches it is in the
same network namespace; its user is checked by SO_PEERCRED. With a secret (`mooncake_hpc.core.authentication`) the first
frames are `{"hello": nonce}`, `{"challenge": …}` and `{"proof": …}` in hexadecimal digits; `{"refused": …}` ends a
connection.
"""

from __future__ import annotations

import array
import json
import os
import select
import socket
import struct
from typing import Annotated, Any, TypeVar

from msgspec import Meta, Struct

from mooncake_hpc.core.authentication import Authentication, Expected, Purpose, Reason, refusal
from mooncake_hpc.core.decode import Address, Count, Length, Positive, Reader, Text, check_range
from mooncake_hpc.core.errors import MalformedRecord
from mooncake_hpc.wire.descriptor import MAX_BUFFERS

HELLO_BYTES = 1 << 10  # longest frame of a client that has proved nothing yet
LENGTH = struct.Struct("<I")
WHERE = "its shared-memory socket"  # for messages
MAX_FRAME, MAX_REQUEST = 64 << 20, 2 << 20  # bytes
MAX_FILES = 65536  # as many as Linux lets a process map (vm.max_map_count)
TIMEOUT = 20.0  # seconds for one exchange: a peer that compiles its kernels on a loaded machine takes several

T = TypeVar("T")
_Hex = Annotated[str, Meta(pattern="^([0-9a-f]{2}){0,128}$")]


class Request(Struct):
    """What a client sends: the files that it has already, or a step of the authentication."""

    have: Annotated[tuple[Count, ...], Meta(max_length=MAX_FILES)] | None = None
    hello: _Hex | None = None
    proof: _Hex | None = None


class Reply(Struct):
    """What a server sends: all its buffers, as (address, bytes, whether read-only), and the files in which they lie, as
    (serial, address, bytes). Descriptors follow, of the shared page where `page` says so, and of the `new` files.
    """

    version: Count = 0
    page: bool = False
    files: Annotated[tuple[tuple[Count, Address, Positive], ...], Meta(max_length=MAX_FILES)] = ()
    new: Annotated[tuple[Count, ...], Meta(max_length=MAX_FILES)] = ()
    buffers: Annotated[tuple[tuple[Address, Length, bool], ...], Meta(max_length=MAX_BUFFERS)] = ()
    challenge: _Hex | None = None
    refused: Text | None = None

    def __post_init__(self) -> None:
        serials = {serial for serial, _, _ in self.files}
        if len(serials) != len(self.files) or len(set(self.new)) != len(self.new):
            raise ValueError("a file is named twice")
        if not serials.issuperset(self.new):
            raise ValueError("a new file is none of the files")
        for _, address, nbytes in self.files:
            check_range(address, nbytes)
        for address, nbytes, _ in self.buffers:
            check_range(address, nbytes)


read_request = Reader(Request, "request for memory files", MAX_REQUEST)
read_reply = Reader(Reply, "list of memory files", MAX_FRAME)


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


def await_reply(connection: socket.socket, timeout: float) -> bool:
    """Whether something has come, or the end, within `timeout` seconds."""
    waiting = select.poll()
    waiting.register(connection, select.POLLIN)
    return bool(waiting.poll(max(0.0, timeout) * 1000))


def receive(connection: socket.socket, read: Reader[T], limit: int = MAX_FRAME) -> T | None:
    """The next message, None at the end. Raises OSError, MalformedRecord."""
    head = _exactly(connection, LENGTH.size)
    if head is None:
        return None
    (size,) = LENGTH.unpack(head)
    if size > limit:
        raise MalformedRecord(f"a frame of {size} bytes is above the limit of {limit}")
    data = _exactly(connection, size)
    return None if data is None else read(data, "a frame")


def prove(connection: socket.socket, expected: Expected) -> None:
    """As the client: have the server prove who it is, and prove ourselves, where that is required.

    Raises AuthenticationError, and as `receive`.
    """
    if not expected.authentication.required:
        return
    exchange = expected.open(Purpose.SHM, WHERE)
    try:
        send(connection, {"hello": exchange.nonce.hex()}, [])
        reply = receive(connection, read_reply, HELLO_BYTES)
    except ConnectionError:
        reply = None
    if reply is None or reply.challenge is None:
        raise refusal(exchange.peer, Reason.NO_SECRET_THERE)
    send(connection, {"proof": exchange.prove(bytes.fromhex(reply.challenge)).hex()}, [])


def check_admitted(reply: Reply, expected: Expected) -> None:
    """Raise AuthenticationError where the server's reply to our first request is a refusal."""
    if reply.refused is not None:
        reason = Reason.SECRETS_DIFFER if expected.authentication.required else Reason.NO_SECRET_HERE
        raise refusal(expected.at(WHERE), reason)


def admit(connection: socket.socket, authentication: Authentication) -> bool:
    """As the server: whether the client has proved that it knows our secret. Raises as `receive`."""
    hello = receive(connection, read_request, HELLO_BYTES)
    if hello is not None and hello.hello is not None:
        exchange = authentication.answer(Purpose.SHM, bytes.fromhex(hello.hello))
        send(connection, {"challenge": exchange.challenge.hex()}, [])
        answer = receive(connection, read_request, HELLO_BYTES)
        if answer is not None and answer.proof is not None and exchange.admits(bytes.fromhex(answer.proof)):
            return True
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
