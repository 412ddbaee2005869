"""The RPC port: answers Connection, Metadata, Notify and Probe frames, each connection in its own thread.

The original serves one connection at a time, so that one silent client blocks the node for 5 seconds. Here a
slow, silent or garbage-sending client costs one of `MAX_CONNECTIONS` threads, and the oldest of them is cut
off when they run out.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import secrets
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any, NamedTuple

from msgspec import Meta, Struct

from mooncake_hpc.control import proofs
from mooncake_hpc.core.address import bind_listener, split
from mooncake_hpc.core.authentication import Authentication
from mooncake_hpc.core.decode import LONGEST_SMALL_VALUE, Reader, Text
from mooncake_hpc.core.errors import ConfigError, MalformedRecord
from mooncake_hpc.core.process import own
from mooncake_hpc.core.settings import Settings
from mooncake_hpc.core.trouble import Trouble
from mooncake_hpc.wire import rpc_frames as frames
from mooncake_hpc.wire.descriptor import OURS
from mooncake_hpc.wire.rpc_frames import Frame, Kind, dumps

log = logging.getLogger(__name__)

MAX_CONNECTIONS = 64
CLIENT_TIMEOUT = 5.0  # seconds to send the request, to take the reply, to close; as the original
WARNING_INTERVAL = 5.0  # seconds between two warnings of refused clients
MAX_FENCE_TIMEOUT = 10.0  # seconds a Probe may wait for its fence
LONGEST_FENCE = 64  # characters
MAX_NOTIFICATIONS, MAX_NOTIFICATION_BYTES = 65536, 64 << 20
NOTIFICATION_LIFE_S = 3600.0


class Notifications:
    """What peers sent by Notify and nobody took yet: a message is kept for NOTIFICATION_LIFE_S seconds.

    Bounded in number and in bytes of memory: once it is full, senders are refused. Thread-safe.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: deque[_Message] = deque()
        self._size = 0

    def put(self, name: str, text: str) -> bool:
        """Keep the message; False when there is no room."""
        now, size = time.monotonic(), sys.getsizeof(name) + sys.getsizeof(text)
        with self._lock:
            self._expire(now)
            if len(self._waiting) >= MAX_NOTIFICATIONS or self._size + size > MAX_NOTIFICATION_BYTES:
                return False
            self._waiting.append(_Message(name, text, size, now))
            self._size += size
            return True

    def take(self) -> list[tuple[str, str]]:
        """All (sender's segment name, text) that arrived since the last call, oldest first."""
        with self._lock:
            self._expire(time.monotonic())
            taken, self._waiting, self._size = self._waiting, deque(), 0
        return [(message.name, message.text) for message in taken]

    def _expire(self, now: float) -> None:
        while self._waiting and now - self._waiting[0].since > NOTIFICATION_LIFE_S:
            self._size -= self._waiting.popleft().size


class _Message(NamedTuple):
    name: str
    text: str
    size: int  # bytes of memory
    since: float  # of time.monotonic()


class _Notify(Struct):
    """A Notify request."""

    name: Text | None = None
    notify_msg: str | None = None

    def __post_init__(self) -> None:
        if "\0" in (self.name or ""):
            raise ValueError("the name holds a NUL character")


class _Probe(Struct):
    """A Probe request. `fence` is the id of a data connection, `timeout` the seconds that its fence may take."""

    fence: Annotated[str, Meta(min_length=1, max_length=LONGEST_FENCE)] | None = None
    timeout: Annotated[float, Meta(ge=0)] = MAX_FENCE_TIMEOUT


_read_notify = Reader(_Notify, "Notify request", nul=True)
_read_probe = Reader(_Probe, "Probe request", LONGEST_SMALL_VALUE)


def refuse_connection(_request: str) -> dict[str, Any]:
    """The answer of a node without RDMA to an RDMA handshake."""
    return {"reply_msg": "this node has no RDMA transport; use tcp"}


@dataclass(frozen=True, slots=True)
class Handlers:
    """What the frames of each kind do. Called from connection threads: they must be thread-safe."""

    generation: str = ""  # told to every Probe; see `Directory`
    metadata: Callable[[], str] = lambda: "null\n"  # our descriptor's JSON; null beside a metadata server
    notify: Callable[[str, str], bool] = field(default_factory=lambda: Notifications().put)
    fence: Callable[[str, float], bool] = lambda _connection, _timeout: False
    """(data connection, seconds) -> whether nothing that came over that connection can land any more."""
    connection: Callable[[str], dict[str, Any]] = refuse_connection
    """The JSON text of an RDMA handshake -> the answer."""


def open_rpc_listener(
    name: str, host: str, settings: Settings, *, peer_to_peer: bool = False, bind_all: bool = False
) -> socket.socket:
    """Listen for RPC on `host`: on the first free port, from a random one on, of MC_MIN_RPC_PORT to MC_MAX_RPC_PORT,
    or on the port of the segment `name` with MC_LEGACY_RPC_PORT_BINDING. In P2PHANDSHAKE mode the name's port is
    ignored, as by the original. Raises ConfigError when no port is free.
    """
    if settings.legacy_rpc_port and not peer_to_peer:
        port = split(name, settings.handshake_port)[1]
        return bind_listener(host, [port], bind_all, settings.handshake_backlog, "--local_server_name")
    low, high = settings.rpc_port_min, settings.rpc_port_max
    if low > high:
        raise ConfigError(f"MC_MIN_RPC_PORT={low} is above MC_MAX_RPC_PORT={high}")
    first = low + secrets.randbelow(high + 1 - low)
    ports = itertools.chain(range(first, high + 1), range(low, first))
    hint = "MC_MIN_RPC_PORT and MC_MAX_RPC_PORT"
    return bind_listener(host, ports, bind_all, settings.handshake_backlog, hint)


