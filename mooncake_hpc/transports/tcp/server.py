"""The target's side: accepts data connections and serves each in a thread that runs one native call."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time
from collections.abc import Sequence

import numpy as np

from mooncake_hpc.kernels import tcp_server as native
from mooncake_hpc.kernels.sockets import LIST
from mooncake_hpc.kernels.tcp_lists import OK
from mooncake_hpc.transports.base import Registration, Tables
from mooncake_hpc.transports.lane import spin_time
from mooncake_hpc.transports.tcp.options import set_options

log = logging.getLogger(__name__)

MAX_CONNECTIONS = 1024
GRACE = 1.0  # seconds a peer may still use memory that is being unregistered before its connection is cut
MAX_FENCED = 65536  # ids of fenced connections that are remembered


class Connection:
    """One data connection, and the block and buffers of its kernel."""

    def __init__(self, client: socket.socket, exports: int, patience: float) -> None:
        self.client = client
        self.thread: threading.Thread | None = None
        self.block = np.zeros(native.CONNECTION_WORDS, np.int64)
        self.address = int(self.block.ctypes.data)
        self._stage = np.empty(native.STAGE_BYTES, np.uint8)
        self._replies = np.empty(2 * LIST, np.int64)
        values = {
            native.FD: client.fileno(),
            native.EXPORTS: exports,
            native.STAGE: int(self._stage.ctypes.data),
            native.REPLIES: int(self._replies.ctypes.data),
            native.SPIN: spin_time(),
            native.PATIENCE: int(patience * 1e9),
            native.GOOD: OK,
            native.REFUSAL: OK | 1,
        }
        for word, value in values.items():
            self.block[word // 8] = value

    @property
    def busy(self) -> int:
        """Version of the exports that the connection refers to, 0 when to none."""
        return int(self.block[native.BUSY // 8])

    @property
    def silent(self) -> bool:
        """Whether no request has come over it, and it has not been stopped."""
        words = native.BUSY, native.BYTES_IN, native.BYTES_OUT, native.STOP
        return not any(self.block[word // 8] for word in words)

    @property
    def identity(self) -> str:
        return f"{int(self.block[native.CONNECTION // 8]):014x}"

    def stop(self) -> None:
        """Have the kernel end at its next look. Never a FIN before the last WRITE has landed: the thread closes."""
        self.block[native.STOP // 8] = 1
        with contextlib.suppress(OSError):
            self.client.shutdown(socket.SHUT_RD)


class TcpServer:
    """Owns the listener, every data connection and their threads until `close`."""

    def __init__(self, listener: socket.socket, patience: float) -> None:
        self._listener = listener
        self._patience = patience
        self.port: int = listener.getsockname()[1]
        self._exports = np.zeros(native.EXPORT_WORDS, np.int64)
        self._exports[native.SPINNING_LIMIT // 8] = max(1, len(os.sched_getaffinity(0)) // 2)
        self._tables = Tables([], [])
        self._retired: list[Tables] = []
        self._install(self._tables)
        self._lock = threading.Lock()
        self._connections: dict[Connection, None] = {}  # oldest first
        self._named: dict[str, Connection] = {}
        self._fenced: dict[str, None] = {}
        self._totals = [0, 0]
        self._closing = False
        self._thread = threading.Thread(target=self._accept, name="mooncake-tcp-accept", daemon=True)
        self._thread.start()

    def export(self, registrations: Sequence[Registration], *, shrinks: bool) -> None:
        """As `Transport.export`."""
        tables = Tables.of((r.address, r.address + r.length, r.readonly) for r in registrations if r.remote_accessible)
        self._retired.append(self._tables)
        self._tables = tables
        self._install(tables)
        if shrinks:
            self._quiesce(int(self._exports[0]))
            self._retired.clear()

    def fence(self, identity: str, timeout: float) -> bool:
        """End the data connection of this id, now or whenever it shows up; whether it has ended."""
        with self._lock:
            self._fenced[identity] = None
            if len(self._fenced) > MAX_FENCED:
                del self._fenced[next(iter(self._fenced))]
            connection = self._named.get(identity)
        if connection is None:
            return True
        connection.stop()
        return self._join(connection, time.monotonic() + timeout)

    @property
    def moved(self) -> tuple[int, int]:
        """Payload bytes (received by WRITEs, sent by READs) since the start."""
        with self._lock:
            words = native.BYTES_IN // 8, native.BYTES_OUT // 8
            received, sent = (
                total + sum(int(c.block[word]) for c in self._connections)
                for total, word in zip(self._totals, words, strict=True)
            )
        return received, sent

    def close(self, timeout: float = 5.0) -> None:
        """Stop accepting, end all connections. Idempotent."""
        deadline = time.monotonic() + timeout
        self._closing = True
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join(timeout)
        self._listener.close()
        with self._lock:
            connections = list(self._connections)
        for connection in connections:
            connection.stop()
        for connection in connections:
            if not self._join(connection, deadline):
                log.warning("data port %d: a connection did not end within %g s", self.port, timeout)

    # --- inside ---------------------------------------------------------------------------------------------

    def _install(self, tables: Tables) -> None:
        word = native.EXPORT_TABLES // 8
        self._exports[word : word + 2] = tables.pair
        self._exports[native.EXPORT_VERSION // 8] += 1  # last: whoever sees it sees the tables (x86, and a futex later)

    def _quiesce(self, version: int) -> None:
        deadline = time.monotonic() + GRACE
        cut = False
        while True:
            with self._lock:
                users = [c for c in self._connections if 0 < c.busy < version]
            if not users:
                return
            if time.monotonic() > deadline and not cut:
                cut = True
                log.warning(
                    "data port %d: cutting %d connections that still use unregistered memory", self.port, len(users)
                )
                for connection in users:
                    connection.stop()
            time.sleep(0.0005)

    def _accept(self) -> None:
        while not self._closing:
            try:
                client, _ = self._listener.accept()
            except OSError as error:
                if self._closing:
                    return
                log.warning("data port %d: accept: %s", self.port, error)
                time.sleep(0.05)
                continue
            try:
                self._admit(client)
            except Exception:  # the next client is to be served all the same
                log.exception("data port %d: a connection could not be set up", self.port)
                client.close()

    def _admit(self, client: socket.socket) -> None:
        set_options(client)
        connection = Connection(client, int(self._exports.ctypes.data), self._patience)
        thread = threading.Thread(target=self._run, args=(connection,), name="mooncake-tcp", daemon=True)
        connection.thread = thread
        with self._lock:
            full = len(self._connections) >= MAX_CONNECTIONS and not self._make_room()
            if not full:
                self._connections[connection] = None
        try:
            if full:
                log.warning("data port %d: %d connections, one more refused", self.port, MAX_CONNECTIONS)
                client.close()
                return
            thread.start()
        except RuntimeError as error:  # the system's limit of threads
            log.warning("data port %d: no thread for a connection: %s", self.port, error)
            self._forget(connection)

    def _make_room(self) -> bool:
        """End the oldest connection that has never asked for anything. The caller holds the lock."""
        silent = next((c for c in self._connections if c.silent), None)
        if silent is None:
            return False
        log.debug("data port %d: %d connections, the oldest silent one is cut", self.port, MAX_CONNECTIONS)
        silent.stop()  # and forgotten by its thread
        return True

    def _run(self, connection: Connection) -> None:
        try:
            code = native.serve(connection.address)
            while code == native.HELLO and self._hello(connection):
                code = native.serve(connection.address)
            if code == native.REFUSED:
                _linger(connection.client)
            elif code in (native.FAILED, native.STALLED):
                log.debug("data port %d: connection %s: code %d", self.port, connection.identity, code)
        except Exception:
            log.exception("data port %d: connection %s", self.port, connection.identity)
        finally:
            self._forget(connection)

    def _hello(self, connection: Connection) -> bool:
        with self._lock:
            if connection.identity in self._fenced:
                return False
            self._named[connection.identity] = connection
            return True

    def _forget(self, connection: Connection) -> None:
        with self._lock:
            self._connections.pop(connection, None)
            if self._named.get(connection.identity) is connection:
                del self._named[connection.identity]
            self._totals[0] += int(connection.block[native.BYTES_IN // 8])
            self._totals[1] += int(connection.block[native.BYTES_OUT // 8])
            connection.client.close()

    def _join(self, connection: Connection, deadline: float) -> bool:
        if connection.thread is not None and connection.thread.ident is not None:
            connection.thread.join(max(0.0, deadline - time.monotonic()))
        return connection not in self._connections


def _linger(client: socket.socket) -> None:
    """After a refusal, take what the client still sends, so that no reset overtakes the refusal."""
    with contextlib.suppress(OSError):
        client.shutdown(socket.SHUT_WR)
        deadline = time.monotonic() + 1.0
        while (left := deadline - time.monotonic()) > 0:
            client.settimeout(left)
            if not client.recv(1 << 18):
                return
