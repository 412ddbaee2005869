"""Authentication at the RPC port: frames that carry the exchange of `mooncake_hpc.core.authentication`.

No frame of Mooncake's begins with their first byte, and it ends a connection to one of its processes. Then comes the
step, and its bytes:

    HELLO      client's nonce, in hexadecimal digits: Mooncake logs what it does not understand
    CHALLENGE  server's nonce and proofs
    REQUEST    client's proof, then the request as it would be without authentication
    REPLY      server's proof, then the reply as it would be
    REFUSED    why the server goes no further

The last two proofs are of request and reply as well: nobody on the way can exchange these.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from enum import IntEnum

from mooncake_hpc.core.authentication import (
    NONCE_BYTES,
    PROOF_BYTES,
    Authentication,
    Expected,
    Purpose,
    Reason,
    refusal,
)
from mooncake_hpc.wire import rpc_frames as frames

AUTHENTICATION = 0xA0  # the first byte
OVERHEAD = 2 + PROOF_BYTES  # bytes that a request or reply is longer by


class Step(IntEnum):
    """The second byte."""

    HELLO = ord("H")
    CHALLENGE = ord("C")
    REQUEST = ord("Q")
    REPLY = ord("R")
    REFUSED = ord("X")


class Refusal(IntEnum):
    """What REFUSED says."""

    NO_SECRET = 0  # the server has none
    UNPROVED = 1  # it wants a HELLO first
    WRONG = 2  # the client's proof is wrong


class Unproved(frames.MalformedFrame):
    """A client was refused, and told so."""


def encode(step: Step, *parts: bytes) -> bytes:
    """A frame of the exchange."""
    return frames.pack(bytes([AUTHENTICATION, step]) + b"".join(parts))


def ask(
    connection: socket.socket, request: bytes, expected: Expected, where: str, limit: int, deadline: float
) -> bytes:
    """Prove each other, send the request's body and return the reply's. `where` is the server's address, for messages.

    Raises AuthenticationError, and as `frames.receive`.
    """
    exchange = expected.open(Purpose.CONTROL, where)
    frames.send(connection, encode(Step.HELLO, exchange.nonce.hex().encode()), deadline)
    try:
        challenge = _take(frames.receive_body(connection, limit, deadline), Step.CHALLENGE, exchange.peer)
    except ConnectionError as error:
        if expected.generation and not isinstance(error, frames.Closed):
            raise  # one of ours that has ended
        raise refusal(exchange.peer, Reason.NO_SECRET_THERE) from None  # Mooncake closes at what it does not know
    frames.send(connection, encode(Step.REQUEST, exchange.prove(challenge, request), request), deadline)
    reply = _take(frames.receive_body(connection, limit + OVERHEAD, deadline), Step.REPLY, exchange.peer)
    exchange.check_reply(reply[:PROOF_BYTES], reply[PROOF_BYTES:])
    return reply[PROOF_BYTES:]


def check_plain(reply: bytes, peer: str) -> None:
    """Raise AuthenticationError where the reply to an unauthenticated request is a refusal."""
    if reply[:1] == bytes([AUTHENTICATION]):
        _take(reply, Step.REPLY, peer)


def _take(body: bytes, step: Step, peer: str) -> bytes:
    """What a frame of this step carries. Raises AuthenticationError."""
    if body[:2] == bytes([AUTHENTICATION, step]):
        return body[2:]
    if body[:2] == bytes([AUTHENTICATION, Step.REFUSED]):
        reasons = {Refusal.UNPROVED: Reason.NO_SECRET_HERE, Refusal.WRONG: Reason.SECRETS_DIFFER}
        code = body[2] if len(body) > 2 else -1
        raise refusal(peer, reasons.get(code, Reason.NO_SECRET_THERE))  # type: ignore[call-overload]
    raise refusal(peer, Reason.NO_SECRET_THERE)


def receive_request(
    client: socket.socket, authentication: Authentication, limit: int, deadline: float
) -> tuple[bytes, Callable[[bytes], bytes]]:
    """A client's request, and what makes the frame of a reply's body; proved where that is required of this client.

    Raises Unproved, with the client told, and as `frames.receive`.
    """
    length, first = frames.receive_head(client, limit + OVERHEAD, deadline)
    if first != AUTHENTICATION:
        if not authentication.allows(client.getpeername()[0]):
            raise _refuse(client, Refusal.UNPROVED, deadline)
        if length > limit:
            raise frames.MalformedFrame(f"frame length {length} is above {limit} (MC_HANDSHAKE_MAX_LENGTH)")
        return frames.receive_rest(client, length, first, deadline), frames.pack
    if not authentication.required:
        raise _refuse(client, Refusal.NO_SECRET, deadline)
    if length != 2 + 2 * NONCE_BYTES:
        raise _refuse(client, Refusal.UNPROVED, deadline)
    hello = frames.receive_rest(client, length, first, deadline)
    try:
        nonce = bytes.fromhex(hello[2:].decode("ascii"))
    except ValueError:
        nonce = b""
    if hello[1] != Step.HELLO or len(nonce) != NONCE_BYTES:
        raise _refuse(client, Refusal.UNPROVED, deadline)
    exchange = authentication.answer(Purpose.CONTROL, nonce)
    frames.send(client, encode(Step.CHALLENGE, exchange.challenge), deadline)
    body = frames.receive_body(client, limit + OVERHEAD, deadline)
    request = body[OVERHEAD:]
    if body[:2] != bytes([AUTHENTICATION, Step.REQUEST]) or not exchange.admits(body[2:OVERHEAD], request):
        raise _refuse(client, Refusal.WRONG, deadline)
    return request, lambda reply: encode(Step.REPLY, exchange.prove_reply(reply), reply)


def _refuse(client: socket.socket, why: Refusal, deadline: float) -> Unproved:
    frames.send(client, encode(Step.REFUSED, bytes([why])), deadline)
    return Unproved(f"a client at {client.getpeername()[0]} was refused: {why.name}")
