"""The initiator's side: lanes over one TCP connection each, made on first use and remade when they break."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import socket
import threading
import time

import numpy as np
import numpy.typing as npt

from mooncake_hpc.core.address import dial, explain_failure, join
from mooncake_hpc.core.authentication import Expected, Reason, refusal
from mooncake_hpc.core.errors import MooncakeError, PeerLost
from mooncake_hpc.core.interrupt import Interrupt, Interrupted
from mooncake_hpc.core.settings import Settings
from mooncake_hpc.native.sockets import LIST
from mooncake_hpc.transports import queue_kernels as layout
from mooncake_hpc.transports import recut_kernels as recut
from mooncake_hpc.transports.base import WHOLE, Peer, Route, Tables
from mooncake_hpc.transports.queue import Lane, code_of
from mooncake_hpc.transports.tcp import client_kernels as tcp_client
from mooncake_hpc.transports.tcp import pipeline_kernels as tcp_lists
from mooncake_hpc.transports.tcp import proofs
from mooncake_hpc.transports.tcp.options import find_vanished, set_options
from mooncake_hpc.wire.descriptor import SegmentDescriptor

ATTEMPTS = 3  # connections in a row without one more completed slice before the queue fails
BACKOFF = 0.05  # seconds before the second attempt, doubled for each further one
FENCE_TIMEOUT = 5.0  # seconds for the peer to end a broken connection
CUT = 16 << 20  # slice size where several lanes share a request


class Unfenced:
    """Broken connections to one peer over which WRITEs may still land: no lane may send before they are fenced."""

    def __init__(self) -> None:
        self.lanes: list[TcpLane] = []
        self._lock = threading.Lock()
        self._identities: list[str] = []

    def add(self, identity: str) -> None:
        """Stop all lanes: what they send next could be overtaken by older bytes for the same addresses."""
        with self._lock:
            self._identities.append(identity)
        for lane in self.lanes:
            lane.interrupt()

    @property
    def any(self) -> bool:
        return bool(self._identities)

    def settle(self, peer: Peer) -> None:
        """Have the peer end them. Raises PeerLost when it cannot."""
        for identity in list(self._identities):
            if not peer.fence(identity, FENCE_TIMEOUT):
                raise PeerLost(f"{peer.name}: WRITEs over an earlier connection may still land")
            with self._lock, contextlib.suppress(ValueError):  # another lane had it ended, too
                self._identities.remove(identity)


class TcpLane(Lane):
    """One connection at a time. A broken one is fenced before its slices go over the next."""

    lead = tcp_client.lead

    def __init__(self, name: str, peer: Peer, settings: Settings, unfenced: Unfenced) -> None:
        super().__init__(name, peer.name, settings.tcp_progress_timeout)
        self._peer = peer
        self._unfenced = unfenced
        unfenced.lanes.append(self)
        self._settings = settings
        self._socket: socket.socket | None = None
        self._connections = 0
        self._where = self._identity = ""
        self._buffers_known = peer.descriptor.buffers  # by which the queue's slices were cut
        self._recut: list[tuple[int, npt.NDArray[np.int64]]] = []  # entries' numbers, and slices that were cut anew
        self._stuck_at = (-1, -1)
        self._failures = 0
        self._lost_code = layout.LOST  # of what fails with a broken connection
        self._buffers = np.zeros(4 * LIST + 4 * tcp_lists.WINDOW, np.int64)
        base = int(self._buffers.ctypes.data)
        self._set(tcp_lists.SEND_LIST, base)
        self._set(tcp_lists.RECEIVE_LIST, base + 16 * LIST)
        self._set(tcp_lists.HEADERS, base + 32 * LIST)
        self._set(tcp_lists.STATUSES, base + 32 * LIST + 24 * tcp_lists.WINDOW)
        self.version = 2 if settings.tcp_proto == 2 and peer.descriptor.tcp_proto_version >= 2 else 1
        self._set(tcp_lists.VERSION, self.version)
        self._launch()

    def interrupt(self) -> None:
        if self._peer.descriptor.generation:
            with self._lock:
                if self._socket is not None:
                    with contextlib.suppress(OSError):
                        self._socket.shutdown(socket.SHUT_RDWR)
        else:  # a peer that cannot be asked is read from to the end (`_read_to_end`): not over a socket that is shut
            with contextlib.suppress(PeerLost), self.owned():
                layout.go_down(self.address, errno.ECONNABORTED)

    def disconnect(self) -> None:
        with self._lock:
            connection, self._socket = self._socket, None
        if connection is not None:
            connection.close()

    def let_go(self) -> None:
        """Segments that were replaced stay until the engine is closed, without the lists of their lanes."""
        self._buffers = np.zeros(0, np.int64)

    def repair(self) -> None:
        if self._socket is not None:
            self._bury()
        while self._is_needed():
            try:
                self._connect()
                return
            except (OSError, MooncakeError) as error:
                if self._peer.interrupt.is_set:
                    return
                self.last_error = (error.strerror if isinstance(error, OSError) else None) or str(error)
                self._failures += 1
                if self._failures >= ATTEMPTS or isinstance(error, MooncakeError):
                    self._fail(code_of(error))
                    return
            with contextlib.suppress(Interrupted):
                self._peer.interrupt.pause(BACKOFF * 2**self._failures)
        self._failures = 0

    def _drop_cancelled(self) -> None:
        tcp_lists.drop_cancelled(self.address)

    # --- inside ---------------------------------------------------------------------------------------------

    def _is_needed(self) -> bool:
        """Whether anything is queued for a connection."""
        with self.owned():
            self._drop_cancelled()
            return self.pending and self._get(layout.STATE) == layout.DOWN

    def _bury(self) -> None:
        """Make sure of the broken connection's end, and fail what cannot be sent again."""
        with self.owned():
            tcp_lists.retract(self.address)
            self._drop_cancelled()
        cause = self._get(layout.CAUSE)
        self.last_error = f"connection {self._where}: {_explain(cause, self._settings)}"
        if cause == layout.REJECTED:  # the peer stops at the request that it refuses
            self._refuse()
        elif cause == layout.STRANGER:  # told before anything was read
            self.last_error = str(refusal(self._peer.expected.at(self._where), Reason.NO_SECRET_HERE))
            self._fail(cause)
        elif cause in (layout.TIMED_OUT, layout.MALFORMED):
            self._remember()
            self._fail(cause)
        elif not self._fenced():
            self._remember()
            self._fail(self._diagnose())
        else:
            self._count_failure()
        with self.owned():
            tcp_lists.reset(self.address)
        self.disconnect()

    def _refuse(self) -> None:
        """The peer has refused the head slice: it is tried once more where our descriptor of its buffers is old."""
        with self.owned():
            retry = self.pending and not recut.is_retried(self.address)
            if self.pending:
                recut.mark_retried(self.address)
        if retry:
            try:
                self._peer.refresh()
            except MooncakeError as error:
                self.last_error += f"; {error}"
        with self.owned():
            if self.pending and recut.is_retried(self.address) and not (self._adopt() and retry):
                layout.finish_head(self.address, layout.REJECTED)

    def _adopt(self) -> bool:
        """As the owner: cut what is queued by the peer's descriptor; whether that was another one before."""
        buffers = self._peer.descriptor.buffers
        changed = buffers != self._buffers_known
        self._buffers_known = buffers
        tables = _tables(self._peer.descriptor)
        for seq in range(self._get(layout.HEAD), self.queued):
            count = recut.count_pieces(self.address, seq, tables.address)
            if count:
                slices = np.empty(4 * count, np.int64)
                recut.cut_anew(self.address, seq, tables.address, int(slices.ctypes.data), count)
                self._recut = [kept for kept in self._recut if kept[0] >= self._get(layout.HEAD)]
                self._recut.append((seq, slices))
                changed = True
        return changed

    def _count_failure(self) -> None:
        at = self._get(layout.HEAD), self._get(layout.DONE_SLICES)
        self._failures = self._failures + 1 if at == self._stuck_at else 0
        self._stuck_at = at
        if self._failures >= ATTEMPTS:
            self._fail(self._diagnose())

    def _diagnose(self) -> int:
        """The code of a lost connection. Version 1 has no status word by which a peer says that it wants a proof."""
        if self.version == 1 and self._peer.descriptor.generation:
            try:
                self._peer.fence(self._identity, FENCE_TIMEOUT)
            except MooncakeError as error:
                self._lost_code = code_of(error)
                if self._lost_code == layout.STRANGER:
                    self.last_error = str(error)
        return self._lost_code

    def _fail(self, code: int) -> None:
        with self.owned():
            layout.fail_all(self.address, code)
        self._failures = 0
        self._stuck_at = (-1, -1)

    def _fenced(self) -> bool:
        """Whether no WRITE sent over the broken connection can land any more."""
        self._lost_code = layout.LOST
        if not tcp_lists.writes_in_flight(self.address):
            return True
        if self._peer.descriptor.generation:
            try:
                return self._peer.fence(self._identity, FENCE_TIMEOUT)
            except MooncakeError as error:
                self.last_error = f"{self.last_error}; {error}"
                self._lost_code = code_of(error)
                return False
        return self._read_to_end()

    def _remember(self) -> None:
        """The queue fails with WRITEs unfenced: whoever sends to the same addresses next must come after them."""
        if self._peer.descriptor.generation and tcp_lists.writes_in_flight(self.address):
            self._unfenced.add(self._identity)

    def _read_to_end(self) -> bool:
        """A peer that cannot be asked has taken everything once it closes in answer to our FIN."""
        assert self._socket is not None
        deadline = time.monotonic() + FENCE_TIMEOUT
        try:
            with self._peer.interrupt.cuts(self._socket):
                self._socket.shutdown(socket.SHUT_WR)
                while (left := deadline - time.monotonic()) > 0:
                    self._socket.settimeout(left)
                    if not self._socket.recv(1 << 18):
                        return not self._peer.interrupt.is_set
        except OSError:
            pass
        return False

    def _connect(self) -> None:
        """Go up over a new connection. Raises OSError, MooncakeError."""
        if self._connections:
            self._peer.refresh()
        self._connections += 1
        while True:
            self._unfenced.settle(self._peer)
            host, port = self._peer.endpoint()
            self._where = join(host, port)
            connection = _connect(host, port, self._settings, self._peer.expected, self._peer.interrupt)
            number = secrets.randbits(55) + 1
            self._identity = f"{number:014x}"
            with self._lock:
                self._socket = connection
            if not self._unfenced.any:  # from here on whoever adds one shuts the socket down
                break
            self.disconnect()
        with self.owned():
            if self._peer.descriptor.buffers is not self._buffers_known:
                self._adopt()
            self._set(tcp_lists.CONNECTION, number)
            self._set(tcp_lists.FD, connection.fileno())
            tcp_lists.reset(self.address)
            layout.go_up(self.address)


