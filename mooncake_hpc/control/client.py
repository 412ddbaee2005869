"""Our side of an exchange with a peer's RPC port. A failure is a PeerLost with address and cause."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from msgspec import Struct

from mooncake_hpc.control import proofs
from mooncake_hpc.core.address import dial, explain_failure, is_silent, split
from mooncake_hpc.core.authentication import Authentication, Expected, Reason
from mooncake_hpc.core.decode import LONGEST_SMALL_VALUE, Reader, Text
from mooncake_hpc.core.errors import (
    AuthenticationError,
    ConfigError,
    MalformedRecord,
    MetadataError,
    PeerLost,
    PeerSilent,
    TransferError,
)
from mooncake_hpc.core.interrupt import Interrupt
from mooncake_hpc.core.names import check_text, check_unicode
from mooncake_hpc.core.settings import Settings
from mooncake_hpc.wire import rpc_frames as frames
from mooncake_hpc.wire.descriptor import Ours, SegmentDescriptor
from mooncake_hpc.wire.rpc_frames import Kind, dumps


class _Probe(Struct):
    """The reply to a Probe."""

    status: Text | None = None
    mooncake_hpc: Ours | None = None
    fenced: bool | None = None


class _Notify(Struct):
    """The reply to a Notify."""

    notify_msg: Text | None = None


_read_probe = Reader(_Probe, "answer to a Probe", LONGEST_SMALL_VALUE)
_read_notify = Reader(_Notify, "answer to a Notify", LONGEST_SMALL_VALUE)


class Unanswered(PeerSilent):
    """The peer's port accepts connections, but no reply came in time: busy, stopped, or not Mooncake."""


@dataclass(frozen=True, slots=True)
class ProbeReply:
    """What a living process says of itself."""

    generation: str  # empty: the original
    fenced: bool  # nothing of the connection asked about can land any more


ANYBODY = Expected(Authentication())


def exchange(
    address: str,
    kind: Kind,
    payload: Any,
    timeout: float,
    settings: Settings,
    expected: Expected = ANYBODY,
    interrupt: Interrupt | None = None,
) -> str:
    """Send one frame to `address` (`host:port`) and return the reply's JSON text, within `timeout` seconds.

    Connecting takes at most MC_HANDSHAKE_CONNECT_TIMEOUT of it. `expected` has to be there, and proves it where its
    authentication requires that. Raises PeerLost, of its kind AuthenticationError; ConfigError for a malformed address,
    and for a frame above MC_HANDSHAKE_MAX_LENGTH.
    """
    what = f"{kind.name.capitalize()} request to {address}"
    request = frames.encode_body(kind, dumps(payload))
    if len(request) > settings.handshake_max_length:
        limit = f"MC_HANDSHAKE_MAX_LENGTH={settings.handshake_max_length}"
        raise ConfigError(f"{what}: a frame of {len(request)} bytes is above {limit}, which its receiver has as well")
    deadline = time.monotonic() + timeout
    try:
        body = _ask(address, request, deadline, settings, expected, what, interrupt or Interrupt())
        reply = frames.decode(body)
    except (PeerLost, ConfigError):
        raise
    except TimeoutError as error:
        raise Unanswered(f"{what}: no answer within {timeout:g} s: stopped, busy or cut off?") from error
    except frames.MalformedFrame as error:
        raise PeerLost(f"{what}: the reply is no frame: {error}") from error
    except OSError as error:
        cause = error.strerror or error
        raise PeerLost(f"{what}: no reply ({cause}); is it the RPC port of a Mooncake process?") from error
    if reply.old or reply.kind is not kind:
        raise PeerLost(f"{what}: the reply is of another kind")
    return reply.text


def _ask(
    address: str,
    request: bytes,
    deadline: float,
    settings: Settings,
    expected: Expected,
    what: str,
    interrupt: Interrupt,
) -> bytes:
    """The body of the reply, proved where that is required of the peer at this address."""
    host, port = split(address, settings.handshake_port)
    limit = settings.handshake_max_length
    proving = expected.authentication.required
    while True:
        connected_by = min(deadline, time.monotonic() + settings.handshake_connect_timeout)
        try:
            connection = dial(host, port, connected_by, interrupt)
        except OSError as error:
            kind = PeerSilent if is_silent(error) else PeerLost
            raise kind(f"{what}: cannot connect: {explain_failure(error)}") from error
        with connection, interrupt.cuts(connection):
            if not proving:
                frames.send(connection, frames.pack(request), deadline)
                body = frames.receive_body(connection, limit, deadline)
                proofs.check_plain(body, expected.at(address))
                return body
            allowed = expected.authentication.allows(connection.getpeername()[0])
            try:
                return proofs.ask(connection, request, expected, address, limit, deadline)
            except AuthenticationError as error:
                if error.reason != Reason.NO_SECRET_THERE or not allowed:
                    raise
                proving = False


def probe(
    address: str,
    timeout: float,
    settings: Settings,
    fence: str = "",
    fence_timeout: float = 0.0,
    expected: Expected = ANYBODY,
    interrupt: Interrupt | None = None,
) -> ProbeReply:
    """Ask whether a process lives at `address`. Raises PeerLost when nobody answers.

    With `fence`, also ask it to fence that data connection within `fence_timeout` seconds; the original
    ignores this, and `fenced` is False then.
    """
    request: dict[str, Any] = {"fence": fence, "timeout": fence_timeout} if fence else {}
    text = exchange(address, Kind.PROBE, request, timeout, settings, expected, interrupt)
    try:
        reply = _read_probe(text, "the reply")
    except MalformedRecord as error:
        raise PeerLost(f"Probe request to {address}: the peer answered {text[:80]!r}: {error}") from error
    if reply.status != "success":
        raise PeerLost(f"Probe request to {address}: the peer answered {text[:80]!r}")
    ours = reply.mooncake_hpc or Ours()
    return ProbeReply(ours.generation or "", reply.fenced or False)


def notify(
    address: str, name: str, text: str, timeout: float, settings: Settings, expected: Expected = ANYBODY
) -> None:
    """Hand `text` from the segment `name` to the process at `address`.

    Raises PeerLost; TransferError when the peer refuses it; ConfigError for what is no text.
    """
    check_text(name, "the sender's name")
    check_unicode(text, "a notification")
    answer = exchange(address, Kind.NOTIFY, {"name": name, "notify_msg": text}, timeout, settings, expected)
    try:
        taken = _read_notify(answer, "the reply").notify_msg
    except MalformedRecord as error:
        raise TransferError(f"Notify request to {address}: {error}") from error
    if not taken:
        raise TransferError(f"Notify request to {address}: refused; the peer does not take its notifications")


def fetch_metadata(address: str, timeout: float, settings: Settings, expected: Expected = ANYBODY) -> SegmentDescriptor:
    """The descriptor that a P2PHANDSHAKE node gives. Raises PeerLost; MetadataError where there is none."""
    reply = exchange(address, Kind.METADATA, {}, timeout, settings, expected)
    if reply.strip() == "null":
        raise MetadataError(f"the process at {address} has a metadata server; use that, not P2PHANDSHAKE")
    return SegmentDescriptor.from_json(reply, f"the answer of {address}")
