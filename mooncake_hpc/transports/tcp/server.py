"""The target's side: threads that each accept data connections and serve them, one after the other, natively."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import select
import socket
import threading
import time
from collections.abc import Sequence

import numpy as np

from mooncake_hpc.core.authentication import Authentication
from mooncake_hpc.native.compile import preload
from mooncake_hpc.native.sockets import LIST
from mooncake_hpc.transports.base import Registration, Tables
from mooncake_hpc.transports.queue import spin_time
from mooncake_hpc.transports.tcp import accept_kernels as tcp_accept
from mooncake_hpc.transports.tcp import proofs
from mooncake_hpc.transports.tcp import server_kernels as tcp_server
from mooncake_hpc.transports.tcp.options import LOCAL_SEND_BUFFER, find_vanished
from mooncake_hpc.transports.tcp.pipeline_kernels import OK

log = logging.getLogger(__name__)

MAX_CONNECTIONS = 1024
GRACE = 1.0  # seconds a peer may still use memory that is being unregistered before its connection is cut
MAX_FENCED = 65536  # ids of fenced connections that are remembered
FENCED_LIFE_S = 3600.0  # a connection that was not accepted for so long is its client's no more
IDENTITY = re.compile("[0-9a-f]{14}")
LINGER = 1.0  # seconds to take what a refused client still sends
SILENT = 0.5  # seconds without a request after which a connection may be cut to make room for another
PAUSE = 0.05  # seconds until what could not be had is tried again
HUSH = 5.0  # seconds between two warnings


class ServerThread:
    """Accepts a connection, serves it, and accepts the next: the block and buffers of its kernel."""

    def __init__(self, listener: socket.socket, exports: int, patience: float) -> None:
        self.thread: threading.Thread | None = None
        self._block = np.zeros(tcp_server.BLOCK_WORDS, np.int64)
        self.address = int(self._block.ctypes.data)
        self._stage = np.empty(tcp_server.STAGE_BYTES, np.uint8)
        self._replies = np.empty(2 * LIST, np.int64)
        values = {
            tcp_server.FD: -1,
            tcp_server.COUNTED: 1,
            tcp_server.LISTENER: listener.fileno(),
            tcp_server.EXPORTS: exports,
            tcp_server.STAGE: int(self._stage.ctypes.data),
            tcp_server.REPLIES: int(self._replies.ctypes.data),
            tcp_server.SPIN: spin_time(),
            tcp_server.PATIENCE: int(patience * 1e9),
            tcp_server.SEND_BUFFER: LOCAL_SEND_BUFFER,
            tcp_server.GOOD: OK,
            tcp_server.REFUSAL: OK | 1,
        }
        for word, value in values.items():
            self._block[word // 8] = value

    def word(self, offset: int) -> int:
        return int(self._block[offset // 8])

    @property
    def fd(self) -> int:
        """The connection's, -1 where there is none."""
        return self.word(tcp_server.FD)

    @property
    def serial(self) -> int:
        """Which of its connections is the present one."""
        return self.word(tcp_server.SERIAL)

    @property
    def silence(self) -> float:
        """Seconds since its connection began, where no request has come over it; 0 after one, or a `stop`."""
        if self.fd < 0 or self.word(tcp_server.ASKED) or self.word(tcp_server.STOP):
            return 0.0
        return (time.monotonic_ns() - self.word(tcp_server.BEGAN)) / 1e9

    @property
    def identity(self) -> str:
        """What the client calls the connection; zeros where it has not said."""
        return f"{self.word(tcp_server.CONNECTION):014x}"

    @property
    def moved(self) -> tuple[int, int]:
        """Payload bytes received and sent over all of its connections."""
        return self.word(tcp_server.BYTES_IN), self.word(tcp_server.BYTES_OUT)

    def stage(self, received: bytes) -> None:
        """Let the kernel begin with these bytes, the first of the connection."""
        self._stage[: len(received)] = np.frombuffer(received, np.uint8)
        self._block[tcp_server.STAGE_END // 8] = len(received)

    def stop(self, serial: int) -> None:
        """End the connection of this number soon, whatever it is doing, if it has not ended."""
        tcp_accept.stop(self.address, serial)

    def uses_before(self, version: int) -> bool:
        """Whether the connection refers to exports older than `version`."""
        return 0 < self.word(tcp_server.BUSY) < version


class TcpServer:
    """Owns the listener, every data connection and their threads until `close`."""

    def __init__(self, listener: socket.socket, patience: float, authentication: Authentication | None = None) -> None:
        self._authentication = authentication or Authentication()
        self._listener = listener
        self._listener.setblocking(True)  # whatever socket.setdefaulttimeout() says
        self._listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # its connections have these from there
        find_vanished(listener, patience)
        self._patience = patience
        self.port: int = listener.getsockname()[1]
        self._exports = np.zeros(tcp_server.EXPORT_WORDS, np.int64)
        self._address = int(self._exports.ctypes.data)
        self._exports[tcp_server.SPINNING_LIMIT // 8] = max(1, len(os.sched_getaffinity(0)) // 2)
        self._exports[tcp_server.GUARDED // 8] = self._authentication.required
        self._tables = Tables([], [])
        self._retired: list[Tables] = []
        self._install(self._tables)
        self._lock = threading.Condition()  # told of ends of connections with an id
        self._threads: dict[ServerThread, None] = {}
        self._named: dict[str, ServerThread] = {}
        self._fenced: dict[str, float] = {}  # when, by time.monotonic(); oldest first
        self._totals = [0, 0]  # of threads that have ended
        self._backlog = select.poll()  # tells whether a client waits to be accepted
        self._backlog.register(listener, select.POLLIN)
        self._warned = -HUSH
        preload(*tcp_accept.KERNELS)
        self._keeper = threading.Thread(target=self._keep, name="mooncake-tcp-accept", daemon=True)
        self._keeper.start()

    def export(self, registrations: Sequence[Registration], *, shrinks: bool) -> None:
        """As `Transport.export`."""
        exported = [r for r in registrations if r.remote_accessible]
        tables = Tables.of((r.address, r.address + r.length, r.readonly_for_peers) for r in exported)
        self._retired.append(self._tables)
        self._tables = tables
        self._install(tables)
        if shrinks:
            self._quiesce(int(self._exports[0]))
            self._retired.clear()

    def fence(self, identity: str, timeout: float) -> bool:
        """End the data connection of this id, now or whenever it shows up; whether it has ended."""
        if not IDENTITY.fullmatch(identity):
            return True  # no connection has such an id, or ever will
        with self._lock:
            self._remember(identity, time.monotonic())
            if (server := self._named.get(identity)) is None:
                return True
            server.stop(server.serial)  # named: it has not ended
            return self._lock.wait_for(lambda: self._named.get(identity) is not server, timeout)

    def _remember(self, identity: str, now: float) -> None:
        """Keep the id as that of a fenced connection, and none for longer than that may still show up."""
        self._fenced.pop(identity, None)
        self._fenced[identity] = now
        while len(self._fenced) > MAX_FENCED or now - next(iter(self._fenced.values())) > FENCED_LIFE_S:
            del self._fenced[next(iter(self._fenced))]

    @property
    def moved(self) -> tuple[int, int]:
        """Payload bytes (received by WRITEs, sent by READs) since the start."""
        with self._lock:
            received, sent = (
                sum(column) for column in zip(self._totals, *(t.moved for t in self._threads), strict=True)
            )
        return received, sent

    def cut(self) -> int:
        """Break every connection; how many there were."""
        with self._lock:
            connected = [(server, server.serial) for server in self._threads if server.fd >= 0]
        for server, serial in connected:
            server.stop(serial)
        return len(connected)

    def close(self, timeout: float = 5.0) -> None:
        """Stop accepting, end all connections. Idempotent."""
        deadline = time.monotonic() + timeout
        tcp_accept.end(self._address)
        self._keeper.join(timeout)
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self.cut()
        with self._lock:
            threads = list(self._threads)
        for server in threads:
            if server.thread is not None and server.thread.ident is not None:
                server.thread.join(max(0.0, deadline - time.monotonic()))
        if self._threads:
            log.warning("data port %d: %d connections did not end within %g s", self.port, len(self._threads), timeout)
        self._listener.close()

    # --- inside ---------------------------------------------------------------------------------------------

    def _install(self, tables: Tables) -> None:
        word = tcp_server.EXPORT_TABLES // 8
        self._exports[word : word + 2] = tables.pair
        # last: whoever sees it sees the tables (x86, and a futex later)
        self._exports[tcp_server.EXPORT_VERSION // 8] += 1

    def _quiesce(self, version: int) -> None:
        deadline = time.monotonic() + GRACE
        cut = False
        while True:
            with self._lock:
                serials = [(server, server.serial) for server in self._threads]
            users = [(server, serial) for server, serial in serials if server.uses_before(version)]
            if not users:
                return
            if time.monotonic() > deadline and not cut:
                cut = True
                log.warning(
                    "data port %d: cutting %d connections that still use unregistered memory", self.port, len(users)
                )
                for server, serial in users:
                    server.stop(serial)
            time.sleep(0.0005)

    def _keep(self) -> None:
        """See to it that somebody accepts the next connection."""
        while tcp_accept.await_shortage(self._address):
            try:
                added = self._add_thread()
            except Exception as error:  # the system's limit of threads, for one
                self._warn(f"no thread for a connection: {error}")
                added = False
            if not added:
                tcp_accept.take_back(self._address)
                time.sleep(PAUSE)

    def _add_thread(self) -> bool:
        """Whether there was room for one more."""
        with self._lock:
            if len(self._threads) >= MAX_CONNECTIONS:
                self._make_room()
                return False
            server = ServerThread(self._listener, self._address, self._patience)
            self._threads[server] = None
        server.thread = threading.Thread(target=self._run, args=(server,), name="mooncake-tcp", daemon=True)
        try:
            server.thread.start()
        except BaseException:
            self._forget(server)
            raise
        return True

    def _make_room(self) -> None:
        """If a client waits, end the oldest connection that has never asked for anything. The caller holds the lock."""
        if not self._backlog.poll(0):
            return
        serials = [(server, server.serial) for server in self._threads]
        silence, server, serial = max(
            ((server.silence, server, serial) for server, serial in serials), key=lambda found: found[0]
        )
        if silence > SILENT:
            log.debug("data port %d: %d connections, the oldest silent one is cut", self.port, MAX_CONNECTIONS)
            server.stop(serial)
        else:
            self._warn(f"{MAX_CONNECTIONS} connections, further ones have to wait")

    def _warn(self, text: str) -> None:
        """Of what lasts, and is seen again and again, now and then."""
        if time.monotonic() - self._warned > HUSH:
            self._warned = time.monotonic()
            log.warning("data port %d: %s", self.port, text)

    def _run(self, server: ServerThread) -> None:
        code = tcp_server.ENDED
        try:
            while code not in (tcp_accept.UNNEEDED, tcp_accept.CLOSED):
                code = tcp_accept.serve(server.address)
                try:
                    self._attend(server, code)
                except Exception:  # the next client is to be served all the same
                    log.exception("data port %d: connection %s", self.port, server.identity)
                    self._end(server)
        finally:
            self._end(server)
            tcp_accept.wait_no_more(server.address)
            self._forget(server)

    def _attend(self, server: ServerThread, code: int) -> None:
        """Do what the kernel left to us, by what `serve` returned."""
        if code == tcp_server.HELLO:
            if not self._name(server):
                self._end(server)
        elif code == tcp_accept.ACCEPTED:
            if not self._admit(server):
                self._end(server)
        elif code == tcp_accept.UNACCEPTED:
            self._warn(f"accept: {os.strerror(server.word(tcp_server.ERROR))}")
            time.sleep(PAUSE)
        elif code not in (tcp_accept.UNNEEDED, tcp_accept.CLOSED):
            if code == tcp_server.REFUSED:
                _linger(server.fd)
            elif code in (tcp_server.FAILED, tcp_server.STALLED):
                log.debug("data port %d: connection %s: code %d", self.port, server.identity, code)
            self._end(server)

    def _admit(self, server: ServerThread) -> bool:
        """Whether the client has proved what it has to, and may make requests."""
        if server.word(tcp_server.STOP):  # the port is being closed: nobody would end a wait
            return False
        client = socket.socket(fileno=server.fd)
        try:
            server.stage(proofs.admit(client, self._authentication))
            client.setblocking(False)
            return True
        except proofs.Refused as error:
            self._warn(str(error))
            _linger(server.fd)
        except OSError as error:
            log.debug("data port %d: a client proves nothing: %s", self.port, error)
        finally:
            client.detach()
        return False

    def _name(self, server: ServerThread) -> bool:
        """Its client has said its id. Whether it may go on."""
        with self._lock:
            if server.identity in self._fenced:
                return False
            self._named[server.identity] = server
            return True

    def _end(self, server: ServerThread) -> None:
        """Nothing more comes over the thread's connection, if it has one."""
        with self._lock:
            if self._named.get(server.identity) is server:
                del self._named[server.identity]
                self._lock.notify_all()
        tcp_accept.hang_up(server.address)

    def _forget(self, server: ServerThread) -> None:
        with self._lock:
            del self._threads[server]
            self._totals = [total + more for total, more in zip(self._totals, server.moved, strict=True)]


def _linger(fd: int) -> None:
    """After a refusal, take what the client still sends, so that no reset overtakes the refusal."""
    client = socket.socket(fileno=fd)
    try:
        client.shutdown(socket.SHUT_WR)
        deadline = time.monotonic() + LINGER
        while (left := deadline - time.monotonic()) > 0:
            client.settimeout(left)
            if not client.recv(1 << 18):
                return
    except OSError:
        pass
    finally:
        client.detach()