class TcpRoute(Route):
    """All connections to one peer. Versions of the original that acknowledge no WRITE get one lane only."""

    transport = "tcp"

    def __init__(self, peer: Peer, settings: Settings) -> None:
        count = settings.tcp_lanes_per_peer or max(1, min(4, len(os.sched_getaffinity(0)) // 2))
        unfenced = Unfenced()
        lanes = [TcpLane(f"tcp/{peer.name}/0", peer, settings, unfenced)]
        self._scratch = np.zeros(1, np.int64)
        fence_byte = int(self._scratch.ctypes.data) if lanes[0].version == 1 else 0
        try:
            while lanes[0].version == 2 and len(lanes) < count:
                lanes.append(TcpLane(f"tcp/{peer.name}/{len(lanes)}", peer, settings, unfenced))
        except BaseException:
            for lane in lanes:
                lane.close("another connection of the same peer could not be made")
            raise
        super().__init__(list(lanes), _tables(peer.descriptor), WHOLE if len(lanes) == 1 else CUT, fence_byte)

    def update(self, descriptor: SegmentDescriptor) -> None:
        self._set_tables(_tables(descriptor))


def _tables(descriptor: SegmentDescriptor) -> Tables:
    return Tables.of((b.address, b.address + b.length, b.readonly) for b in descriptor.buffers)


def _connect(host: str, port: int, settings: Settings, expected: Expected, interrupt: Interrupt) -> socket.socket:
    """A connection to a data port, whose owner has proved who it is where that is required.

    Raises OSError that says which; AuthenticationError.
    """
    where, proving = join(host, port), expected.authentication.required
    while True:
        deadline = time.monotonic() + settings.handshake_connect_timeout
        try:
            connection = dial(host, port, deadline, interrupt)
        except OSError as error:
            text = f"cannot connect to data port {where}: {explain_failure(error)}"
            raise OSError(error.errno, text) from error
        try:
            with interrupt.cuts(connection):
                if not proving or proofs.settle(connection, expected, where, deadline):
                    set_options(connection)
                    find_vanished(connection, settings.tcp_progress_timeout)
                    return connection
        except TimeoutError as error:
            connection.close()
            raise TimeoutError(errno.ETIMEDOUT, f"data port {where} does not prove who it is in time") from error
        except BaseException:
            connection.close()
            raise
        connection.close()
        proving = False


def _explain(cause: int, settings: Settings) -> str:
    if cause == tcp_lists.EOF:
        return "closed by the peer"
    if cause == layout.TIMED_OUT:
        limit = f"{settings.tcp_progress_timeout:g} s (MC_TCP_PROGRESS_TIMEOUT_SEC)"
        return f"no progress for {limit}: stopped, busy or cut off?"
    if cause == layout.REJECTED:
        return "the peer refused the address"
    if cause == layout.MALFORMED:
        return "the reply is no status word of protocol version 2; try MC_TCP_PROTO=1"
    return f"{errno.errorcode.get(cause, cause)}: {os.strerror(cause) if cause > 0 else 'unknown'}"