class ControlServer:
    """Owns `listener` and its threads until `stop`."""

    def __init__(
        self,
        listener: socket.socket,
        handlers: Handlers,
        settings: Settings,
        authentication: Authentication | None = None,
    ) -> None:
        self._listener = listener
        self._authentication = authentication or Authentication()
        self._handlers = handlers
        self._limit = settings.handshake_max_length
        self._warned = -WARNING_INTERVAL
        self._lock = threading.Lock()
        self._clients: dict[socket.socket, threading.Thread] = {}  # oldest first
        self._answering: set[socket.socket] = set()  # those whose handler runs
        self._stopping = threading.Event()
        self._accepting = threading.Thread(target=self._accept, name="mooncake-rpc", daemon=True)
        self.port: int = listener.getsockname()[1]
        self._accepting.start()

    def stop(self, timeout: float = 5.0) -> None:
        """Cut every connection and end all threads, within `timeout` seconds. Idempotent; never raises."""
        deadline = time.monotonic() + timeout
        self._stopping.set()
        _cut(self._listener)
        self._accepting.join(max(0.0, deadline - time.monotonic()))
        self._listener.close()
        with self._lock:
            threads = list(self._clients.values())
            for client in self._clients:
                _cut(client)
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
            if thread.is_alive():
                log.warning("RPC port %d: %s did not end within %g s", self.port, thread.name, timeout)

    def _accept(self) -> None:
        trouble = Trouble(log, f"RPC port {self.port}: accept", 0.5)
        while not self._stopping.is_set():
            try:
                client, _ = self._listener.accept()
                self._admit(own(client))
                trouble.over()
            except Exception as error:  # out of descriptors, or a client that is gone already
                if self._stopping.is_set():
                    return
                self._stopping.wait(trouble.pause_s(error))

    def _admit(self, client: socket.socket) -> None:
        thread = threading.Thread(target=self._serve, args=(client,), name="mooncake-rpc-client", daemon=True)
        with self._lock:
            if len(self._clients) >= MAX_CONNECTIONS and not self._make_room():
                log.debug("RPC port %d: %d requests at work, one refused", self.port, MAX_CONNECTIONS)
                client.close()
                return
            self._clients[client] = thread
        try:
            thread.start()
        except RuntimeError as error:  # the system's limit of threads
            log.warning("RPC port %d: no thread for a connection: %s", self.port, error)
            self._forget(client)

    def _make_room(self) -> bool:
        """Cut the oldest connection that waits for its client. The caller holds the lock."""
        oldest = next((client for client in self._clients if client not in self._answering), None)
        if oldest is None:
            return False
        log.debug("RPC port %d: %d connections, the oldest idle one cut", self.port, MAX_CONNECTIONS)
        _cut(oldest)
        del self._clients[oldest]
        return True

    def _serve(self, client: socket.socket) -> None:
        try:
            request, seal = proofs.receive_request(
                client, self._authentication, self._limit, time.monotonic() + CLIENT_TIMEOUT
            )
            frame = frames.decode(request)
            with self._lock:
                self._answering.add(client)
            reply = seal(frames.encode_body(frame.kind, self._answer(frame), frame.old))
            with self._lock:
                self._answering.discard(client)
            frames.send(client, reply, time.monotonic() + CLIENT_TIMEOUT)
            _finish(client, time.monotonic() + CLIENT_TIMEOUT)
        except proofs.Unproved as error:
            self._warn(str(error))
            with contextlib.suppress(OSError):
                _finish(client, time.monotonic() + CLIENT_TIMEOUT)
        except (OSError, MalformedRecord) as error:
            log.debug("RPC port %d: connection dropped: %s", self.port, error)
        except Exception:
            log.exception("RPC port %d: request failed", self.port)
        finally:
            self._forget(client)

    def _warn(self, text: str) -> None:
        """Of what a stranger may cause again and again, now and then."""
        if time.monotonic() - self._warned > WARNING_INTERVAL:
            self._warned = time.monotonic()
            log.warning("RPC port %d: %s", self.port, text)

    def _forget(self, client: socket.socket) -> None:
        with self._lock:  # closed under the lock: `stop` and `_admit` must not touch a reused descriptor
            self._clients.pop(client, None)
            self._answering.discard(client)
            client.close()

    def _answer(self, frame: Frame) -> str:
        handlers, where = self._handlers, "the request"
        if frame.kind is Kind.METADATA:
            return handlers.metadata()
        if frame.kind is Kind.CONNECTION:
            return dumps(handlers.connection(frame.text))
        if frame.kind is Kind.NOTIFY:
            notice = _read_notify(frame.text, where)
            kept = handlers.notify(notice.name or "", notice.notify_msg or "")
            return dumps({"name": "", "notify_msg": "success" if kept else ""})
        return dumps(self._probe(_read_probe(frame.text, where)))

    def _probe(self, request: _Probe) -> dict[str, Any]:
        reply: dict[str, Any] = {"status": "success", OURS: {"generation": self._handlers.generation}}
        if request.fence is not None:
            timeout = min(request.timeout, MAX_FENCE_TIMEOUT)
            reply["fenced"] = self._handlers.fence(request.fence, timeout)
        return reply


def _cut(connection: socket.socket) -> None:
    """Wake whoever is blocked on the socket; it is still theirs to close."""
    with contextlib.suppress(OSError):  # not connected any more
        connection.shutdown(socket.SHUT_RDWR)


def _finish(client: socket.socket, deadline: float) -> None:
    """Let the client close first, so that no reset overtakes the reply."""
    client.shutdown(socket.SHUT_WR)
    client.settimeout(frames.remaining(deadline))
    while client.recv(frames.CHUNK):
        client.settimeout(frames.remaining(deadline))
