"""Authentication at the data port: what a connection begins with where a secret is set.

    client  4 request headers: size 0, 8 bytes of the nonce as the address, opcode 0xA0, padding 0
    server  status word CHALLENGE, then its nonce and proofs
    client  its proof, then requests as without authentication

A request to read nothing at all does no harm anywhere: a process of Mooncake's, or of ours without a secret, refuses
the first one and closes. A client that begins with anything else is refused before any address is looked at; where it
speaks protocol version 2, status word UNPROVED tells it why.
"""

from __future__ import annotations

import socket
import struct
import time

from mooncake_hpc.core.authentication import (
    CHALLENGE_BYTES,
    NONCE_BYTES,
    PROOF_BYTES,
    TIMEOUT,
    Authentication,
    Expected,
    Purpose,
    Reason,
    refusal,
)
from mooncake_hpc.core.errors import AuthenticationError
from mooncake_hpc.transports.tcp.pipeline_kernels import OK, UNPROVED, VERSION_2
from mooncake_hpc.wire import rpc_frames as frames

HEADER = struct.Struct("<QQQ")  # size, address, opcode and padding
OPCODE = 0xA0  # bit 7: refused by a status word, as in version 2
WORDS = struct.Struct(f"<{NONCE_BYTES // 8}Q")
STATUS = struct.Struct("<Q")
CHALLENGE = OK | 3


class Refused(Exception):
    """A client has not proved what it has to, and was told so; the text says which."""


def prove(connection: socket.socket, expected: Expected, where: str, deadline: float) -> None:
    """As the client: have the server prove who it is, and prove ourselves, until `deadline` (time.monotonic()).

    Raises AuthenticationError, or OSError, TimeoutError among it.
    """
    exchange = expected.open(Purpose.DATA, where)
    hello = b"".join(HEADER.pack(0, word, OPCODE) for word in WORDS.unpack(exchange.nonce))
    frames.send(connection, hello, deadline)
    (word,) = STATUS.unpack(frames.receive_exactly(connection, STATUS.size, deadline))
    if word != CHALLENGE:
        raise refusal(exchange.peer, Reason.NO_SECRET_THERE)
    challenge = frames.receive_exactly(connection, CHALLENGE_BYTES, deadline)
    frames.send(connection, exchange.prove(challenge), deadline)


def settle(connection: socket.socket, expected: Expected, where: str, deadline: float) -> bool:
    """As `prove`; but False where an allowed peer proves nothing, and a new connection may go without."""
    allowed = expected.authentication.allows(connection.getpeername()[0])
    if not expected.generation:  # of Mooncake, and not to be tried with what it does not know
        if allowed:
            return True
        raise refusal(expected.at(where), Reason.NO_SECRET_THERE)
    try:
        prove(connection, expected, where, deadline)
    except AuthenticationError as error:
        if error.reason != Reason.NO_SECRET_THERE or not allowed:
            raise
        return False
    return True


def admit(client: socket.socket, authentication: Authentication) -> bytes:
    """As the server: return once the client has proved that it knows our secret, or needs not.

    The bytes returned were received from it, and are requests. Raises Refused, with the client told, or OSError,
    TimeoutError among it.
    """
    address = client.getpeername()[0]
    began = b""
    if authentication.allows(address):
        client.settimeout(None)  # as without authentication, it may be silent for as long as it likes
        began = client.recv(1)
    deadline = time.monotonic() + TIMEOUT
    header = began + frames.receive_exactly(client, HEADER.size - len(began), deadline)
    if not _greets(header):
        if authentication.allows(address):
            return header
        raise _refuse(client, address, "no hello", header[16] & VERSION_2, deadline)
    hello = header + frames.receive_exactly(client, HEADER.size * (WORDS.size // 8 - 1), deadline)
    headers = [hello[at : at + HEADER.size] for at in range(0, len(hello), HEADER.size)]
    if not all(map(_greets, headers)):
        raise _refuse(client, address, "no hello", True, deadline)
    exchange = authentication.answer(Purpose.DATA, b"".join(header[8:16] for header in headers))
    frames.send(client, STATUS.pack(CHALLENGE) + exchange.challenge, deadline)
    if not exchange.admits(frames.receive_exactly(client, PROOF_BYTES, deadline)):
        raise _refuse(client, address, "a wrong proof", True, deadline)
    return b""


def _greets(header: bytes) -> bool:
    size, _, rest = HEADER.unpack(header)
    return bool(size == 0 and rest == OPCODE)


def _refuse(client: socket.socket, address: str, why: str, told: int, deadline: float) -> Refused:
    if told:
        frames.send(client, STATUS.pack(OK | UNPROVED), deadline)
    return Refused(f"a client at {address} was refused: {why}")
