"""Frames of the original's RPC port: `u64 length` (little-endian), `u8 kind`, JSON text; the length counts
kind and text.

The old protocol has no kind byte: where JSON text begins right after the length, the frame is a Connection, and its
reply has no kind byte either. Any other first byte that is no kind, a length of 0 or above the limit, and malformed
JSON end the connection without a reply. Bytes from 0x80 on begin no JSON text: one of them is of `proofs`.
"""

from __future__ import annotations

import json
import socket
import struct
import time
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from msgspec import Raw

from mooncake_hpc.core.decode import Reader
from mooncake_hpc.core.errors import MalformedRecord

LENGTH = struct.Struct("<Q")
JSON_BEGINS = b'{["-0123456789tfn \t\r\n'  # RFC 8259: no frame kind is among these bytes
CHUNK = 1 << 16  # bytes asked of one recv: memory grows with what arrives, not with what a header claims


class Kind(IntEnum):
    """Kind of an exchange; request and reply carry the same."""

    CONNECTION = 0  # RDMA handshake
    METADATA = 1  # the receiver's segment descriptor
    NOTIFY = 2
    PROBE = 3


KINDS = frozenset(Kind)


class MalformedFrame(MalformedRecord):
    """Bytes that are no frame; the connection cannot be used any further."""


class Closed(ConnectionError):
    """The other side closed before the end of a frame."""


@dataclass(frozen=True, slots=True)
class Frame:
    kind: Kind
    text: str  # well-formed JSON of any kind
    old: bool = False  # came without the kind byte


_check_json = Reader(Raw, "JSON", nul=True)


def dumps(value: Any) -> str:
    """JSON as the original writes it: one line, sorted keys, a newline at the end."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")) + "\n"


def encode(kind: Kind, text: str, old: bool = False) -> bytes:
    """The frame that carries the JSON `text`; `old` leaves the kind byte out."""
    return pack(encode_body(kind, text, old))


def encode_body(kind: Kind, text: str, old: bool = False) -> bytes:
    """As `encode`, without the length."""
    return (b"" if old else bytes([kind])) + text.encode()


def pack(body: bytes) -> bytes:
    """The frame of a body."""
    return LENGTH.pack(len(body)) + body


def decode(body: bytes) -> Frame:
    """The frame whose length was already taken off. Raises MalformedFrame."""
    old = body[:1] in JSON_BEGINS
    if not body or not (old or body[0] in KINDS):
        raise MalformedFrame("neither a frame kind nor JSON text at the start of a frame")
    try:
        text = body[0 if old else 1 :].decode()
        _check_json(text, "a frame")
    except ValueError as error:  # UnicodeDecodeError is one
        raise MalformedFrame(str(error)) from error
    return Frame(Kind.CONNECTION if old else Kind(body[0]), text, old)


def receive(connection: socket.socket, limit: int, deadline: float) -> Frame:
    """Read one frame of at most `limit` bytes until `deadline` (of `time.monotonic`, seconds).

    Raises MalformedFrame, Closed, TimeoutError, or OSError as the socket reports it.
    """
    return decode(receive_body(connection, limit, deadline))


def receive_body(connection: socket.socket, limit: int, deadline: float) -> bytes:
    """As `receive`, the frame's bytes after its length."""
    return receive_rest(connection, *receive_head(connection, limit, deadline), deadline)


def receive_head(connection: socket.socket, limit: int, deadline: float) -> tuple[int, int]:
    """The next frame's length, and its first byte, which says what it is before the rest takes any memory."""
    (length,) = LENGTH.unpack(receive_exactly(connection, LENGTH.size, deadline))
    if not 0 < length <= limit:
        raise MalformedFrame(f"frame length {length} is outside 1 to {limit} (MC_HANDSHAKE_MAX_LENGTH)")
    return length, receive_exactly(connection, 1, deadline)[0]


def receive_rest(connection: socket.socket, length: int, first: int, deadline: float) -> bytes:
    """The body of the frame whose head was received."""
    return bytes([first]) + receive_exactly(connection, length - 1, deadline)


def send(connection: socket.socket, data: bytes, deadline: float) -> None:
    """Send all of `data` until `deadline`. Raises TimeoutError or OSError."""
    connection.settimeout(remaining(deadline))
    connection.sendall(data)


def remaining(deadline: float) -> float:
    """Seconds until `deadline`. Raises TimeoutError when it has passed."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("deadline passed")
    return left


def receive_exactly(connection: socket.socket, count: int, deadline: float) -> bytes:
    """The next `count` bytes. Raises Closed, TimeoutError or OSError."""
    data = bytearray()
    while len(data) < count:
        connection.settimeout(remaining(deadline))
        piece = connection.recv(min(CHUNK, count - len(data)))
        if not piece:
            raise Closed(f"closed after {len(data)} of {count} bytes")
        data += piece
    return bytes(data)
